"""A decoder layer as the fused arithmetic sees it: its projections, norms, heads, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora.kernels import ops
from qlora.kernels.attention import Kernel, Scores
from qlora.kernels.projection import Projection


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm: its weight, its epsilon, and 1 where the weight is stored less one (Gemma)."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0

    def forward(
        self, x: torch.Tensor, add: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, offset=self.offset, add=add)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, add: torch.Tensor | None = None
    ) -> torch.Tensor:
        return ops.rms_norm_backward(dy, x, self.weight, rstd, offset=self.offset, add=add)


@dataclass(frozen=True)
class Parts:
    """A decoder layer as the arithmetic below sees it; see :func:`qlora.kernels.family.parts_of`.

    Attributes:
        reading: The projections of the normed input: q, k, v, or one fused of all three (Phi-3).
        o: Of what attention returns.
        widening: gate and up, or one fused of both.
        down: Back to the residual.
        norms: Before attention and before the MLP.
        post_norms: After each of them, where a family has those (Gemma).
        head_norms: Of queries and keys (Qwen3, Gemma 3).
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Elements a head.
        rotates: Whether queries and keys are rotated: SmolLM3 leaves layers out.
        activation: Of the gate.
        attention: How it is computed.
        scores: Its scale and window.
        level: What is kept, 1 to 5.
        tile: Rows of the MLP at a time, at level 2 or higher; None for all.
    """

    reading: tuple[Projection, ...]
    o: Projection
    widening: tuple[Projection, ...]
    down: Projection
    norms: tuple[Norm, Norm]
    post_norms: tuple[Norm, Norm] | None
    head_norms: tuple[Norm, Norm] | None
    heads: int
    kv_heads: int
    head_dim: int
    rotates: bool
    activation: str
    attention: Kernel
    scores: Scores
    level: int = 1
    tile: int | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.reading, self.o, *self.widening, self.down)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of every adapter, in order."""
        return [parameter for p in self.projections for parameter in p.parameters]
