"""Every command in the README runs; long ones with fewer steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE, REPOSITORY

from qlora import cli

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
FEWER = ["train.max_steps=2", "eval.generate=0", "run.dir=runs"]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) < 200
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    for path in re.findall(r"`((?:qlora|recipes|scripts|tests)/[\w/.]+)`", README):
        assert (REPOSITORY / path).exists(), path


def test_the_make_targets_exist():
    targets = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    for target in targets:
        done = subprocess.run([make, "-n", target], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with the reader's data file; the model of the example is the embedded base."""
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}."} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def say(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["qlora", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)


def test_every_qlora_command_of_the_readme_runs_in_order(desk, monkeypatch, capsys):
    commands = [shlex.split(line)[1:] for line in SHELL if line.startswith("qlora ")]
    verbs = {
        "doctor", "init", "data", "selftest", "train", "chat", "recipes", "plan", "evaluate", "merge",
        "export", "compare", "combine", "serve", "report",
    }  # fmt: skip
    assert {words[0] for words in commands} == verbs
    assert len(commands) == 21
    served = []

    def answer(serving, meter, sock, keys):
        """In the place of answering until somebody stops it."""
        sock.close()
        served.extend(serving.voices)
        return 0

    monkeypatch.setattr("qlora.server.run", answer)
    for words in commands:
        words = [str(BASE) if word == "Qwen/Qwen3-8B" else word for word in words]
        if "--resume" in words:
            finished = max((desk / "runs" / "mine").iterdir())
            (finished / "result.json").unlink()  # as if it had been stopped
            shutil.rmtree(finished / "adapter")
            words = [*words, *FEWER]
        elif words[0] == "train":
            words = [*words, *FEWER]
        if words[0] == "chat":
            monkeypatch.setattr("builtins.input", _typed("Say 5."))
        say(monkeypatch, *words)
    said = capsys.readouterr().out
    assert "wrote mine.yaml" in said and "wrote mine-8b.yaml" in said
    assert "held-out loss" in said and "base " in said and "tuned" in said
    assert "proof     read back from disk" in said
    assert len(served) == 3 and "base" in served
    assert "training beside serving" in said and "all give its loss and gradients" in said


def _typed(*lines: str):
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def test_the_python_example_runs(desk, monkeypatch, capsys):
    (source,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(source.replace("max_steps=20", "max_steps=2"), "README.md", "exec"), {})
    assert "held_out_loss" in capsys.readouterr().out


def test_the_modules_named_are_those_that_exist():
    for name in ("settings", "trainer", "__init__"):
        assert (REPOSITORY / "qlora" / f"{name}.py").exists()


def test_the_longest_sequences_are_those_that_are_planned():
    from qlora import cards, fitting, siblings
    from qlora.recipe import recipe_from

    rows = re.search(r"<!-- longest -->\n(.*?)<!-- end -->", README, re.S)[1].splitlines()
    names = [name.strip() for name in rows[0].strip("|").split("|")][1:]
    shown = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in r.strip("|").split("|")] for r in rows[2:])
    }
    assert len(shown) == 6
    for name, cells in shown.items():
        values = {
            "model": {"name": name}, "data": {"train": "hub:owner/rows"}, "run": {"name": "table"},
            "train": {"fit": "auto"},
        }  # fmt: skip
        for text, cell in zip(names, cells, strict=True):
            card, shape = cards.named_card(text), siblings.published()[name]
            longest = min(
                fitting.longest(recipe_from(values), shape, card, anew=True),
                siblings.positions(name),
            )
            assert cell == (f"{longest:,}" if longest else "-"), (name, text)


def test_the_table_of_steps_is_the_traced_one():
    traced = json.loads((REPOSITORY / "tests/measurements/step-trace.json").read_text())["ways"]
    ways = {way["way"]: way for way in traced if way["tokens"] == 2048}
    rows = re.search(r"<!-- trace -->\n(.*?)<!-- end -->", README, re.S)[1].splitlines()[2:]
    shown = [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in rows]
    asked = ("TRL bf16, recomputed", "TRL bf16, kept", "level 1", "level 5")
    assert shown == [
        [f"{w['gflops']:.1f}", f"{w['launches']:,}", f"{w['kept']:,}", f"{w['gib']:.2f}"]
        for w in (ways[name] for name in asked)
    ]
