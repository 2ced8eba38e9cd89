"""A run that ends in time: steps and schedule are fitted to a limit on the clock.

The pace is measured, not predicted. After the first steps, again whenever the number of steps since has
doubled, and whenever steps have become too slow for those that are left, the steps that still fit are
counted and the schedule is laid over them, so that a cosine ends at its end. When the clock says so the
run stops earlier: what comes after training is kept free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qlora.errors import RecipeError
from qlora.keeping import set_rates
from qlora.screen import Screen, duration

WARM_UP = 2  # steps that are slower than the rest
FIRST_FIT = 5  # steps after them, before the pace is believed
MARGIN = 0.97  # of the time that is left: steps may be longer than the last ones
SPARE = 0.5  # of a step, to be left when the next one begins


class Budget(TrainerCallback):
    """Fits the steps of a run to what is left of its time.

    Args:
        seconds: From ``began`` to the end of the run; None without a limit. A resumed run without one goes
            on over the steps that were fitted before.
        began: ``time.monotonic()`` of the start.
        afterwards: Seconds to keep free for what comes after training.
        rate: What the recipe's learning rate is multiplied by.
        expect: Told a new number of steps.

    Attributes:
        total: Steps that the run has been fitted to; None: the recipe's.
    """

    def __init__(
        self,
        seconds: float | None,
        began: float,
        screen: Screen,
        *,
        afterwards: Callable[[], float],
        rate: Callable[[], float],
        expect: Callable[[int], None],
    ) -> None:
        self.seconds = seconds
        self.deadline = None if seconds is None else began + seconds
        self.screen = screen
        self.afterwards = afterwards
        self.rate = rate
        self.expect = expect
        self.total: int | None = None
        self.trainer: Any = None  # set when it is built
        self.ended_early = False
        self._fitted: int | None = None  # the total, by this process
        self._taken = 0
        self._next_fit = FIRST_FIT
        self._warm = 0.0
        self._began = 0.0  # the step

    def left(self) -> float:
        """Seconds until training must end; infinite without a limit."""
        if self.deadline is None:
            return float("inf")
        return self.deadline - time.monotonic() - self.afterwards()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with steps that were fitted before; refuse a limit that has passed.

        Raises:
            RecipeError: Nothing is left for a step.
        """
        self._taken, self._next_fit = 0, FIRST_FIT
        if self.left() <= 0:
            raise RecipeError(
                f"--budget {duration(self.seconds or 0)}: nothing is left of it for a step but "
                f"{duration(self.afterwards())} that the end of the run needs. Give it more time, or ask "
                "for fewer answers (eval.generate)."
            )
        if self.deadline is not None:
            self.total = self._fitted  # to this limit, before a step back; an earlier one is over
        if self.total is not None:
            self._lay(self.total, state)
            self.screen.say("budget", f"on over the {self.total:,} steps that were fitted before")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.deadline is None:
            return
        self._taken += 1
        now = time.monotonic()
        if self._taken == WARM_UP:
            self._warm = now
        since = self._taken - WARM_UP
        pace = (now - self._warm) / since if since > 0 else 0.0  # evaluations and saves included
        too_many = (state.max_steps - state.global_step + SPARE) * pace > self.left()
        if since >= self._next_fit:
            self._next_fit *= 2
            self._fit(pace, state)
        elif since >= FIRST_FIT and too_many:
            self._fit(pace, state)
        # Where steps get slower, the next one is like the last.
        needed = (1 + SPARE) * max(pace, now - self._began) if since > 0 else 0.0
        if state.global_step < state.max_steps and self.left() < needed:
            self.ended_early = True
            self.screen.say("budget", f"no time for another step after {state.global_step:,}")
        if self.ended_early or state.global_step >= state.max_steps:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _fit(self, pace: float, state: Any) -> None:
        possible = state.global_step + int((self.left() / max(pace, 1e-6) - SPARE) * MARGIN)
        total = max(min(self.trainer.total_steps, possible), state.global_step)
        if total == state.max_steps:
            return
        self._fitted = total
        self._lay(total, state)
        of = self.trainer.total_steps
        self.screen.say(
            "budget",
            f"{pace:.3g} s a step and {duration(max(self.left(), 0))} left: the run ends with step "
            f"{total:,}" + (f" instead of {of:,}" if total < of else ", as the recipe says"),
        )

    def _lay(self, total: int, state: Any) -> None:
        """Lay schedule and steps over another number of them, from where the run is."""
        self.total = state.max_steps = total
        schedule = self.trainer.lr_scheduler
        schedule.lr_lambdas = self.trainer.schedule_over(total) * len(schedule.base_lrs)
        set_rates(self.trainer, self.trainer.args.learning_rate * self.rate())
        self.expect(total)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "of": self.trainer.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Fitted to steps that the recipe does not have any more, if a change of them was allowed.
        self.total = state["total"] if state["of"] == self.trainer.total_steps else None
