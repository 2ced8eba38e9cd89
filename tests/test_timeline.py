"""Where the memory is: every byte has a holder, and the peak a micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from qlora import hardware, timeline, tracking, trainer
from qlora.callbacks import TrackedProgress
from qlora.cards import Card
from qlora.screen import Screen
from qlora.timeline import Timeline

CARD = Card("RTX 3060", "cuda", 2**33, 2**33, (8, 6))


def test_every_log_line_says_what_holds_the_memory_and_where_the_peak_was(make_recipe: Any) -> None:
    run = trainer.train(make_recipe(), console=Console(quiet=True))
    lines = [line for line in run.metrics() if "loss" in line]
    assert len(lines) == 6
    # The independent reference: the plan, which knows shapes and no tensors.
    terms = run_plan(run)["terms"]
    for line in lines:
        memory = line["memory"]
        assert set(memory) == {"base", "unquantized", "adapters", "gradients", "optimizer"}
        # bitsandbytes keeps two code books and an offset for each of the 14 matrices
        codes = 14 * 4 * (16 + 256 + 1)
        assert memory["base"] == pytest.approx(terms["base_nf4"] + codes, rel=0.001)
        assert memory["unquantized"] == pytest.approx(terms["unquantized"], rel=0.01)
        assert memory["adapters"] == memory["gradients"] == terms["adapters"]
        # torch's AdamW keeps a step count for each of the 28 matrices
        assert memory["optimizer"] == terms["optimizer"] + 28 * 4
        assert 1 <= line["peak_step"] <= line["step"] and line["peak_tokens"] > 0
        assert line["peak_memory_bytes"] >= line["memory_bytes"] > 0
    result = run.result
    assert (result["peak_step"], result["peak_tokens"]) == (
        lines[-1]["peak_step"],
        lines[-1]["peak_tokens"],
    )


def run_plan(run: Any) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run.dir / "plan.json").read_text())
    return plan


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the machine would answer."""
    told = SimpleNamespace(now=0, highest=0)
    monkeypatch.setattr(hardware, "memory_in_use", lambda _: (told.now, told.highest))
    return told


def peak(line: Timeline) -> tuple[int, int | None, int | None]:
    return line.peak_bytes, line.peak_step, line.peak_tokens


def test_on_a_card_the_peak_belongs_to_the_micro_batch_that_raised_it(counters: Any) -> None:
    line = Timeline(CARD)
    counters.highest = 50  # loading, and what was asked before training
    line.between()
    assert peak(line) == (50, None, None)
    for step, tokens, highest in ((1, 2048, 70), (1, 1024, 70), (2, 1536, 90), (3, 2048, 90)):
        counters.highest = highest
        line.saw(step, tokens)
    assert peak(line) == (90, 2, 1536)
    counters.highest = 95  # an evaluation between two steps
    line.between()
    line.saw(4, 2048)
    assert peak(line) == (95, None, None)


def test_what_an_evaluation_needed_is_not_laid_to_the_next_micro_batch(
    counters: Any, tmp_path: Path
) -> None:
    quiet = Screen(Console(quiet=True))
    progress = TrackedProgress(tmp_path / "metrics.jsonl", quiet, CARD, tracking.Silent(), 0.0)
    for step, highest in ((0, 50), (1, 80)):
        counters.highest = highest  # before the step begins
        progress.on_step_begin(None, SimpleNamespace(global_step=step), None)
        progress.saw([0], 100, 128, torch.tensor(1.0))
        assert peak(progress.timeline) == (highest, None, None)
    counters.highest = 90
    progress.saw([1], 100, 256, torch.tensor(1.0))
    assert peak(progress.timeline) == (90, 2, 256)


def test_on_a_cpu_the_resident_memory_after_a_micro_batch_is_what_counts(
    counters: Any, cpu: Card
) -> None:
    line = Timeline(cpu)
    counters.highest = 1000  # of the process's whole life
    for step, tokens, now in ((1, 64, 30), (2, 128, 40), (3, 96, 35)):
        counters.now = now
        line.between()
        line.saw(step, tokens)
    assert peak(line) == (40, 2, 128)


def test_on_a_card_what_nothing_here_holds_is_called_other_and_paged_state_is_not_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = torch.nn.Linear(4, 4, bias=False)  # 64 bytes
    layer.weight.grad = torch.zeros(4, 4)
    paged, resident = torch.zeros(100), torch.zeros(8)
    paged.is_paged = True  # type: ignore[attr-defined]
    optimizer = SimpleNamespace(state={layer.weight: {"state1": paged, "absmax1": resident}})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    line = Timeline(CARD)
    line.stepped(layer)
    layer.weight.grad = None  # freed before the line is written
    held = line.held(layer, optimizer)
    assert held["adapters"] == held["gradients"] == 64 and held["paged"] == 400
    assert held["optimizer"] == 0  # a card's own state is on the card: this is the host's
    assert held["other"] == 1000 - 128 and held["base"] == held["unquantized"] == 0


def test_storage_that_several_tensors_share_counts_once() -> None:
    made = torch.zeros(100)
    assert timeline.total([made, made[10:20], made.view(10, 10), torch.zeros(1)]) == 404
    assert list(timeline.state_tensors(None)) == []


def test_before_the_first_step_there_is_no_state_and_no_gradient(cpu: Card) -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    held = Timeline(cpu).held(layer, torch.optim.AdamW(layer.parameters()))
    assert held["gradients"] == held["optimizer"] == 0 and held["adapters"] == 64
