"""Runs side by side: their figures, the settings that differ, and whether they can be compared at all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser
import pytest

from qlora import cli
from qlora.errors import CheckpointError
from qlora.report import comparing

Maker = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """A run directory as a run leaves it, with changes; ``of`` are the digests of rows and base."""

    def call(
        name: str, *, end: float | None = 0.5, of: tuple[str, str] = ("rows", "base"),
        settings: str = "lora: {r: 8}", card: str = "T4", torch: str = "2.13", **result: Any,
    ) -> Path:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(
            f"model: {{name: base}}\n{settings}\nrun: {{name: {name[0]}}}\n"
        )
        losses = [(1, 4.0), (10, 2.0), (20, 1.0)]
        lines: list[dict[str, Any]] = [{"step": step, "loss": loss, "tokens_per_second": 900.0}
                                       for step, loss in losses]  # fmt: skip
        lines += [{"step": 0, "eval_loss": 3.0}, {"step": 20, "eval_loss": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = {"generate": 4, "exact_match": [], "max_new_tokens": 64}
        answers = [{"text": "x", "stopped": True, "right": n == 0} for n in range(4)]
        before = {
            "of": dict(zip(("held_out", "base"), of, strict=True)),
            "eval": asked,
            "loss": 3.0,
        }
        files: dict[str, Any] = {
            "before": before | {"answers": answers},
            "after": before | {"answers": answers},
            "plan": {"total_bytes": 3 * 2**30}, "data": {},
            "environment": {"card": {"name": card, "kind": "cuda"}, "packages": {"torch": torch}},
        }  # fmt: skip
        if end is not None:
            files["result"] = {
                "steps": 20, "before": {"held_out_loss": 3.0, "exact_match": 0.25},
                "after": {"held_out_loss": end, "exact_match": 0.75, "stop_rate": 1.0},
                "tokens": 8000, "train_seconds": 10.0, "total_seconds": 90.0,
                "peak_memory_bytes": 2**31, "trainable_parameters": 1000,
            } | result  # fmt: skip
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return call


def cells(seen: comparing.Comparison, title: str) -> dict[str, tuple[str, ...]]:
    (section,) = [one for one in seen.sections() if one.title == title]
    rows = [block.rows for block in section.blocks if hasattr(block, "rows")]
    return {name: tuple(values) for name, *values in rows[0]} if rows else {}


def notes(seen: comparing.Comparison) -> dict[str, tuple[str, str]]:
    return {note.about: (note.mark, note.said) for note in seen.notes}


def test_figures_stand_side_by_side(make):
    seen = comparing.compare([make("a/1"), make("a/2", end=0.25, steps=40, tokens=30_000)])
    assert seen.names == ["1", "2"]
    told = cells(seen, "what came of them")
    assert {name: told[name] for name in told} == {
        "state": ("finished", "finished"),
        "steps": ("20", "40"),
        "training loss, last": ("1.0000", "1.0000"),
        "held-out loss before": ("3.0000", "3.0000"),
        "held-out loss, last": ("0.5000", "0.2500"),
        "exact match before": ("25.0%", "25.0%"),
        "exact match after": ("75.0%", "75.0%"),
        "answers that stop": ("100.0%", "100.0%"),
        "tokens": ("8,000", "30,000"),
        "tokens a second": ("800", "3,000"),
        "planned memory": ("3.00 GiB", "3.00 GiB"),
        "peak memory": ("2.00 GiB", "2.00 GiB"),
        "trained parameters": ("1,000", "1,000"),
        "time of training": ("10s", "10s"),
        "time in all": ("1m30s", "1m30s"),
    }
    assert notes(seen) == {
        "comparable": ("good", "the same held-out rows and base, asked in one way")
    }


def test_only_settings_that_differ_are_shown_and_those_of_the_place_never(make):
    one = make("a/1", settings="lora: {r: 8, lora_alpha: 16}\ntrain: {max_steps: null}")
    two = make(
        "b/2",
        settings="lora: {r: 32, lora_alpha: 16}\ntrain: {max_steps: 5}\ndata: {packing: true}",
    )
    seen = comparing.compare([one, two])
    assert seen.names == ["a/1", "b/2"]
    assert seen.settings() == {
        "lora.r": [8, 32],
        "train.max_steps": [None, 5],
        "data.packing": [None, True],
    }
    assert cells(seen, "settings that differ")["train.max_steps"] == ("null", "5")
    assert cells(comparing.compare([one, make("c/3", settings="lora: {r: 8, lora_alpha: 16}\n"
                 "train: {max_steps: null}")]), "settings that differ") == {}  # fmt: skip


def test_files_of_one_name_in_two_folders_are_told_apart_without_naming_the_folders(make):
    runs = [make(f"a/{n}", settings=f"data: {{train: [/home/me/{n}/rows.jsonl]}}") for n in (1, 2)]
    told = cells(comparing.compare(runs), "settings that differ")
    assert told["data.train"] == ('["…/rows.jsonl"] (folder 1)', '["…/rows.jsonl"] (folder 2)')


@pytest.mark.parametrize(
    ("of", "about", "said"),
    [
        (
            ("other", "base"),
            "held-out rows",
            "not the same in all runs: their held-out losses and scores",
        ),
        (("rows", "other"), "base", "not the same in all runs: the losses before training"),
        (("", "base"), "held-out rows", "whether they are the same is not known of 2"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(make, of, about, said):
    found = notes(comparing.compare([make("a/1"), make("a/2", of=of)]))
    assert found[about][0] == ("note" if not of[0] else "bad") and found[about][1].startswith(said)
    assert "comparable" not in found


def test_another_way_of_asking_and_another_card_are_noted(make):
    runs = [make("a/1"), make("a/2", card="L4", torch="2.14")]
    kept = json.loads((runs[1] / "before.json").read_text())
    kept["eval"]["max_new_tokens"] = 8
    (runs[1] / "before.json").write_text(json.dumps(kept))
    found = notes(comparing.compare(runs))
    assert "(eval.max_new_tokens): not one measure" in found["exact match"][1]
    assert "other machines" in found["card"][1] and found["versions"][1] == "not the same: torch"


def test_an_unfinished_run_is_named_and_shown_with_what_it_has(make):
    seen = comparing.compare([make("a/1"), make("a/2", end=None)])
    assert notes(seen)["not finished"] == ("note", "2 has no figures of an end yet")
    told = cells(seen, "what came of them")
    assert (
        told["state"][1] == "not finished (step 20)" and told["held-out loss, last"][1] == "0.5000"
    )
    assert told["exact match after"][1] == "-" and told["tokens a second"][1] == "900"
    assert told["exact match before"][1] == "25.0%"


def test_a_run_with_a_lost_file_says_what_is_lost(make):
    broken = make("a/2")
    (broken / "metrics.jsonl").unlink()
    found = notes(comparing.compare([make("a/1"), broken]))
    assert found["2"] == ("note", "metrics.jsonl is missing: there are no curves")


def test_fewer_than_two_runs_are_refused_with_what_there_is(make, tmp_path):
    name = "20260101-120000"
    make(f"a/{name}")
    make("a/20260101-130000")
    for where in (tmp_path / "a", tmp_path / "a" / name):
        with pytest.raises(CheckpointError) as caught:
            comparing.compare([where])
        assert str(caught.value).startswith("compare puts two or more runs side by side. In ")
        assert "20260101-130000, " in str(caught.value) and name in str(caught.value)
    with pytest.raises(CheckpointError, match="Name another run beside it"):
        comparing.compare([tmp_path / "none"])


def test_the_same_run_twice_is_refused(make, tmp_path):
    run = make("a/20260101-120000")
    with pytest.raises(CheckpointError, match="are one run"):
        comparing.compare([run, tmp_path / "a"])


def test_two_runs_of_one_name_have_names_of_their_own(make):
    assert comparing.compare([make("x/a/1"), make("y/a/1")]).names == ["1", "1 (2)"]


@pytest.fixture
def told(monkeypatch, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["qlora", "compare", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_the_command_prints_writes_and_says_json(make, told, tmp_path):
    runs = make("a/1"), make("a/2", settings="lora: {r: 32}")
    code, out, err = told(*runs)
    assert (code, err) == (0, "") and re.search(r"^ +lora\.r +8 +32$", out, re.M)
    code, out, err = told(*runs, "--json", "--html", tmp_path / "c.html")
    value = json.loads(out)
    assert code == 0 and err == f"wrote {tmp_path / 'c.html'}\n"
    assert [one["figures"]["held-out loss, last"] for one in value["runs"]] == [0.5, 0.5]
    assert value["settings"] == {"lora.r": [8, 32]} and value["runs"][0]["dir"] == str(runs[0])
    code, out, err = told(runs[0])
    assert code == 2 and out == "" and err.startswith("qlora: compare puts two or more runs")
    code, _, err = told(*runs, "--html", tmp_path / "c.txt")
    assert code == 2 and "a page is written to a file whose name ends in .html" in err


def test_the_page_of_many_runs_is_small_and_hostile_names_stay_text(make):
    runs = [
        make(f"<b onclick=x>/{n:02}", settings="lora: {r: '<script>x</script>'}") for n in range(40)
    ]
    for run in runs:
        with (run / "metrics.jsonl").open("w") as file:
            file.writelines(
                json.dumps({"step": s, "loss": 1 + s % 7}) + "\n" for s in range(1, 1500)
            )
    (runs[0] / "recipe.yaml").write_text("lora: {r: '<i>'}")
    text = comparing.compare(runs).html()
    assert len(text.encode()) < 2**20 and "<script" not in text and "<b onclick" not in text
    assert "&lt;script&gt;x" in text and text.count('class="curve') == 80


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_curves_over_each_other(make, tmp_path):
    comparing.compare([make("a/1"), make("a/2", end=0.2)]).write(tmp_path / "c.html")
    with browser.browser() as seen:
        seen.open(tmp_path / "c.html")
        assert seen.complaints() == [] and len(seen.requests()) == 1
        drawn = seen.ask(
            "[...document.querySelector('figure .plot').querySelectorAll('path.curve')]"
            ".map(p => [getComputedStyle(p).stroke, p.getBoundingClientRect().height])"
        )
        assert len({colour for colour, _ in drawn}) == 2 and all(
            height > 100 for _, height in drawn
        )
