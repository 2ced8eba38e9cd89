"""The dress rehearsal: the largest real step of a run, on its card, before the first one that counts.

What :mod:`qlora.rehearsal` follows on tensors without contents is done here with the loaded model, the
data and the prepared trainer: memory runs out in the first seconds, or not at all. Nothing of it stays.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from qlora import adapter, hardware, memory, phantom, rundir, sft, timeline
from qlora.cards import Card
from qlora.errors import DoesNotFit, RecipeError
from qlora.memory import Plan
from qlora.packing import Layout
from qlora.rundir import Run
from qlora.screen import GIB, Screen
from qlora.settings import Recipe
from qlora.tracing import MemoryTracer

DRAWN_STEPS = 256  # looked at for a fuller sequence than the longest rows make


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal measured. Bytes are of tensors: the plan's without its overhead."""

    sequences: int  # of the largest micro-batch
    length: int
    planned_sequences: int
    planned_length: int
    micro_batches: int
    measured_bytes: int
    planned_bytes: int
    reserved_bytes: int | None  # what the allocator took from the card; None on a CPU
    seconds: float

    @property
    def shape(self) -> str:
        return f"{self.sequences} x {self.length:,}"

    @property
    def planned_shape(self) -> str:
        return f"{self.planned_sequences} x {self.planned_length:,}"

    def __str__(self) -> str:
        planned = "" if self.shape == self.planned_shape else f" for {self.planned_shape}"
        reserved = (
            ""
            if self.reserved_bytes is None
            else f" (allocator: {self.reserved_bytes / GIB:.1f} reserved)"
        )
        return (
            f"longest batch {self.shape} tokens: {self.measured_bytes / GIB:.2f} GiB measured beside "
            f"{self.planned_bytes / GIB:.2f} planned{planned}{reserved}, {self.seconds:.1f} s"
        )


def is_wanted(recipe: Recipe, card: Card) -> bool:
    """Whether this recipe rehearses on this card."""
    asked = recipe.train.rehearse
    return card.kind == "cuda" if asked == "auto" else asked


class DressRehearsal(TrainerCallback):
    """Takes the largest step as training begins, after a resume too, and puts everything back.

    Adapter weights, gradients, random state, the modules' modes, the trainer's metrics and the state of
    optimizer and gradient scaler are then what they were, so that the run is bit-identical to one without.

    Attributes:
        found: What was measured; None until it was.
    """

    def __init__(
        self,
        trainer: sft.RowTrainer,
        recipe: Recipe,
        plan: Plan,
        card: Card,
        run: Run,
        screen: Screen,
    ) -> None:
        self.trainer = trainer
        self.recipe = recipe
        self.plan = plan
        self.card = card
        self.run = run
        self.screen = screen
        self.found: Rehearsed | None = None
        self._part = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Rehearse, say what was measured, and write it into ``plan.json``.

        Raises:
            DoesNotFit: The card ran out of memory; says in which part, at which shape, and ways down.
            RecipeError: An adapter cannot be written into the run directory.
        """
        if self.found is not None:  # the run went back to a checkpoint
            return
        began = time.perf_counter()
        step = self._largest_step(self.trainer.train_dataset)
        shape = tuple(step["micro_batches"][0]["input_ids"].shape)
        planned = self._planned_shape()
        try:
            with self.trainer.unnoticed(), as_before(self.trainer):
                measured, reserved = self._perform(step)
        except (RuntimeError, MemoryError) as error:
            if not hardware.ran_out_of_memory(error):
                raise
            at = f"{shape[0]} x {shape[1]:,} tokens"
            if shape != planned:
                at += f" (planned: {planned[0]} x {planned[1]:,})"
            when = f" in the rehearsal before the first step: {self._part}, {at}"
            raise DoesNotFit(memory.explain_out_of_memory(self.plan, when)) from None
        if self.card.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(0)  # from here on the run's own peak is told
        self.found = Rehearsed(
            *shape,
            *planned,
            micro_batches=len(step["micro_batches"]),
            measured_bytes=measured,
            planned_bytes=self.plan.total_bytes - self.plan.terms.get("overhead", 0),
            reserved_bytes=reserved,
            seconds=round(time.perf_counter() - began, 2),
        )
        self.screen.say("rehearsal", str(self.found))
        file = self.run.dir / "plan.json"
        rundir.write_json(file, rundir.read_json(file) | {"rehearsal": asdict(self.found)})

    def _perform(self, step: dict[str, Any]) -> tuple[int, int | None]:
        """A step, an evaluation and a save; returns the peak, and what the allocator reserved for it."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        meter = _Allocator() if self.card.kind == "cuda" else _Traced(trainer)
        # Its state comes first, because it stands beside the passes of every step but the run's first.
        self._part = "optimizer step"
        with meter.watching():
            optimizer = self._stepped_optimizer()
        self._part = "forward and backward"
        for number in range(len(step["micro_batches"])):
            with meter.watching():  # the second one finds the gradients of the first
                trainer.training_step(model, _cut(step, number))
        model.zero_grad()
        if trainer.eval_dataset is not None:
            self._part = "evaluation"
            held_out = self._largest_step(trainer.eval_dataset)
            model.eval()
            with meter.watching():
                trainer.prediction_step(model, _cut(held_out, 0), prediction_loss_only=True)
        self._part = "save"
        self._save()
        del optimizer  # in training its state is there until here
        return meter.read()

    def _stepped_optimizer(self) -> Any:
        """A throw-away optimizer after one step, with the state that would be resident in training."""
        optimizer = self.trainer.spare_optimizer()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        if any(True for _ in timeline.state_tensors(self.trainer.optimizer)):
            optimizer.state.clear()  # a resumed run has its own state there already
        for parameter, state in optimizer.state.items():
            if memory.state_bytes(self.plan.optimizer, parameter.numel())[1]:  # paged in training
                for name in ("state1", "state2"):
                    state.pop(name, None)
        return optimizer

    def _save(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=self.run.dir) as folder:
                adapter.save(self.trainer.model, Path(folder), self.recipe.model.name)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(
                f"run.dir is {self.recipe.run.dir!r}, but an adapter cannot be saved in {self.run.dir}: "
                f"{reason}. Free some space, or choose another with run.dir=DIR."
            ) from None

    def _largest_step(self, rows: Any) -> dict[str, Any]:
        """The first two micro-batches of the largest step of these rows, through the trainer's collator."""
        collator = self.trainer.data_collator
        lengths = np.array(rows["length"][:])
        chosen = largest_step(
            lengths, collator.layout, sft.rows_per_step(self.recipe), self.recipe.train.seed
        )
        step: dict[str, Any] = collator([rows[i] for i in chosen])
        return {k: v[:2] if isinstance(v, list) else v for k, v in step.items()}

    def _planned_shape(self) -> tuple[int, int]:
        sequences = self.recipe.train.per_device_train_batch_size
        length = self.recipe.data.max_length
        flat = self.trainer.data_collator.layout.flat
        return (1, sequences * length) if flat else (sequences, length)


def largest_step(lengths: np.ndarray, layout: Layout, rows: int, seed: int) -> list[int]:
    """Indices of rows whose step has the largest micro-batches that these data give.

    Those are the longest rows, if each has a sequence of its own. Packed, the longest rows may leave gaps
    that shorter ones would fill: then a few hundred drawn steps are looked at too. Of steps as wide as the
    widest, to a sixteenth, one with many rows beside a long one is taken: what the memory-efficient kernel
    of attention allocates grows with rows times the longest.
    """
    steps = [np.argsort(-lengths, kind="stable")[:rows]]
    if layout.packed:
        order = np.random.default_rng(seed).permutation(len(lengths))
        starts = range(0, min(len(order), DRAWN_STEPS * rows), rows)
        steps += [order[start : start + rows] for start in starts]

    def sizes(step: np.ndarray) -> list[int]:
        found = [int(length) for length in lengths[step]]
        shapes = (layout.shape(batch, found) for batch in layout.micro_batches(found)[:2])
        return [sequences * width for sequences, width in shapes]

    def uneven(step: np.ndarray) -> int:
        found = [int(length) for length in lengths[step]]
        batches = layout.micro_batches(found)[:2]
        rows = [[found[i] for one in batch for i in one] for batch in batches]
        return max(len(batch) * max(batch) for batch in rows)

    widest = max(steps, key=sizes)
    if not layout.maskless:
        return [int(i) for i in widest]
    near = [step for step in steps if sizes(step)[0] >= sizes(widest)[0] * 15 // 16]
    return [int(i) for i in max(near, key=uneven)]


@contextmanager
def as_before(trainer: sft.RowTrainer) -> Iterator[None]:
    """After this block weights, gradients, random state and modes of the trainer's model are as before."""
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _copied(trained)
    modes = [(module, module.training) for module in model.modules()]
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        _put_back(trained, weights)
        for parameter in trained:
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _copied(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().to("cpu", copy=True) for p in parameters]  # on the card they would count


def _put_back(parameters: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.data.copy_(copy)


def _cut(step: dict[str, Any], number: int) -> dict[str, Any]:
    """A step of only one of its micro-batches."""
    return {k: v[number : number + 1] if isinstance(v, list) else v for k, v in step.items()}


class _Allocator:
    """The highest point of what torch's CUDA allocator hands out."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats(0)

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self) -> tuple[int, int | None]:
        torch.cuda.synchronize(0)
        return torch.cuda.max_memory_allocated(0), torch.cuda.max_memory_reserved(0)


class _Traced:
    """The highest point of all tensors on a CPU, whose allocator keeps no count."""

    def __init__(self, trainer: sft.RowTrainer) -> None:
        self.tracer = MemoryTracer()
        for category, tensor in phantom.frozen(trainer.model):
            self.tracer.own(category, [tensor])
        self.tracer.own("adapters", (p for p in trainer.model.parameters() if p.requires_grad))
        self.tracer.own("optimizer", timeline.state_tensors(trainer.optimizer))

    def watching(self) -> AbstractContextManager[None]:
        return self.tracer.watching()

    def read(self) -> tuple[int, int | None]:
        return self.tracer.peak_bytes, None
