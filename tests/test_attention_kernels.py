"""Attention with its two passes apart, against softmax written out in fp64 and against SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.kernels.attention import (
    Bounds,
    CpuFlash,
    Differentiated,
    Efficient,
    Flash,
    Kernel,
    OnCuda,
    Scores,
    attend_with,
    kernel_on,
)

B, T, H, D = 2, 37, 6, 32
SCALE = 0.3
OFFSETS = [0, 11, 12, 30, T]  # of packed rows, one of them a single token
needs_card = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: torch.cuda.is_available() is False"
)


def heads(
    keys: int, batch: int = B, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output; q, k and v are cut out of wider matrices."""
    generator = torch.Generator().manual_seed(keys)
    wide = torch.randn(batch, T, H + 2 * keys, D, generator=generator).to(device, dtype)
    upstream = torch.randn(batch, T, H, D, generator=generator).to(device, dtype)
    return [*wide.split((H, keys, keys), 2), upstream]


def causal(window: int | None = None) -> torch.Tensor:
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (distance >= 0) & (distance < (window or T))


def within_rows() -> torch.Tensor:
    row = torch.zeros(T, dtype=torch.long)
    for start in OFFSETS[1:-1]:
        row[start:] += 1
    return row[:, None] == row


def exact(
    inputs: list[torch.Tensor], allowed: torch.Tensor, scale: float = SCALE
) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v, by the definition, in fp64."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in inputs[:3])
    groups = q.shape[2] // k.shape[2]
    # Query heads 0 to groups - 1 share key head 0, and so on.
    keys, values = (x[:, :, torch.arange(H) // groups] for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    o = torch.einsum("bhts,bshd->bthd", weights, values)
    return [o.detach(), *torch.autograd.grad(o, [q, k, v], inputs[3].cpu().double())]


def passed(kernel: Kernel, inputs: list[torch.Tensor], scores: Scores) -> list[torch.Tensor]:
    q, k, v, upstream = inputs
    before = [x.clone() for x in inputs]
    o, saved = kernel.forward(q, k, v, scores)
    found = kernel.backward(upstream, q, k, v, o, saved, scores)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))
    assert [x.shape for x in (o, *found)] == [q.shape, q.shape, k.shape, v.shape]
    return [o, *found]


def far(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    return max(
        float((a.cpu().double() - b.cpu().double()).norm() / b.double().norm())
        for a, b in zip(found, reference, strict=True)
    )


# --- on the CPU


@pytest.mark.parametrize("keys", [1, 2, 3, 6])
def test_without_a_mask_the_cpus_kernel_is_causal_attention(keys: int) -> None:
    inputs = heads(keys)
    assert far(passed(CpuFlash(), inputs, Scores(SCALE)), exact(inputs, causal())) < 2e-6


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("keys", [2, 6])
def test_with_a_mask_the_cpus_kernel_sees_what_the_mask_allows(keys: int, batch: int) -> None:
    inputs = heads(keys)
    mask = (causal(9) & within_rows()).expand(batch, 1, T, T).clone()
    mask[-1, 0, :, 2] |= causal()[:, 2]
    reference = exact(inputs, mask)
    assert far(passed(CpuFlash(), inputs, Scores(SCALE, mask=mask)), reference) < 2e-6
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert far(passed(CpuFlash(), inputs, Scores(SCALE, mask=bias)), reference) < 2e-6


@pytest.mark.parametrize("masked", [True, False])
def test_the_cpus_kernel_gives_what_sdpa_gives(masked: bool) -> None:
    inputs = heads(2)
    mask = within_rows()[None, None] & causal() if masked else None
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    o = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=not masked,
        scale=SCALE, enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip
    own = [o.detach(), *torch.autograd.grad(o, [q, k, v], inputs[3])]
    assert far(passed(CpuFlash(), inputs, Scores(SCALE, mask=mask)), own) < 2e-6


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    inputs = heads(2)
    mask = causal()[None, None].clone()
    mask[..., :5, :] = False
    mask[..., :5] = False
    o, dq, dk, dv = passed(CpuFlash(), inputs, Scores(SCALE, mask=mask))
    for x in (o, dq, dk, dv):
        assert bool(torch.isfinite(x).all()) and not bool(x[:, :5].any())


@pytest.mark.parametrize("keys", [2, 6])
def test_any_other_attention_is_differentiated_as_autograd_does(keys: int) -> None:
    inputs, mask = heads(keys), causal(9)[None, None]

    def capped(q: Any, k: Any, v: Any, asked: Scores) -> torch.Tensor:
        k, v = (x.repeat_interleave(H // keys, 1) for x in (k, v))
        scores = 2 * torch.tanh(q @ k.transpose(2, 3) * SCALE / 2)
        return (scores.masked_fill(~asked.mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    o = capped(*(x.transpose(1, 2) for x in leaves), Scores(SCALE, mask=mask))
    own = [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]
    with torch.no_grad():
        found = passed(Differentiated(capped), inputs, Scores(SCALE, mask=mask))
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
    assert not any(x.requires_grad for x in found)


def test_a_kernel_can_be_differentiated_without_a_layer_around_it() -> None:
    inputs = heads(2)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    o = attend_with(CpuFlash(), *leaves, Scores(SCALE))
    found = [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]
    assert far(found, exact(inputs, causal())) < 2e-6
    o = attend_with(CpuFlash(), *leaves, Scores(SCALE))
    (first,) = torch.autograd.grad(o.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- which kernel a card has


class Calls(TorchDispatchMode):
    """The aten operators that were called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...]]] = []
        self.windows: list[int | None] = []  # as each kernel counts them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func._opname.removeprefix("_"), args))
        named = kwargs or {}
        if "window_size_left" in named:  # positions to the left of a token
            self.windows.append(named["window_size_left"])
        elif "efficient_attention" in func._opname:
            self.windows.append(
                args[13] if "backward" in func._opname else named.get("window_size")
            )
        return func(*args, **(kwargs or {}))

    def of(self, part: str) -> list[tuple[str, tuple[Any, ...]]]:
        return [call for call in self.made if part in call[0]]


def imagined(
    kernel: Kernel, scores: Scores, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> Calls:
    """The calls of both passes, on tensors without data, and that their shapes are right."""
    q, k, v, upstream = heads(2, batch, dtype)
    with FakeTensorMode() as mode, Calls() as calls:
        q, k, v, upstream = map(mode.from_tensor, (q, k, v, upstream))
        mask, bounds = scores.mask, scores.bounds
        scores = Scores(
            scores.scale,
            scores.window,
            None if mask is None else mode.from_tensor(mask),
            None if bounds is None else Bounds(mode.from_tensor(bounds.offsets), bounds.longest),
        )
        o, saved = kernel.forward(q, k, v, scores)
        found = kernel.backward(upstream, q, k, v, o, saved, scores)
    assert [x.shape for x in (o, *found)] == [q.shape, q.shape, k.shape, v.shape]
    assert {x.dtype for x in (o, *found)} == {dtype}
    return calls


BOUNDS = Bounds(torch.tensor(OFFSETS, dtype=torch.int32), 18)
MASK = (causal() & within_rows())[None, None]


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
@pytest.mark.parametrize("kernel", [Flash(), Efficient()])
def test_the_kernels_of_a_card_take_what_they_are_given(
    kernel: Kernel, bounds: Bounds | None, window: int | None, batch: int
) -> None:
    if bounds is not None and batch > 1:
        return  # packed rows are one sequence
    name = "flash_attention" if isinstance(kernel, Flash) else "efficient_attention"
    calls = imagined(kernel, Scores(SCALE, window, None, bounds), batch=batch)
    assert [call for call, _ in calls.of(name)] == [f"{name}_forward", f"{name}_backward"]
    if isinstance(kernel, Flash):
        assert calls.windows == [-1 if window is None else window - 1] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_efficient_kernel_takes_a_mask_laid_out_as_it_wants_it(dtype: torch.dtype) -> None:
    """Every 8th number begins a row: the kernel refuses others, and SDPA pads its masks to that."""
    assert T % 8
    calls = imagined(Efficient(), Scores(SCALE, mask=MASK), dtype, batch=B)
    (_, forward), (_, backward) = calls.of("efficient_attention")
    for bias in (forward[3], backward[4]):
        assert bias.shape == (B, H, T, T) and bias.dtype == dtype
        assert all(stride % 8 == 0 for stride in bias.stride()[:3]) and bias.stride(3) == 1


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_window_is_the_efficient_kernels_own_unless_a_mask_has_it(bounds: Bounds | None) -> None:
    calls = imagined(Efficient(), Scores(SCALE, 9, None, bounds))
    assert calls.windows == [9, 9]
    assert imagined(Efficient(), Scores(SCALE, 9, MASK)).windows == [None, None]
    assert imagined(Efficient(), Scores(SCALE)).windows == [None, None]


def test_a_card_gets_the_kernel_that_it_can_run() -> None:
    plain, masked = Scores(SCALE), Scores(SCALE, mask=MASK)

    def used(card: OnCuda, scores: Scores, dtype: torch.dtype) -> str:
        made = imagined(card, scores, dtype).of("attention")
        return made[0][0].removesuffix("_attention_forward")

    new, old, wide = kernel_on((8, 0), 128), kernel_on((7, 5), 128), kernel_on((9, 0), 512)
    assert used(new, plain, torch.bfloat16) == "flash"
    assert used(new, masked, torch.bfloat16) == used(new, plain, torch.float32) == "efficient"
    assert used(old, plain, torch.float16) == used(wide, plain, torch.bfloat16) == "efficient"
    assert used(kernel_on(None, 64), plain, torch.float16) == "efficient"


# --- on a card


LAID_OUT = {
    "causal": (Scores(SCALE), causal()),
    "window": (Scores(SCALE, 9), causal(9)),
    "packed": (Scores(SCALE, bounds=BOUNDS), causal() & within_rows()),
    "packed, window": (Scores(SCALE, 9, None, BOUNDS), causal(9) & within_rows()),
    "mask": (Scores(SCALE, mask=MASK), causal() & within_rows()),
}
ON_CARD = [
    (kernel, layout, dtype)
    for kernel in (Flash(), Efficient())
    for layout in LAID_OUT
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if isinstance(kernel, Efficient) or (layout != "mask" and dtype != torch.float32)
]


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("keys", [2, 6])
@pytest.mark.parametrize("kernel, layout, dtype", ON_CARD)
def test_a_cards_kernels_give_what_the_definition_gives(
    kernel: Kernel, layout: str, dtype: torch.dtype, keys: int
) -> None:
    new = isinstance(kernel, Flash) or dtype == torch.bfloat16
    if new and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention and bf16 need compute capability 8.0")
    scores, allowed = LAID_OUT[layout]
    mask, bounds = scores.mask, scores.bounds
    on_card = Scores(
        SCALE,
        scores.window,
        None if mask is None else mask.cuda(),
        None if bounds is None else Bounds(bounds.offsets.cuda(), bounds.longest),
    )
    inputs = heads(keys, 1, dtype, "cuda")
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs[:3])
    spread = (x.repeat_interleave(H // keys, 1) for x in (k, v))
    o = functional.scaled_dot_product_attention(q, *spread, attn_mask=allowed.cuda(), scale=SCALE)
    gradients = torch.autograd.grad(o, [q, k, v], inputs[3].transpose(1, 2))
    sdpa = [x.detach().transpose(1, 2) for x in (o, *gradients)]
    reference = exact(inputs, allowed)
    assert far(passed(kernel, inputs, on_card), reference) <= max(2 * far(sdpa, reference), 1e-5)


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("length", [1, 37, 64, 129])
def test_a_mask_of_any_length_is_taken_on_a_card(length: int) -> None:
    q = torch.randn(2, length, H, D, device="cuda", dtype=torch.float16)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device="cuda").tril()
    o, dq, dk, dv = passed(Efficient(), [q, q, q, q], Scores(SCALE, mask=mask))
    plain = passed(Efficient(), [q, q, q, q], Scores(SCALE))
    for found, reference in zip((o, dq, dk, dv), plain, strict=True):
        assert torch.allclose(found, reference, atol=2e-2)
