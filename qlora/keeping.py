"""A training kept on disk and taken up again: everything that decides its next step.

The Trainer of transformers pickles optimizer, schedule, scaler and random state, and reads what it finds
of them. Here they are one tree in safetensors and JSON, and a resumed run proves before its first step
that all of it was put back.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from qlora import adapter, alive, bnb, randomness, rundir, statefile, store, timeline
from qlora.errors import CheckpointError
from qlora.rundir import Run
from qlora.screen import Screen

MAX_FAILURES = 3  # checkpoints in a row that the disk did not take: then the run stops
IDENTITY = "identity.json"
_PARTS = {"weights", "optimizer", "schedule", "scaler", "observers", "random"}


class Stateful(Protocol):
    """Something that a resumed run must know of its past."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Keeper(TrainerCallback):
    """Writes the checkpoints of a run and restores one.

    The Trainer calls :meth:`save`, and on a resume :meth:`weights`, :meth:`optimizer` and :meth:`random`,
    at the moments when it would write and read its own files.

    Args:
        run: Where they are kept.
        base_name: What the recipe calls the base.
        keep: How many of them.
        every_seconds: The longest time between two; None: only every ``train.save_steps``.
        identity: What the run is; see :mod:`qlora.identity`. Every checkpoint carries it.
        observers: By name, what else has a state.
        rate: What the recipe's learning rate is multiplied by.
        restart_optimizer: A resume begins with an optimizer that has no state: it is another one.
        proof: Called with each adapter that was written, before its checkpoint gets its name.
        then: Called with each checkpoint.
        way_back: A command that goes on with the run, for messages.
        screen: Where it is told.
    """

    def __init__(
        self,
        run: Run,
        *,
        base_name: str,
        keep: int,
        every_seconds: float | None,
        identity: dict[str, Any],
        observers: Mapping[str, Stateful],
        rate: Callable[[], float],
        restart_optimizer: bool,
        proof: Callable[[Path, Path], None],
        then: Callable[[Path], None],
        way_back: str,
        screen: Screen,
    ) -> None:
        self.run = run
        self.base_name = base_name
        self.keep = keep
        self.every_seconds = every_seconds
        self.identity = identity
        self.observers = observers
        self.rate = rate
        self.restart_optimizer = restart_optimizer
        self.proof = proof
        self.then = then
        self.way_back = way_back
        self.screen = screen
        self.longest_save = 0.0  # seconds
        self._failures = 0
        self._saved = time.monotonic()
        self._state: dict[str, Any] = {}
        self._epoch: dict[str, Any] = {}  # the random state that the epoch's rows were drawn with
        self._missing: set[str] = set()

    # --- saving

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every_seconds is not None:
            control.should_save |= time.monotonic() - self._saved >= self.every_seconds

    def save(self, trainer: Any) -> None:
        """Keep the training as it is after its last step; tell, and go on, if the disk does not take it.

        Raises:
            CheckpointError: It did not for the third time in a row, or the adapter is dead.
            TrainingDiverged: A weight is not a finite number.
        """
        began = time.monotonic()
        step = trainer.state.global_step
        alive.require_finite(trainer.model, step)
        try:
            store.require_room(self.run.checkpoints, bytes_needed(trainer))
            checkpoint = store.write(
                self.run.checkpoints, step, lambda folder: self._fill(folder, step, trainer)
            )
        except (OSError, SafetensorError) as error:
            self._failed(step, getattr(error, "strerror", None) or str(error))
        else:
            self._failures = 0
            self.restart_optimizer = False  # from here on they hold this one's state
            store.rotate(self.run.checkpoints, self.keep, checkpoint)
            self.then(checkpoint)
        self._saved = time.monotonic()
        self.longest_save = max(self.longest_save, self._saved - began)

    def _fill(self, folder: Path, step: int, trainer: Any) -> None:
        adapter.save(trainer.model, folder, self.base_name)
        self.proof(folder, self.run.checkpoints / f"checkpoint-{step}")
        scaler = trainer.accelerator.scaler
        statefile.write(
            folder,
            {
                "optimizer": trainer.optimizer.state_dict(),
                "schedule": trainer.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "observers": {name: one.state_dict() for name, one in self.observers.items()},
                "random": randomness.take(),
                "epoch": self._epoch,
            },
        )
        # The Trainer reads where it was from here. Its intervals are the recipe's, not the checkpoint's.
        state = dataclasses.replace(
            trainer.state, log_history=[], logging_steps=None, eval_steps=None, save_steps=None
        )
        state.save_to_json(str(folder / "trainer_state.json"))
        rundir.write_json(folder / IDENTITY, self.identity)

    def _failed(self, step: int, reason: str) -> None:
        self._failures += 1
        last = store.newest(self.run.checkpoints)
        kept = f"the last whole one is {last.name}" if last else "no checkpoint is there yet"
        said = f"step {step} was not saved: {reason}; {kept}"
        if self._failures >= MAX_FAILURES:
            raise CheckpointError(
                f"{self.run.checkpoints}: {said}. It failed {self._failures} times in a row, so the run is "
                f"stopped. Free some space, then: "
                + (self.way_back if last else "start the run again.")
            )
        self.screen.say("saving", f"{said}; the run goes on")

    # --- restoring

    def weights(self, trainer: Any, checkpoint: Path) -> None:
        """Put the adapter of a checkpoint into the model.

        Raises:
            CheckpointError: It is not of this model, or its state cannot be read.
        """
        self._state = _state_in(checkpoint)
        self._missing = set(_PARTS)
        adapter.restore(trainer.model, checkpoint)
        self._missing.remove("weights")

    def optimizer(self, trainer: Any) -> None:
        """Put back the state of optimizer, schedule, scaler and observers.

        Raises:
            CheckpointError: A part of it is missing, or is of another optimizer.
        """
        scaler = trainer.accelerator.scaler
        groups = [_settings(group) for group in trainer.optimizer.param_groups]
        try:
            if not self.restart_optimizer:
                trainer.optimizer.load_state_dict(self._state["optimizer"])
                bnb.page_again(trainer.optimizer)
            trainer.lr_scheduler.load_state_dict(self._state["schedule"])
            if (scaler is None) != (self._state["scaler"] is None):
                raise ValueError("one of the two computes in float16 and has a gradient scaler")
            if scaler is not None:
                scaler.load_state_dict(self._state["scaler"])
            self._observers()
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.run.dir}: the checkpoint's state does not fit this run: {error}. The "
                "checkpoint is as it was; resume with the recipe and the version of qlora that wrote it."
            ) from None
        # The recipe decides, not the checkpoint: they differ where a change was allowed.
        for group, settings in zip(trainer.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        set_rates(trainer, trainer.args.learning_rate * self.rate())
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        self._missing -= {"optimizer", "schedule", "scaler", "observers"}

    def _observers(self) -> None:
        for name, one in self.observers.items():
            one.load_state_dict(self._state["observers"][name])

    def finished(self, trainer: Any, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the last step; then its weights are put back, and that is all."""
        budget: Any = self.observers["budget"]
        try:
            budget.load_state_dict(_state_in(checkpoint)["observers"]["budget"])
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{checkpoint}: its state is of another version of qlora."
            ) from None
        if store.step_of(checkpoint) < (budget.total or trainer.total_steps):
            return False
        self.weights(trainer, checkpoint)
        self._observers()
        trainer.state = state_of(checkpoint)  # what is measured now is of the last step
        self._missing, self._state = set(), {}
        return True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Some samplers draw the rows of an epoch from the common generator: again as they were drawn."""
        if self._state:
            randomness.put(self._state["epoch"])
        self._epoch = randomness.take()

    def random(self, begun: bool) -> None:
        """Put back the random generators; called last, after rows that were trained on were passed over.

        Args:
            begun: The epoch's rows have been drawn; else they will be now.
        """
        randomness.put(self._state["random"])
        if not begun:
            self._epoch = self._state["random"]
        self._missing.remove("random")
        self._state = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert not self._missing, f"resumed without {sorted(self._missing)}"


def _state_in(checkpoint: Path) -> dict[str, Any]:
    state = statefile.read(checkpoint)
    missing = sorted((_PARTS | {"epoch"}) - {"weights"} - state.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint}: it holds no state of {', '.join(missing)}: another version of qlora wrote it. "
            "Resume with that version, or start the run again."
        )
    return state


def bytes_needed(trainer: Any) -> int:
    """Bytes that the next checkpoint takes on disk, from what is in memory."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    state = timeline.total(timeline.state_tensors(trainer.optimizer))
    return timeline.total(trained) + state + 2**20  # and the small files


def set_rates(trainer: Any, peak: float) -> None:
    """Let the schedule go on from where it is with another peak learning rate."""
    schedule, groups = trainer.lr_scheduler, trainer.optimizer.param_groups
    schedule.base_lrs = [peak] * len(groups)
    for group, scale in zip(groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * scale(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What of a group a recipe sets; some optimizers keep state there, too."""
    return {k: group[k] for k in ("weight_decay", "betas", "eps") if k in group}


def state_of(checkpoint: Path) -> TrainerState:
    """Where the Trainer was at a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
