"""Causal attention whose forward and backward passes can be apart, as torch's own kernels compute it.

A layer that keeps q, k, v, the output and the log-sum-exp of its scores, or some of them, cannot leave
attention to autograd, which keeps what it likes. Here each kernel of PyTorch is called by its aten name,
forward and backward; a test holds them to ``scaled_dot_product_attention``. Rows that are packed into one
sequence are told apart by their bounds where the kernel takes bounds, and by a mask elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

aten = torch.ops.aten
CAUSAL_FROM_TOP_LEFT = 1  # of aten's memory-efficient kernel
BIAS_ALIGNMENT = 8  # between rows of its bias, or it refuses; SDPA pads its own
Saved = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Bounds:
    """Where packed rows begin and end: (rows + 1,) int32 on the card, and the longest row."""

    offsets: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Scores:
    """How a layer scores: its scale, and what may see what.

    Attributes:
        scale: Of the products of queries and keys.
        window: Positions a token sees, itself included; None for all before it. With a mask, the mask
            has it already.
        mask: True or 0 where a score counts, shape (B, 1, T, T); None for causal attention.
        bounds: Of packed rows, where the kernel takes them; then B is 1.
    """

    scale: float
    window: int | None = None
    mask: torch.Tensor | None = None
    bounds: Bounds | None = None


# torch 2.13's shape function of this operator lacks one of its arguments, so that fake tensors cannot pass
# it; ours calls it on a card and knows the shapes. Drop it when torch's does.
_library = torch.library.Library("qlora", "FRAGMENT")
_library.define(
    "efficient_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor o,"
    " Tensor? offsets, SymInt longest, Tensor lse, Tensor seed, Tensor offset, int kind, float scale,"
    " int? window)"
    " -> (Tensor, Tensor, Tensor)"
)


def _efficient_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    o: torch.Tensor,
    offsets: torch.Tensor | None,
    longest: int,
    lse: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    kind: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = aten._efficient_attention_backward(
        do, q, k, v, bias, o, offsets, offsets, longest, longest, lse, 0.0, seed, offset, kind, False,
        scale=scale, window_size=window,
    )  # fmt: skip
    return found[0], found[1], found[2]


_library.impl("efficient_attention_backward", _efficient_backward, "CUDA")
torch.library.register_fake(
    "qlora::efficient_attention_backward",
    lambda do, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    lib=_library,
)


class Kernel(Protocol):
    """One way to compute attention: q (B, T, H, D), k and v (B, T, K, D), output (B, T, H, D)."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        """The output, and what else :meth:`backward` needs."""
        ...

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of q, k and v."""
        ...


class CpuFlash:
    """The CPU's flash kernel: any dtype, a mask or none, as many key heads as query heads."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        assert scores.bounds is None, "this kernel takes masks alone"
        groups = q.shape[2] // k.shape[2]
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), _spread(k, groups).transpose(1, 2), _spread(v, groups).transpose(1, 2),
            0.0, scores.mask is None, attn_mask=_bias(scores, q.dtype), scale=scores.scale,
        )  # fmt: skip
        return o.transpose(1, 2), (lse,)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = q.shape[2] // k.shape[2]
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do.transpose(1, 2), q.transpose(1, 2), _spread(k, groups).transpose(1, 2),
            _spread(v, groups).transpose(1, 2), o.transpose(1, 2), saved[0], 0.0, scores.mask is None,
            attn_mask=_bias(scores, q.dtype), scale=scores.scale,
        )  # fmt: skip
        return (
            dq.transpose(1, 2),
            _gather(dk.transpose(1, 2), groups),
            _gather(dv.transpose(1, 2), groups),
        )


class Flash:
    """FlashAttention 2 as PyTorch carries it: 16 bits, capability 8.0, heads up to 256; no mask.

    Key heads are shared without a copy; packed rows and windows are the kernel's own.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        shape = q.shape
        (q, k, v), offsets, longest = self._laid_out(scores, q, k, v)
        o, lse, rng, unused, _ = aten._flash_attention_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scores.scale,
            window_size_left=self._left(scores, longest), window_size_right=0,
        )  # fmt: skip
        return o.view(shape), (lse, rng, unused)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = [x.shape for x in (q, k, v)]
        (q, k, v, o, do), offsets, longest = self._laid_out(scores, q, k, v, o, do)
        lse, rng, unused = saved
        found = aten._flash_attention_backward(
            do, q, k, v, o, lse, offsets, offsets, longest, longest, 0.0, True, rng, unused,
            scale=scores.scale, window_size_left=self._left(scores, longest), window_size_right=0,
        )  # fmt: skip
        dq, dk, dv = (grad.view(shape) for grad, shape in zip(found, shapes, strict=True))
        return dq, dk, dv

    @staticmethod
    def _laid_out(scores: Scores, *tensors: torch.Tensor) -> tuple[Any, torch.Tensor | None, int]:
        if scores.bounds is None:
            return tensors, None, tensors[0].shape[1]
        return [x[0] for x in tensors], scores.bounds.offsets, scores.bounds.longest

    @staticmethod
    def _left(scores: Scores, longest: int) -> int:
        return -1 if scores.window is None or scores.window >= longest else scores.window - 1


class Efficient:
    """PyTorch's memory-efficient kernel: any dtype and capability; a mask, or bounds, or neither.

    It wants as many key heads as query heads: keys and values are repeated while it works, and the
    copies are not kept. What a T4 gets.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        groups = q.shape[2] // k.shape[2]
        offsets, longest = self._bounds(scores, None)
        o, lse, seed, offset, _, _ = aten._efficient_attention_forward(
            q, _spread(k, groups), _spread(v, groups), _spread_bias(scores, q), offsets, offsets,
            longest, longest, 0.0, self._kind(scores), True, scale=scores.scale,
            window_size=self._window(scores),
        )  # fmt: skip
        return o, (lse, seed, offset)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = q.shape[2] // k.shape[2]
        offsets, longest = self._bounds(scores, q.shape[1])
        lse, seed, offset = saved
        dq, dk, dv = torch.ops.qlora.efficient_attention_backward(
            do, q, _spread(k, groups), _spread(v, groups), _spread_bias(scores, q), o, offsets, longest,
            lse, seed, offset, self._kind(scores), scores.scale, self._window(scores),
        )  # fmt: skip
        return dq, _gather(dk, groups), _gather(dv, groups)

    @staticmethod
    def _bounds(scores: Scores, length: int | None) -> tuple[torch.Tensor | None, int | None]:
        if scores.bounds is None:
            return None, length
        return scores.bounds.offsets, scores.bounds.longest

    @staticmethod
    def _window(scores: Scores) -> int | None:
        """As the kernel counts: positions a token sees, itself included; a mask has it already."""
        return scores.window if scores.mask is None else None

    @staticmethod
    def _kind(scores: Scores) -> int:
        return CAUSAL_FROM_TOP_LEFT if scores.mask is None else 0


class OnCuda:
    """On a card: one kernel for batches without a mask, another for those with one.

    In fp32 FlashAttention does not work, so the second one takes those too.
    """

    def __init__(self, unmasked: Kernel, masked: Kernel) -> None:
        self.unmasked, self.masked = unmasked, masked

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        return self._kernel(q, scores).forward(q, k, v, scores)

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._kernel(q, scores).backward(do, q, k, v, o, saved, scores)

    def _kernel(self, q: torch.Tensor, scores: Scores) -> Kernel:
        plain = scores.mask is None and q.dtype != torch.float32
        return self.unmasked if plain else self.masked


class Differentiated:
    """Any other attention, as transformers calls it, through autograd: soft-capped, eager, flex.

    Its graph cannot be kept by parts. It is made again in the backward pass from q, k and v.

    Args:
        function: ``(q, k, v, scores) -> output``, all (B, heads, T, D) but the output (B, T, H, D).
    """

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, Saved]:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return self.function(*heads, scores), ()

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        saved: Saved,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again = self.function(*(x.transpose(1, 2) for x in leaves), scores)
        dq, dk, dv = torch.autograd.grad(again, leaves, do)
        return dq, dk, dv


def candidates_on(capability: tuple[int, int] | None, head_dim: int) -> dict[str, Kernel]:
    """The kernels without masks that a card of this compute capability has, the likeliest first."""
    recent = capability is not None and capability >= (8, 0)
    flash: dict[str, Kernel] = {"flash": Flash()} if recent and head_dim <= 256 else {}
    return flash | {"memory-efficient": Efficient()}


def kernel_on(capability: tuple[int, int] | None, head_dim: int) -> OnCuda:
    """The kernels for a card of this compute capability, untried."""
    return OnCuda(next(iter(candidates_on(capability, head_dim).values())), Efficient())


def bounds_in(options: dict[str, Any]) -> Bounds | None:
    """Where packed rows end, as transformers hands it to FlashAttention; None if nobody says."""
    offsets = options.get("cu_seq_lens_q")
    return None if offsets is None else Bounds(offsets, int(options["max_length_q"]))


def in_options(bounds: Bounds) -> dict[str, Any]:
    """The same the other way round."""
    offsets, longest = bounds.offsets, bounds.longest
    return {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest,
        "max_length_k": longest,
    }  # fmt: skip


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        scores: Scores,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        o, saved = kernel.forward(q, k, v, scores)
        ctx.kernel, ctx.scores = kernel, scores
        ctx.save_for_backward(q, k, v, o, *saved)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, o, *saved = ctx.saved_tensors
        return None, None, *ctx.kernel.backward(grads[0], q, k, v, o, tuple(saved), ctx.scores)


def attend_with(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """The output of a kernel, differentiable: for layers that are not fused."""
    return _Attend.apply(kernel, scores, q, k, v)  # type: ignore[no-any-return]


def _spread(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Each key head as often as query heads share it: (B, T, K, D) to (B, T, H, D)."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=2)


def _gather(gradient: torch.Tensor, groups: int) -> torch.Tensor:
    return gradient if groups == 1 else gradient.unflatten(2, (-1, groups)).sum(3)


def _bias(scores: Scores, dtype: torch.dtype) -> torch.Tensor | None:
    """The mask as what is added to scores."""
    mask = scores.mask
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _spread_bias(scores: Scores, q: torch.Tensor) -> torch.Tensor | None:
    mask = scores.mask
    if mask is None:
        return None
    length = mask.shape[-1]
    if length % BIAS_ALIGNMENT:
        mask = functional.pad(mask, (0, -length % BIAS_ALIGNMENT))
    bias = _bias(replace(scores, mask=mask), q.dtype)
    assert bias is not None
    return bias[..., :length].expand(len(q), q.shape[2], -1, -1)
