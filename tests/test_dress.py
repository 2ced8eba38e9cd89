"""The dress rehearsal: it measures the largest real step, and the run is as if it had not been."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from qlora import (
    adapter,
    cli,
    data,
    dress,
    hardware,
    loader,
    memory,
    packing,
    rundir,
    sft,
    store,
    timeline,
    tokenizer,
    trainer,
    verdict,
)
from qlora.cards import Card
from qlora.dress import DressRehearsal, Rehearsed, is_wanted, largest_step
from qlora.errors import DoesNotFit, Interrupted, RecipeError
from qlora.packing import Layout
from qlora.rundir import Run
from qlora.screen import Screen
from qlora.shape import Shape


def run_it(recipe: Any, **settings: Any) -> Run:
    return trainer.train(recipe, console=Console(quiet=True), **settings)


def learned(run: Run) -> tuple[bytes, list[Any]]:
    """The adapter file's bytes, and what the log says of the steps, but for time and memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "eval_loss")
    lines = [{key: line.get(key) for key in kept} for line in run.metrics()]
    return (run.adapter / "adapter_model.safetensors").read_bytes(), lines


def rehearsed(run: Run) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads((run.dir / "plan.json").read_text()).get("rehearsal")
    return found


def interrupted(run_recipe: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> Run:
    """A run that was stopped in the middle of a step, as by Ctrl-C."""
    original = sft.RowTrainer.compute_loss

    def stopped(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", stopped)
        with pytest.raises(Interrupted):
            run_it(run_recipe)
    return rundir.open_run(run_recipe.run.dir)


# --- a run with it is a run without it


@pytest.mark.parametrize("packed", [True, False])
def test_a_rehearsed_run_is_bit_identical_to_one_that_was_not(
    make_recipe: Any, packed: bool
) -> None:
    settings: dict[str, Any] = {
        "lora__lora_dropout": 0.1, "data__packing": packed, "train__eval_steps": 3,
        "train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 2,
        "train__weight_decay": 0.1, "train__activation_checkpointing": packed,
    }  # fmt: skip
    plain = run_it(make_recipe(**settings, train__rehearse=False))
    tried = run_it(make_recipe(**settings, train__rehearse=True))
    assert rehearsed(plain) is None and plain.result["rehearsed_memory_bytes"] is None
    found = rehearsed(tried)
    assert found is not None and found["measured_bytes"] > 0
    assert tried.result["rehearsed_memory_bytes"] == found["measured_bytes"]
    assert learned(tried) == learned(plain)
    assert not list(tried.dir.glob(".rehearsal-*"))


def test_a_resumed_run_rehearses_too_and_goes_on_bit_identically(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_it(make_recipe(lora__lora_dropout=0.1, train__rehearse=False))
    recipe = make_recipe(lora__lora_dropout=0.1, train__rehearse=True)
    broken = interrupted(recipe, monkeypatch, step=4)
    began = []
    original = DressRehearsal.on_train_begin

    def counted(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        began.append(state.global_step)
        original(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(DressRehearsal, "on_train_begin", counted)
    resumed = run_it(recipe, resume=broken.dir)
    assert began == [3] and rehearsed(resumed) is not None
    assert learned(resumed)[0] == learned(straight)[0]
    steps = [[line for line in learned(run)[1] if line["loss"]] for run in (resumed, straight)]
    assert [line["loss"] for line in steps[0]] == [line["loss"] for line in steps[1]]
    assert [line["step"] for line in steps[0]] == [1, 2, 3, 4, 5, 6]


class Enough(Exception):
    """Raised when a test has seen what it wanted."""


class Look(TrainerCallback):
    """Everything that a rehearsal touches, as it is when training begins."""

    def __init__(self, trainer: Any, *, last: bool = False) -> None:
        self.trainer, self.last = trainer, last
        self.seen: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        it, scaler = self.trainer, self.trainer.accelerator.scaler
        self.seen = {
            "weights": {n: p.detach().clone() for n, p in it.model.state_dict().items()},
            "gradients": [n for n, p in it.model.named_parameters() if p.grad is not None],
            "modes": {n: m.training for n, m in it.model.named_modules()},
            "random": torch.get_rng_state(),
            "optimizer": copy.deepcopy(it.optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "metrics": copy.deepcopy(it._metrics),
            "tokens": it._total_train_tokens,
            "observers": it.observers,
            "state": dataclasses.asdict(it.state),
            "loss": float(it._tr_loss),
        }
        if self.last:
            raise Enough


class Told:
    """An observer that only counts."""

    count = 0

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None:
        self.count += 1


def staged(
    recipe: Any, card: Card, folder: Path, console: Console | None = None
) -> tuple[sft.RowTrainer, DressRehearsal]:
    """A trainer and its rehearsal, which has not been added."""
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, config.vocab_size)
    model = adapter.attach(loader.load_base(recipe, card, config, bars=False).model, recipe)
    run = Run(folder)
    layout, _ = packing.choose(recipe, model, prepared.train[:3]["input_ids"], "sdpa")
    built = sft.build(recipe, run, card, model, tok, prepared, layout, observers=(), callbacks=())
    plan = memory.plan(recipe, Shape.from_config(config.values), card)
    rundir.write_json(folder / "plan.json", plan.to_json())
    screen = Screen(console or Console(quiet=True))
    return built, DressRehearsal(built, recipe, plan, card, run, screen)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])  # of the second TRL itself keeps metrics
def test_everything_is_as_before_afterwards(
    make_recipe: Any, cpu: Card, tmp_path: Path, loss_type: str
) -> None:
    recipe = make_recipe(lora__lora_dropout=0.1, train__sft_config={"loss_type": loss_type})
    built, stage = staged(recipe, cpu, tmp_path)
    # In fp16 accelerate has a scaler, which it makes on a card only.
    built.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    told = Told()
    built.observers = [told]
    before, after = Look(built), Look(built, last=True)
    for callback in (before, stage, after):
        built.add_callback(callback)
    built.model.eval()  # as an evaluation leaves it
    next(built.model.modules()).training = True
    with pytest.raises(Enough):
        built.train()
    assert stage.found is not None and told.count == 0
    assert {k for k in before.seen if not same(before.seen[k], after.seen[k])} == set()
    assert after.seen["gradients"] == [] and after.seen["observers"] == [told]
    assert after.seen["scaler"]["scale"] == 512.0 and len(set(after.seen["modes"].values())) == 2


def test_after_a_failure_too_nothing_is_left(make_recipe: Any, cpu: Card, tmp_path: Path) -> None:
    built, _ = staged(make_recipe(), cpu, tmp_path)
    trained = [p for p in built.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    with pytest.raises(Enough), dress.as_before(built):
        built.training_step(built.model, next(iter(built.get_train_dataloader())))
        assert all(p.grad is not None for p in trained)
        with torch.no_grad():
            trained[0].add_(1)
        raise Enough
    assert all(p.grad is None for p in trained)
    assert same(before, [p.detach() for p in trained])


# --- what it measures


def test_the_measured_peak_is_the_allocators(make_recipe: Any, cpu: Card, tmp_path: Path) -> None:
    """The independent reference: the profiler's allocator events in a real step of the trainer."""
    recipe = make_recipe(
        model__name="embedded:base", train__per_device_train_batch_size=2,
        train__gradient_accumulation_steps=2, data__packing=False, data__held_out_fraction=0.0,
    )  # fmt: skip
    built, stage = staged(recipe, cpu, tmp_path)

    class Measure(TrainerCallback):
        peak = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = stage._largest_step(built.train_dataset)
            standing = [p for p in built.model.parameters() if p.requires_grad]
            standing += [tensor for _, tensor in dress.phantom.frozen(built.model)]
            standing += list(timeline.state_tensors(built.optimizer))
            built.training_step(built.model_wrapped, dress._cut(step, 0))
            gradients = [p.grad for p in built.model.parameters() if p.grad is not None]
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                built.training_step(built.model_wrapped, dress._cut(step, 1))
            recorded.export_chrome_trace(str(tmp_path / "trace.json"))
            events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
            now = highest = 0
            for event in sorted(
                (e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]
            ):
                now += event["args"]["Bytes"]
                highest = max(highest, now)
            self.peak = highest + timeline.total([*standing, *gradients])
            raise Enough

    measure = Measure()
    built.add_callback(stage)
    built.add_callback(measure)
    with pytest.raises(Enough):
        built.train()
    assert stage.found is not None and stage.found.micro_batches == 2
    assert stage.found.measured_bytes == pytest.approx(measure.peak, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_where_attention_takes_bounds_an_uneven_step_is_rehearsed_among_the_widest(
    seed: int,
) -> None:
    drawn = np.random.default_rng(seed)
    lengths = np.where(
        drawn.random(400) < 0.1, drawn.integers(90, 129, 400), drawn.integers(4, 12, 400)
    )
    layout = Layout(128, 2, packed=True, flat=True)
    found = {
        maskless: largest_step(lengths, replace(layout, maskless=maskless), rows=16, seed=seed)
        for maskless in (False, True)
    }

    def first(step: list[int]) -> tuple[int, int]:
        chosen = [int(lengths[i]) for i in step]
        batches = layout.micro_batches(chosen)[:2]
        rows = [[chosen[i] for one in batch for i in one] for batch in batches]
        return layout.shape(batches[0], chosen)[1], max(len(r) * max(r) for r in rows)

    widths, uneven = zip(*(first(found[maskless]) for maskless in (False, True)), strict=True)
    assert widths[1] >= widths[0] * 15 // 16 and uneven[1] >= uneven[0]


def test_the_longest_rows_make_the_largest_step_when_each_has_its_own_sequence() -> None:
    lengths = np.array([5, 90, 7, 80, 100, 6])
    assert largest_step(lengths, Layout(128, 2, packed=False), rows=3, seed=0) == [4, 1, 3]
    flat = Layout(128, 2, packed=False, flat=True)
    assert largest_step(lengths, flat, rows=2, seed=0) == [4, 1]


def test_packed_a_step_whose_rows_fill_their_sequence_is_larger_than_one_of_the_longest_rows() -> (
    None
):
    lengths = np.array([60] * 20 + [40] * 200)
    layout = Layout(100, 1, packed=True)
    for seed in range(3):
        step = [int(lengths[i]) for i in largest_step(lengths, layout, rows=4, seed=seed)]
        first = layout.micro_batches(step)[0]
        assert sorted(step[i] for i in first[0]) == [40, 60]
    assert largest_step(np.array([8]), layout, rows=4, seed=0) == [0]  # fewer rows than a step has


def test_auto_means_on_a_card(make_recipe: Any, cpu: Card) -> None:
    card = Card("RTX 3060", "cuda", 2**33, 2**33, (8, 6))
    asked = [make_recipe(train__rehearse=value) for value in ("auto", True, False)]
    assert [is_wanted(recipe, card) for recipe in asked] == [True, True, False]
    assert [is_wanted(recipe, cpu) for recipe in asked] == [False, True, False]
    assert make_recipe().train.rehearse == "auto"


def test_what_was_measured_is_said_beside_what_was_planned() -> None:
    found = Rehearsed(
        2, 1024, 2, 1024, micro_batches=2, measured_bytes=int(6.61 * 2**30),
        planned_bytes=int(6.7 * 2**30), reserved_bytes=7 * 2**30, seconds=4.06,
    )  # fmt: skip
    assert str(found) == (
        "longest batch 2 x 1,024 tokens: 6.61 GiB measured beside 6.70 planned "
        "(allocator: 7.0 reserved), 4.1 s"
    )
    shorter = dataclasses.replace(found, length=912, reserved_bytes=None)
    assert str(shorter) == (
        "longest batch 2 x 912 tokens: 6.61 GiB measured beside 6.70 planned for 2 x 1,024, 4.1 s"
    )


def test_on_a_card_the_allocator_is_asked_and_its_peak_forgotten_afterwards(
    make_recipe: Any, cpu: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=300)
    built, stage = staged(make_recipe(), cpu, tmp_path, console)
    stage.card = Card("RTX 3060", "cuda", 2**33, 2**33, (8, 6))
    stage.plan = dataclasses.replace(stage.plan, terms={"base_nf4": 2**32, "overhead": 2**30})
    calls: list[str] = []
    for name, answer in (
        ("reset_peak_memory_stats", None), ("synchronize", None),
        ("max_memory_allocated", 2**31), ("max_memory_reserved", 3 * 2**30),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda _, n=name, a=answer: calls.append(n) or a)
    built.add_callback(stage)
    built.add_callback(Look(built, last=True))
    with pytest.raises(Enough):
        built.train()
    assert calls[0] == calls[-1] == "reset_peak_memory_stats" and len(calls) == 5
    said = console.export_text()
    assert "rehearsal longest batch" in said
    assert "2.00 GiB measured beside 4.00 planned" in said and "(allocator: 3.0 reserved)" in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["predicted"] is True and written["rehearsal"]["reserved_bytes"] == 3 * 2**30
    assert (written["rehearsal"]["planned_sequences"], written["rehearsal"]["planned_length"]) == (
        4,
        128,
    )


def test_the_throw_away_optimizer_is_the_recipes_own_but_never_paged(
    make_recipe: Any, cpu: Card, tmp_path: Path
) -> None:
    recipe = make_recipe(train__optim="paged_adamw_8bit", lora__r=16)
    built, stage = staged(recipe, cpu, tmp_path)
    own = built.create_optimizer()
    spare = built.spare_optimizer()
    assert own.is_paged and not spare.is_paged and type(spare) is type(own)
    assert spare.args.optim_bits == own.args.optim_bits == 8
    assert built.optimizer is own and built.optimizer_cls_and_kwargs is None
    assert built.optimizer.state == {}
    # What would be paged is not resident beside the passes of a step; here everything is small.
    assert {"state1", "state2"} <= next(iter(stage._stepped_optimizer().state.values())).keys()
    stage.plan = dataclasses.replace(stage.plan, optimizer="paged_adamw_8bit")
    wide = torch.nn.Parameter(torch.zeros(100_000))
    built.spare_optimizer = lambda: type(own)([wide], optim_bits=8)  # type: ignore[method-assign]
    (state,) = stage._stepped_optimizer().state.values()
    assert "state1" not in state and "absmax1" in state and wide.grad is None
    own.state[wide] = {"state1": torch.zeros(8)}  # as a resumed run has it: it is not there twice
    assert not stage._stepped_optimizer().state


# --- when it fails


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("where", "error", "part"),
    [
        ("training_step", torch.OutOfMemoryError(OUT), "forward and backward"),
        (
            "training_step",
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "forward and backward",
        ),
        ("spare_optimizer", torch.OutOfMemoryError(OUT), "optimizer step"),
        ("prediction_step", RuntimeError("CUDA error: out of memory\nmore"), "evaluation"),
        ("save", torch.OutOfMemoryError(OUT), "save"),
    ],
)
def test_running_out_of_memory_says_in_which_part_at_which_shape_and_what_helps(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, part: str
) -> None:
    recipe = make_recipe(train__rehearse=True)
    if where == "prediction_step":  # the loss before training takes this way too
        monkeypatch.setattr(verdict, "measure", lambda *_: (None, None))
    owner = adapter if where == "save" else sft.RowTrainer
    monkeypatch.setattr(owner, where, failing(error))
    with pytest.raises(DoesNotFit) as caught:
        run_it(recipe)
    assert caught.value.exit_code == 2
    first, *ways = str(caught.value).splitlines()
    said = rf"ran out of memory in the rehearsal before the first step: {part}, (\d) x (\d+) tokens"
    found = re.search(rf"{said} \(planned: 4 x 128\)\. ", first)
    assert found and int(found[1]) <= 4 and int(found[2]) <= 128
    assert "GiB were predicted of the " in first and "GiB that were free at the start" in first
    assert ways[0] == "Cheapest ways down:"
    assert any("train.per_device_train_batch_size" in way for way in ways)
    assert not list(Path(recipe.run.dir).glob("*/*"))  # not a step was taken


def test_a_resumed_run_keeps_its_directory_when_the_rehearsal_runs_out_of_memory(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__rehearse=True)
    broken = interrupted(recipe, monkeypatch, step=4)
    monkeypatch.setattr(sft.RowTrainer, "training_step", failing(torch.OutOfMemoryError(OUT)))
    with pytest.raises(DoesNotFit, match="in the rehearsal"):
        run_it(recipe, resume=broken.dir)
    assert store.newest(broken.checkpoints) is not None


def test_the_command_line_exits_with_2_and_no_traceback(
    make_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(make_recipe(train__rehearse=True).dump())
    monkeypatch.setattr(sft.RowTrainer, "training_step", failing(torch.OutOfMemoryError(OUT)))
    monkeypatch.setattr(sys, "argv", ["qlora", "train", str(file)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert "in the rehearsal before the first step" in said.err and "Traceback" not in said.err


def test_a_full_disk_is_told_as_what_it_is(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(adapter, "save", failing(full))
    with pytest.raises(
        RecipeError, match=r"an adapter cannot be saved in .*: No space left on device\. Free some"
    ):
        run_it(make_recipe(train__rehearse=True))


def test_an_error_that_is_none_of_memory_goes_through(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft.RowTrainer, "training_step", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_it(make_recipe(train__rehearse=True))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(OUT), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_running_out_of_memory_is_known_in_all_its_words(error: Exception, is_one: bool) -> None:
    assert hardware.ran_out_of_memory(error) is is_one
