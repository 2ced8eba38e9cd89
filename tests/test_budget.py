"""A run with a budget ends in time, with all that a run ends with."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console
from test_resume import lines, weights, write_rows

from qlora import (
    budget,
    durations,
    hardware,
    keeping,
    loader,
    ready,
    sft,
    statefile,
    store,
    trainer,
    verdict,
)
from qlora.errors import RecipeError
from qlora.rundir import Run
from qlora.settings import Recipe

pytestmark = pytest.mark.usefixtures("one_thread", "light")

PEAK = 1e-2  # the learning rate
LOADING, MEASURING, SAVING = 4.0, 3.0, 0.5  # seconds of the fake clock


class Clock:
    """Time that passes as a test says; what else the time module knows is as ever."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step: Callable[[int], float] = lambda step: 1.0  # seconds of a step, by its number
        self.measuring = MEASURING

    def monotonic(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Loading, measuring, steps and saves take the seconds above, and no other."""
    clock = Clock()
    for module in (budget, keeping, trainer, ready):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    load, measure = loader.load_base, verdict.measure
    step, write = sft.RowTrainer.training_step, store.write

    def loaded(*args: Any, **kwargs: Any) -> Any:
        clock.now += LOADING
        return load(*args, **kwargs)

    def measured(*args: Any) -> Any:
        clock.now += clock.measuring
        return measure(*args)

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += clock.step(self.state.global_step + 1)
        return step(self, *args, **kwargs)

    def written(*args: Any) -> Path:
        clock.now += SAVING
        return write(*args)

    monkeypatch.setattr(loader, "load_base", loaded)
    monkeypatch.setattr(verdict, "measure", measured)
    monkeypatch.setattr(sft.RowTrainer, "training_step", stepped)
    monkeypatch.setattr(store, "write", written)
    return clock


@pytest.fixture
def write(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of sixty steps under a cosine."""
    rows = write_rows(tmp_path / "few.jsonl", ROWS[:24])

    def written(**changes: Any) -> Recipe:
        return make_recipe(
            **{
                "data__train": str(rows), "train__max_steps": 60, "train__save_steps": 1000,
                "train__lr_scheduler_type": "cosine", "train__learning_rate": PEAK,
                "run__save_every": None,
            }
            | changes
        )  # fmt: skip

    return written


def train(recipe: Recipe, **settings: Any) -> tuple[Run, str]:
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=1000), **settings)
    return run, said.getvalue()


def rates(run: Run) -> list[float]:
    return [line["learning_rate"] for line in run.metrics() if "loss" in line]


def cosine(step: int, of: int) -> float:
    """The rate of a step, counted from 1, under a cosine that ends at its end."""
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - 1) / of))


def require_whole(run: Run) -> None:
    assert run.is_complete and weights(run)
    last = run.result["steps"]
    assert len(rates(run)) == last
    assert store.newest(run.checkpoints).name == f"checkpoint-{last}"
    assert store.defect(store.newest(run.checkpoints)) is None


def fitted_in(run: Run) -> int | None:
    return statefile.read(store.newest(run.checkpoints))["observers"]["budget"]["total"]


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_steps_are_fitted_to_the_limit_and_the_schedule_to_the_steps(
    offset: float, clock: Clock, write: Callable[..., Recipe]
) -> None:
    """Wherever in a step the limit falls."""
    began, clock.measuring = clock.now, MEASURING + offset
    run, said = train(write(), budget="50s")
    spent, steps = clock.now - began, run.result["steps"]
    assert 0.85 * 50 < spent <= 50
    require_whole(run)
    # 50 less 4 of loading, 3 of measuring, twice that of measuring again and a reserve of 2 to 8.
    assert 30 <= steps <= 40
    assert "1 s a step" in said and f"the run ends with step {steps} instead of 60" in said
    assert "no time for another step" not in said
    assert rates(run)[:7] == pytest.approx([cosine(step, 60) for step in range(1, 8)])
    assert rates(run)[-1] == pytest.approx(cosine(steps, steps)) and rates(run)[-1] < PEAK / 100
    assert rates(run) == sorted(rates(run), reverse=True)


def test_a_budget_that_is_larger_than_needed_changes_no_bit(
    clock: Clock, write: Callable[..., Recipe]
) -> None:
    recipe = write(train__max_steps=20, lora__lora_dropout=0.1)
    plain, _ = train(recipe)
    run, said = train(recipe, budget="1h")
    files = [one.adapter / "adapter_model.safetensors" for one in (run, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert lines(run) == lines(plain) and run.result["steps"] == 20
    assert "instead of" not in said and fitted_in(run) is None


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ("5s", 0),  # loading takes 4, measuring 3
        ("13s", 0),  # and what comes after training as long again, and more
        ("18s", 4),  # the pace is known after the third step, and hardly one more fits
    ],
)
def test_a_budget_that_is_too_small_is_refused_or_ends_with_few_steps_in_time(
    limit: str, steps: int, clock: Clock, write: Callable[..., Recipe]
) -> None:
    recipe, began = write(), clock.now
    if not steps:
        with pytest.raises(RecipeError) as refused:
            train(recipe, budget=limit)
        said = str(refused.value)
        assert said.startswith("--budget ") and "nothing is left of it for a step" in said
        assert "eval.generate" in said
        assert not list(Path(recipe.run.dir).glob("*"))
        return
    run, said = train(recipe, budget=limit)
    assert clock.now - began <= durations.seconds(limit)
    require_whole(run)
    assert 1 <= run.result["steps"] <= steps and "no time for another step" in said


@pytest.mark.parametrize(
    "pace",
    [
        lambda step: 1.0 * 1.03**step,
        lambda step: 1.0 if step < 20 else 4.0,
        lambda step: 0.5 if step < 12 else 0.5 + 0.2 * (step - 12),
        lambda step: 3.0 if step % 5 == 0 else 0.5,
        lambda step: 10.0 if step == 1 else 0.7,
        lambda step: 2.0 if step < 15 else 0.5,
        lambda step: 1.0 if step < 25 else 9.0,
        lambda step: 1.0 if step < 30 else 8.0,
    ],
    ids=[
        "slower and slower",
        "four times",
        "after the fit",
        "uneven",
        "slow start",
        "faster",
        "nine times",
        "eight times",
    ],
)
def test_steps_that_take_another_time_later_still_end_in_time(
    pace: Callable[[int], float], clock: Clock, write: Callable[..., Recipe]
) -> None:
    clock.step, began = pace, clock.now
    run, _ = train(write(), budget="60s")
    assert 0.65 * 60 < clock.now - began <= 60
    require_whole(run)


def test_evaluations_and_saves_on_the_way_are_counted(
    clock: Clock, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = sft.RowTrainer.evaluate

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += 2.0
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "evaluate", slow)
    began = clock.now
    run, _ = train(write(train__eval_steps=4, train__save_steps=3), budget="60s")
    assert clock.now - began <= 60
    require_whole(run)
    assert rates(run)[-1] < PEAK / 50


def test_what_comes_after_training_gets_the_time_that_it_took_before(
    clock: Clock, write: Callable[..., Recipe]
) -> None:
    clock.measuring, began = 20.0, clock.now
    run, _ = train(write(eval__generate=1), budget="90s")
    assert clock.now - began <= 90 and run.is_complete
    assert run.result["steps"] <= 90 - 4 - 20 - 30


# --- with a resume


@pytest.fixture
def stopped(
    clock: Clock, write: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """A copy of a run as it was when it began a step, with a checkpoint every five."""
    step = sft.RowTrainer.training_step

    def copied(at: int, *, limit: str | None, **changes: Any) -> Run:
        copy = Run(tmp_path / "copy" / "20260101-120000")

        def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step + 1 == at:
                shutil.copytree(Path(self.args.output_dir).parent, copy.dir)
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(sft.RowTrainer, "training_step", stepped)
            train(write(train__save_steps=5, **changes), budget=limit)
        return copy

    yield copied


def test_resumed_without_a_budget_a_run_goes_on_over_the_steps_that_were_fitted(
    stopped: Callable[..., Run], write: Callable[..., Recipe]
) -> None:
    run = stopped(18, limit="50s")
    fitted = fitted_in(run)
    assert fitted is not None and 25 <= fitted <= 45
    run, said = train(write(train__save_steps=5), resume=run.dir)
    assert f"on over the {fitted} steps that were fitted before" in said
    assert run.result["steps"] == fitted
    require_whole(run)
    assert rates(run)[15:] == pytest.approx([cosine(n, fitted) for n in range(16, fitted + 1)])


@pytest.mark.parametrize("before", [None, "50s"])
@pytest.mark.parametrize(("limit", "most"), [("30s", 36), ("45s", 51), ("1h", 60)])
def test_resumed_with_a_budget_a_run_ends_within_it(
    before: str | None,
    limit: str,
    most: int,
    stopped: Callable[..., Run],
    write: Callable[..., Recipe],
    clock: Clock,
) -> None:
    run, began = stopped(18, limit=before), clock.now
    run, _ = train(write(train__save_steps=5), resume=run.dir, budget=limit)
    assert clock.now - began <= durations.seconds(limit)
    require_whole(run)
    steps = run.result["steps"]
    assert (steps == most == 60) if limit == "1h" else 20 <= steps <= most
    assert rates(run)[-1] == pytest.approx(cosine(steps, steps))


def test_a_new_budget_is_not_bound_by_what_was_fitted_to_an_earlier_one(
    stopped: Callable[..., Run], write: Callable[..., Recipe]
) -> None:
    """Also where fewer steps of it are left than a pace is measured over."""
    run = stopped(31, limit="50s")
    fitted = fitted_in(run)
    assert fitted is not None and 31 <= fitted <= 36
    run, _ = train(write(train__save_steps=5), resume=run.dir, budget="1h")
    assert run.result["steps"] == 60
    require_whole(run)


def test_on_a_resume_the_answers_after_get_the_time_that_those_before_once_took(
    stopped: Callable[..., Run], write: Callable[..., Recipe], clock: Clock
) -> None:
    """They are recalled then, which takes no time at all."""
    clock.measuring = 20.0
    run, began = stopped(18, limit=None, eval__generate=1), clock.now
    run, _ = train(write(train__save_steps=5, eval__generate=1), resume=run.dir, budget="50s")
    assert 20 + LOADING < clock.now - began <= 50
    require_whole(run)


def test_too_small_a_budget_for_a_resume_leaves_the_run_as_it_was(
    stopped: Callable[..., Run], write: Callable[..., Recipe]
) -> None:
    run = stopped(18, limit="50s")
    with pytest.raises(RecipeError, match="nothing is left of it"):
        train(write(train__save_steps=5), resume=run.dir, budget="6s")
    run, _ = train(write(train__save_steps=5), resume=run.dir)
    require_whole(run)


def test_more_steps_that_are_allowed_are_taken_although_fewer_were_fitted(
    stopped: Callable[..., Run], write: Callable[..., Recipe]
) -> None:
    run = stopped(18, limit="50s")
    run, said = train(
        write(train__save_steps=5, train__max_steps=70), resume=run.dir,
        allow_change=["train.max_steps"],
    )  # fmt: skip
    assert run.result["steps"] == 70 and "fitted before" not in said
    assert rates(run)[15:] == pytest.approx([cosine(step, 70) for step in range(16, 71)])


def test_a_run_that_took_its_last_fitted_step_takes_no_more(
    clock: Clock,
    write: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Run(tmp_path / "copy" / "20260101-120000")
    save = trainer._save
    with monkeypatch.context() as patch:
        patch.setattr(
            trainer, "_save", lambda ready: shutil.copytree(ready.run.dir, copy.dir) and save(ready)
        )
        whole, _ = train(write(), budget="50s")
    run, _ = train(write(), resume=copy.dir)
    assert run.result["steps"] == whole.result["steps"] < 60
    assert lines(run) == lines(whole)


def test_after_a_step_back_the_run_still_ends_in_time(
    clock: Clock, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = sft.RowTrainer.compute_loss
    bad = {21, 22, 23}

    def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = loss(self, model, *args, **kwargs)
        if model.training and self.state.global_step + 1 in bad:
            bad.remove(self.state.global_step + 1)
            return found * float("nan")
        return found

    monkeypatch.setattr(sft.RowTrainer, "compute_loss", poisoned)
    monkeypatch.setattr(sft.RowTrainer, "blame", lambda self: "")
    began = clock.now
    run, said = train(write(train__save_steps=5, train__after_bad_steps="roll_back"), budget="60s")
    assert "back to checkpoint-20" in said and bad == set()
    assert 0.7 * 60 < clock.now - began <= 60 and run.is_complete
    assert rates(run)[-1] < PEAK / 50


# --- how a limit is written


@pytest.mark.parametrize(
    "written", ["soon", "", "0s", "-5m", "5", "1.5h", "5 m", "m", "1s1h", "1h1h", "5M", "∞"]
)
def test_what_is_no_duration_is_refused_before_anything_else(
    written: str, write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "card", lambda: pytest.fail("the card was looked at"))
    recipe = write()
    with pytest.raises(RecipeError) as refused:
        trainer.train(recipe, budget=written, console=Console(quiet=True))
    assert str(refused.value) == (
        f"--budget is {written!r}, which is no duration; write one such as 90s, 10m or 1h30m."
    )
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172800),
        (" 1d1h1m1s ", 90061),
        ("0h5s", 5),
    ],
)
def test_durations_are_read_as_people_write_them(written: str, seconds: float) -> None:
    assert durations.seconds(written) == seconds


# --- on the real clock


def test_on_the_real_clock_a_run_of_endless_steps_ends_before_its_limit(
    write: Callable[..., Recipe],
) -> None:
    began = time.monotonic()
    run, said = train(write(train__max_steps=1_000_000, train__logging_steps=100), budget="12s")
    assert time.monotonic() - began <= 12
    assert run.is_complete and run.adapter.is_dir()
    assert run.result["steps"] < 1_000_000 and "instead of 1,000,000" in said
    assert json.loads((run.dir / "result.json").read_text())["steps"] == run.result["steps"]
