"""What watches a run: metrics to disk, progress to the screen, a stop at the first number that is none.

Observers only: nothing here alters the optimization.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers import TrainerCallback

from qlora import hardware
from qlora.cards import Card
from qlora.errors import TrainingDiverged
from qlora.screen import GIB, Screen, duration
from qlora.timeline import Timeline


class TrackedProgress(TrainerCallback):
    """Writes ``metrics.jsonl``, moves the bar, and tells the tracker: one line a log step.

    ``tokens_per_second`` counts tokens that are not padding over the time of training steps alone:
    evaluations and saves do not slow it down on paper. ``data_wait`` is the share of the time of the
    training loop, steps and waits, in which it waited for rows.
    """

    def __init__(self, path: Path, screen: Screen, card: Card, tracker: Any) -> None:
        self.path = path
        self.screen = screen
        self.card = card
        self.tracker = tracker
        self.train_seconds = 0.0
        self.wait_seconds = 0.0  # for rows; in no step's time
        self.steps = 0  # of this process: a resumed run has taken more
        self.tokens = 0
        self.has_learned = False  # a step was taken with a learning rate above zero
        self.timeline = Timeline(card)
        self._step = 0
        self._began = 0.0
        self._logged_seconds = 0.0
        self._logged_wait = 0.0
        self._logged_tokens = 0
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

    @property
    def data_wait(self) -> float:
        """The share of the run so far; 0 to 1."""
        return _share(self.wait_seconds, self.train_seconds)

    def waited(self, seconds: float) -> None:
        """Count what the next step waited for its rows."""
        self.wait_seconds += seconds

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        """Count the tokens of a micro-batch, and see whether it needed more memory than those before."""
        self.tokens += tokens
        self.timeline.saw(self._step, computed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.timeline.between()
        self._step = state.global_step + 1
        self._began = time.perf_counter()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        self.timeline.stepped(model)
        # In fp16 the first steps may be skipped, until the scaler has found its scale.
        if not optimizer.step_was_skipped:
            self.has_learned |= any(group["lr"] > 0 for group in optimizer.param_groups)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.train_seconds += time.perf_counter() - self._began
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
            line["tokens"] = self.tokens
            seconds = self.train_seconds - self._logged_seconds
            line["tokens_per_second"] = round(
                (self.tokens - self._logged_tokens) / max(seconds, 1e-9), 1
            )
            line["data_wait"] = _share(self.wait_seconds - self._logged_wait, seconds)
            self._logged_seconds, self._logged_tokens = self.train_seconds, self.tokens
            self._logged_wait = self.wait_seconds
            line["memory_bytes"], line["peak_memory_bytes"] = hardware.memory_in_use(self.card)
            line["peak_step"] = self.timeline.peak_step
            line["peak_tokens"] = self.timeline.peak_tokens
            line["memory"] = self.timeline.held(model, optimizer)
            self._show(line, state)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.tracker.log({k: v for k, v in line.items() if k != "step"}, state.global_step)

    def _show(self, line: dict[str, Any], state: Any) -> None:
        facts = (
            f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tok/s  "
            f"{line['memory_bytes'] / GIB:.1f} GiB"
            + ("" if self.card.kind == "cuda" else " in the process")
        )
        if self._bar is not None:
            self._bar.update(self._task, facts=facts)
        elif not self.screen.live:
            done = state.global_step
            left = self.train_seconds / max(self.steps, 1) * (state.max_steps - done)
            self.screen.say("training", f"{done}/{state.max_steps}  {facts}  {duration(left)} left")


class StopOnNonFinite(TrainerCallback):
    """Stops the run at the first loss or gradient that is not a finite number, and names the rows.

    The stack would log the NaN as 0.0, go on, and save it over the good checkpoints. With a gradient
    scaler (fp16) an infinite gradient is the scaler's business; there only the loss counts.
    """

    def __init__(self, addresses: Sequence[str], *, scaled: bool) -> None:
        self.addresses = addresses
        self.scaled = scaled
        self._seen: list[tuple[list[int], torch.Tensor]] = []

    def waited(self, seconds: float) -> None:
        """Of no concern here."""

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        """Remember a micro-batch, without waiting for the device."""
        self._seen.append((rows, loss.detach()))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        losses = torch.stack([loss for _, loss in self._seen]).float()
        checked = losses.sum()
        if not self.scaled:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            checked = checked + torch.nn.utils.get_total_norm(grads).to(checked.device)
        if not math.isfinite(checked.item()):  # the only wait for the device in this callback
            self._stop(state.global_step + 1, losses.tolist())
        self._seen.clear()

    def _stop(self, step: int, losses: list[float]) -> None:
        bad = [
            rows
            for (rows, _), loss in zip(self._seen, losses, strict=True)
            if not math.isfinite(loss)
        ]
        what = "the loss" if bad else "the gradient"
        listed = [self.addresses[i] for rows in bad or [r for r, _ in self._seen] for i in rows]
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise TrainingDiverged(
            f"step {step}: {what} is not a finite number; the run is stopped, and nothing of this step "
            f"was kept.\n  rows of the batch: {', '.join(listed[:8])}{more}\n"
            "  Lower train.learning_rate, raise train.warmup_steps, or look at these rows; on a T4 some "
            "models overflow in fp16 (quant.compute_dtype: float32)."
        )


class AfterSave(TrainerCallback):
    """Calls a function with each checkpoint's folder once the trainer has written it."""

    def __init__(self, then: Callable[[Path], None]) -> None:
        self.then = then

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.then(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _share(waited: float, trained: float) -> float:
    return round(waited / max(waited + trained, 1e-9), 4)


def finite(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
