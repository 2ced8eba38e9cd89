"""The copies of :class:`qlora.offload.InputsOnHost` on a card that is played: their order, what is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora import offload
from qlora.offload import InputsOnHost


class Played:
    """The streams of a card: what is done on each, in the order in which it is asked for."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.here = self.main = "arithmetic"
        self.resident: weakref.WeakSet[Any] = weakref.WeakSet()  # what came back and is still there

    def Stream(self, device: Any) -> Any:
        return SimpleNamespace(
            name="copies", wait_stream=lambda other: self.done.append(("copies waits for", other.name))
        )  # fmt: skip

    def current_stream(self, device: Any) -> Any:
        name = self.here
        wait = lambda other: self.done.append((f"{name} waits for", other.name))  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait)

    def stream(self, stream: Any) -> Any:
        played = self

        class Entered:
            def __enter__(self) -> None:
                played.here = stream.name

            def __exit__(self, *_: Any) -> None:
                played.here = played.main

        return Entered()


class OnCard:
    """A hidden state on that card."""

    is_cuda, requires_grad, ndim, shape, dtype = True, True, 3, (1, 2, 3), torch.float32
    device = torch.device("cuda", 0)
    nbytes = offload.MIN_BYTES

    def __init__(self, played: Played, number: int) -> None:
        self.played, self.number = played, number

    def detach(self) -> OnCard:
        return self

    def record_stream(self, stream: Any) -> None:
        self.played.done.append(("not given away before", stream.name, self.number))


class OnHost:
    """Its copy; ``pinned``, or a copy would not run beside anything."""

    def __init__(self, played: Played, pinned: bool) -> None:
        assert pinned
        self.played, self.number = played, -1

    def copy_(self, tensor: OnCard, *, non_blocking: bool) -> None:
        assert non_blocking
        self.number = tensor.number
        self.played.done.append(("out", self.played.here, self.number))

    def to(self, device: Any, *, non_blocking: bool) -> OnCard:
        assert non_blocking and device == OnCard.device
        self.played.done.append(("in", self.played.here, self.number))
        back = OnCard(self.played, self.number)
        self.played.resident.add(back)
        return back


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    card = Played()
    empty = lambda shape, dtype, device, pin_memory: OnHost(card, pin_memory)  # noqa: E731
    monkeypatch.setattr(
        offload, "torch", SimpleNamespace(Tensor=torch.Tensor, empty=empty, cuda=card)
    )
    monkeypatch.setattr(offload._Kept, "streams", {})
    return card


def forward(card: Played, layers: int) -> tuple[Callable[[Any], Any], list[Any]]:
    """What autograd would hold after a forward pass, and the way back."""
    hooks = InputsOnHost()
    return hooks.unpack_hook, [hooks.pack_hook(OnCard(card, n)) for n in range(layers)]


def test_a_copy_out_waits_for_the_arithmetic_and_the_memory_for_the_copy(played: Played) -> None:
    forward(played, 2)
    assert played.done == [
        step
        for n in range(2)
        for step in (
            ("copies waits for", "arithmetic"), ("out", "copies", n),
            ("not given away before", "copies", n),
        )
    ]  # fmt: skip


def test_each_input_is_sent_for_before_it_is_wanted_and_two_are_there_at_a_time(
    played: Played,
) -> None:
    unpack, kept = forward(played, 5)
    played.done.clear()
    most = 0
    for n in range(4, -1, -1):
        played.done.append(("wanted", n))
        back = unpack(kept[n])
        kept[n] = None  # autograd lets go of it
        assert back.number == n
        most = max(most, len(played.resident))
        played.done.append(("used", n))
        del back
    assert most == 2 and not played.resident
    order = {step: i for i, step in enumerate(played.done)}
    assert sum(step[0] == "in" for step in played.done) == 5  # each once
    for n in range(5):
        arrives = order["in", "copies", n]
        # Asked for while the layer after it in the forward pass is still to be computed again.
        assert arrives < order["wanted", n] if n < 4 else order["wanted", n] < arrives
        assert n == 4 or arrives < order["used", n + 1]
        # The arithmetic waits for the copies, and the memory is not given away under its hands.
        after = played.done[order["wanted", n] : order["used", n]]
        assert ("arithmetic waits for", "copies") in after
        assert ("not given away before", "arithmetic", n) in after


def test_a_second_way_back_brings_all_again(played: Played) -> None:
    unpack, kept = forward(played, 3)
    for _ in range(2):
        played.done.clear()
        assert [unpack(one).number for one in reversed(kept)] == [2, 1, 0]
        assert [step[2] for step in played.done if step[0] == "in"] == [2, 1, 0]
    gc.collect()
    assert not played.resident and all(one.on_card is None for one in kept)


@pytest.mark.parametrize("backwards", [0, 1, 3])
def test_nothing_is_left_behind_whether_or_not_a_pass_goes_back(
    played: Played, backwards: int
) -> None:
    gc.collect()
    gc.disable()  # pinned memory must not wait for the garbage collector
    try:
        unpack, kept = forward(played, 3)
        left = [weakref.ref(one.on_host) for one in kept]
        for n in range(backwards):
            unpack(kept[2 - n])
        kept.clear()
        assert not any(ref() is not None for ref in left) and not played.resident
    finally:
        gc.enable()


@pytest.mark.parametrize("backwards", [True, False])
def test_copies_on_the_host_go_with_the_graph(backwards: bool) -> None:
    copies: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(1, 512, 640, requires_grad=True)
        with InputsOnHost(lambda tensor: copies.append(weakref.ref(tensor))):
            total = x.exp().exp().exp().sum()
        assert len(copies) == 3 and all(copy() is not None for copy in copies)
        if backwards:
            total.backward()
        del total
        assert all(copy() is None for copy in copies)
    finally:
        gc.enable()
