"""The fastest attention kernel is found by trying, on whatever machine this is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qlora.kernels.attention import (
    CpuFlash,
    Differentiated,
    Scores,
    candidates_on,
    kernel_on,
)
from qlora.kernels.contest import TURNS, fastest

CPU = torch.device("cpu")


class ByBounds:
    """The CPU's kernel, told its rows' bounds as a card's kernels are, and paid for by a clock."""

    def __init__(self, clock: Clock, cost: float, wrong: float = 0.0, fails: bool = False) -> None:
        self.clock, self.cost, self.wrong, self.fails = clock, cost, wrong, fails

    def forward(self, q: Any, k: Any, v: Any, scores: Scores) -> Any:
        if self.fails:
            raise RuntimeError("no kernel image is available\nand more")
        self.clock.now += self.cost
        return CpuFlash().forward(q, k, v, Scores(scores.scale, mask=_mask(scores)))

    def backward(self, do: Any, q: Any, k: Any, v: Any, o: Any, saved: Any, scores: Scores) -> Any:
        asked = Scores(scores.scale, mask=_mask(scores))
        dq, dk, dv = CpuFlash().backward(do, q, k, v, o, saved, asked)
        return dq * (1 + self.wrong), dk, dv


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _mask(scores: Scores) -> torch.Tensor:
    assert scores.bounds is not None
    offsets = scores.bounds.offsets.tolist()
    length = offsets[-1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for begin, end in itertools.pairwise(offsets):
        allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    return allowed[None, None]


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def race(clock: Clock, **kernels: Any) -> Any:
    return fastest(kernels, (4, 2, 16), 67, torch.float32, CPU, clock=clock)


def test_the_fastest_wins_and_all_times_are_told(clock: Clock) -> None:
    quick, slow = ByBounds(clock, 0.001), ByBounds(clock, 0.002)
    found = race(clock, slow=slow, quick=quick)
    assert found.winner is quick
    assert found.said == "quick 1.00 ms, slow 2.00 ms for 64 packed tokens"


def test_a_kernel_that_fails_is_out_and_it_is_told_why(clock: Clock) -> None:
    found = race(clock, broken=ByBounds(clock, 0.0, fails=True), good=ByBounds(clock, 0.003))
    assert found.said.endswith("; broken is out: no kernel image is available")
    assert isinstance(found.winner, ByBounds) and not found.winner.fails


@pytest.mark.parametrize("wrong", [0.2, float("nan")])
def test_a_kernel_with_other_gradients_is_out_however_fast(clock: Clock, wrong: float) -> None:
    good = ByBounds(clock, 0.003)
    found = race(clock, good=good, wrong=ByBounds(clock, 0.001, wrong=wrong))
    assert found.winner is good and "wrong is out: gradients differ by" in found.said


def test_without_any_that_works_there_is_no_winner(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="broken: no kernel image is available"):
        race(clock, broken=ByBounds(clock, 0.0, fails=True))


def test_the_random_state_of_a_run_is_left_alone(clock: Clock) -> None:
    before = torch.get_rng_state()
    race(clock, only=ByBounds(clock, 0.001))
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_turn_does_not_count(clock: Clock) -> None:
    class Warming(ByBounds):
        turns = 0

        def forward(self, *arguments: Any) -> Any:
            self.turns += 1
            self.cost = 9.0 if self.turns == 1 else 0.001
            return super().forward(*arguments)

    warming = Warming(clock, 0.0)
    assert race(clock, warming=warming).said.startswith("warming 1.00 ms")
    assert warming.turns == TURNS + 1


def test_what_a_card_may_try_depends_on_its_capability_and_the_heads() -> None:
    assert list(candidates_on((8, 6), 128)) == ["flash", "memory-efficient"]
    assert list(candidates_on((7, 5), 128)) == ["memory-efficient"]
    assert list(candidates_on((9, 0), 512)) == ["memory-efficient"]
    assert type(kernel_on((8, 6), 128).unmasked).__name__ == "Flash"
    assert not isinstance(kernel_on((7, 5), 128).unmasked, Differentiated)


@pytest.mark.gpu
def test_a_cards_kernels_race_over_real_heads() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    capability = torch.cuda.get_device_capability()
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    candidates = candidates_on(capability, 128)
    found = fastest(candidates, (32, 8, 128), 2048, dtype, torch.device("cuda"))
    assert all(name in found.said for name in candidates) and "is out" not in found.said
