"""Every step judged before the optimizer takes it: a loss or gradient that would do harm is left out.

The stack would log a NaN as 0.0, go on, and save it over the good checkpoints.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from qlora import diagnosis
from qlora.errors import TrainingDiverged
from qlora.screen import Screen
from qlora.settings import Recipe

WINDOW = 64  # good steps that a loss is held against
SEASONED = 16  # so many are needed before one can be called a spike
HARMLESS = 1.0  # nats: where losses are near zero, a row that is merely hard is no spike
IN_A_ROW = 3  # bad steps: what causes them does not pass by itself
ROLL_BACKS = 3  # in a run
SLOWER = 0.5  # the learning rate after one, as a share of that before


class RollBack(Exception):
    """Three bad steps in a row, and the recipe asks for another try from the last checkpoint."""


class StepGuard(TrainerCallback):
    """Skips a step whose loss or gradient is no finite number, or whose loss is a spike.

    A skipped step changes no weight and no optimizer state; its rows are told and the schedule moves on.
    With a gradient scaler (fp16) an infinite gradient is the scaler's business until it cannot go lower.

    Args:
        recipe: ``train.spike_factor`` and ``train.after_bad_steps``.
        addresses: Of every training row, by its number.
        length_of: Tokens of a row, by its number.
        judged: Told the loss of each step and whether it is taken.
        record: Told each bad step as a line of ``metrics.jsonl``.

    Attributes:
        rate: What the recipe's learning rate is multiplied by, after steps back.
        skipped: Steps that were left out.
        scale: The gradient scaler's value now; None without one.
        blame: Finds where the step computes what is no number.
    """

    def __init__(
        self,
        recipe: Recipe,
        addresses: Sequence[str],
        length_of: Callable[[int], int],
        screen: Screen,
        *,
        judged: Callable[[float, bool], None],
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self.spike_factor = recipe.train.spike_factor
        self.then = recipe.train.after_bad_steps
        self.addresses = addresses
        self.length_of = length_of
        self.screen = screen
        self.judged = judged
        self.record = record
        self.scale: Callable[[], float | None] = lambda: None
        self.blame: Callable[[], str] = lambda: ""
        self.rate = 1.0
        self.skipped = 0
        self.roll_backs = 0
        self._in_a_row = 0
        self._good: deque[float] = deque(maxlen=WINDOW)
        self._seen: list[tuple[list[int], torch.Tensor]] = []

    def waited(self, seconds: float) -> None:
        """Of no concern here."""

    def again(self) -> None:
        """The step is begun anew."""
        self._seen.clear()

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        """Remember a micro-batch, without waiting for the device."""
        self._seen.append((rows, loss.detach()))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Judge the step; the only wait for the device.

        Raises:
            TrainingDiverged: It is the third bad one in a row, and ``after_bad_steps`` is stop.
            RollBack: It is, and ``after_bad_steps`` is roll_back.
        """
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        losses = torch.stack([loss for _, loss in self._seen]).float()
        *parts, gradient = torch.cat([losses, norm.float().to(losses.device)[None]]).tolist()
        loss = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan
        seen, self._seen = self._seen, []
        what = self._complaint(loss, gradient)
        self.judged(loss, not what)
        if not what:
            self._in_a_row = 0
            if math.isfinite(gradient):
                self._good.append(loss)
            return
        bad = [r for (r, _), part in zip(seen, parts, strict=True) if not math.isfinite(part)]
        rows = [i for some in bad or [r for r, _ in seen] for i in some]
        where = "" if math.isfinite(loss) and math.isfinite(gradient) else self._where(model, loss)
        for parameter in model.parameters():
            parameter.grad = None  # every optimizer passes over a parameter without one
        self._skip(state.global_step + 1, what, rows, where)

    def _complaint(self, loss: float, gradient: float) -> str:
        if not math.isfinite(loss):
            return "the loss is not a finite number"
        if not math.isfinite(gradient) and (self.scale() or 0.0) <= 1:  # of None or the least
            return "the gradient is not a finite number"
        if self.spike_factor is not None and len(self._good) >= SEASONED:
            highest = max(self._good)
            if loss > max(self.spike_factor * highest, HARMLESS):
                return (
                    f"the loss, {loss:.4g}, is more than train.spike_factor = {self.spike_factor:g} times "
                    f"the highest of the last {len(self._good)} steps, {highest:.4g}"
                )
        return ""

    def _where(self, model: Any, loss: float) -> str:
        if math.isfinite(loss):
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            # Clipping by a norm that is NaN makes all of them NaN: then they tell nothing.
            if any(bool(grad.isfinite().all()) for _, grad in named):
                return f"first in the gradient of {diagnosis.last_non_finite(named)}"
        return self.blame()

    def _skip(self, step: int, what: str, rows: list[int], where: str) -> None:
        self.skipped += 1
        self._in_a_row += 1
        listed = [f"{self.addresses[i]} ({self.length_of(i):,} tokens)" for i in rows]
        scale = self.scale()
        self.record(
            {
                "step": step, "time": round(time.time(), 3), "skipped": what, "where": where,
                "rows": [self.addresses[i] for i in rows], "lengths": [self.length_of(i) for i in rows],
                "scale": scale,
            }
        )  # fmt: skip
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        said = f"{what}{', ' + where if where else ''}" + (f", scaler {scale:g}" if scale else "")
        rows_said = f"rows: {', '.join(listed[:8])}{more}"
        self.screen.say("guard", f"step {step} is left out: {said}; {rows_said}")
        if self._in_a_row < IN_A_ROW:
            return
        again = self.then == "roll_back" and self.roll_backs < ROLL_BACKS
        told = (
            f"step {step}: {said}. It is the {_ordinal(self._in_a_row)} such step in a row, and nothing of "
            f"them was kept.\n  {rows_said}"
        )
        if again:
            raise RollBack(told)
        raise TrainingDiverged(
            f"{told}\n  Look at these rows, or resume with train.after_bad_steps=roll_back, or with a "
            "lower train.learning_rate and --allow-change train.learning_rate; "
            + (
                "write train.spike_factor: null if such losses are meant."
                if "spike" in what
                else "on a T4 some models overflow in fp16 (quant.compute_dtype: float32)."
            )
        )

    def step_back(self) -> None:
        """The run goes on from a checkpoint, with a smaller learning rate."""
        self.rate *= SLOWER
        self.roll_backs += 1
        self._in_a_row = 0
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rate": self.rate, "skipped": self.skipped, "roll_backs": self.roll_backs,
            "in_a_row": self._in_a_row, "good": list(self._good),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A checkpoint from before a step back knows nothing of it.
        self.rate = min(self.rate, state["rate"])
        self.roll_backs = max(self.roll_backs, state["roll_backs"])
        # What was left out after it is taken again, and metrics.jsonl knows of it no more.
        self.skipped = state["skipped"]
        self._in_a_row = state["in_a_row"] if self.roll_backs == state["roll_backs"] else 0
        self._good = deque(state["good"], maxlen=WINDOW)


def _ordinal(number: int) -> str:
    return {3: "third"}.get(number, f"{number}th")
