"""Every step is judged before the optimizer takes it, and a bad one changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from qlora import guard
from qlora.errors import TrainingDiverged
from qlora.guard import RollBack, StepGuard
from qlora.screen import Screen


class Watched:
    """A guard over a layer, with all that it tells."""

    def __init__(self, make_recipe, *, scale: float | None = None, **train):
        self.console = Console(record=True, width=400)
        self.lines, self.verdicts = [], []
        recipe = make_recipe(**{f"train__{k}": v for k, v in train.items()})
        self.guard = StepGuard(
            recipe, [f"f.jsonl:{n}" for n in range(20)], lambda row: 10 * row, Screen(self.console),
            judged=lambda loss, taken: self.verdicts.append((loss, taken)), record=self.lines.append,
        )  # fmt: skip
        self.guard.scale = lambda: scale
        self.guard.blame = lambda: "first in the output of layers.0"
        self.layer = torch.nn.Linear(1, 1)
        self.number = 0

    def step(self, *losses: float, grad: float = 0.0) -> bool:
        """Whether the optimizer would take this step."""
        for parameter in self.layer.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        for index, loss in enumerate(losses):
            self.guard.saw([2 * index, 2 * index + 1], 10, 12, torch.tensor(loss))
        state = SimpleNamespace(global_step=self.number)
        self.number += 1
        self.guard.on_pre_optimizer_step(None, state, None, model=self.layer)
        return all(p.grad is not None for p in self.layer.parameters())


@pytest.fixture
def watch(make_recipe):
    return lambda **settings: Watched(make_recipe, **settings)


def test_only_the_micro_batch_with_the_nan_is_named_with_its_lengths_and_layer(watch):
    watched = watch()
    assert not watched.step(1.0, math.nan, 2.0)
    (line,) = watched.lines
    assert line["rows"] == ["f.jsonl:2", "f.jsonl:3"] and line["lengths"] == [20, 30]
    assert line["where"] == "first in the output of layers.0" and line["step"] == 1
    said = watched.console.export_text()
    assert (
        "step 1 is left out: the loss is not a finite number, first in the output of layers.0"
        in said
    )
    assert "rows: f.jsonl:2 (20 tokens), f.jsonl:3 (30 tokens)" in said


def test_each_step_is_judged_alone(watch):
    watched = watch()
    assert watched.step(1.0, 2.0) and watched.step(1.0)
    assert not watched.step(1.0, grad=math.nan)
    assert watched.step(1.0)
    assert [taken for _, taken in watched.verdicts] == [True, True, False, True]
    assert watched.verdicts[0][0] == 3.0 and watched.guard.skipped == 1


def test_a_gradient_is_named_where_others_are_finite_and_else_looked_for(watch):
    watched = watch()
    assert not watched.step(1.0, grad=math.nan)  # as clipping by a norm that is NaN leaves them
    assert watched.lines[0]["where"] == "first in the output of layers.0"
    for parameter in watched.layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    watched.layer.weight.grad.fill_(math.inf)
    watched.guard.saw([0, 1], 10, 12, torch.tensor(1.0))
    watched.guard.on_pre_optimizer_step(
        None, SimpleNamespace(global_step=1), None, model=watched.layer
    )
    assert watched.lines[1]["where"] == "first in the gradient of weight"


def test_an_infinite_gradient_under_a_scaler_is_the_scalers_business_until_it_is_at_its_end(watch):
    watched = watch(scale=1024.0)
    assert watched.step(1.0, grad=math.inf)
    assert not watched.step(math.inf)
    assert "scaler 1024" in watched.console.export_text() and watched.lines[0]["scale"] == 1024.0
    assert not watch(scale=1.0).step(1.0, grad=math.inf)


def test_three_bad_steps_in_a_row_stop_the_run_but_not_three_in_all(watch):
    watched = watch()
    for _ in range(3):
        assert not watched.step(math.nan) and not watched.step(math.nan) and watched.step(1.0)
    watched.step(math.nan)
    watched.step(math.nan)
    with pytest.raises(
        TrainingDiverged, match=r"(?s)step 12: .*third such step.*rows: f.jsonl:0.*learning_rate"
    ):
        watched.step(math.nan)


def test_or_roll_back_as_the_recipe_says_a_few_times(watch):
    watched = watch(after_bad_steps="roll_back")
    for times in range(1, guard.ROLL_BACKS + 1):
        watched.step(math.nan), watched.step(math.nan)
        with pytest.raises(RollBack):
            watched.step(math.nan)
        watched.guard.step_back()
        assert watched.guard.rate == 0.5**times
    watched.step(math.nan), watched.step(math.nan)
    with pytest.raises(TrainingDiverged):
        watched.step(math.nan)


def test_a_spike_is_left_out_once_there_is_something_to_hold_it_against(watch):
    watched = watch()
    assert watched.step(1e6)  # the first losses may be anything
    watched = watch()
    for _ in range(guard.SEASONED):
        assert watched.step(2.0)
    assert watched.step(7.9) and not watched.step(32.0)
    assert "more than train.spike_factor = 4 times the highest" in watched.console.export_text()
    fitted = watch()
    for _ in range(guard.SEASONED):
        assert fitted.step(1e-4)
    assert fitted.step(0.9) and not fitted.step(4.0), "a hard row is none"
    quiet = watch(spike_factor=None)
    for _ in range(guard.SEASONED):
        quiet.step(2.0)
    assert quiet.step(1e9)


def test_a_guard_goes_on_as_the_one_that_was_saved(watch):
    first, second = watch(), watch()
    for _ in range(20):
        first.step(2.0)
    first.step(math.nan)
    second.guard.load_state_dict(first.guard.state_dict())
    for watched in (first, second):
        assert not watched.step(9.0), "a spike for both"
        with pytest.raises(TrainingDiverged):
            watched.step(math.nan)


def test_a_checkpoint_from_before_a_step_back_does_not_undo_it(watch):
    watched = watch(after_bad_steps="roll_back")
    before = watched.guard.state_dict()
    watched.guard.step_back()
    watched.guard.load_state_dict(before)
    assert watched.guard.rate == 0.5 and watched.guard.roll_backs == 1


def test_steps_that_are_taken_again_after_a_step_back_are_not_left_out_any_more(watch):
    watched = watch(after_bad_steps="roll_back")
    watched.step(math.nan)
    before = watched.guard.state_dict()
    watched.step(math.nan)
    with pytest.raises(RollBack):
        watched.step(math.nan)
    watched.guard.step_back()
    watched.guard.load_state_dict(before)
    assert watched.guard.skipped == 1  # the first one, which metrics.jsonl still has
    assert not watched.step(math.nan) and not watched.step(math.nan)  # the count begins anew
