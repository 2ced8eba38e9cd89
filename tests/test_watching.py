"""What watches and tells: callbacks, the screen, the doctor, the hardware."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from qlora import callbacks, data, doctor, hardware, nf4, screen, tokenizer, tracking
from qlora.cards import Card
from qlora.screen import Screen


def test_durations_are_said_as_people_say_them():
    spoken = [screen.duration(s) for s in (0.2, 59.4, 60, 3599, 3600, 86_400)]
    assert spoken == ["0s", "59s", "1m00s", "59m59s", "1h00m", "24h00m"]


def test_numbers_that_json_cannot_hold_become_null():
    assert [callbacks.finite(v) for v in (1.5, float("nan"), float("inf"), "x")] == [
        1.5,
        None,
        None,
        "x",
    ]


def test_without_a_terminal_progress_comes_as_lines_with_time_left(tmp_path, cpu):
    console = Console(record=True, width=120, force_terminal=False)
    progress = callbacks.TrackedProgress(
        tmp_path / "m.jsonl", Screen(console), cpu, tracking.Silent(), time.monotonic()
    )
    state = SimpleNamespace(global_step=5, max_steps=50)
    with progress.shown(50):
        progress.on_step_begin(None, state, None)
        progress.saw([0], 1000, 1024, torch.tensor(1.0))
        progress.judged(2.5, True)
        progress.on_step_end(None, state, None)
        logs = {"loss": 99.0, "grad_norm": float("nan")}
        progress.on_log(None, state, None, logs, torch.nn.Linear(1, 1), None)
    said = console.export_text()
    assert "5/50  loss 2.500" in said and said.rstrip().endswith("left")
    (line,) = [json.loads(text) for text in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert line["tokens"] == 1000 and line["grad_norm"] is None and line["peak_memory_bytes"] > 0
    assert (line["peak_step"], line["peak_tokens"]) == (6, 1024)


def test_a_terminal_gets_a_bar(tmp_path, cpu):
    console = Console(record=True, width=120, force_terminal=True)
    assert list(Screen(console).track([1, 2, 3], "counting")) == [1, 2, 3]


def test_the_first_example_is_shown_with_what_trains(make_recipe):
    recipe = make_recipe()
    tok, note = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, 2048)
    console = Console(record=True, width=200, force_terminal=True, color_system="standard")
    Screen(console).tell_data(prepared, tok, note)
    styled = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert "36 train" in text or "held out" in text
    assert "What is 1 plus 1?" in text and "\x1b[32m" in styled  # green: the answer


def test_the_doctor_tries_the_kernel_and_finds_this_machine_ready(tmp_path):
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    names = ("python", "packages", "card", "nf4", "attention", "kernels", "disk", "hub", "wandb")
    assert set(checks) == set(names)
    assert all(check.status != "fail" for check in checks.values())
    assert "0.008" in checks["nf4"].found and "HF_HUB_OFFLINE" in checks["hub"].found


def test_the_doctor_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(nf4, "error", lambda *_: 0.5)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["torch>=99", "nosuch>=1"])
    (tmp_path / "file").write_text("x")
    checks = {check.name: check for check in doctor.examine(tmp_path)}
    assert checks["nf4"].status == "fail" and "0.5000" in checks["nf4"].found
    assert checks["packages"].status == "fail"
    assert "torch 2" in checks["packages"].found and "nosuch is missing" in checks["packages"].found


@pytest.mark.parametrize(
    ("capability", "says"),
    [((7, 5), "computes in fp16 with fp32 adapters"), ((8, 6), "computes in bf16")],
)
def test_the_doctor_tells_a_t4_from_a_newer_card(capability, says):
    card = Card("some card", "cuda", 2**34, 2**34, capability)
    assert says in doctor._card(card).found


def test_the_hardware_is_described_without_deciding_anything():
    card = hardware.card()
    assert card.total_bytes > 2**30 and 0 < card.free_bytes <= card.total_bytes
    now, peak = hardware.memory_in_use(card)
    assert 0 < now <= peak or card.kind == "cuda"


def test_a_pad_token_is_chosen_from_the_vocabulary_and_never_added(make_recipe, tmp_path, tiny):
    import shutil

    folder = tmp_path / "nopad"
    shutil.copytree(tiny, folder)
    for name, expected in (("<|pad|>", "<|pad|>"), (None, "<|endoftext|>")):
        settings = json.loads((tiny / "tokenizer_config.json").read_text())
        settings.pop("pad_token")
        settings["eos_token"] = "<|im_end|>"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        vocabulary = json.loads((tiny / "tokenizer.json").read_text())
        if name is None:
            text = json.dumps(vocabulary).replace("<|pad|>", "<|unused|>")
            vocabulary = json.loads(text)
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        tok, note = tokenizer.load(make_recipe(model__name=str(folder)))
        assert tok.pad_token == expected and repr(expected) in note
        assert len(tok) == 2048


def test_a_tokenizer_that_cannot_be_read_is_named(make_recipe, tmp_path, tiny):
    import shutil

    from qlora.errors import ModelError

    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="whose tokenizer cannot be loaded"):
        tokenizer.load(make_recipe(model__name=str(folder)))


def test_the_doctor_says_what_fused_layers_lack_on_a_card(monkeypatch):
    card = Card("RTX 3060", "cuda", 2**33, 2**33, (8, 6))
    missing = doctor.importlib.metadata.PackageNotFoundError

    def version(name):
        raise missing(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    lacking = doctor._kernels(card)
    assert (lacking.status, lacking.found) == ("note", "triton is not installed")
    assert "libraries' layers train instead" in lacking.advice
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no C compiler" in doctor._kernels(card).found
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor._kernels(card).status == "ok"
