"""What watches a run: metrics to disk, progress to the screen and the tracker.

Observers only: nothing here alters the optimization.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers import TrainerCallback

from qlora import hardware
from qlora.cards import Card
from qlora.screen import GIB, Screen, duration
from qlora.timeline import Timeline


@dataclass
class Tally:
    """Sums over a run. ``loss`` is the sum of those of the ``steps`` that were taken."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0  # for rows; in no step's time

    def __sub__(self, earlier: Tally) -> Tally:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)
        return Tally(*(now - then for now, then in pairs))

    @property
    def mean_loss(self) -> float | None:
        return self.loss / self.steps if self.steps else None

    @property
    def data_wait(self) -> float:
        waited = self.wait_seconds
        return round(waited / max(waited + self.train_seconds, 1e-9), 4)


class TrackedProgress(TrainerCallback):
    """Writes ``metrics.jsonl``, moves the bar, and tells the tracker: one line a log step.

    ``tokens_per_second`` counts tokens that are not padding over the time of training steps alone:
    evaluations and saves do not slow it down on paper. ``data_wait`` is the share of the time of the
    training loop, steps and waits, in which it waited for rows. ``loss`` is the mean over steps that were
    taken. All of it is of the whole run, sessions before a resume included.
    """

    def __init__(self, path: Path, screen: Screen, card: Card, tracker: Any, began: float) -> None:
        self.path = path
        self.screen = screen
        self.card = card
        self.tracker = tracker
        self.began = began  # time.monotonic() of this process's start with the run
        self._earlier: float | None = None  # seconds of earlier sessions
        self.total = Tally()
        self.logged = Tally()  # the total at the last log line
        self.steps = 0  # of this process: a resumed run has taken more
        self.has_learned = False  # a step was taken with a learning rate above zero
        self.timeline = Timeline(card)
        self._session = Tally()  # the total when this process began
        self._step = 0
        self._began = 0.0
        self._tokens_before = 0  # the step
        self._unwritten = 0  # lines that the disk did not take
        self._torn = False  # the last one
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @contextmanager
    def shown(self, total_steps: int, done: int = 0) -> Iterator[None]:
        """The training bar, for as long as the block runs."""
        if not self.screen.live:
            yield
            return
        with self.screen.bar() as bar:
            self._bar = bar
            self._task = bar.add_task("training", total=total_steps, completed=done, facts="")
            try:
                yield
            finally:
                self._bar = None

    def expect(self, total_steps: int) -> None:
        """The run has another number of steps now."""
        if self._bar is not None:
            self._bar.update(self._task, total=total_steps)

    @property
    def data_wait(self) -> float:
        """The share of the run so far; 0 to 1."""
        return self.total.data_wait

    @property
    def seconds(self) -> float:
        """Of the run so far: loading, measuring and saving included."""
        return (self._earlier or 0.0) + time.monotonic() - self.began

    @property
    def session(self) -> Tally:
        """What this process has done of the run."""
        return self.total - self._session

    def waited(self, seconds: float) -> None:
        """Count what the next step waited for its rows."""
        self.total.wait_seconds += seconds

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        """Count the tokens of a micro-batch, and see whether it needed more memory than those before."""
        self.total.tokens += tokens
        self.timeline.saw(self._step, computed)

    def again(self) -> None:
        """The step is begun anew."""
        self.total.tokens = self._tokens_before

    def judged(self, loss: float, taken: bool) -> None:
        """A step's loss, and whether the optimizer takes it."""
        if taken:
            self.total.loss += loss
            self.total.steps += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.timeline.between()
        self._step = state.global_step + 1
        self._tokens_before = self.total.tokens
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self.timeline.stepped(model)
        # In fp16 the first steps may be skipped, until the scaler has found its scale.
        if not self.has_learned and not optimizer.step_was_skipped:
            self.has_learned = any(
                group["lr"] > 0 and any(p.grad is not None for p in group["params"])
                for group in optimizer.param_groups
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.total.train_seconds += time.perf_counter() - self._began
        self.steps += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any],
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        line: dict[str, Any] = {"step": state.global_step, "time": round(time.time(), 3)}
        line |= {key: finite(value) for key, value in logs.items() if key != "num_tokens"}
        if "loss" in logs:
            since, self.logged = self.total - self.logged, dataclasses.replace(self.total)
            line["loss"] = since.mean_loss  # the Trainer's counts steps that were left out
            line["tokens"] = self.total.tokens
            line["tokens_per_second"] = round(since.tokens / max(since.train_seconds, 1e-9), 1)
            line["data_wait"] = since.data_wait
            line["memory_bytes"], line["peak_memory_bytes"] = hardware.memory_in_use(self.card)
            line["peak_step"] = self.timeline.peak_step
            line["peak_tokens"] = self.timeline.peak_tokens
            line["memory"] = self.timeline.held(model, optimizer)
            self._show(line, state)
        if "train_runtime" in logs and state.global_step < state.max_steps:
            return  # the Trainer sums up what a signal ends, too
        self.write(line)
        self.tracker.log({k: v for k, v in line.items() if k != "step"}, state.global_step)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics; a disk that does not take it is told of once and stops nothing."""
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                # After a torn line a new one begins, or both would be lost.
                file.write("\n" * self._torn + json.dumps(line, allow_nan=False) + "\n")
            self._torn = False
        except OSError as error:
            if not self._unwritten:
                self.screen.say("metrics", f"{self.path.name} cannot be written: {error.strerror}")
            self._unwritten += 1
            self._torn = True

    def state_dict(self) -> dict[str, Any]:
        seen = self.timeline
        return {
            "total": dataclasses.asdict(self.total), "logged": dataclasses.asdict(self.logged),
            "has_learned": self.has_learned, "seconds": self.seconds,
            "peak": (seen.peak_bytes, seen.peak_step, seen.peak_tokens),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.logged = Tally(**state["total"]), Tally(**state["logged"])
        self._session = dataclasses.replace(self.total)
        self.steps = 0
        if self._earlier is None:  # else the run goes back, and time does not
            self._earlier = state["seconds"]
        self.has_learned = state["has_learned"]
        seen = self.timeline
        seen.peak_bytes, seen.peak_step, seen.peak_tokens = state["peak"]

    def _show(self, line: dict[str, Any], state: Any) -> None:
        loss = "none taken" if line["loss"] is None else f"{line['loss']:.3f}"
        facts = (
            f"loss {loss}  {line['tokens_per_second']:,.0f} tok/s  "
            f"{line['memory_bytes'] / GIB:.1f} GiB"
            + ("" if self.card.kind == "cuda" else " in the process")
        )
        if self._bar is not None:
            self._bar.update(self._task, facts=facts)
        elif not self.screen.live:
            done = state.global_step
            left = self.session.train_seconds / max(self.steps, 1) * (state.max_steps - done)
            self.screen.say("training", f"{done}/{state.max_steps}  {facts}  {duration(left)} left")


def finite(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
