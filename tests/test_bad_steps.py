"""NaN, infinities and spikes in a run: nothing that is no number reaches a disk, and the run says why.

The table is :data:`CASES`. ``scripts/torture_steps.py`` prints what every one of them gives.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, save_tiny
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from qlora import guard, randomness, rundir, sft, store, trainer
from qlora.errors import Interrupted, QLoRAError, TrainingDiverged
from qlora.recipe import recipe_from
from qlora.rundir import Run

pytestmark = pytest.mark.usefixtures("one_thread")

SEASONED = 3  # good steps here before a loss can be called a spike; 16 in a real run
ALWAYS = 10**9


# --- what goes wrong


class Fault(TrainerCallback):
    """Something that goes wrong in some steps of a run, and a witness of what the run makes of it.

    Args:
        kind: What. ``loss``: it is multiplied by ``factor``. ``output``: that of the module ``at`` is.
            ``gradient``: that of the weight ``at`` is, on its way; ``left``: when it lies there already.
            ``base`` and ``weight``: the weight ``at`` becomes NaN, and stays it. ``none``: the step has no
            gradient. ``nothing``.
        steps: In which. A weight is changed in the first of them, before it (base) or after it.
        number: Of the pass in the step; None for all of them.
        row: Only in passes that hold this row of the data.
        visits: How often a step goes wrong when it is taken again and again.
        kill: (step, how often it has begun then): the process ends there.
    """

    def __init__(
        self,
        kind: str,
        steps: tuple[int, ...] = (),
        *,
        at: str = "",
        factor: float = math.nan,
        number: int | None = None,
        row: int | None = None,
        visits: int = ALWAYS,
        kill: tuple[int, int] | None = None,
    ) -> None:
        self.kind, self.steps, self.at, self.factor = kind, steps, at, factor
        self.number, self.row, self.visits, self.kill = number, row, visits, kill
        self.begun: dict[int, int] = {}
        self.rows: dict[int, list[list[int]]] = {}  # by step, of its passes
        self.before: dict[int, str] = {}
        self.kept_still: dict[int, bool] = {}  # whether a step changed nothing
        self.bad_rows: dict[int, list[int]] = {}  # by step, of the passes that went wrong
        self.rates: list[tuple[int, float]] = []
        self._seen: list[list[int]] = []
        self.trainer: Any = None

    # As an observer.

    def waited(self, seconds: float) -> None: ...

    def saw(self, rows: list[int], *_: Any) -> None:
        self._seen.append(rows)

    def again(self) -> None:
        self._seen.clear()

    # As a callback: the last one.

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step + 1
        self.begun[step] = self.begun.get(step, 0) + 1
        if self.kill == (step, self.begun[step]):
            raise KeyboardInterrupt
        self._seen = []
        self.before[step] = self.digest()
        self.bad_rows.pop(step, None)
        if self.kind == "base" and step == self.steps[0]:
            self._spoil()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        if self.kind == "none" and state.global_step + 1 in self.steps:
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step + 1
        self.rows[step] = self._seen
        self.kept_still[step] = self.before[step] == self.digest()
        self.rates.append((step, self.trainer.optimizer.param_groups[0]["lr"]))
        if self.kind == "weight" and step == self.steps[0]:
            self._spoil()

    def _spoil(self) -> None:
        with torch.no_grad():
            self._weight().view(-1)[0] = self.factor

    def _weight(self) -> torch.Tensor:
        named = {_bare(name): p for name, p in self.trainer.model.named_parameters()}
        return named[self.at]

    def digest(self) -> str:
        """Of every trained weight and everything the optimizer holds."""
        found = hashlib.sha256()
        held = self.trainer.optimizer.state_dict()["state"]
        states = [(i, k, v) for i, one in sorted(held.items()) for k, v in sorted(one.items())]
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        for tensor in [*trained, *(v for *_, v in states if isinstance(v, torch.Tensor))]:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(raw.numpy().tobytes())
        found.update(
            repr([(i, k, v) for i, k, v in states if not isinstance(v, torch.Tensor)]).encode()
        )
        return found.hexdigest()

    @property
    def is_now(self) -> bool:
        step = self.trainer.state.global_step + 1
        return step in self.steps and self.begun.get(step, 0) <= self.visits

    def install(self, built: sft.RowTrainer) -> sft.RowTrainer:
        """Put it into a trainer."""
        self.trainer, self.hits = built, False
        built.observers = [*built.observers, self]
        built.add_callback(self)
        inner, inner_step = built.compute_loss, built.training_step

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # Which pass it is: also when the guard looks for what is to blame.
            number = next(
                (n for n, one in enumerate(built._passes)
                 if torch.equal(one.batch["input_ids"], inputs["input_ids"])), None,
            )  # fmt: skip
            rows = [] if number is None else built._passes[number].rows
            self.hits = model.training and self.is_now and self.number in (None, number)
            self.hits &= self.row is None or self.row in rows
            loss = inner(model, inputs, *args, **kwargs)
            if self.hits:
                self.bad_rows.setdefault(built.state.global_step + 1, []).extend(rows)
            return loss * self.factor if self.kind == "loss" and self.hits else loss

        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = inner_step(*args, **kwargs)
            if self.kind == "left" and self.is_now:
                self._weight().grad.view(-1)[0] = self.factor
            return loss

        built.compute_loss = compute_loss  # type: ignore[method-assign]
        built.training_step = training_step  # type: ignore[method-assign]
        if self.kind == "output":
            modules = {_bare(name): module for name, module in built.model.named_modules()}
            modules[self.at].register_forward_hook(
                lambda module, args, output: (
                    output * self.factor if self.hits and module.training else output
                )
            )
        if self.kind == "gradient":
            self._weight().register_hook(lambda grad: grad * self.factor if self.hits else grad)
        return built


def _bare(name: str) -> str:
    """The name without peft's wrappers, written another way than :func:`qlora.diagnosis.plain`."""
    parts = name.split(".")
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(part for part in parts if part not in ("base_layer", "default"))


# --- a run with a fault


@dataclass
class Outcome:
    """How a run ended, and what it left."""

    run: Run | None
    error: BaseException | None
    said: str
    fault: Fault
    addresses: list[str]
    lengths: list[int]
    recipe: Any

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [] if self.run is None else self.run.metrics()

    @property
    def losses(self) -> dict[int, float | None]:
        """By step. A step that is there twice is a mistake."""
        found: dict[int, float | None] = {}
        for line in self.lines:
            if "loss" in line:
                assert line["step"] not in found, f"step {line['step']} is in metrics.jsonl twice"
                found[line["step"]] = line["loss"]
        return found

    @property
    def skipped(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "skipped" in line]

    @property
    def adapter(self) -> bytes:
        assert self.run is not None
        return (self.run.adapter / "adapter_model.safetensors").read_bytes()

    @property
    def in_words(self) -> str:
        """What became of the run."""
        left_out = ", ".join(str(line["step"]) for line in self.skipped) or "none"
        if self.error is None:
            backs = self.run.result["roll_backs"] if self.run else 0
            return f"ended well; left out: {left_out}" + (
                f"; rolled back {backs} times" if backs else ""
            )
        return f"{type(self.error).__name__}: {self.error}"

    def on_disk(self) -> tuple[int, list[str]]:
        """How many files of tensors there are, and in which of them a number is none."""
        files = [] if self.run is None else sorted(self.run.dir.rglob("*.safetensors"))
        bad = [
            f"{path.relative_to(self.run.dir)}: {name}"  # type: ignore[union-attr]
            for path in files
            for name, tensor in load_file(path).items()
            if not bool(tensor.isfinite().all())
        ]
        return len(files), bad


class Stable:
    """A base, its rows, and runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny(folder / "base")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self._reference = functools.cache(
            lambda changes, steps: self.run(Fault("none", steps), dict(json.loads(changes)))
        )

    def reference(self, changes: Mapping[str, Any], steps: tuple[int, ...]) -> Outcome:
        """The run in which the gradient of these steps was None, and nothing went wrong."""
        return self._reference(json.dumps(sorted(changes.items())), steps)

    def recipe(self, changes: Mapping[str, Any], folder: Path) -> Any:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.folder / "base")},
            "data": {
                "train": str(self.folder / "rows.jsonl"), "max_length": 64, "packing": False,
                "held_out_fraction": 0.0,
            },
            "lora": {"r": 4},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "warmup_steps": 0,
                "activation_checkpointing": False, "rehearse": False, "lr_scheduler_type": "constant",
                "save_total_limit": 20,
            },
            "run": {"dir": str(folder), "name": "tiny"},
        }  # fmt: skip
        for address, value in changes.items():
            section, _, key = address.partition("__")
            values[section][key] = value
        return recipe_from(values)

    def run(self, fault: Fault, changes: Mapping[str, Any], *, resume: bool = False) -> Outcome:
        """A run with something wrong in it; what it was resumed after, if that is asked for."""
        number = 1 + len(list(self.folder.glob("runs-*"))) - resume
        folder = self.folder / f"runs-{number}"
        recipe = self.recipe(changes, folder)
        said, held, error = io.StringIO(), {}, None
        original = sft.build

        def build(*args: Any, **kwargs: Any) -> sft.RowTrainer:
            held["prepared"] = args[5]
            return fault.install(original(*args, **kwargs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "build", build)
            patch.setattr(guard, "SEASONED", SEASONED)
            patch.setenv("WANDB_MODE", "disabled")
            patch.setenv("QLORA_CACHE", str(self.folder / "cache"))
            started = rundir.open_run(folder).dir if resume else None
            try:
                trainer.train(recipe, resume=started, console=Console(file=said, width=2000))
            except (QLoRAError, KeyboardInterrupt) as found:
                error = found
        runs = list(folder.glob("*/*"))
        prepared = held["prepared"]
        return Outcome(
            Run(runs[0]) if runs else None, error, said.getvalue(), fault, list(prepared.addresses),
            [len(row["input_ids"]) for row in prepared.train], recipe,
        )  # fmt: skip


# --- the table


@dataclass(frozen=True)
class Case:
    """A fault, and how a run with it has to end.

    Attributes:
        skips: Steps that are left out, in the order in which they are taken.
        where: What is to blame, as a pattern; empty: nobody is named, as of a spike.
        stops: The step in which the run ends, if it does.
        says: More patterns of what it ends with.
        roll_backs: Steps back that it takes first.
    """

    name: str
    fault: Callable[[], Fault]
    changes: Mapping[str, Any] = field(default_factory=dict)
    skips: tuple[int, ...] = ()
    where: str = ""
    stops: int | None = None
    says: tuple[str, ...] = ()
    roll_backs: int = 0
    same: bool = True  # the rest is as if the steps left out had had no gradient
    check: Callable[[Outcome], list[str]] = lambda outcome: []

    def outcome(self, stable: Stable) -> Outcome:
        fault = self.fault()
        outcome = stable.run(fault, self.changes)
        if fault.kill is not None:
            assert isinstance(outcome.error, Interrupted), outcome.error
            outcome = stable.run(fault, self.changes, resume=True)
        return outcome

    def of(self, outcome: Outcome) -> tuple[int, ...]:
        """The steps that are left out: of a bad row, those that hold it."""
        row, taken = outcome.fault.row, outcome.fault.rows
        if row is None:
            return self.skips
        return tuple(step for step in taken if any(row in some for some in taken[step]))

    def problems(self, outcome: Outcome, stable: Stable) -> list[str]:
        """What is not as it should be."""
        found: list[str] = []
        skips = self.of(outcome)

        def require(holds: object, said: str) -> None:
            if not holds:
                found.append(said)

        files, bad = outcome.on_disk()
        require(not bad, f"not finite on disk: {bad}")
        if self.stops is None:
            if outcome.error is not None or outcome.run is None:
                return [*found, f"it ended with {type(outcome.error).__name__}: {outcome.error}"]
            result = outcome.run.result
            require(files >= 3, f"only {files} files of tensors")
            require(result["skipped_steps"] == len(skips), f"{result['skipped_steps']} skipped")
            require(result["roll_backs"] == self.roll_backs, f"{result['roll_backs']} roll-backs")
            require(result["learning_rate_factor"] == 0.5**self.roll_backs, "another factor")
            last = outcome.recipe.train.max_steps
            every = outcome.recipe.train.logging_steps
            logged = [s for s in range(1, last + 1) if s == 1 or not s % every]
            require(list(outcome.losses) == logged, f"logged steps: {list(outcome.losses)}")
            if every == 1:
                for step, loss in outcome.losses.items():
                    require((loss is None) == (step in skips), f"step {step}: loss {loss}")
        else:
            self._stopped(outcome, require)
        self._skipped(outcome, require)
        if self.same and self.stops is None and not self.roll_backs:
            usual = stable.reference(self.changes, skips)
            require(usual.error is None and usual.adapter == outcome.adapter, "another adapter")
            differ = [
                s for s, loss in outcome.losses.items()
                if s not in skips and usual.losses[s] != loss
            ]  # fmt: skip
            if outcome.recipe.train.logging_steps == 1:
                require(not differ, f"other losses at {differ}")
        return found + self.check(outcome)

    def _stopped(self, outcome: Outcome, require: Callable[[object, str], None]) -> None:
        error = outcome.error
        if not isinstance(error, TrainingDiverged) or outcome.run is None:
            require(False, f"it ended with {type(error).__name__}: {error}")
            return
        said, run = str(error), outcome.run
        require(error.exit_code == 2, f"exit code {error.exit_code}")
        require(f"step {self.stops}: " in said, f"not of step {self.stops}: {said}")
        for part in self.says:
            require(re.search(part, said), f"does not say {part!r}: {said}")
        last = store.newest(run.checkpoints)
        named = (
            "before the first checkpoint" if last is None else f"{last}.\n  Go on from it: qlora"
        )
        require(named in said, f"does not name the last checkpoint: {said}")
        require(not run.adapter.exists() and not run.is_complete, "an adapter is there")

    def _skipped(self, outcome: Outcome, require: Callable[[object, str], None]) -> None:
        lines, fault, skips = outcome.skipped, outcome.fault, self.of(outcome)
        require(tuple(line["step"] for line in lines) == skips, f"left out: {lines}")
        for line in lines:
            step = line["step"]
            rows = [i for some in fault.rows.get(step, [fault._seen]) for i in some]
            if math.isfinite(fault.factor) or "gradient" in line["skipped"] or fault.kind == "base":
                expected = rows if step in fault.rows else None
            else:
                expected = fault.bad_rows[step][: len(line["rows"])]
            if expected is not None:
                named = [outcome.addresses[i] for i in expected]
                require(line["rows"] == named, f"step {step}: rows {line['rows']}, not {named}")
                lengths = [outcome.lengths[i] for i in expected]
                require(line["lengths"] == lengths, f"step {step}: lengths {line['lengths']}")
            require(line["scale"] is None, f"step {step}: scale {line['scale']}")
            matches = re.fullmatch(self.where, line["where"])
            require(matches, f"step {step}: {line['where']!r} is to blame")
            require(
                f"step {step} is left out: {line['skipped']}" in outcome.said, "nothing was said"
            )
            if step in fault.kept_still:
                require(fault.kept_still[step], f"step {step} changed something")
        taken = [s for s, still in fault.kept_still.items() if still and s not in skips]
        require(fault.kind == "none" or not taken, f"steps {taken} changed nothing")


OFF = {"train__kernels": "off"}
NARROW = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 3}
EIGHT = {"train__optim": "adamw_8bit", "lora__r": 64, "train__learning_rate": 1e-3}
LONG = {"train__max_steps": 9}
BACK = {"train__after_bad_steps": "roll_back"}
LAYER = "model.layers.1"
LORA_A = "model.layers.0.self_attn.q_proj.lora_A"
NORM = "model.layers.0.input_layernorm"
ITSELF = "first in the loss itself"


def _mean_of_those_taken(outcome: Outcome) -> list[str]:
    by_two = outcome.losses
    each = STABLE[0].reference({}, (3,)).losses
    wanted = {1: each[1], 2: each[2], 4: each[4], 6: (each[5] + each[6]) / 2}  # type: ignore[operator]
    # Step 1 has a line of its own; step 4's is of 3 and 4, and 3 was left out.
    return [] if by_two == pytest.approx(wanted, rel=1e-12) else [f"{by_two}, not {wanted}"]


def _null_where_none_was(outcome: Outcome) -> list[str]:
    nulls = [step for step, loss in outcome.losses.items() if loss is None]
    return [] if nulls == [4] else [f"null at {nulls}, not at 4 alone"]


def _rates(*expected: tuple[int, float]) -> Callable[[Outcome], list[str]]:
    """Steps in the order in which they were taken, with the learning rate by the recipe's."""

    def check(outcome: Outcome) -> list[str]:
        peak = outcome.recipe.train.learning_rate
        found = [(step, rate / peak) for step, rate in outcome.fault.rates]
        logged = {s: r / peak for s, r in _logged_rates(outcome).items()}
        wrong = [] if found == list(expected) else [f"rates {found}, not {list(expected)}"]
        last = dict(expected)
        if any(last.get(s) != r for s, r in logged.items() if s in last):
            wrong.append(f"logged rates {logged}, not {last}")
        return wrong

    return check


def _logged_rates(outcome: Outcome) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in outcome.lines if "loss" in line}


def _same_rows_again(outcome: Outcome) -> list[str]:
    taken = STABLE[0].reference(LONG, ()).fault.rows
    return [] if outcome.fault.rows == taken else ["other rows"]


def _exploded_or_finite(outcome: Outcome) -> list[str]:
    if outcome.error is None:
        return [] if outcome.run and outcome.run.is_complete else ["it did not end"]
    said = str(outcome.error)
    named = "rows: rows.jsonl:" in said or "not finite any more" in said
    return [] if isinstance(outcome.error, TrainingDiverged) and named else [f"it said {said}"]


class _Explodes(Case):
    """Whatever becomes of it, it ends by one of the two ways."""

    def problems(self, outcome: Outcome, stable: Stable) -> list[str]:
        _, bad = outcome.on_disk()
        found = [f"not finite on disk: {bad}"] if bad else []
        result = outcome.run.result if outcome.run and outcome.run.is_complete else None
        if result is not None and result["skipped_steps"] != len(outcome.skipped):
            found.append(
                f"{result['skipped_steps']} skipped, {len(outcome.skipped)} in the metrics"
            )
        return found + self.check(outcome)


def _steps(first: int, last: int, rate: float) -> list[tuple[int, float]]:
    return [(step, rate) for step in range(first, last + 1)]


def _loss(*steps: int, **more: Any) -> Callable[[], Fault]:
    return lambda: Fault("loss", steps, **more)


def _at(kind: str, at: str, *steps: int, **more: Any) -> Callable[[], Fault]:
    return lambda: Fault(kind, steps, at=at, **more)


CASES = (
    # a loss that is no number
    Case("NaN loss, first step", _loss(1), skips=(1,), where=ITSELF),
    Case("NaN loss, right before a save", _loss(3), OFF, skips=(3,), where=ITSELF),
    Case("NaN loss, right after a save", _loss(4), skips=(4,), where=ITSELF),
    Case("NaN loss, last step", _loss(6), OFF, skips=(6,), where=ITSELF),
    Case("infinite loss", _loss(2, factor=math.inf), skips=(2,), where=ITSELF),
    Case("NaN loss, two steps in a row, twice", _loss(1, 2, 4, 5), skips=(1, 2, 4, 5), where=ITSELF),
    Case("NaN loss, first pass of three", _loss(2, number=0), NARROW, skips=(2,), where=ITSELF),
    Case("NaN loss, last pass of three", _loss(5, number=2), NARROW, skips=(5,), where=ITSELF),
    Case("NaN loss with dropout", _loss(2), {"lora__lora_dropout": 0.2}, skips=(2,), where=ITSELF),
    Case("NaN loss, recomputed, 8-bit optimizer", _loss(2),
         EIGHT | {"train__activation_checkpointing": True}, skips=(2,), where=ITSELF),
    Case("NaN loss from step 4 on", _loss(4, 5, 6), skips=(4, 5, 6), where=ITSELF, stops=6,
         says=("third such step", "rows: rows.jsonl:")),
    # a module's output
    Case("NaN output of a layer, kernels", _at("output", LAYER, 2), skips=(2,),
         where=f"first in the output of {LAYER}"),
    Case("NaN output of a layer, libraries", _at("output", LAYER, 5), OFF, skips=(5,),
         where=f"first in the output of {LAYER}"),
    Case("NaN output of a linear", _at("output", "model.layers.0.mlp.down_proj", 1), OFF, skips=(1,),
         where="first in the output of model.layers.0.mlp.down_proj"),
    Case("infinite output of an A", _at("output", LORA_A, 3, factor=math.inf), OFF, skips=(3,),
         where=f"first in the output of {LORA_A}"),
    Case("NaN output of the last norm, recomputed", _at("output", "model.norm", 6),
         OFF | {"train__activation_checkpointing": True}, skips=(6,),
         where="first in the output of model.norm"),
    Case("NaN output in the second pass of three", _at("output", "model.layers.0", 2, number=1),
         NARROW, skips=(2,), where="first in the output of model.layers.0"),
    # a gradient
    Case("NaN gradient of one weight, kernels", _at("gradient", f"{LORA_A}.weight", 2), skips=(2,),
         where=f"first in the gradient of {LORA_A}.weight"),
    Case("NaN gradient of one weight, libraries", _at("gradient", f"{LORA_A}.weight", 4), OFF, skips=(4,),
         where=f"first in the gradient of {LORA_A}.weight"),
    Case("infinite gradient", _at("gradient", f"{LAYER}.mlp.up_proj.lora_B.weight", 3, factor=math.inf),
         skips=(3,), where=f"first in the gradient of {LAYER}.mlp.up_proj.lora_B.weight"),
    Case("NaN gradient, second pass of three, other clipping",
         _at("gradient", f"{LORA_A}.weight", 2, number=1), NARROW | {"train__max_grad_norm": 1e9},
         skips=(2,), where=f"first in the gradient of {LORA_A}.weight"),
    Case("NaN in a gradient that no second pass has", _at("left", f"{LORA_A}.weight", 5), skips=(5,),
         where="a second pass of it is finite"),
    Case("NaN gradient from the first step on", _at("gradient", f"{LORA_A}.weight", 1, 2, 3),
         skips=(1, 2, 3), where=f"first in the gradient of {LORA_A}.weight", stops=3),
    # a weight
    Case("NaN in the base, from the first step on", _at("base", f"{NORM}.weight", 1, 2, 3), skips=(1, 2, 3),
         where=f"first in the output of {NORM}", stops=3),
    Case("NaN in the base after a save", _at("base", f"{NORM}.weight", 4, 5, 6), OFF, skips=(4, 5, 6),
         where=f"first in the output of {NORM}", stops=6),
    Case("NaN in the adapter right before a save", _at("weight", f"{LORA_A}.weight", 6),
         {"train__max_steps": 8}, stops=6, says=("lora_A.* is not finite any more",)),
    Case("NaN in the adapter at the end, no save to come", _at("weight", f"{LORA_A}.weight", 6),
         {"train__save_steps": 4}, stops=6, says=("lora_A.* is not finite any more",)),
    # data and recipe
    Case("NaN for one row", lambda: Fault("loss", tuple(range(1, 11)), row=7), {"train__max_steps": 10},
         skips=(), where=ITSELF, same=False),
    _Explodes("learning rate of 0.9", lambda: Fault("nothing"),
              {"train__learning_rate": 0.9, "train__optim": "adamw_torch"}, check=_exploded_or_finite),
    _Explodes("learning rate of 0.9, 8-bit optimizer", lambda: Fault("nothing"),
              EIGHT | {"train__learning_rate": 0.9, "train__save_steps": 1}, check=_exploded_or_finite),
    _Explodes("learning rate of 0.9, SGD, lora_alpha of 1e20",
        lambda: Fault("nothing"),
        {
            "train__learning_rate": 0.9, "train__optim": "sgd", "train__max_grad_norm": 1e9,
            "lora__lora_alpha": 1e20, "train__save_steps": 1,
        },
        check=_exploded_or_finite),
    # spikes
    Case("spike", _loss(5, factor=1e4), EIGHT, skips=(5,)),
    Case("three spikes in a row", _loss(5, 6, 7, factor=1e4), LONG, skips=(5, 6, 7), stops=7,
         says=("train.spike_factor: null",)),
    Case("another level", _loss(*range(6, 10), factor=1e4), LONG, skips=(6, 7, 8), stops=8),
    Case("spikes that are meant", _loss(5, 6, 7, factor=1e4), {"train__spike_factor": None}, same=False),
    # what is logged
    Case("two steps a line, one of them left out", _loss(3), {"train__logging_steps": 2}, skips=(3,),
         where=ITSELF, check=_mean_of_those_taken),
    Case("two steps a line, both left out", _loss(3, 4), {"train__logging_steps": 2}, skips=(3, 4),
         where=ITSELF, check=_null_where_none_was),
    # steps back
    Case("three NaN once, rolled back", _loss(4, 5, 6, visits=1), LONG | BACK, roll_backs=1,
         check=lambda o: _same_rows_again(o) + _rates(
             *_steps(1, 5, 1.0), *_steps(4, 9, 0.5))(o)),
    Case("rolled back three times, and stopped", _loss(*range(7, 10), factor=1e4), LONG | BACK | OFF,
         skips=(7, 8, 9), stops=9, roll_backs=3,
         check=_rates(*_steps(1, 8, 1.0), *_steps(7, 8, 0.5), *_steps(7, 8, 0.25), *_steps(7, 8, 0.125))),
    Case("nothing to roll back to", _loss(1, 2, 3), BACK, skips=(1, 2, 3), where=ITSELF, stops=3,
         says=("There is no checkpoint yet to go back to",)),
)  # fmt: skip
STABLE: list[Stable] = []  # the one in use: some cases look at other runs


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stable]:
    made = Stable(tmp_path_factory.mktemp("stable"))
    STABLE.append(made)
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()
    STABLE.clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_that_is_no_number_is_kept_and_the_run_says_why(stable: Stable, case: Case) -> None:
    assert case.problems(case.outcome(stable), stable) == []


def test_the_table_has_forty_cases() -> None:
    assert len(CASES) == len({case.name for case in CASES}) == 40


# --- steps back, and a process that ends


@pytest.mark.parametrize(
    ("kill", "visits"),
    [((4, 2), 1), ((5, 2), 1), ((7, 1), 1), ((4, 2), ALWAYS), ((5, 2), ALWAYS)],
    ids=[
        "at once",
        "a step later",
        "after the next checkpoint",
        "at once, in vain",
        "later, in vain",
    ],
)
def test_a_run_that_was_rolled_back_and_killed_goes_on_as_if_it_had_not_been_killed(
    stable: Stable, kill: tuple[int, int], visits: int
) -> None:
    changes = LONG | BACK
    straight = stable.run(Fault("loss", (4, 5, 6), visits=visits), changes)
    fault = Fault("loss", (4, 5, 6), visits=visits, kill=kill)
    broken = stable.run(fault, changes)
    assert isinstance(broken.error, Interrupted) and "checkpoint-" in str(broken.error)
    assert broken.run is not None and broken.run.dir.is_dir()
    resumed = stable.run(fault, changes, resume=True)
    assert type(resumed.error) is type(straight.error)
    if straight.error is None:
        assert resumed.adapter == straight.adapter and resumed.losses == straight.losses
        assert _logged_rates(resumed) == _logged_rates(straight)
        results = [one.run.result for one in (resumed, straight) if one.run]
        keys = ("skipped_steps", "roll_backs", "learning_rate_factor", "tokens", "train_loss")
        assert all(results[0][key] == results[1][key] for key in keys)
        assert results[0]["roll_backs"] == 1
    else:  # three times in all, in whatever process
        rates = dict.fromkeys(rate for step, rate in fault.rates if step == 4)
        assert list(rates) == pytest.approx([1e-2, 5e-3, 2.5e-3, 1.25e-3])
    assert resumed.on_disk()[1] == []


def test_a_step_back_is_told(stable: Stable) -> None:
    outcome = stable.run(Fault("loss", (4, 5, 6), visits=1), LONG | BACK)
    assert "back to checkpoint-3, and on with 0.5 times the learning rate (1. time)" in outcome.said
    assert outcome.run is not None and outcome.run.result["skipped_steps"] == 0
    assert outcome.skipped == []  # they were taken after all


def test_a_step_back_takes_the_optimizers_state_of_the_checkpoint(stable: Stable) -> None:
    for changes in (LONG | BACK, LONG | BACK | EIGHT):
        rolled = Fault("loss", (4, 5, 6), visits=1)
        assert stable.run(rolled, changes).error is None
        usual = stable.reference(changes, ())
        assert rolled.before[4] == usual.fault.before[4] != rolled.before[5]
        assert rolled.before[5] != usual.fault.before[5]  # half the rate


@pytest.mark.parametrize("scale", ["fitting", "too large"])
def test_a_step_back_under_a_gradient_scaler_begins_with_the_checkpoints(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    import test_t4

    monkeypatch.setattr(test_t4.hardware, "card", lambda: test_t4.T4)
    fault, scales = Fault("loss", (4, 5, 6), visits=1), []
    original = sft.build

    class Scales(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            scales.append((state.global_step + 1, fault.trainer.scale()))
            held = fault.trainer.accelerator.scaler._per_optimizer_states
            assert not held, "it remembers another optimizer"

    def build(*args: Any, **kwargs: Any) -> sft.RowTrainer:
        first = test_t4.FITTING if scale == "fitting" else test_t4.TOO_LARGE
        built = fault.install(test_t4.scaled(original(*args, **kwargs), first))
        built.add_callback(Scales())
        return built

    monkeypatch.setattr(sft, "build", build)
    recipe = make_recipe(quant__compute_dtype="float16", train__after_bad_steps="roll_back")
    run = trainer.train(recipe, console=Console(quiet=True))
    assert run.result["roll_backs"] == 1 and run.result["steps"] == 6
    at_four = [found for step, found in scales if step == 4]
    assert at_four == [test_t4.FITTING] * 2
    # A NaN lowers the scale of a step that is left out; the checkpoint's is put back.
    assert len({found for step, found in scales if step > 4}) > 1


def test_an_optimizer_that_began_anew_once_is_not_thrown_away_by_a_step_back(
    stable: Stable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed with another optimizer: checkpoints from then on are that one's."""
    number = 1 + len(list(stable.folder.glob("runs-*")))
    broken = stable.run(Fault("nothing", kill=(5, 1)), LONG | BACK)
    assert isinstance(broken.error, Interrupted)
    recipe = stable.recipe(
        LONG | BACK | {"train__optim": "adamw_8bit"}, stable.folder / f"runs-{number}"
    )
    fault, original = Fault("loss", (7, 8, 9), visits=1), sft.build
    monkeypatch.setattr(sft, "build", lambda *a, **k: fault.install(original(*a, **k)))
    started = rundir.open_run(stable.folder / f"runs-{number}").dir
    digests: list[str] = []
    begin = fault.on_step_begin

    def watched(args: Any, state: Any, *rest: Any, **more: Any) -> None:
        begin(args, state, *rest, **more)
        if state.global_step + 1 == 7:
            digests.append(fault.before[7])

    fault.on_step_begin = watched  # type: ignore[method-assign]
    run = trainer.train(
        recipe, resume=started, allow_change=["optimizer"], console=Console(quiet=True)
    )
    assert run.result["roll_backs"] == 1 and len(digests) == 2 and digests[0] == digests[1]


# --- what is to blame


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("kind", "at", "where"),
    [
        ("output", "model.layers.0", "first in the output of model.layers.0"),
        ("output", "model.layers.1.mlp.gate_proj", "first in the output of model.layers.1.mlp.gate_proj"),
        ("output", "model.embed_tokens", "first in the output of model.embed_tokens"),
        ("gradient", f"{LORA_A}.weight", f"first in the gradient of {LORA_A}.weight"),
        ("loss", "", ITSELF),
        ("nothing", "", "a second pass of it is finite"),
    ],
)  # fmt: skip
def test_blame_names_the_module_and_leaves_everything_as_it_was(
    stable: Stable, kernels: bool, kind: str, at: str, where: str
) -> None:
    found: list[str] = []

    class Asks(Fault):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any, **_: Any
        ) -> None:
            if state.global_step != 1:
                return
            before = self.everything()
            self.asking = True
            found.append(self.trainer.blame())
            self.asking = False
            assert self.everything() == before

        asking = False

        @property
        def is_now(self) -> bool:
            return self.asking

        def everything(self) -> list[Any]:
            model = self.trainer.model
            state = randomness.take()
            return [
                self.digest(), state["python"], state["numpy"][1].tolist(), state["cpu"].tolist(),
                [p.grad.tolist() for p in model.parameters() if p.grad is not None],
                [(name, module.training, len(module._forward_hooks))
                 for name, module in model.named_modules()],
            ]  # fmt: skip

    changes = {"lora__lora_dropout": 0.3, "train__max_steps": 2}
    outcome = stable.run(Asks(kind, (2,), at=at), changes if kernels else changes | OFF)
    assert outcome.error is None and found == [where]
    usual = stable.reference(changes if kernels else changes | OFF, ())
    assert outcome.adapter == usual.adapter


def test_blame_without_memory_says_so_and_the_step_is_left_out_all_the_same(stable: Stable) -> None:
    class Full(Fault):
        def install(self, built: sft.RowTrainer) -> sft.RowTrainer:
            super().install(built)

            def full(batch: Any) -> Any:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            built._loss_again = full  # type: ignore[method-assign]
            return built

    outcome = stable.run(Full("loss", (2,)), {})
    assert outcome.error is None
    assert [line["where"] for line in outcome.skipped] == [
        "no memory is left to look for the layer"
    ]


def test_a_base_that_overflows_is_told_before_its_first_step(
    stable: Stable, tmp_path: Path
) -> None:
    weights = load_file(save_tiny(tmp_path / "loud") / "model.safetensors")
    weights["model.norm.weight"] *= 1e30
    weights["lm_head.weight"] *= 1e20
    save_file(weights, tmp_path / "loud" / "model.safetensors", metadata={"format": "pt"})
    outcome = stable.run(
        Fault("nothing"), {"data__held_out_fraction": 0.2, "model__name": str(tmp_path / "loud")}
    )
    assert isinstance(outcome.error, TrainingDiverged) and outcome.run is None
    assert re.match(
        r"The held-out loss before training is (nan|inf), not a finite number\. The base overflows as it "
        r"is: .*quant\.compute_dtype: float32",
        str(outcome.error),
    )


def test_a_held_out_loss_that_is_no_number_in_the_end_is_told_with_the_checkpoint(
    stable: Stable, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sft.RowTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = original(self, *args, **kwargs)
        return found if self.state.global_step == 0 else found | {"eval_loss": math.nan}

    monkeypatch.setattr(sft.RowTrainer, "evaluate", evaluate)
    outcome = stable.run(Fault("nothing"), {"data__held_out_fraction": 0.2})
    assert isinstance(outcome.error, TrainingDiverged) and outcome.run is not None
    assert str(outcome.error).startswith(
        "The held-out loss after training is nan, not a finite number."
    )
    assert "checkpoint-6" in str(outcome.error) and not outcome.run.is_complete


def test_a_weight_that_is_lost_after_the_last_save_is_in_no_adapter(stable: Stable) -> None:
    class AtTheEnd(Fault):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._spoil()

    outcome = stable.run(AtTheEnd("late", at=f"{LORA_A}.weight"), {})
    assert isinstance(outcome.error, TrainingDiverged) and outcome.run is not None
    said = str(outcome.error)
    assert (
        said.startswith("step 6: ") and "is not finite any more" in said and "checkpoint-6" in said
    )
    assert not outcome.run.adapter.exists() and outcome.on_disk()[1] == []


def test_sixteen_good_steps_come_before_a_spike_in_a_real_run() -> None:
    assert guard.SEASONED == 16
