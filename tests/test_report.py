"""The page of a run says what its files say, be they whole, unfinished, torn or hostile; nothing else."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import browser
import pytest
from conftest import ROWS, save_tiny
from rich.console import Console

import qlora
from qlora import chart, cli, mirror, page, report, rundir, trainer, verdict
from qlora.chart import Chart, Series
from qlora.errors import CheckpointError
from qlora.recipe import recipe_from
from qlora.report import dossier
from qlora.rundir import Run
from qlora.screen import Screen

pytestmark = pytest.mark.usefixtures("one_thread", "light")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EVIL = "</style></svg><script>alert(1)</script><b onclick=x>\x1b[2J\u202e\"'><img src=http://x.example/>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run of six steps with answers, and what it said."""
    root = tmp_path_factory.mktemp("report")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held = root / "held.jsonl"
    questions = [
        {"prompt": f"What is {n} plus 9?", "completion": f"It is {n + 9}."} for n in range(30)
    ]
    held.write_text("".join(json.dumps(row) + "\n" for row in questions))
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(root / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        recipe = recipe_from(
            {
                "model": {"name": str(save_tiny(root / "base"))},
                "data": {"train": str(rows), "held_out": str(held), "max_length": 128},
                "lora": {"r": 4},
                "train": {
                    "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                    "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "eval_steps": 2,
                    "warmup_steps": 0, "activation_checkpointing": False,
                },
                "eval": {"generate": 28, "max_new_tokens": 4, "batch_size": 28},
                "run": {"dir": str(root / "runs"), "name": "tiny"},
            }
        )  # fmt: skip
        run = trainer.train(recipe, console=Console(file=said, width=200))
    return run, said.getvalue()


@pytest.fixture
def copied(trained: tuple[Run, str], tmp_path: Path) -> Run:
    """The same run, to be spoilt."""
    folder = tmp_path / "runs" / "tiny" / trained[0].dir.name
    shutil.copytree(trained[0].dir, folder)
    return Run(folder)


class Reader(HTMLParser):
    """A page's tags and attributes; every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


OURS = {
    "html", "head", "meta", "title", "body", "div", "style", "section", "h2", "h3", "h4", "p", "b", "span",
    "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "figure", "figcaption", "svg",
    "line", "path", "details", "summary", "pre",
}  # fmt: skip


def made(run: Run) -> Reader:
    """The run's page, read; whatever is in it stays text, and it is small enough."""
    written = report.html(dossier.read(run))
    assert len(written.encode()) <= 2**20
    assert not CONTROLS.search(written)
    reader = Reader(written)
    assert set(reader.tags) <= OURS and not [a for a in reader.attributes if a.startswith("on")]
    assert not {"src", "href", "xlink:href", "srcset", "action"} & set(reader.attributes)
    return reader


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- a whole run


def test_every_run_leaves_a_page_and_says_where(trained):
    run, said = trained
    assert (run.dir / "report.html").is_file()
    assert re.search(rf"^report +{re.escape(str(run.dir / 'report.html'))}$", said, re.M)
    assert (run.dir / "report.html").read_text() == report.html(dossier.read(run))


def test_the_page_says_what_the_files_say(trained):
    run, _ = trained
    result, text = run.result, made(run).text
    before, after = result["before"], result["after"]
    for said in (
        f"held-out loss : {before['held_out_loss']:.4f} before, "
        f"{after['held_out_loss']:.4f} after on 30 rows",
        "finished : after 6 steps",
        f"{before['exact_match']:.1%} before, {after['exact_match']:.1%} after on 28 held-out rows",
        "alive: it moves logits",
        "not one of its bytes has changed",
        "none was left out",
        "were predicted for the model and its training",
        f"tokens trained on {result['tokens']:,}",
        "the first 24 of 28",
        "rows read 40",
        "qlora train recipe.yaml",
        f"qlora {qlora.__version__}",
    ):
        assert said in text, said
    assert "missing" not in text


def test_the_page_names_no_folder_of_the_machine_and_fetches_nothing(trained):
    run, _ = trained
    text = (run.dir / "report.html").read_text()
    assert str(run.dir.parent.parent) not in text and "/tmp" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    for foreign in ("http:", "https:", "<script", "<link", "<img", "url(", "@import", "src="):
        assert foreign not in text.replace("default-src", "").replace("style-src", "")
    assert "prefers-color-scheme: dark" in text


def test_settings_are_those_that_differ_from_the_defaults(trained):
    run, _ = trained
    recipe = qlora.load_recipe(run.recipe_file)
    usual = type(recipe)(model=recipe.model, data=type(recipe.data)(train=("x",)))
    expected = {
        f"{section}.{key}"
        for section in type(recipe).model_fields
        for key, value in getattr(recipe, section).model_dump(mode="json").items()
        if value != getattr(usual, section).model_dump(mode="json")[key]
    } | {"model.name", "data.train", "run.name"}
    assert set(dossier.unusual(dossier.read(run).recipe)) == expected


def test_answers_are_kept_with_what_was_asked_and_expected(trained):
    run, _ = trained
    for name in ("before.json", "after.json"):
        answers = json.loads((run.dir / name).read_text())["answers"]
        assert len(answers) == 28
        asked = [(one["question"], one["expected"]) for one in answers if "question" in one]
        assert asked == [(f"What is {n} plus 9?", f"It is {n + 9}.") for n in range(24)]
    kept = json.loads((run.dir / "after.json").read_text())
    right = sum(one["right"] for one in kept["answers"]) / 28
    assert right == run.result["after"]["exact_match"]
    assert kept["loss"] == run.result["after"]["held_out_loss"]
    assert kept["of"] == json.loads((run.dir / "before.json").read_text())["of"]


def test_a_long_question_is_cut_where_it_is_kept():
    from qlora.data import Example
    from qlora.records import Record, Turn

    turns = (Turn("system", "s"), Turn("user", "q" * 5000), Turn("assistant", "a" * 5000))
    found = verdict._asked(Example("x:1", Record(turns)))
    assert (
        found["question"] == "system: s\nuser: " + "q" * (2000 - 16)
        and found["expected"] == "a" * 2000
    )


def test_a_page_that_cannot_be_written_is_told_and_fails_nothing(copied):
    (copied.dir / "report.html").unlink()
    (copied.dir / "report.html").mkdir()
    said = StringIO()
    report.leave(copied, Screen(Console(file=said, width=200)))
    assert "report    not written: " in said.getvalue() and "cannot be written" in said.getvalue()


def test_a_bug_of_the_page_fails_no_run(copied, monkeypatch):
    monkeypatch.setattr(report, "html", lambda told: 1 // 0)
    said = StringIO()
    report.leave(copied, Screen(Console(file=said, width=200)))
    assert "not written: ZeroDivisionError" in said.getvalue()


def test_a_mirror_gets_the_page_and_the_answers_when_the_run_has_ended(copied, tmp_path):
    target = Run(tmp_path / "copy")
    mirror.copy_files(copied, target)
    assert not (target.dir / "report.html").exists() and not (target.dir / "after.json").exists()
    mirror.copy_files(copied, target, result=True)
    for name in ("report.html", "after.json", "result.json"):
        assert (target.dir / name).read_bytes() == (copied.dir / name).read_bytes()


# --- verdicts


def verdicts(run: Run) -> dict[str, tuple[str, str]]:
    found = report.summary(dossier.read(run)).blocks
    return {one.about: (one.mark, one.said) for one in found if isinstance(one, page.Verdict)}


def test_a_run_without_its_result_is_not_finished_and_says_how_to_go_on(copied):
    (copied.dir / "result.json").unlink()
    mark, said = verdicts(copied)["not finished"]
    assert mark == "note" and "step 6" in said and "checkpoint-6" in said
    text = made(copied).text
    assert (
        "qlora train recipe.yaml --resume ." in text and "qlora chat" not in text.split("again")[-1]
    )
    assert "tuned" not in text and "base" in text  # the answers of an end that was not reached


def test_a_result_that_is_torn_is_no_finished_run(copied):
    (copied.dir / "result.json").write_text('{"steps": ')
    found = verdicts(copied)
    assert found["result"][0] == "bad" and "result.json is damaged" in found["missing"][1]


def test_worse_figures_are_marked_as_worse(copied):
    change(copied.dir / "result.json", before={"held_out_loss": 1.0, "exact_match": 0.5},
           after={"held_out_loss": 1.5, "exact_match": 0.25, "stop_rate": 0.1})  # fmt: skip
    found = verdicts(copied)
    assert found["held-out loss"][0] == "bad" and "did not get lower" in found["held-out loss"][1]
    assert found["exact match (whole answer)"] == ("bad", "50.0% before, 25.0% after")
    assert found["answers"] == ("note", "only 10% end by themselves; the others run on until cut")


def test_a_loss_that_rose_again_is_told(copied):
    lines = [{"step": s, "eval_loss": y} for s, y in ((0, 3.0), (2, 0.5), (4, 0.9))]
    (copied.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(copied.dir / "result.json", before={"held_out_loss": 3.0}, after={"held_out_loss": 0.9})
    mark, said = verdicts(copied)["held-out loss"]
    assert mark == "note" and "it was lower at step 2 (0.5000)" in said


def test_what_the_guard_did_is_told(copied):
    change(
        copied.dir / "result.json",
        skipped_steps=2,
        roll_backs=1,
        oom_retries=3,
        learning_rate_factor=0.5,
    )
    mark, said = verdicts(copied)["steps"]
    assert mark == "note" and said == (
        "2 left out by the guard, 1 times back to a checkpoint, 3 begun anew when memory ran out, the "
        "learning rate ended at 0.5 times the recipe's"
    )


@pytest.mark.parametrize(
    ("peak", "mark", "said"), [(9, "good", "10% less"), (12, "note", "20% more")]
)
def test_on_a_card_the_peak_is_held_against_the_plan(copied, peak, mark, said):
    card = {"name": "T4", "kind": "cuda", "total_bytes": 16 * 2**30, "free_bytes": 15 * 2**30}
    change(copied.dir / "environment.json", card=card)
    change(copied.dir / "plan.json", total_bytes=10 * 2**30)
    change(copied.dir / "result.json", peak_memory_bytes=peak * 2**30)
    found = verdicts(copied)["memory"]
    assert found == (mark, f"10.00 GiB predicted, {peak}.00 GiB at most: {said} than predicted; "
                           "15.00 GiB were free")  # fmt: skip


def test_a_dead_adapter_and_a_changed_base_are_marked_bad(copied):
    alive = {"tuned_against_base": 0.0, "disk_against_memory": 0.0, "largest_b": 0.0}
    change(copied.dir / "result.json", alive=alive, base_unchanged=False)
    found = verdicts(copied)
    assert found["adapter"][0] == found["base"][0] == "bad"


def test_a_merged_model_beside_the_run_is_told(copied):
    (copied.dir / "merged").mkdir()
    verdict_of = {"kl": 0.0001, "top1": 0.99, "positions": 1234}
    rundir.write_json(
        copied.dir / "merged" / "merge.json",
        {"onto": "nf4", "verdict": verdict_of, "learned": {"kl": 0.5}},
    )
    mark, said = verdicts(copied)["merged model"]
    assert mark == "good" and "the NF4 base" in said and "0.0001 nats" in said and "99.0%" in said
    assert "1,234 positions" in said and "moved the base by 0.5" in said


# --- torn, foreign and hostile files

NAMES = ("recipe.yaml", "plan.json", "environment.json", "data.json", "before.json", "after.json",
         "metrics.jsonl", "result.json")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gone", "torn", "noise", "link", "folder"])
def test_what_is_missing_or_torn_is_named_and_the_rest_is_told(copied, name, kind, tmp_path):
    path = copied.dir / name
    content = path.read_bytes()
    path.unlink()
    if kind == "torn":
        path.write_bytes(content[: len(content) // 2 - 3])
    elif kind == "noise":
        path.write_bytes(bytes(random.Random(0).randrange(256) for _ in range(500)) + b"\n")
    elif kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.mkdir()
    reader = made(copied)
    if (name, kind) == ("result.json", "gone"):
        assert "not finished" in reader.text
    elif (name, kind) == ("metrics.jsonl", "torn"):
        assert reader.tags["figure"]  # its last line is one that is being written
    elif (name, kind) == ("recipe.yaml", "torn"):
        assert reader.tags["section"]  # half of it is a recipe, too
    else:
        assert f"{name} is " in reader.text
    assert "qlora train recipe.yaml" in reader.text


def test_a_file_of_gigabytes_is_not_read(copied):
    with (copied.dir / "before.json").open("r+b") as file:
        file.truncate(2**31)
    assert "before.json is 2,048 MiB, too large to be of a run" in made(copied).text


def test_hostile_text_stays_text_wherever_it_stands(copied):
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{key}": poisoned(inner) for key, inner in value.items()} | {EVIL: EVIL}
        if isinstance(value, list):
            return [*map(poisoned, value), EVIL]
        return EVIL if isinstance(value, str) else value

    for name in ("plan.json", "environment.json", "data.json", "result.json"):
        path = copied.dir / name
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    for name in ("before.json", "after.json"):
        kept = json.loads((copied.dir / name).read_text())
        for answer in kept["answers"]:
            answer |= dict.fromkeys(("question", "expected", "text"), EVIL)
        (copied.dir / name).write_text(json.dumps(kept))
    with (copied.dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "skipped": EVIL, "memory": {EVIL: 5}}) + "\n")
    recipe = (copied.dir / "recipe.yaml").read_text()
    name = json.dumps(EVIL.replace("\x1b", "").replace("\u202e", ""))
    (copied.dir / "recipe.yaml").write_text(
        re.sub("(?m)^  name: tiny$", lambda _: f"  name: {name}", recipe)
    )
    reader = made(copied)
    assert reader.tags["script"] == 0 and reader.text.count("<script>alert(1)</script>") > 50


def test_any_change_of_any_value_still_gives_a_page(copied):
    chance = random.Random(0)
    strange = [
        None, True, -1, 0, 10**400, 1e308, -1e308, 5e-324, "x", "", [], {}, [[[]]], {"a": {"b": []}},
        "9" * 5000, ["a", 1, None], float("nan"), float("inf"), "\ud800",
    ]  # fmt: skip

    def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        keys = (
            value
            if isinstance(value, dict)
            else range(len(value))
            if isinstance(value, list)
            else ()
        )
        for key in list(keys):
            found.append((value, key))
            places(value[key], found)
        return found

    originals = {name: (copied.dir / name).read_text() for name in NAMES if name != "recipe.yaml"}
    for _ in range(40):
        name = chance.choice(list(originals))
        lines = originals[name].split("\n") if name == "metrics.jsonl" else [originals[name]]
        at = chance.randrange(len(lines) - 1) if len(lines) > 1 else 0
        value = json.loads(lines[at])
        for holder, key in chance.sample(places(value, []), 2):
            holder[key] = chance.choice(strange)
        lines[at] = json.dumps(value)
        (copied.dir / name).write_text("\n".join(lines))
        made(copied)
        (copied.dir / name).write_text(originals[name])


def test_secrets_in_rows_and_settings_are_not_on_the_page(copied):
    token = "hf_" + "a" * 34
    kept = json.loads((copied.dir / "after.json").read_text())
    kept["answers"][0] |= {"text": f"my {token}", "expected": "x " * 893 + token}
    (copied.dir / "after.json").write_text(json.dumps(kept))
    change(copied.dir / "environment.json", platform=f"at {token}")
    written = report.html(dossier.read(copied))
    assert "my ***" in written and "at ***" in written and "hf_a" not in written


def test_nothing_is_written_through_a_link(copied, tmp_path):
    precious = tmp_path / "precious"
    for name in ("report.html", ".report.html.part"):
        (copied.dir / name).unlink(missing_ok=True)
        precious.write_text("mine")
        (copied.dir / name).symlink_to(precious)
        report.write(dossier.read(copied))
        assert precious.read_text() == "mine" and not (copied.dir / "report.html").is_symlink()


def test_however_much_a_run_holds_its_page_stays_small_and_says_so(copied):
    with (copied.dir / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            loss = 9.75 if step == 17_321 else 1 + 1 / step
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-4,
                                   "memory_bytes": step, "peak_memory_bytes": step}) + "\n")  # fmt: skip
    written = report.html(dossier.read(copied))
    assert "of 30,000 points" in written and "step 17,321: 9.75" in written
    assert len(written.encode()) < 2**20 and "Shortened" not in written
    for name in ("before.json", "after.json"):
        kept = json.loads((copied.dir / name).read_text())
        for answer in kept["answers"]:
            answer |= dict.fromkeys(("question", "expected", "text"), '"\u202e' * 50000)
        kept["answers"] = [kept["answers"][0]] * 28
        (copied.dir / name).write_text(json.dumps(kept))
    change(copied.dir / "data.json", notes=['"' * 10**4] * 100)
    assert "Shortened, so that the page stays below 1 MB" in made(copied).text


def test_a_run_whose_recipe_is_lost_is_found_by_its_other_files(copied, tmp_path):
    (copied.dir / "recipe.yaml").unlink()
    assert dossier.find(copied.dir) == Run(copied.dir)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="not a run directory"):
        dossier.find(tmp_path / "other")


# --- charts


def test_a_curve_is_drawn_where_its_values_are():
    values = [(0.0, 2.0), (5.0, 4.0), (10.0, 1.0)]
    drawn = chart.svg(Chart("c", [Series("s", values)]))
    points = re.search(r'class="curve c0" d="([^"]+)"', drawn)[1]
    found = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", points)]
    assert [x for x, _ in found] == [0.0, 500.0, 1000.0]
    heights = [1000 - y for _, y in found]
    # Linear: equal differences of values are equal differences of heights.
    assert (heights[1] - heights[0]) / (heights[0] - heights[2]) == pytest.approx(2.0, rel=1e-2)
    assert "s, step 5: 4" in drawn


def test_values_far_apart_are_drawn_on_a_logarithmic_axis_that_says_so():
    values = [(0.0, 100.0), (1.0, 10.0), (2.0, 1.0)]
    drawn = chart.svg(Chart("c", [Series("s", values)], steep=True))
    found = re.findall(
        r"[ML]([\d.]+) ([\d.]+)", re.search(r'class="curve c0" d="([^"]+)"', drawn)[1]
    )
    assert "logarithmic" in drawn and [float(y) for _, y in found] == [0.0, 500.0, 1000.0]
    assert "logarithmic" not in chart.svg(Chart("c", [Series("s", values)]))


def test_a_curve_is_broken_where_a_value_is_missing():
    drawn = chart.svg(Chart("c", [Series("s", [(0.0, 1.0), (1.0, None), (2.0, 1.5), (3.0, 2.0)])]))
    assert len(re.findall("M", re.search(r'class="curve c0" d="([^"]+)"', drawn)[1])) == 2


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0, 0.0], [-1.0, 1.0], [1e-30, 1e29], [1e29, -1e29], [5e-324, 1.0], [3.0] * 500],
)
def test_any_finite_values_can_be_drawn(values):
    for unit in ("plain", "bytes"):
        given = Chart("c", [Series("s", list(enumerate(values)))], unit=unit, steep=True,
                      levels=[("plan", 2.0)], marks=[(1.0, "skipped")])  # fmt: skip
        drawn = chart.svg(given)
        assert "nan" not in drawn and "inf" not in drawn
        assert len(drawn) < 2**17 and chart.told(given)
        if values:
            numbers = [
                float(n)
                for d in re.findall(r' d="([^"]+)"', drawn)
                for n in re.findall(r"-?[\d.]+", d)
            ]
            assert numbers and all(-1 <= n <= 1001 for n in numbers)


def test_a_chart_as_text_says_where_it_begins_ends_and_is_lowest():
    points = [(float(n), y) for n, y in enumerate([5.0, 1.0, 2.0, 3.0])]
    (line,) = chart.told(Chart("c", [Series("loss", points)]))
    assert line == "loss  █▁▃▅  5 to 3, lowest 1 at step 1"


# --- the command


@pytest.fixture
def told(monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["qlora", "report", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_the_command_prints_the_verdicts_and_writes_the_page(copied, told, tmp_path):
    (copied.dir / "report.html").unlink()
    code, out, err = told(str(copied.dir.parent))
    assert (code, err) == (0, "") and (copied.dir / "report.html").is_file()
    assert "✓ finished: after 6 steps" in out and f"wrote {copied.dir / 'report.html'}" in out
    code, out, _ = told(str(copied.dir), "--out", str(tmp_path / "mine.html"))
    assert code == 0 and (tmp_path / "mine.html").read_text().startswith("<!doctype html>")


def test_what_the_command_cannot_do_ends_with_a_message(copied, told, tmp_path):
    for words, said in (
        (("none",), "none: no such directory. A run is what `qlora train` prints at its end."),
        (
            (str(copied.dir), "--out", str(tmp_path / "x.txt")),
            "a page is written to a file whose name ends in",
        ),
        ((str(copied.dir), "--out", str(tmp_path / "none" / "x.html")), "there is no folder"),
    ):
        code, out, err = told(*words)
        assert code == 2 and said in err and out == ""
    (copied.dir / "report.html").unlink()
    (copied.dir / "report.html").mkdir()
    code, _, err = told(str(copied.dir))
    assert (
        code == 2
        and "report.html: cannot be written: Is a directory. Name another file with --out." in err
    )


# --- in a browser


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_page_without_a_complaint_or_a_request(trained):
    run, _ = trained
    file = run.dir / "report.html"
    backs = []
    with browser.browser() as seen:
        for width, dark in ((1200, False), (400, True)):
            seen.open(file, width=width, dark=dark)
            assert seen.complaints() == []
            assert seen.requests() == [file.resolve().as_uri()]
            boxes = seen.ask(
                "[...document.querySelectorAll('path.curve')].map(p => p.getBoundingClientRect())"
                ".map(b => [b.width, b.height])"
            )
            assert boxes[0][0] > 200 and boxes[0][1] > 100  # the training loss, as it is shown
            assert seen.ask("document.documentElement.scrollWidth <= window.innerWidth")
            backs.append(
                seen.ask("getComputedStyle(document.querySelector('.qlora-page')).backgroundColor")
            )
    assert backs == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_browser_of_these_tests_notices_what_it_should(tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('x')</script><img src='none.png'>")
    with browser.browser() as seen:
        seen.open(tmp_path / "bad.html")
        assert seen.complaints() and len(seen.requests()) == 2
