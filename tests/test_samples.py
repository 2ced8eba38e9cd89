"""Rows answered while the model learns are in the log, and change nothing of what is learned."""

from __future__ import annotations

import io
import json

import pytest
import torch
from conftest import ROWS, save_tiny
from rich.console import Console
from safetensors.torch import load_file

from qlora import answering, samples, sft, store, tracking, trainer
from qlora.errors import Interrupted, RecipeError
from qlora.recipe import load_recipe, recipe_from
from qlora.rundir import Run

pytestmark = pytest.mark.usefixtures("one_thread", "light")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A tiny run's recipe with dropout, and how to train it with or without samples."""
    folder = tmp_path_factory.mktemp("samples")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = save_tiny(folder / "base")

    def run(name: str, **changes):
        values = {
            "model": {"name": str(base)},
            "data": {"train": str(data), "max_length": 128, "held_out_fraction": 0.2},
            "lora": {"r": 4, "lora_dropout": 0.2},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1, "save_steps": 2,
                "eval_steps": 2, "activation_checkpointing": False,
            },
            "run": {"dir": str(folder / "runs"), "name": name},
            "eval": {"max_new_tokens": 8, "exact_match": [], **changes},
        }  # fmt: skip
        said = io.StringIO()
        patch = pytest.MonkeyPatch()
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        try:
            found = trainer.train(recipe_from(values), console=Console(file=said, width=200))
        finally:
            patch.undo()
        return found, said.getvalue()

    return run


@pytest.fixture(scope="module")
def without(bench):
    return bench("without")


@pytest.fixture(scope="module")
def with_samples(bench):
    sent = []

    class Fake(tracking.Silent):
        def log(self, values, step):
            sent.append(values)

    patch = pytest.MonkeyPatch()
    patch.setattr(tracking, "start", lambda recipe, folder: Fake())
    try:
        run, said = bench("with", samples=3)
    finally:
        patch.undo()
    return run, said, sent


def test_the_adapter_is_bit_equal_with_and_without(without, with_samples):
    one, other = (
        load_file(run.adapter / "adapter_model.safetensors")
        for run in (without[0], with_samples[0])
    )
    assert one.keys() == other.keys() and len(one) == 28
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(bool(value.any()) for name, value in one.items() if "lora_B" in name)


def test_losses_on_the_way_are_equal_too(without, with_samples):
    losses = [
        [
            (line["step"], line.get("loss"), line.get("eval_loss"))
            for line in run.metrics()
            if "samples" not in line
        ]
        for run in (without[0], with_samples[0])
    ]
    assert losses[0] == losses[1]
    assert [step for step, _, loss in losses[0] if loss is not None] == [0, 2, 4, 6, 6]


def test_every_evaluation_leaves_its_answers_in_the_metrics(with_samples):
    run, _, _ = with_samples
    found = [line for line in run.metrics() if "samples" in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    asked = {row["prompt"]: row["completion"] for row in ROWS}
    for line in found:
        assert len(line["samples"]) == 3
        for one in line["samples"]:
            assert set(one) == {"row", "question", "expected", "answer", "stopped", "right"}
            assert asked[one["question"]] == one["expected"] and one["row"].startswith(
                "rows.jsonl:"
            )
            assert one["right"] == (one["answer"] == one["expected"])
    assert len({json.dumps(line["samples"]) for line in found}) > 1  # it is another model each time


def test_the_screen_gets_one_short_line_of_them(with_samples):
    lines = [line for line in with_samples[1].splitlines() if line.startswith("samples")]
    assert len(lines) == 3
    assert lines[0].split(maxsplit=1)[1].startswith("step 2: 0/3 right; What is ")
    assert all(" -> " in line and len(line) < 180 for line in lines)


def test_no_tracker_is_told_a_rows_text(with_samples):
    _, _, sent = with_samples
    assert any("eval_loss" in values for values in sent)
    assert "samples" not in {key for values in sent for key in values}
    assert "What is" not in json.dumps(sent)


def test_without_the_setting_nothing_is_asked(without):
    assert not any("samples" in line for line in without[0].metrics())
    assert "\nsamples" not in without[1]


def test_a_run_that_is_resumed_has_each_evaluations_answers_once(bench, monkeypatch):
    step = sft.RowTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 5 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    stopped: list[bool] = []
    monkeypatch.setattr(sft.RowTrainer, "training_step", stopping)
    with pytest.raises(Interrupted):
        bench("stopped", samples=2)
    monkeypatch.undo()
    straight, _ = bench("straight", samples=2)
    (folder,) = (straight.dir.parent.parent / "stopped").iterdir()
    recipe = load_recipe(folder / "recipe.yaml")
    assert store.step_of(store.newest(Run(folder).checkpoints)) == 4
    resumed = trainer.train(recipe, resume=folder, console=Console(quiet=True))
    answers = [
        [(line["step"], line["samples"]) for line in run.metrics() if "samples" in line]
        for run in (straight, resumed)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 3


def test_when_no_memory_is_left_to_answer_training_goes_on(bench, monkeypatch):
    def full(*args, **kwargs):
        asked.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    asked: list[bool] = []
    monkeypatch.setattr(samples.answering, "answer", full)
    run, said = bench("full", samples=2)
    assert run.is_complete and len(asked) == 1
    assert "no memory is left to answer rows" in said


def test_an_error_of_ours_is_not_taken_for_a_lack_of_memory(bench, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(samples.answering, "answer", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        bench("broken", samples=2)
    assert answering.answer is broken


def test_samples_without_evaluations_are_refused(make_recipe):
    with pytest.raises(RecipeError) as refused:
        make_recipe(eval__samples=2)
    assert (
        "eval.samples is 2: so many held-out rows are answered whenever the held-out loss is measured, and "
        "train.eval_steps is null" in str(refused.value)
    )
    assert make_recipe(eval__samples=2, train__eval_steps=3).eval.samples == 2
