"""A frozen head in 8 bits: half of its bytes, and its logits made by tiles of the vocabulary.

Each row has a scale of its own, the largest of its values by 127. Whole numbers up to 127 by 128 are exact
in bf16 and fp16, so that a tile is unpacked by one product, and the scale multiplies the logits instead. By
128, because fp16 ends at 65,504: a logit of 40 by a scale of a two-thousandth would be beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qlora.step import HEAD_TILE_BYTES


class PackedHead(nn.Module):
    """A drop-in for a frozen ``nn.Linear`` head, which also is a :class:`qlora.kernels.loss.Head`.

    Args:
        linear: The head; it has no bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None
        source = linear.weight.detach()
        self.dtype = source.dtype
        self.out_features, self.in_features = source.shape
        packed = torch.empty(source.shape, dtype=torch.int8, device=source.device)
        scale = torch.empty(len(source), dtype=torch.float, device=source.device)
        for rows in self._tiles():
            part = source[rows].float()
            scale[rows] = part.abs().amax(1).clamp(min=torch.finfo(torch.float).tiny) / 127
            packed[rows] = (part / scale[rows, None]).round().to(torch.int8)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.weight: torch.Tensor
        self.scale: torch.Tensor

    @property
    def width(self) -> int:
        return int(self.out_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        flat = hidden.reshape(-1, self.in_features).to(self.dtype)
        return self.logits(flat).view(*hidden.shape[:-1], self.width)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, V)."""
        out = hidden.new_empty(len(hidden), self.width)
        for rows in self._tiles():
            tile = torch.mm(hidden, self._unpacked(rows, hidden).T)
            torch.mul(tile, self._factors(rows), out=out[:, rows])  # in fp32, rounded once
        return out

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix (V, H) that it multiplies with. In fp32 it may be too much for a card at once."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for rows in self._tiles():
            out[rows] = self.weight[rows].float() * self.scale[rows, None]
        return out

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """(N, V) to (N, H). ``gradient`` is used up."""
        found = gradient.new_zeros(len(gradient), self.in_features, dtype=torch.float)
        for rows in self._tiles():
            scaled = gradient[:, rows].mul_(self._factors(rows))
            found += torch.mm(
                scaled, self._unpacked(rows, gradient)
            )  # 16 bits would round each sum
        return found.to(gradient.dtype)

    def _unpacked(self, rows: slice, like: torch.Tensor) -> torch.Tensor:
        whole = self.weight[rows]
        return torch.mul(whole, 1 / 128, out=like.new_empty(whole.shape))  # in one launch

    def _factors(self, rows: slice) -> torch.Tensor:
        return self.scale[rows] * 128

    def _tiles(self) -> Iterator[slice]:
        size = max(1, HEAD_TILE_BYTES // (self.in_features * self.dtype.itemsize))
        return (
            slice(at, min(at + size, self.out_features)) for at in range(0, self.out_features, size)
        )


def pack_head(base: nn.Module) -> PackedHead:
    """Put an 8-bit head in the place of a base's own, which is let go."""
    head = base.get_output_embeddings()  # type: ignore[operator]
    assert head.weight is not base.get_input_embeddings().weight, "the head is the embedding"  # type: ignore[operator]
    packed = PackedHead(head).to(head.weight.device).train(head.training)
    base.set_output_embeddings(packed)  # type: ignore[operator]
    return packed
