"""The elementwise operators of a QLoRA step, each one launch on a card.

They are registered with torch as ``qlora::name``, in three forms: plain torch for a CPU (the reference
that every test compares with), Triton for CUDA (:mod:`qlora.kernels.triton_ops`, imported when the first
CUDA tensor arrives), and shapes alone for fake tensors, so that a trace sees what a card would allocate
and launch. None of them knows autograd: the fused layer derives its own backward pass.

All matrices are two-dimensional, a token a row; the last dimension is contiguous. Arithmetic is fp32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from qlora.bnb import bnb  # its operators unpack on a CPU

_library = torch.library.Library("qlora", "DEF")
SILU, GELU_TANH = "silu", "gelu_tanh"


def _register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator; on CUDA the function of the same name in ``triton_ops`` computes it."""
    name = schema.partition("(")[0]

    def cuda(*args: Any, **kwargs: Any) -> Any:
        triton_ops = importlib.import_module("qlora.kernels.triton_ops")
        return getattr(triton_ops, name)(*args, **kwargs)

    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"qlora::{name}", fake, lib=_library)


# --- RMSNorm


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, add: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd[:, None] * (weight.float() + offset)
    if add is not None:
        y = y + add
    return y.to(x.dtype), rstd


def _rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    add: torch.Tensor | None,
) -> torch.Tensor:
    normed = x.float() * rstd[:, None]
    scaled = dy.float() * (weight.float() + offset)
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if add is not None:
        dx = dx + add
    return dx.to(x.dtype)


_register(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, Tensor? add) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, eps, offset, add: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:1], dtype=torch.float),
    ),
)
_register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, Tensor? add)"
    " -> Tensor",
    _rms_norm_backward,
    lambda dy, x, weight, rstd, offset, add: x.new_empty(x.shape),
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    add: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / rms(x) * (weight + offset)``, plus ``add``; and 1 / rms, fp32, a number a row.

    The product is rounded once, at the end (Llama's own code rounds before the weight, too).

    Args:
        x: Shape (N, H).
        weight: Shape (H,).
        eps: Under the root.
        offset: 1 for Gemma, whose weights are stored less one.
        add: Shape (N, H), a residual.
    """
    return torch.ops.qlora.rms_norm(x, weight, eps, offset, add)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    offset: float = 0.0,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of :func:`rms_norm`'s input, plus ``add``: shape (N, H). The weight is frozen."""
    return torch.ops.qlora.rms_norm_backward(dy, x, weight, rstd, offset, add)


# --- rotary position embedding


def _rotary_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> None:
    half = cos.shape[-1] // 2
    for x in (q, k):
        # (repeats, M, heads, D): rows of cos and sin serve every M-th token
        rows = x.unflatten(0, (-1, cos.shape[0]))
        first, second = rows[..., :half], rows[..., half : 2 * half]
        c, s = cos[:, None].float(), sin[:, None].float()
        if inverse:
            s = -s
        a, b = first.float(), second.float()
        # cos and sin repeat in both halves, up to what a scaled rope does to them
        turned = a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:]
        first.copy_(turned[0])
        second.copy_(turned[1])


_register(
    "rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse) -> ()",
    _rotary_,
    lambda q, k, cos, sin, inverse: None,
)


def rotary_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False
) -> None:
    """Rotate pairs (i, i + R/2) of the first R elements of each head, in place.

    Args:
        q: Shape (N, heads, D).
        k: Shape (N, key heads, D).
        cos: Shape (M, R), where N is a multiple of M and R at most D; both halves of R are equal.
        sin: As ``cos``.
        inverse: Rotate back: the transposed map, which is what a gradient needs.
    """
    torch.ops.qlora.rotary_(q, k, cos, sin, inverse)


# --- gated MLP


def _activated(gate: torch.Tensor, kind: str) -> torch.Tensor:
    return functional.silu(gate) if kind == SILU else functional.gelu(gate, approximate="tanh")


def _gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    activated = _activated(gate.float(), kind)
    return activated.mul_(up).to(gate.dtype)


def _gated_backward_(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> None:
    g, u, d = gate.float(), up.float(), dproduct.float()
    activated = _activated(g, kind)
    if kind == SILU:
        dgate = torch.ops.aten.silu_backward(d * u, g)
    else:
        dgate = torch.ops.aten.gelu_backward(d * u, g, approximate="tanh")
    dup = d * activated
    dproduct.copy_(activated.mul_(u))
    gate.copy_(dgate)
    up.copy_(dup)


_register("gated(Tensor gate, Tensor up, str kind) -> Tensor", _gated,
          lambda gate, up, kind: gate.new_empty(gate.shape))  # fmt: skip
_register(
    "gated_backward_(Tensor(a!) dproduct, Tensor(b!) gate, Tensor(c!) up, str kind) -> ()",
    _gated_backward_,
    lambda dproduct, gate, up, kind: None,
)


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate) * up``, shape (N, I), contiguous: SwiGLU or, with the tanh form of GELU, GeGLU.

    ``gate`` and ``up`` may be halves of one matrix (Phi-3): only their rows are contiguous.
    """
    return torch.ops.qlora.gated(gate, up, kind)


def gated_backward_(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> None:
    """Turn the product's gradient into the product, and gate and up into their gradients, in place.

    What is read is not needed again, so the widest moment of a layer's backward pass allocates nothing.
    """
    torch.ops.qlora.gated_backward_(dproduct, gate, up, kind)
    # Triton writes past autograd's eyes. A second pass over what was kept must fail, not be wrong.
    torch.autograd.graph.increment_version((dproduct, gate, up))


# --- NF4 with nested scales


def _unpack(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    if absmax2 is not None:
        assert offset is not None and code2 is not None
        scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, absmax2, code2, blocksize2, torch.float32
        )
        absmax = scales + offset
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, absmax, blocksize, "nf4", shape, dtype
    )


_register(
    "unpack(Tensor packed, Tensor absmax, Tensor code, Tensor? offset, Tensor? absmax2, Tensor? code2,"
    " int blocksize, int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor",
    _unpack,
    lambda packed, absmax, code, offset, absmax2, code2, blocksize, blocksize2, shape, dtype: (
        packed.new_empty(shape, dtype=dtype)
    ),
)


def unpack(
    packed: torch.Tensor, state: Any, dtype: torch.dtype, rows: slice = slice(None)
) -> torch.Tensor:
    """A weight packed as NF4 by bitsandbytes, shape (out, in), its nested scales unpacked on the way.

    QLoRA, section 3 (arXiv:2305.14314). bitsandbytes takes three launches and two matrices of fp32
    scales for the same.

    Args:
        packed: The bytes of a ``Params4bit``.
        state: Its ``QuantState``.
        dtype: Of the result. Rows must hold whole blocks of weights: on a CPU bitsandbytes 0.50 takes a
            wrong scale else.
        rows: Only these, which must begin and end at whole blocks of all scales.
    """
    nested = state.state2 if state.nested else None
    absmax, absmax2, shape = state.absmax, nested and nested.absmax, list(state.shape)
    if rows != slice(None):
        first, last = rows.start * shape[1], rows.stop * shape[1]
        size, size2 = state.blocksize, state.blocksize * nested.blocksize if nested else 0
        per_element = 2 * packed.element_size()
        packed = packed.flatten()[first // per_element : last // per_element]
        absmax = absmax[first // size : last // size]
        absmax2 = nested and absmax2[first // size2 : last // size2]
        shape[0] = rows.stop - rows.start
    return torch.ops.qlora.unpack(
        packed, absmax, state.code, state.offset if nested else None, absmax2, nested and nested.code,
        state.blocksize, nested.blocksize if nested else 0, shape, dtype,
    )  # fmt: skip


# --- dropout without a mask


def _dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    kept = torch.rand(x.shape, generator=generator) >= p
    return (x * kept.to(x.dtype) * (1 / (1 - p))).contiguous()


_register("dropout(Tensor x, float p, Tensor seed) -> Tensor", _dropout,
          lambda x, p, seed: x.new_empty(x.shape))  # fmt: skip
# The seed lies on the CPU, whatever x is on: reading it waits for nothing.


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """``x`` with a share ``p`` of its elements zeroed and the rest scaled by 1 / (1 - p).

    The mask follows from the seed and the position, so it is made again and never kept; on its own
    gradient the same call is the backward pass.

    Args:
        x: Shape (N, H).
        p: From 0 to below 1.
        seed: One int64 on the CPU.
    """
    return torch.ops.qlora.dropout(x, p, seed)


# --- cross entropy, its gradient in place


def _cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float, scale: float
) -> torch.Tensor:
    wide = logits.float()
    slope = None
    if softcap:
        squashed = torch.tanh(wide / softcap)
        slope, wide = 1 - squashed.square(), softcap * squashed
    log_probs = torch.log_softmax(wide, -1)
    losses = -log_probs.gather(1, labels[:, None]).squeeze(1)
    gradient = log_probs.exp_()
    gradient[torch.arange(len(labels)), labels] -= 1
    if slope is not None:
        gradient *= slope
    logits.copy_(gradient * scale)
    return losses


_register(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, float softcap, float scale) -> Tensor",
    _cross_entropy_,
    lambda logits, labels, softcap, scale: logits.new_empty(labels.shape, dtype=torch.float),
)


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, *, softcap: float = 0.0, scale: float = 1.0
) -> torch.Tensor:
    """The loss of each row, fp32, shape (N,); the logits become their gradients, in place.

    Args:
        logits: Shape (N, V).
        labels: Shape (N,), all within V.
        softcap: Gemma 2's bound of the logits, ``c tanh(x / c)``; 0 for none.
        scale: What the gradients are multiplied by before they are rounded.
    """
    return torch.ops.qlora.cross_entropy_(logits, labels, softcap, scale)


assert bnb is not None
