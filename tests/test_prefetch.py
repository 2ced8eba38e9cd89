"""Rows prepared ahead: the same run, nothing left behind, and the wait told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qlora import packing, prefetch, rundir, sft, trainer
from qlora.errors import Interrupted
from qlora.rundir import Run


def run_it(recipe: Any, **settings: Any) -> Run:
    return trainer.train(recipe, console=Console(quiet=True), **settings)


def learned(run: Run) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    """Adapter and losses, to compare without a tolerance."""
    weights = load_file(run.adapter / "adapter_model.safetensors")
    lines = [(one["step"], one.get("loss", one.get("eval_loss"))) for one in run.metrics()]
    lines = [
        (step, loss) for step, loss in lines if step and loss
    ]  # a resumed run measures twice at 0
    return {k: v.numpy().tobytes() for k, v in weights.items()}, lines


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("qlora-prefetch")]


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    assert threads() == []


@pytest.fixture
def collated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The thread and the rows of every step that is collated."""
    seen: list[tuple[str, list[int]]] = []
    original = packing.Collator.__call__

    def collate(self: Any, step: Any) -> Any:
        seen.append((threading.current_thread().name, [int(row["row"]) for row in step]))
        return original(self, step)

    monkeypatch.setattr(packing.Collator, "__call__", collate)
    return seen


def without_prefetching(patch: pytest.MonkeyPatch) -> None:
    """accelerate's own loader, as the Trainer makes it."""
    patch.setattr(prefetch.Prefetcher, "loader", lambda self, loader: loader)


def changed(
    name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(sft.RowTrainer, name, wrap(getattr(sft.RowTrainer, name)))


def stopped_at(step: int) -> Callable[..., Any]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and self.state.global_step == step:
                raise KeyboardInterrupt
            return original(self, model, *args, **kwargs)

        return compute_loss

    return wrap


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_is_bit_identical_to_one_whose_rows_are_not_prepared_ahead(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, collated: Any, packed: bool
) -> None:
    recipe = make_recipe(
        lora__lora_dropout=0.1, train__eval_steps=2, train__max_steps=14, data__packing=packed,
        train__per_device_train_batch_size=2, train__gradient_accumulation_steps=2,
    )  # fmt: skip
    taken: list[list[list[int]]] = []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
            taken.append(inputs["rows"])
            return original(self, model, inputs, *args)

        return training_step

    changed("training_step", wrap, monkeypatch)
    ahead = learned(run_it(recipe))  # two epochs
    assert any(name.startswith("qlora-prefetch") for name, _ in collated)
    collated.clear()
    without_prefetching(monkeypatch)
    assert learned(run_it(recipe)) == ahead
    assert len(taken) == 28 and taken[:14] == taken[14:]
    assert {name for name, _ in collated} == {"MainThread"}


@pytest.mark.parametrize("step", [4, 12])  # in the first epoch and in the second
def test_a_resumed_run_is_bit_identical_to_one_whose_rows_are_not_prepared_ahead(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    recipe = make_recipe(lora__lora_dropout=0.1, train__max_steps=14)
    with monkeypatch.context() as patch:
        without_prefetching(patch)
        straight = learned(run_it(recipe))
    with monkeypatch.context() as patch:
        changed("compute_loss", stopped_at(step), patch)
        with pytest.raises(Interrupted):
            run_it(recipe)
    assert threads() == []
    broken = rundir.open_run(recipe.run.dir)
    assert learned(run_it(recipe, resume=broken.dir)) == straight


def test_the_next_step_is_prepared_while_the_present_one_trains(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, collated: Any
) -> None:
    """Each backward pass waits until one more step than has trained was collated."""
    recipe = make_recipe(data__held_out_fraction=0.0)  # ten steps an epoch
    order: list[str] = []

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(self, *args, **kwargs)
            until = time.monotonic() + 30
            while len(collated) < self.state.global_step + 2 and time.monotonic() < until:
                time.sleep(0.001)
            order.append(collated[self.state.global_step + 1][0])
            return loss

        return compute_loss

    changed("compute_loss", wrap, monkeypatch)
    run_it(recipe)
    assert order == ["qlora-prefetch_0"] * 6
    assert collated[0][0] == "MainThread"  # nothing trains before it


class Unreadable(Exception):
    def __init__(self, row: int, why: str) -> None:  # torch's workers could not raise it again
        super().__init__(f"row {row}: {why}")


@pytest.mark.parametrize("at", [0, 3])
def test_what_the_collator_raises_reaches_the_user_as_itself(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    error, calls = Unreadable(7, "torn"), 0

    def collate(self: Any, step: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise error
        return original(self, step)

    original = packing.Collator.__call__
    monkeypatch.setattr(packing.Collator, "__call__", collate)
    recipe = make_recipe(data__held_out_fraction=0.0)
    with pytest.raises(Unreadable) as caught:
        run_it(recipe)
    assert caught.value is error
    runs = rundir.runs_below(Path(recipe.run.dir))
    taken = [line for run in runs for line in run.metrics()]
    assert len(taken) == at and len(runs) == (at > 0)  # the steps before it were taken


def test_an_interrupt_waits_for_the_step_in_preparation_and_for_no_other(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    original = packing.Collator.__call__

    def slow(self: Any, step: Any) -> Any:
        time.sleep(0.2)
        ended.append(threading.current_thread().name)
        return original(self, step)

    monkeypatch.setattr(packing.Collator, "__call__", slow)

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            original(self, *args, **kwargs)
            raise KeyboardInterrupt

        return training_step

    changed("training_step", wrap, monkeypatch)
    with pytest.raises(Interrupted):
        run_it(make_recipe(data__held_out_fraction=0.0))
    assert threads() == [] and ended == ["MainThread", "qlora-prefetch_0"]


def test_outside_of_training_a_loader_gives_the_same_batches_without_a_thread(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, cpu: Any, tmp_path: Path, collated: Any
) -> None:
    from test_sft import build

    built = build(make_recipe(), cpu, Run(tmp_path))
    for name in ("get_train_dataloader", "get_eval_dataloader"):
        torch.manual_seed(0)
        found, random = list(getattr(built, name)()), torch.get_rng_state()
        with monkeypatch.context() as patch:
            without_prefetching(patch)
            torch.manual_seed(0)
            plain = list(getattr(built, name)())
        assert torch.equal(random, torch.get_rng_state())
        assert len(found) == len(plain) > 0
        for one, other in zip(found, plain, strict=True):
            batches = zip(one.pop("micro_batches"), other.pop("micro_batches"), strict=True)
            assert json.dumps(one) == json.dumps(other)
            for a, b in batches:
                assert list(a) == list(b)
                assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    assert {name for name, _ in collated} == {"MainThread"}


def test_a_cards_batches_are_pinned_and_copied_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned, copies = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t + 100)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, device, **how: copies.append((device, how)) or t
    )
    batch = {"micro_batches": [{"input_ids": torch.zeros(1)}, {"input_ids": torch.ones(1)}], "n": 3}
    pending = prefetch._Pending(lambda: prefetch._pinned(batch))
    found = pending.to("cuda:0", non_blocking=False)  # as accelerate asks after a resume
    assert [int(one["input_ids"]) for one in found["micro_batches"]] == [100, 101]
    assert found["n"] == 3 and len(pinned) == 2
    assert copies == [("cuda:0", {"non_blocking": True})] * 2


def test_every_log_line_and_the_result_say_what_share_of_the_time_was_waited_for_rows(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__max_steps=4, train__logging_steps=2, train__eval_steps=3)

    def shares(run: Run) -> list[float]:
        lines = [line for line in run.metrics() if "loss" in line]
        assert all(("data_wait" in line) == ("loss" in line) for line in run.metrics())
        return [run.result["data_wait"], *(line["data_wait"] for line in lines)]

    quick = shares(run_it(recipe))
    original = packing.Collator.__call__

    def slow(self: Any, step: Any) -> Any:
        time.sleep(0.3)
        return original(self, step)

    monkeypatch.setattr(packing.Collator, "__call__", slow)
    waited = shares(run_it(recipe))
    for fast, late in zip(quick, waited, strict=True):
        assert 0 <= fast < late <= 1 and round(late, 4) == late
    assert waited[0] > 0.3
