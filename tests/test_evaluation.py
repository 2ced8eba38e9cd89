"""Base and tuned on the same rows: the figures, the interval, what was seen before, and what is refused."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROWS, save_tiny
from rich.console import Console
from typer.testing import CliRunner

from qlora import answering, cli, evaluation, rundir, scoring, trained, trainer
from qlora.errors import CheckpointError, DataError, DoesNotFit, QLoRAError, RecipeError
from qlora.evaluation import heldout, scorecard
from qlora.evaluation.interval import Interval
from qlora.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("one_thread", "light")
NEW = [
    {"prompt": f"What is {n} minus 1?", "completion": f"{n} less one is {n - 1}."}
    for n in range(20, 32)
]


def listening(width: int) -> Console:
    return Console(record=True, width=width, file=io.StringIO())


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny run that answers in JSON, its files, and a model's folder that no run made."""
    folder = tmp_path_factory.mktemp("evaluation")
    patch = pytest.MonkeyPatch()
    patch.setenv("QLORA_CACHE", str(folder / "cache"))
    rows = [
        {"prompt": row["prompt"], "completion": json.dumps({"sum": row["completion"], "ok": True})}
        for row in ROWS
    ]
    base = save_tiny(folder / "base", max_position_embeddings=1024)
    recipe = recipe_from(
        {
            "model": {"name": str(base)},
            "data": {"train": str(write(folder / "rows.jsonl", rows)), "max_length": 128,
                     "held_out_fraction": 0.3},
            "lora": {"r": 4},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "warmup_steps": 0, "save_steps": 3,
                "activation_checkpointing": False,
            },
            "run": {"dir": str(folder / "runs"), "name": "tiny"},
            "eval": {"max_new_tokens": 8, "generate": 4},
        }
    )  # fmt: skip
    run = trainer.train(recipe, console=Console(quiet=True))
    yield {"folder": folder, "run": run, "base": base, "rows": rows, "recipe": recipe}
    patch.undo()


@pytest.fixture
def run(bench, tmp_path, monkeypatch):
    """A copy of the run, to write into."""
    monkeypatch.setenv("QLORA_CACHE", str(bench["folder"] / "cache"))
    where = tmp_path / "runs" / "tiny" / bench["run"].dir.name
    shutil.copytree(bench["run"].dir, where)
    return rundir.Run(where)


@pytest.fixture(scope="module")
def evaluated(bench):
    """The whole evaluation of a copy, once."""
    where = bench["folder"] / "evaluated" / "tiny" / bench["run"].dir.name
    shutil.copytree(bench["run"].dir, where)
    patch = pytest.MonkeyPatch()
    patch.setenv("QLORA_CACHE", str(bench["folder"] / "cache"))
    console = listening(200)
    found = evaluation.evaluate(where, console=console)
    patch.undo()
    return found, console.export_text(), rundir.Run(where)


def quick(run, **asked):
    return evaluation.evaluate(run, **{"answers": 0, "general": False, "base": False} | asked)


# --- the figures


def test_the_losses_of_base_and_tuned_are_those_of_the_runs_result(evaluated):
    found, _, run = evaluated
    assert found.base.loss == pytest.approx(run.result["before"]["held_out_loss"], rel=1e-6)
    assert found.tuned.loss == pytest.approx(run.result["after"]["held_out_loss"], rel=1e-6)
    assert found.tuned.perplexity == pytest.approx(math.exp(found.tuned.loss))
    assert found.tuned.loss < found.base.loss


def test_all_held_out_rows_are_scored_and_known_as_the_runs_own(evaluated, bench):
    found, said, run = evaluated
    count = rundir.read_json(run.dir / "data.json")["held_out"]["rows"]
    assert found.rows.count == count >= 6 and found.tuned.answered == count
    assert found.rows.are_the_runs is True and found.rows.trained_on == 0
    assert f"{count} of the rows held out of data.train" in said
    assert "they are the rows that the run held out" in said


def test_the_difference_of_the_loss_has_an_interval_over_its_rows(evaluated):
    found, _, _ = evaluated
    one = found.differences["loss"]
    assert one.rows == found.rows.count and one.low < one.difference < one.high < 0
    assert one.difference == pytest.approx(found.tuned.loss - found.base.loss, rel=1e-6)
    assert one.verdict(lower_is_better=True) == "better"
    assert set(found.differences) == {
        "loss", "closing_loss", "exact_match", "stop_rate", "field_match", "valid_json",
    }  # fmt: skip


def test_the_answers_are_scored_whole_by_field_and_as_json(bench, run, monkeypatch):
    """Made-up answers: of four, one right, one right in one field, one no JSON, one cut short."""
    from qlora import generation

    def answer_all(model, tok, prompts, *args):
        asked = iter(examples)
        found = []
        for number in range(len(prompts)):
            want = next(asked).record.turns[-1].content
            said = [want, json.dumps({**json.loads(want), "ok": False}), f"Sure! {want}", want[:5]]
            found.append(generation.Answer(said[number % 4], number % 4 < 3))
        return found

    found = trained.find(run.dir)
    _, examples, _ = heldout.find(found, None, evaluation.Screen(Console(quiet=True)))
    monkeypatch.setattr(generation, "answer_all", answer_all)
    scored = quick(run, answers=4).tuned
    assert (scored.answered, scored.exact_match, scored.stop_rate) == (4, 0.25, 0.75)
    assert scored.field_match == (1 + 0.5 + 0 + 0) / 4
    assert scored.fields == {"sum": 0.5, "ok": 0.25} and scored.valid_json == 0.5


def test_fields_that_the_recipe_names_are_the_ones_compared():
    expected = ['{"a": 1, "b": 2}', '{"b": 3}', "prose"]
    found = answering.compare_fields(expected, ['{"a": 1}', '{"b": 3}', "prose"], ["a"])
    assert (found.rows, found.right, found.by_field) == ([0], [1.0], {"a": (1, 1)})
    found = answering.compare_fields(expected, ['{"a": 1}', '{"b": 3}', "prose"])
    assert found.right == [0.5, 1.0] and found.by_field == {"a": (1, 1), "b": (1, 2)}
    assert answering.compare_fields(["prose"], ["prose"]) is None
    assert answering.compare_fields(["{}"], ["{}"]) is None


def test_general_text_is_read_by_both_and_what_was_lost_is_said(evaluated):
    found, _, _ = evaluated
    meter = found.forgetting
    assert meter.passages == meter.interval.rows == 62
    assert meter.tuned - meter.base == pytest.approx(meter.interval.difference)


def test_the_first_rows_are_kept_with_both_answers(evaluated):
    found, _, _ = evaluated
    assert len(found.samples) == evaluation.SAMPLES
    for one in found.samples:
        assert one.question.startswith("What is ") and json.loads(one.expected)["ok"] is True
        assert one.base is not None and one.address.startswith("rows.jsonl:")


def test_base_and_tuned_are_not_the_same_model(evaluated):
    """The adapter is off for one and on for the other: else both columns would agree."""
    found, _, _ = evaluated
    assert found.base.closing_loss != found.tuned.closing_loss
    assert found.forgetting.base != found.forgetting.tuned


def test_it_is_written_into_the_run_and_is_json(evaluated):
    found, _, run = evaluated
    assert found.path.parent == run.dir / "evaluations"
    kept = rundir.read_json(found.path)
    made = kept.pop("made")
    assert kept == found.to_json() and made.startswith("20")
    assert kept["differences"]["loss"]["is_shown"] is True
    assert kept["rows"]["digest"] == rundir.read_json(run.dir / "before.json")["of"]["held_out"]


def test_two_evaluations_in_one_second_are_both_kept(run):
    first, second = quick(run), quick(run)
    assert first.path != second.path and first.path.is_file() and second.path.is_file()


def test_a_run_that_was_evaluated_is_still_the_run_it_was(run):
    before = {p: p.read_bytes() for p in run.dir.rglob("*") if p.is_file() and p.name != ".lock"}
    quick(run)
    assert {p: p.read_bytes() for p in before} == before
    assert trained.find(run.dir).name == f"tiny/{run.dir.name}"


# --- what is measured is up to the caller


def test_the_base_the_answers_and_the_general_text_can_be_left_out(run):
    found = quick(run)
    assert found.base is None and found.differences == {} and found.forgetting is None
    assert found.tuned.exact_match is None and found.samples == ()
    assert "difference" not in str(found) and "tuned" in str(found)


def test_two_hundred_rows_are_answered_unless_the_recipe_or_the_caller_says_more(bench):
    recipe = bench["recipe"]
    more = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"generate": 300})})
    assert evaluation._asking(recipe, None, None).eval.generate == 200
    assert evaluation._asking(more, None, None).eval.generate == 300
    assert evaluation._asking(more, 7, 3).eval.generate == 7
    assert evaluation._asking(more, 7, 3).eval.batch_size == 3


def test_a_checkpoint_can_be_evaluated_and_is_named(run):
    found = quick(run.checkpoints / "checkpoint-3")
    assert found.adapter == "checkpoint-3" and "(checkpoint-3)" in str(found)
    assert found.tuned.loss != quick(run).tuned.loss


def test_a_run_is_taken_as_a_path_or_as_a_run(run):
    assert quick(run).tuned == quick(run.dir).tuned == quick(str(run.dir.parent)).tuned


# --- rows of a file


def test_every_row_of_a_file_is_asked_and_unseen_rows_are_known_as_such(run, tmp_path, bench):
    said = listening(200)
    found = quick(run, file=str(write(tmp_path / "new.jsonl", NEW)), console=said)
    assert (found.rows.count, found.rows.trained_on, found.rows.are_the_runs) == (12, 0, False)
    assert "none of them is among the run's training rows" in said.export_text()


def test_rows_that_the_run_was_trained_on_are_counted_and_told(run, tmp_path, bench):
    """All rows of data.train: those that were held out do not count."""
    account = rundir.read_json(run.dir / "data.json")
    said = listening(200)
    file = write(tmp_path / "mixed.jsonl", [*bench["rows"], *NEW])
    found = quick(run, file=str(file), console=said)
    assert found.rows.count == len(bench["rows"]) + 12
    assert found.rows.trained_on == account["train"]["rows"] == 40 - account["held_out"]["rows"]
    assert f"the run was TRAINED on {found.rows.trained_on} of them" in said.export_text()


def test_where_the_training_rows_are_gone_that_is_said(run, tmp_path, bench):
    moved = bench["folder"] / "rows.jsonl"
    aside = moved.rename(moved.with_suffix(".aside"))
    said = listening(200)
    try:
        found = quick(run, file=str(write(tmp_path / "new.jsonl", NEW)), console=said)
    finally:
        aside.rename(moved)
    assert found.rows.trained_on is None
    assert "whether the model was trained on some of them is not known" in said.export_text()


def test_the_runs_own_held_out_rows_in_a_file_are_recognized(run, tmp_path, bench):
    found = trained.find(run.dir)
    _, examples, _ = heldout.find(found, None, evaluation.Screen(Console(quiet=True)))
    rows = [
        {"prompt": e.record.turns[0].content, "completion": e.record.turns[1].content}
        for e in examples
    ]
    scored = quick(run, file=str(write(tmp_path / "held.jsonl", rows)))
    assert scored.rows.are_the_runs is True
    assert scored.tuned.loss == pytest.approx(run.result["after"]["held_out_loss"], rel=1e-6)


def test_a_file_of_another_format_is_read_by_its_columns(run, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]},
                      {"role": "assistant", "content": r["completion"]}]}
        for r in NEW
    ]  # fmt: skip
    one = quick(run, file=str(write(tmp_path / "chat.jsonl", rows)))
    other = quick(run, file=str(write(tmp_path / "pairs.jsonl", NEW)))
    assert one.tuned.loss == pytest.approx(other.tuned.loss, rel=1e-6)


def test_rows_that_cannot_be_used_are_left_out_and_told(run, tmp_path):
    rows = [
        *NEW,
        {"prompt": "no answer", "completion": ""},
        {"prompt": "x " * 400, "completion": "y"},
    ]
    said = listening(250)
    found = quick(run, file=str(write(tmp_path / "some.jsonl", rows)), console=said)
    assert found.rows.count == 12 and len(found.rows.notes) == 2
    told = said.export_text()
    assert "1 row cannot be used (first: some.jsonl:13: completion is empty)" in told
    assert "1 row is longer than data.max_length (first: some.jsonl:14:" in told


def test_plain_texts_have_losses_and_no_answers(run, tmp_path):
    rows = [{"text": f"Here are {n} words of a text."} for n in range(10)]
    found = quick(run, file=str(write(tmp_path / "texts.jsonl", rows)), answers=5, base=True)
    assert found.tuned.answered == 0 and found.tuned.exact_match is None
    assert set(found.differences) == {"loss", "closing_loss"} and found.samples == ()


# --- a model that is no run


def test_a_models_folder_is_evaluated_on_a_file_alone(bench, run, tmp_path):
    found = quick(bench["base"], file=str(write(tmp_path / "new.jsonl", NEW)), base=True, answers=2)
    assert found.base is None and found.differences == {} and found.path is None
    assert found.rows.trained_on is None and found.adapter == ""
    other = quick(run, file=str(tmp_path / "new.jsonl"), base=True)
    assert found.tuned.loss != other.base.loss  # 16 bits here, NF4 there
    packed = quick(bench["base"], file=str(tmp_path / "new.jsonl"), quant="nf4")
    assert packed.tuned.loss == pytest.approx(other.base.loss, rel=1e-5)


def test_a_model_without_a_file_is_refused(bench):
    with pytest.raises(DataError, match=r"base is a model that no run of qlora made.* --data FILE"):
        quick(bench["base"])


# --- what is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"bad\.jsonl"),
        ("not json\n", r"bad\.jsonl"),
        ('{"zebra": 1}\n', r"columns \(zebra\) fit no known format"),
        ('{"prompt": "a", "completion": ""}\n', r"none of its rows can be used: 1 are no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name(run, tmp_path, content, said):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=said) as refused:
        quick(run, file=str(file))
    assert "bad.jsonl" in str(refused.value)


def test_a_file_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        quick(run, file=str(tmp_path / "none.jsonl"))


def test_a_run_whose_data_is_gone_says_how_to_go_on(run, bench):
    moved = bench["folder"] / "rows.jsonl"
    aside = moved.rename(moved.with_suffix(".aside"))
    try:
        with pytest.raises(DataError) as refused:
            quick(run)
    finally:
        aside.rename(moved)
    said = str(refused.value)
    assert said.startswith(f"The rows that tiny/{run.dir.name} held out cannot be read again:")
    assert "rows.jsonl" in said and said.endswith("--data FILE.")


def test_a_run_whose_data_changed_is_told_so(run, bench, tmp_path):
    file = bench["folder"] / "rows.jsonl"
    whole = file.read_text()
    said = listening(250)
    try:
        write(file, [*bench["rows"][:30], *NEW])
        found = quick(run, console=said)
    finally:
        file.write_text(whole)
    assert found.rows.are_the_runs is False and found.rows.trained_on is None
    assert "not the rows that the run held out: its data has changed since" in said.export_text()


def test_a_run_that_held_nothing_out_asks_for_a_file(run):
    recipe = run.recipe_file.read_text()
    assert "held_out_fraction: 0.3" in recipe
    run.recipe_file.write_text(recipe.replace("held_out_fraction: 0.3", "held_out_fraction: 0.0"))
    with pytest.raises(
        DataError, match=r"held out no rows \(data.held_out_fraction is 0\).* --data FILE"
    ):
        quick(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        quick(tmp_path)


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_loaded(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(trained, "find", None)
    with pytest.raises(RecipeError, match=r"--out is .*which is a folder"):
        quick(run, out=tmp_path)
    with pytest.raises(RecipeError, match=r"--out is .*is no folder that can be written"):
        quick(run, out=tmp_path / "none" / "x.json")


def test_an_unknown_task_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load", None)
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    with pytest.raises(RecipeError, match="no folder"):
        quick(run, lm_eval=["nothing"], lm_eval_path=tmp_path / "none")


def test_answers_that_need_too_much_memory_name_a_smaller_batch(run, monkeypatch):
    import torch

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(answering, "answer", full)
    with pytest.raises(
        DoesNotFit, match=r"Answering 8 rows at a time .* --batch-size 2, or --rows 0"
    ):
        quick(run, answers=8)


def test_a_run_that_can_only_be_read_is_evaluated_none_the_less(run, tmp_path, monkeypatch):
    def denied(path, value):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rundir, "write_json", denied)
    said = listening(200)
    assert quick(run, console=said).path is None
    assert "not written into the run: Permission denied" in said.export_text()


# --- the table


def test_the_table_says_better_worse_or_that_nothing_can_be_told(evaluated):
    found, _, _ = evaluated
    same = Interval(0.01, -0.2, 0.2, 40, 9)
    worse = Interval(-0.5, -0.7, -0.2, 40, 30)
    text = str(replace(found, differences={"loss": found.differences["loss"], "exact_match": same,
                                           "stop_rate": worse}))  # fmt: skip
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["loss"].rstrip().endswith("better")
    assert lines["exact match"].rstrip().endswith("no difference")
    assert "+1.0% (-20.0 to +20.0)" in lines["exact match"]
    assert lines["stopped by itself"].rstrip().endswith("worse")
    assert "no difference: none that so many rows, or documents, can show" in text
    assert "general   62 passages: " in text


def test_a_model_that_does_not_stop_is_told_what_that_means(evaluated):
    found, _, _ = evaluated
    low = replace(found, tuned=replace(found.tuned, stop_rate=0.25))
    assert "75% of the answers did not end by themselves" in str(low)
    assert "did not end" not in str(replace(found, tuned=replace(found.tuned, stop_rate=0.95)))


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed(evaluated):
    found, _, _ = evaluated
    bad = scorecard.Sample("a", "\x1b[31mred", "\x1b]0;title\x07", "x", "\u202eyes")
    text = str(replace(found, samples=(bad,)))
    assert "\x1b" not in text and "\u202e" not in text and "␛[31mred" in text


# --- the command line


def test_the_command_prints_json_on_its_own_and_progress_elsewhere(run, tmp_path):
    asked = ["evaluate", str(run.dir), "--rows", "2", "--no-forgetting", "--json"]
    result = CliRunner().invoke(cli.app, [*asked, "--out", str(tmp_path / "scores.json")])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["tuned"]["answered"] == 2 and told["base"]["loss"] > told["tuned"]["loss"]
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept | {"made": ""} == told | {"made": ""}
    assert "rows " in result.stderr and "tuned" in result.stderr
    assert len(list((run.dir / "evaluations").iterdir())) == 1


def test_the_command_prints_the_table_and_where_it_is_kept(run):
    result = CliRunner().invoke(
        cli.app, ["evaluate", str(run.dir), "--rows", "2", "--no-forgetting"]
    )
    assert result.exit_code == 0, result.stderr
    assert "difference (95 %)" in result.stdout and "general" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"written   {run.dir}")


def test_a_users_mistake_ends_with_exit_code_two_and_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora", "evaluate", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("qlora: ") and str(tmp_path / "none") in said.err


@pytest.mark.parametrize(
    "option", [["--lm-eval-limit", "3"], ["--lm-eval-chat"], ["--lm-eval-path", "x"]]
)
def test_how_tasks_are_run_needs_tasks(option):
    result = CliRunner().invoke(cli.app, ["evaluate", "somewhere", *option])
    assert isinstance(result.exception, QLoRAError)
    assert "--lm-eval names none" in str(result.exception)


def test_tasks_of_the_harness_stand_beside_each_other_too(run, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra qlora[eval]")
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = write(
        folder / "sums.jsonl",
        [{"q": f"What is {n} plus 1?", "c": ["x", "y"], "a": n % 2} for n in range(8)],
    )
    (folder / "sums.yaml").write_text(
        f"task: our_sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\n'
        'doc_to_choice: "{{c}}"\ndoc_to_target: a\nmetric_list:\n  - metric: acc\n'
        "    aggregation: mean\n    higher_is_better: true\n"
    )
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
        found = quick(run, base=True, lm_eval=["our_sums"], lm_eval_path=folder)
    (one,) = found.lm_eval
    assert (one["task"], one["metric"], one["difference"]["rows"]) == ("our_sums", "acc", 8)
    assert one["difference"]["difference"] == pytest.approx(one["tuned"] - one["base"])
    assert "our_sums: acc" in str(found) and one["verdict"].startswith(
        ("no difference", "better", "worse")
    )


def test_scores_of_a_row_are_the_scorers(run):
    """The held-out loss is no other figure than :mod:`qlora.scoring` gives."""
    found = trained.find(run.dir)
    _, _, listed = heldout.find(found, None, evaluation.Screen(Console(quiet=True)))
    scores = scoring.score(trained.load(found), listed, found.tok.pad_token_id)
    assert quick(run).tuned.loss == scoring.mean(scores)
