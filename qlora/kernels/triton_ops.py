"""The operators of :mod:`qlora.kernels.ops` in Triton: same names and arguments, one launch each.

Elementwise work is bound by memory, so each operator reads its inputs once (cross entropy twice) and
writes its result once. Block sizes follow from the width by a formula, and nothing is tuned at run time.
Asserts are about what would read or write past an end. From compute capability 7.5 on.

With TRITON_INTERPRET=1, set before Triton is imported, the functions take CPU tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton

from qlora.kernels import triton_kernels as kernels
from qlora.kernels.ops import GELU_TANH, SILU

# A thread holds eight elements where it can: 16 bytes of a 16-bit dtype, the widest load there is.
ELEMENTS = 8
MAX_WARPS = 16
TILE = 1024  # elements of a program that does not need a whole row
WHOLE_ROW = 16384  # the widest row that a norm keeps in registers
VOCABULARY_TILE = 8192


def _warps(elements: int) -> int:
    return min(max(elements // (32 * ELEMENTS), 1), MAX_WARPS)


def _block(width: int, most: int) -> int:
    return int(min(triton.next_power_of_2(max(width, 1)), most))


def _stride(matrix: torch.Tensor, shape: Sequence[int]) -> int:
    """Elements from a row to the next, in a matrix that must have this shape."""
    assert tuple(matrix.shape) == tuple(shape), (matrix.shape, shape)
    assert matrix.dim() == 2 and (matrix.stride(1) == 1 or matrix.shape[1] == 1), matrix.stride()
    return matrix.stride(0)


# --- RMSNorm


def _norm_shape(width: int) -> dict[str, int | bool]:
    whole = width <= WHOLE_ROW
    block = _block(width, WHOLE_ROW if whole else WHOLE_ROW // 4)
    rows = max(TILE // block, 1)
    return {
        "WIDTH": width, "ROWS": rows, "BLOCK": block, "WHOLE": whole, "num_warps": _warps(rows * block),
    }  # fmt: skip


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, add: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    assert weight.shape == (width,) and weight.is_contiguous()
    y = x.new_empty(x.shape)
    rstd = x.new_empty((rows,), dtype=torch.float)
    shape = _norm_shape(width)
    kernels.rms_norm[(triton.cdiv(rows, shape["ROWS"]),)](
        x, weight, add, y, rstd, rows, _stride(x, x.shape),
        0 if add is None else _stride(add, x.shape), float(eps), float(offset), **shape,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    add: torch.Tensor | None,
) -> torch.Tensor:
    rows, width = x.shape
    assert weight.shape == (width,) and weight.is_contiguous()
    assert rstd.shape == (rows,) and rstd.is_contiguous()
    dx = x.new_empty(x.shape)
    shape = _norm_shape(width)
    kernels.rms_norm_backward[(triton.cdiv(rows, shape["ROWS"]),)](
        dy, x, weight, rstd, add, dx, rows, _stride(dy, x.shape), _stride(x, x.shape),
        0 if add is None else _stride(add, x.shape), float(offset), **shape,
    )  # fmt: skip
    return dx


# --- rotary position embedding


def rotary_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> None:
    tokens, positions, rotated = q.shape[0], cos.shape[0], cos.shape[1]
    assert q.dim() == k.dim() == 3 and k.shape[0] == tokens and tokens % positions == 0
    assert rotated % 2 == 0 and rotated <= min(q.shape[2], k.shape[2])
    assert q.stride(2) == k.stride(2) == 1
    block = _block(rotated // 2, TILE)
    assert rotated // 2 <= block
    heads = min(max(TILE // block, 1), _block(max(q.shape[1], k.shape[1]), TILE))
    groups = triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads)
    kernels.rotary[(tokens, groups)](
        q, k, cos, sin, q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        positions, _stride(cos, cos.shape), _stride(sin, cos.shape),
        INVERSE=inverse, HEADS=heads, HALF=rotated // 2, BLOCK=block, num_warps=_warps(heads * block),
    )  # fmt: skip


# --- gated MLP


def _gated_shape(gate: torch.Tensor, kind: str) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """The grid, and the rest of what a launch is told."""
    assert kind in (SILU, GELU_TANH), kind
    rows, width = gate.shape
    block = _block(width, TILE)
    shape = {"GELU": kind == GELU_TANH, "BLOCK": block, "num_warps": _warps(block)}
    return (rows, triton.cdiv(width, block)), shape


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    out = gate.new_empty(gate.shape)
    grid, shape = _gated_shape(gate, kind)
    kernels.gated[grid](
        gate, up, out, gate.shape[1], _stride(gate, gate.shape), _stride(up, gate.shape), **shape
    )
    return out


def gated_backward_(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> None:
    grid, shape = _gated_shape(gate, kind)
    kernels.gated_backward[grid](
        dproduct, gate, up, gate.shape[1],
        _stride(dproduct, gate.shape), _stride(gate, gate.shape), _stride(up, gate.shape), **shape,
    )  # fmt: skip


# --- NF4 with nested scales


def unpack(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor | None,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    numel = math.prod(shape)
    count = triton.cdiv(numel, blocksize)
    assert packed.is_contiguous() and packed.nbytes >= triton.cdiv(numel, 2)
    assert absmax.is_contiguous() and absmax.numel() >= count
    assert code.is_contiguous() and code.numel() == 16
    if absmax2 is not None:
        assert absmax.dtype == torch.uint8 and offset is not None and code2 is not None
        assert absmax2.is_contiguous() and absmax2.numel() >= triton.cdiv(count, blocksize2)
        assert code2.is_contiguous() and code2.numel() == 256
    out = packed.new_empty(shape, dtype=dtype)
    blocks = max(TILE // blocksize, 1)
    kernels.unpack[(triton.cdiv(count, blocks),)](
        packed.view(torch.uint8), absmax, code, offset, absmax2, code2, out,
        triton.cdiv(numel, 2), numel, HALF=blocksize // 2, BLOCKSIZE2=blocksize2, BLOCKS=blocks,
        num_warps=_warps(blocks * blocksize),
        enable_fp_fusion=False,  # bitsandbytes rounds the product before it adds the offset
    )  # fmt: skip
    return out


# --- dropout without a mask


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    rows, width = x.shape
    out = x.new_empty(x.shape)
    quarter = triton.cdiv(width, 4)
    block = _block(quarter, TILE)
    kernels.dropout[(rows, triton.cdiv(quarter, block))](
        x, out, width, quarter, _stride(x, x.shape), float(p), 1 / (1 - p), int(seed),
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


# --- cross entropy, its gradient in place


def cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float, scale: float
) -> torch.Tensor:
    rows, width = logits.shape
    assert labels.shape == (rows,) and labels.is_contiguous()
    losses = logits.new_empty((rows,), dtype=torch.float)
    block = _block(width, VOCABULARY_TILE)
    kernels.cross_entropy[(rows,)](
        logits, labels, losses, _stride(logits, logits.shape), float(softcap), float(scale),
        WIDTH=width, SOFTCAP=softcap != 0, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return losses
