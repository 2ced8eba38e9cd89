"""Memory that runs out in a step: it is taken again in smaller passes, as if nothing had happened.

The table is :data:`CASES`. ``scripts/torture_steps.py`` prints what every one of them gives.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import json
import math
import random
import re
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from transformers import TrainerCallback

from qlora import (
    adapter,
    data,
    dress,
    fusing,
    loader,
    memory,
    randomness,
    relief,
    rundir,
    sft,
    store,
    table,
    tokenizer,
    tracking,
    trainer,
)
from qlora.callbacks import TrackedProgress
from qlora.cards import Card
from qlora.errors import DoesNotFit, Interrupted
from qlora.guard import StepGuard
from qlora.packing import Collator, Layout
from qlora.recipe import recipe_from
from qlora.relief import Relief, passes
from qlora.rundir import Run
from qlora.screen import Screen
from qlora.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Card("CPU", "cpu", 2**34, 2**34)
STEPS = 3
LENGTH = 80  # of a sequence: a step of eight rows has several
SAME = 1e-6  # of a loss or a gradient's norm, relative
OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."
ERRORS = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError(OUT),
    "cuda": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "MemoryError": lambda: MemoryError(),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"
    ),
    "driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
}


# --- where memory runs out


class _Fails(torch.autograd.Function):
    """The identity, whose backward pass needs more than there is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shortage: Shortage) -> torch.Tensor:
        ctx.shortage = shortage
        ctx.save_for_backward(shortage.large())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.shortage.fail()


class Shortage(TrainerCallback):
    """Memory that runs out at one place of one pass of one step, so many times.

    Sites: ``loss`` and ``layer`` of the forward pass (before the model, and after its last layer);
    ``hook`` and ``function`` of the backward pass, when the last layer has its gradients; ``again``, where
    the first layer is computed again for it.
    """

    def __init__(self, site: str, step: int, at: int, error: str, times: int = 1) -> None:
        self.site, self.step, self.at, self.left = site, step, at, times
        self.error = ERRORS[error]
        self.kept: list[weakref.ref[torch.Tensor]] = []
        self.found_gradients: list[bool] = []
        self.done, self.passed = 0, 0
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done = 0

    def waited(self, seconds: float) -> None: ...

    def saw(self, *_: Any) -> None:
        self.done += 1

    def again(self) -> None:
        self.done = 0

    @property
    def is_now(self) -> bool:
        step = self.trainer.state.global_step + 1
        return self.left > 0 and (step, self.done) == (self.step, self.at)

    def large(self) -> torch.Tensor:
        """A tensor that must be gone when the step is taken again."""
        made = torch.ones(2**16)
        self.kept.append(weakref.ref(made))
        return made

    def fail(self) -> None:
        held = self.large()
        self.left -= 1
        self.found_gradients.append(
            any(p.grad is not None for p in self.trainer.model.parameters())
        )
        if held.numel():  # this frame holds it, and the error the frame
            raise self.error()

    def install(self, built: sft.RowTrainer) -> list[Any]:
        """Put it into a trainer; the hooks to take off again."""
        self.trainer = built
        inner = built.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            self.passed = 0
            if self.site == "loss" and self.is_now:
                self.fail()
            return inner(*args, **kwargs)

        def enter_first(module: Any, args: Any) -> None:
            self.passed += 1
            if self.site == "again" and self.passed > 1 and self.is_now:
                self.fail()

        def leave_first(module: Any, args: Any, output: Any) -> Any:
            if not self.is_now:
                return output
            if self.site == "hook":
                self.kept.append(weakref.ref(output))
                output.register_hook(lambda grad: self.fail())
            return _Fails.apply(output, self) if self.site == "function" else output

        def leave_last(module: Any, args: Any, output: Any) -> Any:
            if self.site == "layer" and self.is_now:
                self.kept.append(weakref.ref(output))
                self.fail()
            return output

        built.compute_loss = compute_loss  # type: ignore[method-assign]
        layers = built.model.get_base_model().model.layers
        return [
            layers[0].input_layernorm.register_forward_pre_hook(enter_first),
            layers[0].register_forward_hook(leave_first),
            layers[-1].register_forward_hook(leave_last),
        ]


# --- a run, disturbed or not


@dataclass(frozen=True)
class Setting:
    """What decides a step's passes. ``form`` is padded, packed or flat."""

    form: str
    sequences: int
    accumulation: int
    kernels: bool
    checkpointing: bool

    @property
    def layout(self) -> Layout:
        return Layout(LENGTH, self.sequences, self.form != "padded", self.form == "flat")

    def __str__(self) -> str:
        kernels = "kernels" if self.kernels else "libraries"
        again = ", recomputed" if self.checkpointing else ""
        return f"{self.form} {self.sequences}x{self.accumulation}, {kernels}{again}"


@dataclass
class Taken:
    """What a run did, step by step."""

    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, one a step
    rows: list[list[list[int]]] = field(default_factory=list)  # of a step's passes
    shapes: list[list[str]] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    random: list[list[Any]] = field(default_factory=list)
    weights: torch.Tensor | None = None
    threads: list[str] = field(default_factory=list)  # that laid a step out
    said: str = ""
    times: int = 0
    freed: list[bool] = field(default_factory=list)
    found_gradients: list[bool] = field(default_factory=list)


class Witness(TrainerCallback):
    """Writes down what each step is made of, before the optimizer takes it."""

    def __init__(self, taken: Taken) -> None:
        self.taken = taken
        self.rows: list[list[int]] = []
        self.shapes: list[str] = []

    def waited(self, seconds: float) -> None: ...

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        self.rows.append(rows)

    def again(self) -> None:
        self.rows.clear()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.taken.gradients.append(torch.cat(grads))
        self.taken.rows.append(self.rows)
        self.taken.random.append(_random_state())
        self.rows = []


def _random_state() -> list[Any]:
    state = randomness.take()
    _, words, *rest = state["numpy"]
    return [state["python"], words.tolist(), rest, state["cpu"].tolist()]


class ByThread(Collator):
    """A collator that tells which thread lays a step out."""

    def __init__(self, layout: Layout, pad_token_id: int, multiple: int, taken: Taken) -> None:
        super().__init__(layout, pad_token_id, multiple)
        self.taken = taken

    def __call__(self, step: Any) -> dict[str, Any]:
        name = threading.current_thread().name
        self.taken.threads.append(name.rstrip("_0123456789"))
        return super().__call__(step)


class Bench:
    """Models that are made once; every run on them begins with the same weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny(folder / "base")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))
        self._undisturbed = functools.cache(lambda setting: self.run(setting))

    def usual(self, case: Case) -> Taken:
        """The run in which nothing happens."""
        return self._undisturbed(case.setting)

    def recipe(self, **train: Any) -> Any:
        values = {
            "model": {"name": str(self.folder / "base")},
            "data": {
                "train": str(self.folder / "rows.jsonl"), "max_length": LENGTH,
                "held_out_fraction": 0.0,
            },
            "lora": {"r": 4},
            "train": {
                "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 100,
                "warmup_steps": 0, "rehearse": False,
            } | train,
            "run": {"dir": str(self.folder / "runs"), "name": "tiny"},
        }  # fmt: skip
        return recipe_from(values)

    @functools.cached_property
    def prepared(self) -> tuple[Any, Any]:
        recipe = self.recipe()
        tok, _ = tokenizer.load(recipe)
        return data.prepare(recipe, tok, loader.read_config(recipe).vocab_size), tok

    @functools.cache  # noqa: B019 - a bench lives as long as its tests
    def model(self, kernels: bool, checkpointing: bool) -> tuple[Any, Any, list[torch.Tensor]]:
        """The model, the head of the fused loss, and the weights that every run begins with."""
        recipe = self.recipe(
            activation_checkpointing=checkpointing, kernels="auto" if kernels else "off"
        )
        config = loader.read_config(recipe)
        base = loader.load_base(recipe, CPU, config, bars=False)
        model = adapter.attach(base.model, recipe)
        shape = Shape.from_config(config.values)
        quiet = Screen(Console(quiet=True))
        fused = fusing.fuse(model, recipe, shape, CPU, self.prepared[0], base.facts, quiet)
        assert (fused is not None) is kernels, base.facts["kernels"]
        first = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        return model, fused and fused.head, first

    def run(
        self,
        setting: Setting,
        shortage: Shortage | None = None,
        *,
        limit: int = 3,
        also: Any = (),
        change: Any = lambda built: None,
        **train: Any,
    ) -> Taken:
        """A few steps."""
        recipe = self.recipe(
            per_device_train_batch_size=setting.sequences,
            gradient_accumulation_steps=setting.accumulation,
            activation_checkpointing=setting.checkpointing,
            kernels="auto" if setting.kernels else "off", **train,
        )  # fmt: skip
        prepared, tok = self.prepared
        model, head, first = self.model(setting.kernels, setting.checkpointing)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, value in zip(trained, first, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        said, taken = io.StringIO(), Taken()
        screen = Screen(Console(file=said, width=1000))
        folder = self.folder / f"{time.monotonic_ns()}"
        folder.mkdir()
        progress = TrackedProgress(folder / "metrics.jsonl", screen, CPU, tracking.Silent(), 0.0)
        rows = table.Numbered(prepared.train)
        guard = StepGuard(
            recipe, prepared.addresses, lambda row: len(rows[row]["input_ids"]), screen,
            judged=progress.judged, record=progress.write,
        )  # fmt: skip
        witness = Witness(taken)
        watching = [witness, guard, progress, *([shortage] if shortage else []), *also]
        built = sft.build(
            recipe, Run(folder), CPU, model, tok, prepared, setting.layout,
            observers=watching, callbacks=watching, head=head,
        )  # fmt: skip
        guard.blame, guard.scale = built.blame, built.scale
        plan = memory.plan(recipe, Shape.from_config(loader.read_config(recipe).values), CPU)
        built.data_collator = ByThread(setting.layout, tok.pad_token_id, 1, taken)
        built.relief = Relief(
            limit, plan, CPU, rows, Collator(setting.layout, tok.pad_token_id), screen
        )
        hooks = [] if shortage is None else shortage.install(built)
        free = built.relief.free

        def freed() -> None:
            free()
            assert shortage is not None
            taken.freed.append(
                not any(ref() is not None for ref in shortage.kept)
                and all(p.grad is None for p in trained)
            )

        built.relief.free = freed  # type: ignore[method-assign]
        change(built)
        try:
            built.train()
        finally:
            for hook in hooks:
                hook.remove()
            taken.said = said.getvalue()
            built.prefetcher = None  # type: ignore[assignment]
        taken.lines = [line for line in Run(folder).metrics() if "loss" in line]
        taken.weights = torch.cat([p.detach().flatten() for p in trained])
        taken.times = built.relief.times
        if shortage is not None:
            taken.found_gradients = shortage.found_gradients
        return taken


def _rows() -> list[dict[str, str]]:
    drawn = random.Random(3)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        {
            "prompt": f"Say {n} words.",
            "completion": " ".join(drawn.choice(words) for _ in range(drawn.randint(3, 22))),
        }
        for n in range(40)
    ]


# --- the table


@dataclass(frozen=True)
class Case:
    """One place where memory runs out."""

    setting: Setting
    site: str
    step: int
    last: bool  # in the last pass of the step that has enough rows, or in the first
    error: str
    times: int = 1

    @property
    def phase(self) -> str:
        return "forward" if self.site in ("loss", "layer") else "backward"

    @property
    def name(self) -> str:
        again = "" if self.times == 1 else f" {self.times} times"
        place = f"step {self.step}, {'last' if self.last else 'first'} pass, {self.site}{again}"
        return f"{self.setting}: {place}, {self.error}"

    def at(self, usual: Taken) -> int:
        """Which pass of the step."""
        rows = usual.rows[self.step - 1]
        enough = [i for i, some in enumerate(rows) if len(some) >= 2**self.times]
        return enough[-1 if self.last else 0]

    def taken(self, bench: Bench) -> Taken:
        """The run in which it happens."""
        at = self.at(bench.usual(self))
        return bench.run(self.setting, Shortage(self.site, self.step, at, self.error, self.times))

    def problems(self, bench: Bench, taken: Taken) -> list[str]:
        """What is not as it should be."""
        usual = bench.usual(self)
        return differences(taken, usual, self, self.at(usual))


def loss_difference(taken: Taken, usual: Taken) -> float:
    """The largest, relative."""
    pairs = zip(taken.lines, usual.lines, strict=True)
    return max(abs(now["loss"] - then["loss"]) / then["loss"] for now, then in pairs)


def differences(taken: Taken, usual: Taken, case: Case, at: int) -> list[str]:
    """What a run in which memory ran out did otherwise than one in which it did not."""
    found = []

    def require(holds: object, said: str) -> None:
        if not holds:
            found.append(said)

    rows = [sorted(i for some in step for i in some) for step in taken.rows]
    require(rows == [sorted(i for some in step for i in some) for step in usual.rows], "other rows")
    more = [len(a) - len(b) for a, b in zip(taken.rows, usual.rows, strict=True)]
    require(more[case.step - 1] >= case.times, f"{more[case.step - 1]} more passes")
    require(not any(m for n, m in enumerate(more, 1) if n != case.step), "other steps changed")
    for now, then in zip(taken.lines, usual.lines, strict=True):
        for key in ("loss", "grad_norm"):
            if not math.isclose(now[key], then[key], rel_tol=SAME):
                found.append(f"step {now['step']}: {key} {now[key]!r}, not {then[key]!r}")
        for key in ("step", "tokens", "learning_rate", "epoch"):
            require(now[key] == then[key], f"step {now['step']}: another {key}")
    for number, (now, then) in enumerate(zip(taken.gradients, usual.gradients, strict=True), 1):
        apart = float((now - then).norm() / then.norm())
        require(apart < 1e-5, f"step {number}: the gradient is {apart:.1e} apart")
    apart = float((taken.weights - usual.weights).norm() / usual.weights.norm())
    require(apart < 1e-5, f"the adapter is {apart:.1e} apart")
    require(taken.random == usual.random, "another random state")
    require(taken.freed == [True] * case.times, "something of the failed pass is held")
    if case.phase == "backward" or at:
        require(all(taken.found_gradients), "it came too early: there was no gradient yet")
    ahead = [run.threads.count("qlora-prefetch") for run in (taken, usual)]
    require(ahead[0] == ahead[1] >= STEPS - 1, f"{ahead[0]} steps laid out ahead, not {ahead[1]}")
    require(taken.times == case.times, f"{taken.times} times, not {case.times}")
    shape = r"\d+ x \d+ tokens"
    told = re.findall(
        rf"the CPU ran out in step {case.step}, in the {case.phase} pass of {shape}; the step is taken "
        rf"again with this pass as {shape}(?:, {shape})+ \((\d) of 3 times\)\. \S.* would avoid it",
        taken.said,
    )
    require(told == [str(n + 1) for n in range(case.times)], f"it said {taken.said!r}")
    return found


def _cases() -> Iterator[Case]:
    """Forward and backward in each setting, with step, pass, site and error in turn; and twice in a row."""
    plain = [("padded", 2, 4), ("padded", 4, 2), ("padded", 8, 1), ("packed", 2, 4), ("packed", 4, 2),
             ("packed", 1, 8)]  # fmt: skip
    errors, number = list(ERRORS), 0
    for kernels in (False, True):
        for checkpointing in (False, True):
            back = ["hook", "function"] + ["again"] * (checkpointing and not kernels)
            # On a CPU no kernel of ours takes rows' bounds.
            for form in [*plain, *([] if kernels else [("flat", 2, 4), ("flat", 4, 2)])]:
                setting = Setting(*form, kernels, checkpointing)
                for sites in (["loss", "layer"], back):
                    number += 1
                    yield Case(
                        setting, sites[(number // 2) % len(sites)], 1 + number % STEPS,
                        number % 4 < 2, errors[number % len(errors)],
                    )  # fmt: skip
            site = "function" if kernels else "layer"
            setting = Setting("padded", 4, 2, kernels, checkpointing)
            yield Case(setting, site, 2, checkpointing, "OutOfMemoryError", times=2)


CASES = tuple(_cases())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("bench"))
    assert made.prepared
    gc.collect()
    gc.freeze()  # a run collects twice: let it not pass over every module each time
    yield made
    gc.unfreeze()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_that_ran_out_of_memory_is_the_same_step_in_smaller_passes(
    bench: Bench, case: Case
) -> None:
    assert case.problems(bench, case.taken(bench)) == []


def test_the_table_has_sixty_cases_and_every_kind_of_them() -> None:
    assert len(CASES) == len({case.name for case in CASES}) == 60
    assert {case.site for case in CASES} == {"loss", "layer", "hook", "function", "again"}
    assert {case.error for case in CASES} == set(ERRORS)
    assert {(c.phase, c.step) for c in CASES} == {
        (phase, step) for phase in ("forward", "backward") for step in range(1, STEPS + 1)
    }
    assert {(c.setting.kernels, c.setting.checkpointing, c.last) for c in CASES} == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    }
    assert {c.setting.form for c in CASES} == {"padded", "packed", "flat"}
    assert {c.setting.sequences for c in CASES} >= {2, 4, 8}
    assert {c.setting.accumulation for c in CASES} >= {1, 2, 4}
    assert sum(case.times == 2 for case in CASES) == 4


# --- the halves


@pytest.mark.parametrize("form", ["padded", "packed", "flat"])
@pytest.mark.parametrize("sequences", [1, 2, 3, 8])
def test_every_pass_in_its_place_holds_at_most_about_half_and_all_hold_the_same_rows(
    bench: Bench, form: str, sequences: int
) -> None:
    drawn = random.Random(0)
    halver = Relief(10**9, plan_of(bench), CPU, None, None, Screen(Console(quiet=True)))  # type: ignore[arg-type]
    for _ in range(60):
        lengths = [drawn.choice((2, 3, 40, 41, 126, 127)) for _ in range(drawn.randint(2, 24))]
        rows = [{"input_ids": [5] * n, "labels": [5] * n, "row": i} for i, n in enumerate(lengths)]
        layout = Layout(128, sequences, form != "padded", form == "flat")
        halver.rows, halver.collator = rows, Collator(layout, 0)
        all_of = passes(halver.collator(rows))
        for at, failed in enumerate(all_of):
            if len(failed.rows) < 2:
                continue
            smaller = halver.halve(all_of, at, 1, "forward")
            new = smaller[at : len(smaller) - (len(all_of) - at - 1)]
            assert smaller[:at] == all_of[:at] and smaller[at + len(new) :] == all_of[at + 1 :]
            assert sorted(i for one in new for i in one.rows) == sorted(failed.rows)
            assert sum(one.tokens for one in new) == failed.tokens
            before = failed.batch["input_ids"].shape
            for one in new:
                after = one.batch["input_ids"].shape
                if before[0] > 1:
                    assert after[0] <= (before[0] + 1) // 2 and after[1] <= before[1]
                else:  # in two as well as whole rows can be
                    longest = max(lengths[i] for i in failed.rows)
                    assert after[1] <= max(longest, (before[1] + longest) / 2) and after < before


def plan_of(bench: Bench) -> memory.Plan:
    recipe = bench.recipe()
    return memory.plan(recipe, Shape.from_config(loader.read_config(recipe).values), CPU)


def test_a_single_row_cannot_be_halved(bench: Bench) -> None:
    setting = Setting("padded", 1, 4, False, False)
    with pytest.raises(
        DoesNotFit,
        match=r"(?s)^The CPU ran out of memory in step 2, in the backward pass of 1 x \d+ tokens\. .*"
        r"were predicted.*Cheapest ways down:\n.*\nIt is a single row: no smaller pass is "
        r"left\.$",
    ):
        bench.run(setting, Shortage("hook", 2, 1, "OutOfMemoryError"))


def test_it_is_tried_as_often_as_the_recipe_allows(bench: Bench) -> None:
    setting = Setting("padded", 8, 1, False, False)
    for limit in (0, 1, 2):
        shortage = Shortage("layer", 2, 0, "cuda", times=9)
        with pytest.raises(DoesNotFit) as error:
            bench.run(setting, shortage, limit=limit)
        assert str(error.value).endswith(
            f"It is the {limit + 1}. time; train.oom_retries allows {limit}."
        )
        assert 9 - shortage.left == limit + 1


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("CUDA error: out of memory"), KeyboardInterrupt()],
)
def test_another_error_is_none_of_its_business(
    bench: Bench, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ERRORS, "other", lambda: error)
    monkeypatch.setattr(
        Relief, "halve", lambda *_: pytest.fail("it was taken for a lack of memory")
    )
    with pytest.raises(type(error)) as found:
        bench.run(Setting("padded", 4, 2, False, False), Shortage("layer", 2, 0, "other"))
    assert found.value is error


def test_the_step_begins_again_from_the_random_state_it_had(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: what the failed attempt drew is drawn again."""
    setting = Setting("padded", 4, 2, False, False)
    model, _, _ = bench.model(False, False)
    drops = [m for n, m in model.named_modules() if n.endswith("lora_dropout")]
    shortage = Shortage("layer", 2, 1, "OutOfMemoryError")
    begun: list[tuple[int, int, list[Any]]] = []

    def watch(built: sft.RowTrainer) -> None:
        inner = built.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            begun.append((built.state.global_step + 1, shortage.done, _random_state()))
            return inner(*args, **kwargs)

        built.compute_loss = compute_loss  # type: ignore[method-assign]

    try:
        for module in drops:
            module["default"] = torch.nn.Dropout(0.5)
        bench.run(setting, shortage, change=watch)
    finally:
        for module in drops:
            module["default"] = torch.nn.Identity()
    first, again = [state for step, done, state in begun if (step, done) == (2, 0)]
    later = next(state for step, done, state in begun if (step, done) == (2, 1))
    assert first == again != later


def test_blame_looks_at_the_passes_that_fitted(bench: Bench) -> None:
    asked: list[int] = []

    def watch(built: sft.RowTrainer) -> None:
        whole = built.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = whole(model, inputs, *args, **kwargs)
            if built.state.global_step != 1 or shortage.left:
                return loss
            asked.append(len(inputs["input_ids"]))
            return loss * float("nan")

        built.compute_loss = compute_loss  # type: ignore[method-assign]

    shortage = Shortage("layer", 2, 0, "OutOfMemoryError")
    taken = bench.run(Setting("padded", 8, 1, False, False), shortage, change=watch)
    assert asked == [4, 4, 4]  # two halves, and the first of them once more
    assert "first in the loss itself" in taken.said


# --- the whole story


def full(step: int, times: int = 1) -> Any:
    """A compute_loss for which there is no memory from a step on, so many times; 0: for ever."""
    original, left = sft.RowTrainer.compute_loss, [times or 10**9]

    def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step + 1 >= step and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError(OUT)
        return original(self, model, *args, **kwargs)

    return compute_loss


def run_it(recipe: Any, **settings: Any) -> tuple[Run, str]:
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=1000), **settings)
    return run, said.getvalue()


def test_a_run_tells_how_often_memory_ran_out_and_learns_the_same(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, _ = run_it(make_recipe())
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", full(2, times=2))
    run, said = run_it(make_recipe())
    assert run.result["oom_retries"] == 2 and usual.result["oom_retries"] == 0
    assert said.count("the step is taken again") == 2
    for key in ("train_loss", "tokens", "steps"):
        assert run.result[key] == pytest.approx(usual.result[key], rel=1e-5)


def test_a_run_that_has_no_memory_left_keeps_its_checkpoint_and_says_how_to_go_on(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__oom_retries=0)
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", full(5, times=0))
    with pytest.raises(DoesNotFit) as error:
        run_it(recipe)
    run = rundir.open_run(recipe.run.dir)
    kept = store.newest(run.checkpoints)
    assert kept is not None and kept.name == "checkpoint-3"
    assert re.search(
        r"(?s)^The .* ran out of memory in step 5, in the forward pass of .* tokens\. .*Cheapest ways "
        r"down:\n.*It is the 1\. time; train\.oom_retries allows 0\.\n.*last complete checkpoint is .*"
        rf"checkpoint-3\.\n  Go on from it: qlora train {run.recipe_file} --resume {run.dir}$",
        str(error.value),
    )
    assert error.value.exit_code == 2 and not run.is_complete
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert run_it(recipe, resume=run.dir)[0].result["steps"] == 6


def test_a_run_without_memory_for_its_first_step_leaves_nothing_behind(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", full(1, times=0))
    with pytest.raises(DoesNotFit) as error:
        run_it(recipe)
    assert "--resume" not in str(error.value) and not list(Path(recipe.run.dir).glob("*/*"))


def test_a_resumed_run_knows_how_often_memory_ran_out(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__oom_retries=2, train__save_steps=2)
    original = sft.RowTrainer.compute_loss
    inner = full(2, times=1)

    def stopped(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step == 3:
            raise KeyboardInterrupt
        return inner(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "compute_loss", stopped)
    with pytest.raises(Interrupted):
        run_it(recipe)
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", original)
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", full(4, times=0))
    broken = rundir.open_run(recipe.run.dir)
    with pytest.raises(DoesNotFit, match=r"It is the 3\. time; train\.oom_retries allows 2"):
        run_it(recipe, resume=broken.dir)
    assert broken.checkpoints.is_dir()


def test_the_rehearsal_is_not_relieved_and_the_steps_after_it_are(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__rehearse=True)
    halved: list[int] = []
    halve = Relief.halve

    def counted(self: Relief, steps: Any, at: int, number: int, phase: str) -> Any:
        halved.append(number)
        return halve(self, steps, at, number, phase)

    monkeypatch.setattr(Relief, "halve", counted)
    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", full(1))
        with pytest.raises(
            DoesNotFit,
            match=r"in the rehearsal before the first step: forward and backward, \d x \d+ tokens",
        ):
            run_it(recipe)
    assert halved == []
    original = dress.DressRehearsal.on_train_begin

    def rehearsed(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        monkeypatch.setattr(sft.RowTrainer, "compute_loss", full(1))

    monkeypatch.setattr(dress.DressRehearsal, "on_train_begin", rehearsed)
    run, said = run_it(recipe)
    assert halved == [1] and run.result["oom_retries"] == 1
    assert said.index("rehearsal") < said.index("the step is taken again")


@pytest.mark.parametrize("site", ["layer", "hook"])
def test_under_a_gradient_scaler_the_step_and_the_scale_are_the_same(
    make_recipe: Any, tmp_path: Path, site: str
) -> None:
    import test_t4

    recipe = make_recipe(
        quant__compute_dtype="float16", data__packing=False, train__max_steps=3,
        train__learning_rate=1e-3,
    )  # fmt: skip
    found = []
    for shortage in (None, Shortage(site, 2, 0, "OutOfMemoryError")):
        watch = test_t4.Watch()
        built, *_ = test_t4.build(recipe, test_t4.T4, tmp_path, watch)
        test_t4.scaled(built, test_t4.TOO_LARGE)  # the first step overflows
        if shortage is not None:
            plan = dataclasses.replace(
                memory.plan(recipe, Shape.from_config(loader.read_config(recipe).values), CPU)
            )
            rows = table.Numbered(built.train_dataset)
            screen = Screen(Console(quiet=True))
            built.relief = Relief(3, plan, CPU, rows, built.data_collator, screen)
            built.observers = [*built.observers, shortage]
            built.add_callback(shortage)
            shortage.install(built)
        built.train()
        found.append(watch)
        assert built.relief is None or built.relief.times == 1
    usual, relieved = found
    assert relieved.skipped == usual.skipped == [True, False, False]
    assert relieved.scales == usual.scales and relieved.rates == usual.rates
    for now, then in zip(relieved.gradients[1:], usual.gradients[1:], strict=True):
        assert float((now - then).norm() / then.norm()) < 1e-2  # of fp16


def test_what_torch_still_holds_is_given_back(
    monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    card = dataclasses.replace(CPU, kind="cuda", name="a card")
    called = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("emptied"))
    monkeypatch.setattr(relief.gc, "collect", lambda: called.append("collected"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**32)
    rows = [{"input_ids": [1] * 9, "labels": [1] * 9, "row": i} for i in range(4)]
    collator, said = Collator(Layout(16, 4, packed=False), 0), io.StringIO()
    found = Relief(3, plan_of(bench), card, rows, collator, Screen(Console(file=said, width=500)))
    found.halve(passes(collator(rows)), 0, 7, "backward")
    assert (
        "the a card ran out in step 7, in the backward pass of 4 x 9 tokens (3.00 GiB at most in "
        "tensors, 4.00 reserved); the step is taken again with this pass as 2 x 9 tokens, 2 x 9 tokens "
        "(1 of 3 times)" in said.getvalue()
    )
    found.free()
    assert called == ["collected", "emptied"]
