"""The front door: verbs, calm errors, and nothing heavy before a verb needs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml

from qlora import __version__, cli, cookbook, draft, rundir
from qlora.errors import DoesNotFit, Interrupted, QLoRAError
from qlora.recipe import load_recipe
from qlora.settings import Recipe

ROOT = Path(__file__).resolve().parent.parent
NAMES = [entry.name for entry in cookbook.entries()]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Two?", "completion": "Four."}\n' * 9)
    (tmp_path / "mine.yaml").write_text("model: {name: embedded:base}\ndata: {train: rows.jsonl}\n")
    return tmp_path


@pytest.fixture
def qlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line, in this process."""

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qlora", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return Answer(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


Call = Callable[..., Answer]


def test_help_names_every_verb(qlora: Call) -> None:
    answer = qlora("--help")
    assert (answer.code, answer.err) == (0, "")
    for verb in ("train", "init", "chat", "doctor", "recipes", "cache"):
        assert f" {verb} " in answer.out
    assert "QLoRA" in answer.out


@pytest.mark.parametrize("verb", ["train", "init", "chat", "doctor", "recipes", "cache"])
def test_every_verb_explains_itself(verb: str, qlora: Call) -> None:
    answer = qlora(verb, "--help")
    assert answer.code == 0
    assert re.search(rf"Usage: .*qlora {verb} ", answer.out)


def test_the_version_is_that_of_the_package(qlora: Call) -> None:
    assert qlora("--version") == Answer(0, f"qlora {__version__}\n", "")


def test_the_module_is_the_same_front_door() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora", "--help"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Usage: " in done.stdout and "recipes" in done.stdout
    assert done.stderr == ""


def test_the_light_verbs_and_refusals_never_load_torch(folder: Path) -> None:
    (folder / "rows.csv").write_text("prompt,completion\n")
    commands = [
        ["--help"], ["--version"], ["train", "--help"], ["recipes", "list"], ["recipes", "schema"],
        ["recipes", "show", "quickstart"], ["recipes", "show", "quickstart", "--resolved"],
        ["recipes", "copy", "quickstart", "copied.yaml"], ["train", "mine.yaml", "lora.rank=8"],
        ["train", "quickstrat"], ["chat", "."], ["init", "rows.csv", "--model", "owner/name"],
        ["init", "rows.jsonl", "--model", "owner/name", "--card", "T4"],
        ["cache", "list"], ["cache", "verify"], ["cache", "remove", "nothing"],
    ]  # fmt: skip
    code = f"""
import json, sys
from qlora import cli
codes = []
for words in {commands!r}:
    sys.argv = ["qlora", *words]
    try:
        cli.main()
    except SystemExit as end:
        codes.append(end.code or 0)
print()
print(json.dumps([codes, sorted({{"torch", "transformers", "datasets"}} & set(sys.modules))]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * 8 + [2] * 4 + [0] * 3 + [2]
    assert loaded == []


# --- recipes


def test_the_list_has_every_recipe_with_a_sentence(qlora: Call) -> None:
    answer = qlora("recipes", "list")
    assert (answer.code, answer.err) == (0, "")
    lines = [line.split(maxsplit=1) for line in answer.out.splitlines()]
    assert [line[0] for line in lines] == NAMES
    assert len(NAMES) >= 20 and "quickstart" in NAMES
    assert all(len(line[1]) > 20 for line in lines)


def test_a_recipe_is_shown_as_it_is_written(qlora: Call) -> None:
    written = (cookbook.shelf() / "quickstart.yaml").read_text(encoding="utf-8")
    assert qlora("recipes", "show", "quickstart") == Answer(0, written, "")
    own = Path("mine.yaml").read_text()
    assert qlora("recipes", "show", "mine.yaml") == Answer(0, own, "")


@pytest.mark.parametrize("words", [["--resolved"], ["lora.r=3"], ["lora.r=3", "--resolved"]])
def test_a_resolved_recipe_has_every_value_and_loads(
    words: list[str], qlora: Call, folder: Path
) -> None:
    answer = qlora("recipes", "show", "mine.yaml", *words)
    assert (answer.code, answer.err) == (0, "")
    (folder / "resolved.yaml").write_text(answer.out)
    overrides = [word for word in words if "=" in word]
    assert load_recipe("resolved.yaml") == load_recipe("mine.yaml", overrides)
    assert list(yaml.safe_load(answer.out)) == list(Recipe.model_fields)


def test_a_recipe_is_copied_and_nothing_is_overwritten(qlora: Call, folder: Path) -> None:
    answer = qlora("recipes", "copy", "quickstart", "sub/own.yaml")
    assert answer == Answer(0, "wrote sub/own.yaml\nnext: qlora train sub/own.yaml\n", "")
    assert load_recipe("sub/own.yaml").run.name == "own"
    (folder / "sub" / "own.yaml").write_text("changed")
    answer = qlora("recipes", "copy", "quickstart", "sub/own.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("qlora: sub/own.yaml: exists already")
    assert (folder / "sub" / "own.yaml").read_text() == "changed"


def test_the_schema_is_one_that_checks_recipes(qlora: Call) -> None:
    answer = qlora("recipes", "schema")
    schema = json.loads(answer.out)
    jsonschema.validate(yaml.safe_load(Path("mine.yaml").read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {"name": "x"}, "data": {"train": "x"}, "speed": 1}, schema)


# --- mistakes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "quickstrat"], ["quickstrat: no such file", "'quickstart'", "recipes list"]),
        (["train", "none.yaml"], ["none.yaml: no such file"]),
        (["train", "mine.yaml", "lora.rank=8"], ["command line: unknown key 'lora.rank'", "'r'?"]),
        (["train", "mine.yaml", "data.train=row.jsonl"], ["row.jsonl", "Did you mean 'rows.jsonl'"]),
        (["train", "mine.yaml", "lora.r"], ["'lora.r' is not an override", "lora.r=32"]),
        (["train", "mine.yaml", "train.max_steps=four"], ["'train.max_steps' must be a whole"]),
        (["train", "."], [".: a folder"]),
        (["recipes", "show", "quickstrat"], ["Did you mean 'quickstart'?"]),
        (["recipes", "show", "latin.yaml"], ["latin.yaml", "cannot be read"]),
        (["recipes", "copy", "quickstrat", "x.yaml"], ["Did you mean 'quickstart'?"]),
        (["recipes", "copy", "quickstart", "rows.jsonl/x.yaml"], ["cannot be written"]),
        (["chat", "."], ["not a run directory", "no run lies below it"]),
        (["chat", "nowhere"], ["nowhere: no such directory"]),
        (["cache", "remove", "x"], ["'x': nothing of this name", "qlora cache list"]),
        (["init", "none.jsonl", "--model", "owner/name"], ["none.jsonl: cannot be read"]),
        (["init", "rows.pdf", "--model", "owner/name"], ["Known endings", ".jsonl"]),
        (["init", "rows.jsonl", "--model", "owner/name", "--card", "T44"], ["'T44'", "T4"]),
        (["init", "rows.jsonl", "--model", "owner/name", "--out", "mine.yaml"], ["exists already"]),
        (["init", "rows.jsonl", "--model", "./base"], ["base", "not there"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_mistake_ends_in_a_short_message_and_status_2(
    words: list[str], parts: list[str], qlora: Call, folder: Path
) -> None:
    (folder / "latin.yaml").write_bytes(b"model: \xe9\n")
    before = sorted(folder.rglob("*"))
    answer = qlora(*words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("qlora: ")
    assert [part for part in parts if part not in answer.err] == []
    assert "Traceback" not in answer.err and len(answer.err) < 800
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [["tarin"], ["train"], ["train", "mine.yaml", "--epochs", "3"], ["recipes", "copy", "quickstart"],
     ["init", "rows.jsonl"], ["chat", ".", "--top-p", "2"], ["chat", ".", "--max-new-tokens", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_use_of_the_command_line_has_status_2(words: list[str], qlora: Call) -> None:
    answer = qlora(*words)
    assert (answer.code, answer.out) == (2, "")
    assert "Usage: " in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (QLoRAError("mend it"), 2, "qlora: mend it\n"),
        (DoesNotFit("too large\n  by 2 GiB"), 2, "qlora: too large\n  by 2 GiB\n"),
        (Interrupted("stopped at step 3"), 130, "qlora: stopped at step 3\n"),
    ],
)
def test_an_error_prints_its_text_and_sets_its_exit_code(
    error: QLoRAError, code: int, said: str, qlora: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cookbook, "entries", fail)
    assert qlora("recipes", "list") == Answer(code, "", said)


def test_a_stop_from_the_keyboard_has_status_130(
    qlora: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cookbook, "entries", stop)
    answer = qlora("recipes", "list")
    assert answer.code == 130 and "Traceback" not in answer.err


def test_our_own_bug_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr(cookbook, "entries", fail)
    monkeypatch.setattr(sys, "argv", ["qlora", "recipes", "list"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("verb", ["list", "schema"])
def test_a_reader_that_goes_away_is_no_error(verb: str) -> None:
    """``qlora recipes schema | head -1``, and with so little text that it is written at exit."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "qlora", "recipes", verb],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    said = writer.stderr.read()
    writer.stderr.close()
    assert writer.wait() in (0, 1)
    assert said == b""


# --- what the verbs hand on


def test_train_hands_on_the_recipe_with_its_overrides(
    qlora: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora import trainer

    calls: list[Any] = []
    monkeypatch.setattr(trainer, "train", lambda *args, **named: calls.append((args, named)))
    assert qlora("train", "mine.yaml", "lora.r=3", "run.name=x", "--resume", "runs/x").code == 0
    ((args, named),) = calls
    assert args == (load_recipe("mine.yaml", ["lora.r=3", "run.name=x"]),)
    assert 0 < named.pop("began") <= time.monotonic()
    assert named == {"resume": "runs/x", "allow_change": (), "budget": None}


@pytest.mark.parametrize(
    ("typed", "resume", "overrides"),
    [
        (["--resume"], "newest", []),
        (["--resume", "lora.r=3"], "newest", ["lora.r=3"]),
        (["lora.r=3", "--resume"], "newest", ["lora.r=3"]),
        (["--resume", "--budget", "90m"], "newest", []),
        (["--resume", "runs/a=b"], "runs/a=b", []),
        (["--resume=runs/x"], "runs/x", []),
    ],
)
def test_resume_may_stand_alone(
    qlora: Call,
    monkeypatch: pytest.MonkeyPatch,
    typed: list[str],
    resume: str,
    overrides: list[str],
) -> None:
    from qlora import trainer

    calls: list[Any] = []
    monkeypatch.setattr(trainer, "train", lambda *args, **named: calls.append((args, named)))
    allowed = ["--allow-change", "train.seed", "--allow-change", "rows"]
    assert qlora("train", "mine.yaml", *typed, *allowed).code == 0
    ((args, named),) = calls
    assert args == (load_recipe("mine.yaml", overrides),)
    assert named["resume"] == resume and named["allow_change"] == ["train.seed", "rows"]
    assert named["budget"] == ("90m" if "--budget" in typed else None)


def test_chat_hands_on_how_to_sample_and_what_is_typed(
    qlora: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from io import StringIO

    from qlora import chat
    from qlora.generation import Sampling

    run = rundir.create(folder / "runs", "mine")
    (run.dir / "recipe.yaml").write_text("x")
    asked: dict[str, Any] = {}

    def converse(
        where: str, console: object, questions: Any, sampling: Sampling, **named: object
    ) -> None:
        asked.update(where=where, typed=list(questions), sampling=sampling, **named)

    monkeypatch.setattr(chat, "converse", converse)
    monkeypatch.setattr(sys, "stdin", StringIO("one\ntwo\n"))
    words = ["--base", "--temperature", "0.5", "--top-p", "0.9", "--max-new-tokens", "7"]
    answer = qlora("chat", "runs/mine", *words, "--system", "Be kind.")
    assert answer.code == 0
    assert asked == {
        "where": "runs/mine",
        "typed": ["one", "two"],
        "sampling": Sampling(0.5, 0.9, 7),
        "compare": True,
        "system": "Be kind.",
    }


def test_init_without_the_hub_writes_a_recipe_that_is_not_planned(
    qlora: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = qlora("init", "rows.jsonl", "--model", "owner/name", "--card", "T4")
    assert answer == Answer(
        0,
        "rows.jsonl: 9 rows, read as prompt_completion\n"
        "not planned: the model's config.json cannot be read here; `qlora train` will check the fit\n"
        "wrote rows.yaml\nlook: qlora data rows.yaml\nnext: qlora train rows.yaml\n",
        "",
    )
    recipe = load_recipe("rows.yaml")
    assert recipe.model.name == "owner/name"
    assert recipe.data.train == (str(folder / "rows.jsonl"),)
    assert "Not planned for T4" in (folder / "rows.yaml").read_text()


def test_init_on_a_local_base_counts_tokens_and_plans(qlora: Call) -> None:
    words = ["--model", "embedded:base", "--card", "T4", "--out", "a.yaml"]
    answer = qlora("init", "rows.jsonl", *words)
    assert (answer.code, answer.err) == (0, "")
    assert "GiB predicted on T4" in answer.out
    assert "wrote a.yaml" in answer.out
    text = Path("a.yaml").read_text()
    assert "Predicted peak on T4" in text and "estimated" not in text
    assert load_recipe("a.yaml").train.per_device_train_batch_size == 16


def test_init_refuses_to_overwrite_before_it_reads_a_model(
    qlora: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(draft, "read_base", slow)
    answer = qlora("init", "rows.jsonl", "--model", "embedded:base", "--out", "mine.yaml")
    assert answer.code == 2 and "mine.yaml: exists already" in answer.err
