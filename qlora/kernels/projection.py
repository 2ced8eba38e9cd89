"""A frozen linear with a LoRA adapter on it, forward and backward by hand.

Nothing of the frozen weight is kept but the packed weight itself: it is unpacked for each product and
freed. Of the adapter's input nothing is kept beside what the layer keeps anyway; the inner product
``x A`` (N, r) is small and is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora.kernels import ops


@dataclass(frozen=True)
class Pair:
    """The adapter of one projection at work: its matrices in the compute dtype."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)


@dataclass(frozen=True)
class Projection:
    """One linear of a layer.

    Attributes:
        base: The frozen linear, packed by bitsandbytes or not.
        wrapper: PEFT's layer around it, or None where no adapter hangs.
        adapter: The adapter's name.
    """

    base: nn.Module
    wrapper: Any = None
    adapter: str = "default"

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """A (r, in) and B (out, r), or nothing."""
        if self.wrapper is None:
            return ()
        return self.wrapper.lora_A[self.adapter].weight, self.wrapper.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return float(self.wrapper.scaling[self.adapter])

    @property
    def dropout(self) -> float:
        """The share of the adapter's input that is dropped; 0 in evaluation."""
        found = self.wrapper.lora_dropout[self.adapter]
        return float(getattr(found, "p", 0.0)) if found.training else 0.0

    @property
    def drops(self) -> bool:
        """Whether its adapter's input is dropped out."""
        return self.wrapper is not None and self.dropout > 0

    @property
    def is_on(self) -> bool:
        """Whether its adapter takes part, alone: PEFT can switch it off, merge it, or exchange it."""
        wrapper = self.wrapper
        if wrapper is None:
            return True
        return (
            not wrapper.disable_adapters
            and not wrapper.merged
            and wrapper.active_adapters == [self.adapter]
        )

    def weight(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the frozen weight, all of shape (out, in): unpacked, or as they lie there."""
        weight: Any = self.base.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            return weight.detach()[rows].to(dtype)
        return ops.unpack(weight.detach(), state, dtype, rows)

    def _cuts(self, pieces: int) -> list[slice]:
        """Slices of rows that can be unpacked apart: whole blocks of scales, nested ones too."""
        weight: Any = self.base.weight
        state = getattr(weight, "quant_state", None)
        out, width = (weight if state is None else state).shape
        block = (
            1
            if state is None
            else state.blocksize * (state.state2.blocksize if state.nested else 1)
        )
        if out % pieces or out // pieces * width % block:
            return [slice(None)]
        size = out // pieces
        return [slice(start, start + size) for start in range(0, out, size)]

    def forward(
        self,
        x: torch.Tensor,
        pair: Pair | None,
        seed: torch.Tensor | None,
        *,
        inner: torch.Tensor | None = None,
        add: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x W^T + bias + s dropout(x) A^T B^T``, plus ``add``; and ``s dropout(x) A^T`` (N, r).

        Args:
            x: Shape (N, in).
            pair: The adapter's matrices.
            seed: Of its dropout.
            inner: ``s dropout(x) A^T``, if it is known from an earlier time.
            add: Shape (N, out), a residual: it costs no launch of its own.
            weight: The frozen weight, if it is unpacked already.
        """
        weight = self.weight(x.dtype) if weight is None else weight
        bias = getattr(self.base, "bias", None)
        if add is not None:
            y = torch.addmm(add, x, weight.T)
            if bias is not None:
                y += bias.to(y.dtype)
        elif bias is not None:
            y = torch.addmm(bias.to(x.dtype), x, weight.T)
        else:
            y = torch.mm(x, weight.T)
        del weight
        if pair is None:
            return y, None
        if inner is None:
            inner = self._scaled(self._dropped(x, seed), pair.a.T)
        return y.addmm_(inner, pair.b.T), inner

    def input_gradient(
        self,
        dy: torch.Tensor,
        pair: Pair | None,
        seed: torch.Tensor | None,
        *,
        into: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        pieces: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of ``x`` (N, in), added to ``into`` in place, and of ``dropout(x) A^T`` (N, r).

        With ``pieces`` the frozen weight is unpacked and multiplied in so many parts, one after another.
        """
        dx = into
        for rows in self._cuts(pieces) if weight is None else [slice(None)]:
            part = self.weight(dy.dtype, rows) if weight is None else weight
            dx = torch.mm(dy[:, rows], part) if dx is None else dx.addmm_(dy[:, rows], part)
            del part
        assert dx is not None
        if pair is None:
            return dx, None
        dinner = self.inner_gradient(dy, pair)
        if self.dropout:
            dx += self._dropped(torch.mm(dinner, pair.a), seed)
        else:
            dx.addmm_(dinner, pair.a)
        return dx, dinner

    def weight_gradients(
        self,
        x: torch.Tensor,
        dy: torch.Tensor,
        inner: torch.Tensor,
        dinner: torch.Tensor,
        seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of A (r, in) and B (out, r), from what :meth:`forward` and the other gave."""
        return (
            torch.mm(dinner.T, self._dropped(x, seed)),
            torch.mm(dy.T, inner),
        )

    def inner_gradient(self, dy: torch.Tensor, pair: Pair) -> torch.Tensor:
        """The gradient of ``dropout(x) A^T`` (N, r)."""
        return self._scaled(dy, pair.b)

    def _scaled(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The scaling times a product, in one launch."""
        ignored = x.new_empty(len(x), matrix.shape[1])
        return torch.addmm(ignored, x, matrix, beta=0, alpha=self.scaling)

    def _dropped(self, x: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        if not self.dropout:
            return x
        assert seed is not None
        return ops.dropout(x, self.dropout, seed)
