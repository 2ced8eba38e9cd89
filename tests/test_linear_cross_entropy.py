"""The loss over a frozen head, against torch's own over logits that are all there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from qlora.kernels import loss as module
from qlora.kernels.loss import Dense, linear_cross_entropy
from qlora.tracing import MemoryTracer

ROWS, WIDTH, WORDS = 37, 64, 300


def given(
    dtype: torch.dtype = torch.float32, rows: int = ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, labels and a head; the logits scatter by about eight."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(WORDS, (rows,), generator=generator)
    return hidden, labels, torch.randn(WORDS, WIDTH, generator=generator).to(dtype)


def plain(
    hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor, softcap: float = 0.0
) -> torch.Tensor:
    logits = hidden @ head.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    return functional.cross_entropy(wide, labels, reduction="sum")


def pulled(
    function: Any, hidden: torch.Tensor, upstream: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss and the gradient of hidden states, with a gradient of the loss that is not 1."""
    leaf = hidden.clone().requires_grad_()
    total = function(leaf)
    total.backward(torch.full_like(total, upstream))
    assert leaf.grad is not None and leaf.grad.dtype == hidden.dtype
    return total.detach(), leaf.grad


def far(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("upstream", [1.0, -0.37, 1 / 3000])
@pytest.mark.parametrize("chunk", [1, 5 * 4 * WORDS, 10**9])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_it_is_torchs_cross_entropy_and_its_gradient(
    softcap: float, chunk: int, upstream: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    hidden, labels, head = given(rows=rows)
    exact = pulled(lambda h: plain(h, labels, head.double(), softcap), hidden.double(), upstream)
    mine = pulled(
        lambda h: linear_cross_entropy(h, labels, Dense(head), softcap=softcap), hidden, upstream
    )
    own = pulled(lambda h: plain(h, labels, head, softcap), hidden, upstream)
    assert mine[0].dtype == torch.float32 and mine[0].shape == ()
    for found, torchs, reference in zip(mine, own, exact, strict=True):
        assert far(found, reference) <= max(1e-6, 1.05 * far(torchs, reference))


@pytest.mark.parametrize("upstream", [1.0, 1 / 3000, 65536 / 3000, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_the_gradient_no_more_than_autograd_does(
    dtype: torch.dtype, upstream: float
) -> None:
    """Also under a division by the tokens of a step, and under a loss scaler."""
    hidden, labels, head = given(dtype)
    head = head / 8
    exact = pulled(lambda h: plain(h, labels, head.double()), hidden.double(), upstream)
    mine = pulled(lambda h: linear_cross_entropy(h, labels, Dense(head)), hidden, upstream)
    own = pulled(lambda h: plain(h, labels, head), hidden, upstream)
    assert mine[0].dtype == torch.float32
    assert far(mine[0], exact[0]) <= max(1e-3, 1.05 * far(own[0], exact[0]))
    # The gradient is rounded twice: when it is made, and after the multiplication.
    assert far(mine[1], exact[1]) <= 1.1 * far(own[1], exact[1])


def test_fp16_keeps_gradients_below_its_smallest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sure word leaves every other a probability that fp16 rounds to nothing; together they weigh."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(4000, WIDTH, generator=generator) / 8
    hidden, labels = torch.zeros(1, WIDTH), torch.tensor([5])
    hidden[0] = 24 * head[5] / head[5].norm() ** 2
    hidden[0, 0] = head[5, 0] = 0
    head[:5, 0] = head[6:, 0] = 1  # what all the others pull at
    head, hidden = head.half(), hidden.half()
    others = torch.softmax((hidden.double() @ head.double().T)[0], 0)
    others[5] = 0
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert 0 < float(others.quantile(0.99)) < smallest / 2
    exact = pulled(lambda h: plain(h, labels, head.double()), hidden.double())[1]

    def error() -> float:
        found = pulled(lambda h: linear_cross_entropy(h, labels, Dense(head)), hidden, 1024.0)
        return far(found[1].double() / 1024, exact)

    kept = error()
    monkeypatch.setattr(module, "FP16_SCALE", 1.0)
    assert kept < error() / 5


def test_labels_may_repeat_and_stand_at_both_ends_of_the_vocabulary() -> None:
    hidden, _, head = given()
    labels = torch.tensor([0, WORDS - 1] * (ROWS // 2) + [0])
    exact = pulled(lambda h: plain(h, labels, head.double()), hidden.double())
    mine = pulled(lambda h: linear_cross_entropy(h, labels, Dense(head)), hidden)
    assert all(far(a, b) <= 1e-6 for a, b in zip(mine, exact, strict=True))


def test_no_tokens_have_no_loss_and_no_gradient() -> None:
    hidden, labels, head = given()
    found = pulled(lambda h: linear_cross_entropy(h, labels[:0], Dense(head)), hidden[:0])
    assert float(found[0]) == 0 and found[1].shape == (0, WIDTH)


class Watched(Dense):
    """A head that remembers how it was used."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.forward: list[int] = []
        self.backward: list[int] = []

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.forward.append(len(hidden))
        return super().logits(hidden)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        self.backward.append(len(gradient))
        return super().back(gradient)


def test_each_row_is_projected_once_forward_and_once_back(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, weight = given()
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * 4 * WORDS + 7)
    head = Watched(weight)
    pulled(lambda h: linear_cross_entropy(h, labels, head), hidden)
    assert head.forward == head.backward == [10, 10, 10, 7]


def test_without_gradients_none_is_made() -> None:
    hidden, labels, weight = given()
    head = Watched(weight)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, labels, head)
    assert linear_cross_entropy(hidden, labels, head) == total and not total.requires_grad
    assert head.forward and not head.backward


def test_the_logits_never_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head = given(rows=512)
    hidden.requires_grad_()
    peaks = []
    for rows in (512, 64):
        monkeypatch.setattr(module, "CHUNK_BYTES", rows * 4 * WORDS)
        tracer = MemoryTracer()
        tracer.own("given", [hidden, labels, head])
        with tracer.watching():
            linear_cross_entropy(hidden, labels, Dense(head)).backward()
        peaks.append(tracer.peak_bytes - tracer.peak["given"])
    gradient = 512 * WIDTH * 4
    assert peaks[0] > 512 * WORDS * 4 > 4 * gradient
    assert peaks[1] < peaks[0] / 4 + gradient


def test_a_second_pass_backward_is_refused_or_gives_the_same() -> None:
    hidden, labels, head = given()
    leaf = hidden.clone().requires_grad_()
    total = linear_cross_entropy(leaf, labels, Dense(head))
    (first,) = torch.autograd.grad(total, [leaf], retain_graph=True)
    (second,) = torch.autograd.grad(total, [leaf])
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, [leaf])


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden, labels, head = given()
    leaf = hidden.clone().requires_grad_()
    total = linear_cross_entropy(leaf, labels, Dense(head))
    (first,) = torch.autograd.grad(total.square(), [leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_does_not_reach_into_it() -> None:
    hidden, labels, head = given()
    own = pulled(lambda h: linear_cross_entropy(h, labels, Dense(head)), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = pulled(lambda h: linear_cross_entropy(h, labels, Dense(head)), hidden)
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
