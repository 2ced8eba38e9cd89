"""Linear cross entropy over a frozen head: the logits of all tokens never stand side by side.

A frozen head needs no gradient, so the gradient of the hidden states can be made in the forward pass,
while a chunk of logits is there: one product forward and one backward for each supervised token, where a
loss that only avoids the memory (TRL 1.16) projects twice. Tokens that do not train are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels import ops
from qlora.step import CHUNK_BYTES

# fp16's smallest step is 6e-8, and most gradients of a softmax over 128,000 words are smaller than that.
FP16_SCALE = 1024.0


class Head(Protocol):
    """A frozen (V, H) matrix, maybe packed."""

    @property
    def width(self) -> int:
        """V."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states it takes."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, V)."""
        ...

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """(N, V) to (N, H)."""
        ...


class Dense:
    """A head whose weight (V, H) is in the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight.detach()

    @property
    def width(self) -> int:
        return int(self.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.mm(hidden, self.weight.T)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.mm(gradient, self.weight)


class LinearCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of hidden states (N, H) and labels (N,), fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, softcap: float
    ) -> torch.Tensor:
        scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        total = hidden.new_zeros((), dtype=torch.float)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), head.width * hidden.element_size()):
                logits = head.logits(hidden[rows])
                losses = ops.cross_entropy_(logits, labels[rows], softcap=softcap, scale=scale)
                total += losses.sum()
                if gradient is not None:
                    gradient[rows] = head.back(logits)
                del logits
        ctx.scale = scale
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # Multiplied in fp32: grads[0] carries the loss scaler and the division by the step's tokens, and
        # fp16 has few digits for a three-thousandth. A matrix, for torch to compute in the wider dtype.
        factor = (grads[0] / ctx.scale).view(1, 1)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient)), None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, *, softcap: float = 0.0
) -> torch.Tensor:
    """The sum of the cross entropies of supervised tokens; a scalar in fp32.

    Args:
        hidden: Shape (N, H), in the compute dtype, of tokens whose next one is supervised.
        labels: Shape (N,), those next ones.
        head: Frozen.
        softcap: Of the logits; 0 for none.
    """
    return LinearCrossEntropy.apply(hidden, labels, head, softcap)


def _chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // row_bytes)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
