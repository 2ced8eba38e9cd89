"""A conversation in the terminal: its commands, adapters that are switched, and models without any."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from conftest import save_tiny
from families import EVERY, tokenizer_of
from rich.console import Console

from qlora import chat, cli, generation, trained, trainer
from qlora.errors import CheckpointError
from qlora.generation import Answer, Sampling
from qlora.recipe import recipe_from
from qlora.records import Record, Turn
from qlora.rendering import Renderer

QUIET = Console(quiet=True)
SHORT = Sampling(max_new_tokens=6)
pytestmark = pytest.mark.usefixtures("one_thread", "light")


def train(folder, base, name, word):
    rows = [{"prompt": f"Say {n}.", "completion": f"{word} {n}"} for n in range(1, 31)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_from(
        {
            "model": {"name": str(base)},
            "data": {"train": str(file), "max_length": 64, "held_out_fraction": 0.1},
            "lora": {"r": 4 if word == "one" else 8},
            "train": {
                "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 2e-2,
                "gradient_accumulation_steps": 1, "warmup_steps": 0, "activation_checkpointing": False,
            },
            "run": {"dir": str(folder / "runs"), "name": name},
        }
    )  # fmt: skip
    return trainer.train(recipe, console=QUIET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def base(folder):
    return save_tiny(folder / "base", initializer_range=0.1)


@pytest.fixture(scope="module")
def one(folder, base):
    return train(folder, base, "v1.one", "one")


@pytest.fixture(scope="module")
def two(folder, base):
    return train(folder, base, "v1.two", "two")


def talk(where, *lines, **settings):
    """What the terminal shows."""
    console = Console(record=True, width=200, force_terminal=False)
    chat.converse(where, console, iter(lines), SHORT, **settings)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_base_is_switched_on_and_off_beside_the_tuned_model(one):
    said = talk(one.dir, "Say 3.", "/base", "Say 3.", "/base", "Say 3.")
    spoken = [line.split()[0] for line in said if line.startswith(("base ", "tuned"))]
    assert spoken == ["tuned", "base", "tuned", "tuned"]
    assert "the base answers first" in said and "the base answers no longer" in said


def test_an_adapter_is_switched_and_speaks_as_it_does_alone(one, two):
    lines = ["Say 3.", f"/adapter {two.dir}", "Say 3.", f"/adapter v1.one/{one.dir.name}", "Say 3."]
    said = talk(one.dir, *lines, "/adapter")
    answers = [line for line in said if line.startswith("tuned")]
    (alone_one,) = [line for line in talk(one.dir, "Say 3.") if line.startswith("tuned")]
    (alone_two,) = [line for line in talk(two.dir, "Say 3.") if line.startswith("tuned")]
    assert answers == [alone_one, alone_two, alone_one] and alone_one != alone_two
    assert f"begun anew with v1.two/{two.dir.name}" in said
    assert said[-2:] == [f"* v1.one/{one.dir.name}", f"  v1.two/{two.dir.name}"]


def test_an_adapter_beside_another_leaves_the_bare_base_as_it_is(one, two):
    speaker, alone = chat.load_speaker(one.dir), chat.load_speaker(two.dir)
    speaker.switch(str(two.dir))
    turns = [Turn("user", "Say 9.")]
    ids = torch.tensor([speaker.found.prompt_ids(turns)])
    with torch.inference_mode():
        ours, theirs = speaker.model(input_ids=ids).logits, alone.model(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    asked = [one.answer(turns, SHORT, lambda _: None, as_base=True) for one in (speaker, alone)]
    assert asked[0] == asked[1]


def test_an_adapter_that_cannot_be_had_is_told_and_the_conversation_goes_on(one, tmp_path):
    other = train(tmp_path, save_tiny(tmp_path / "other"), "other", "one")
    said = talk(one.dir, "/adapter nowhere", "/adapter it's", f"/adapter {other.dir}", "Say 3.")
    assert any("it's: no such directory" in line for line in said)
    assert any("nowhere: no such directory" in line for line in said)
    (told,) = [line for line in said if "were not trained on one base" in line]
    assert "model.name is" in told and told.endswith("Name runs of one base.")
    assert said[-1].startswith("tuned")


def test_a_conversation_begins_anew_with_a_system_turn_or_without(one, monkeypatch):
    seen = []
    ask = trained.Trained.prompt_ids

    def spy(self, turns, tools=()):
        seen.append([turn.role for turn in turns])
        return ask(self, turns, tools)

    monkeypatch.setattr(trained.Trained, "prompt_ids", spy)
    talk(one.dir, "a", "b", "/new", "c", "/system Be brief.", "d", "/system", "e", system="Now.")
    assert seen == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
        ["system", "user"],
        ["user"],
    ]


def test_an_unknown_command_is_no_question(one):
    said = talk(one.dir, "/bse", "/help")
    assert "/bse is no command here; /help lists them" in said
    assert any(line.startswith("/adapter RUN") for line in said)
    assert not any(line.startswith("tuned") for line in said)


def test_a_model_without_an_adapter_speaks_too(base, monkeypatch, capsys):
    said = talk(base, "Say 3.", "/base", compare=True)
    assert any(line.startswith("base; /help") for line in said)
    assert [line.split()[0] for line in said if line.startswith(("model", "base "))] == ["model"]
    assert said[-1] == "a model without an adapter has no base to compare with"
    monkeypatch.setattr(sys, "argv", ["qlora", "chat", str(base), "--max-new-tokens", "3"])
    monkeypatch.setattr(sys, "stdin", iter(()))
    monkeypatch.setattr("qlora.cli.chat._questions", lambda: iter(["Say 3."]))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and "model" in capsys.readouterr().out


# --- what is opened


def test_a_run_is_opened_although_its_data_has_moved(one, folder):
    (folder / "v1.one.jsonl").rename(folder / "away.jsonl")
    try:
        assert trained.find(one.dir).name == f"v1.one/{one.dir.name}"
    finally:
        (folder / "away.jsonl").rename(folder / "v1.one.jsonl")


def test_a_checkpoint_or_the_adapter_itself_can_be_named(one):
    newest = trained.find(one.checkpoints / "checkpoint-20")
    assert newest.source.name == "checkpoint-20" and newest.run.dir == one.dir
    assert trained.find(one.adapter).source == one.adapter
    with pytest.raises(CheckpointError, match="a checkpoint; name a run that has finished"):
        trained.find(one.checkpoints / "checkpoint-20", finished=True)


def test_a_damaged_checkpoint_is_not_opened(one, tmp_path):
    copy = shutil.copytree(one.dir, tmp_path / "v1.one" / one.dir.name)
    file = copy / "checkpoints" / "checkpoint-20" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"is damaged\. Name another checkpoint, or the run"):
        trained.find(file.parent)


def test_an_adapter_that_lies_in_no_run_is_refused(one, tmp_path):
    shutil.copytree(one.adapter, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="lies in no run of qlora"):
        trained.find(tmp_path / "adapter")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("system", [False, True])
def test_every_family_is_asked_with_the_tokens_that_it_was_trained_on(name, system, monkeypatch):
    """Through a whole conversation: what the model is given is the beginning of the row that trains."""
    if system and not EVERY[name].system:
        pytest.skip(f"the template of {name} refuses a system turn")
    tok = tokenizer_of(name)
    answers = iter(["It makes 4.", "Then 5, not 6.", " Because."])
    asked = []

    def spoken(model, tok, prompt, sampling, say):
        asked.append(prompt)
        return Answer(next(answers), True)

    monkeypatch.setattr(generation, "stream", spoken)
    renderer = Renderer(tok, chat=True)
    found = trained.Trained(name, None, None, None, None, renderer, "messages", None)
    talk = chat.Conversation(
        chat.Speaker(None, {name: found}, name),
        QUIET,
        SHORT,
        system="Be brief." if system else None,
    )
    talk.start()
    for question in ("What is two plus two?", "And one more?", "Why?"):
        talk.ask(question)
    assert len(asked) == 3 and len(talk.turns) == 6 + system
    for number, prompt in enumerate(asked):
        turns = talk.turns[: 2 * (number + 1) + system]
        row = renderer.encode(Record(tuple(turns))).input_ids
        assert prompt == row[: len(prompt)] and len(prompt) < len(row), number
