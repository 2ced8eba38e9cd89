"""The inputs of recomputed layers, kept in the host's memory from the forward pass to the backward pass.

What activation checkpointing keeps is one tensor a layer. Here each goes to pinned host memory when its
layer begins and comes back when its layer is computed again, both in the order of the card's own stream:
nothing can be read before it is written. The copies are not overlapped with arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MIN_BYTES = 2**20  # a smaller tensor is not worth a copy


class InputsOnHost(torch.autograd.graph.saved_tensors_hooks):
    """While entered, what autograd keeps of hidden states (B, T, H) is kept on the host.

    Inside a checkpointed layer other hooks are in force, so only the layers' inputs pass through here.
    Masks and rotary embeddings, which all layers share, need no gradient and are left alone.

    Args:
        moved: Told of each copy on the host, for whoever counts bytes.
    """

    def __init__(self, moved: Callable[[torch.Tensor], Any] | None = None) -> None:
        def pack(tensor: torch.Tensor) -> Any:
            if not _is_hidden_state(tensor):
                return tensor
            on_host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
            on_host.copy_(tensor.detach(), non_blocking=True)
            if moved is not None:
                moved(on_host)
            return tensor.device, on_host

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, on_host = packed
            if device.type == "cpu":
                return on_host.clone()  # where the host is all there is: the same copies
            return on_host.to(device, non_blocking=True)

        super().__init__(pack, unpack)


def _is_hidden_state(tensor: torch.Tensor) -> bool:
    return (
        tensor.requires_grad
        and tensor.ndim == 3
        and not isinstance(tensor, nn.Parameter)
        and tensor.nbytes >= MIN_BYTES
    )
