"""What a card does not have to hold all the time, kept in the host's memory.

The inputs of recomputed layers go to pinned memory from the forward pass to the backward pass, one tensor a
layer. On a card the copies run beside the arithmetic, on a stream of their own: while one layer computes,
the input of the one before it leaves, or that of the next one backwards comes in, so that two are there at
a time. The embedding table stays with the host altogether: a step gathers a row of it for each token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

MIN_BYTES = 2**20  # a smaller tensor is not worth a copy


class InputsOnHost(torch.autograd.graph.saved_tensors_hooks):
    """While entered, what autograd keeps of hidden states (B, T, H) is kept on the host.

    Inside a checkpointed layer other hooks are in force, and a fused one keeps its own tensors without
    gradients, so only the layers' inputs pass through here. Masks and rotary embeddings, which all layers
    share, need no gradient and are left alone.

    Args:
        moved: Told of each copy on the host, for whoever counts bytes.
    """

    def __init__(self, moved: Callable[[torch.Tensor], Any] | None = None) -> None:
        last: list[Callable[[], _Kept | None]] = [lambda: None]

        def pack(tensor: torch.Tensor) -> Any:
            if not _is_hidden_state(tensor):
                return tensor
            kept = _Kept(tensor.detach(), last[0])
            last[0] = weakref.ref(kept)
            if moved is not None:
                moved(kept.on_host)
            return kept

        def unpack(packed: Any) -> torch.Tensor:
            return packed if isinstance(packed, torch.Tensor) else packed.bring_back()

        super().__init__(pack, unpack)


class _Kept:
    """One tensor on the host, and its way there and back.

    It knows the one before it in the forward pass, which is wanted after it, and does not keep it alive:
    each goes when autograd lets go of it.
    """

    streams: ClassVar[dict[torch.device, Any]] = {}  # one of copies for each card

    def __init__(self, tensor: torch.Tensor, before: Callable[[], _Kept | None]) -> None:
        self.device, self.before = tensor.device, before
        self.on_card: torch.Tensor | None = None
        self.on_host = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )
        if not tensor.is_cuda:
            self.on_host.copy_(tensor)
            return
        copies = self._stream()
        copies.wait_stream(torch.cuda.current_stream(self.device))  # until it is written
        with torch.cuda.stream(copies):
            self.on_host.copy_(tensor, non_blocking=True)
        tensor.record_stream(copies)  # its memory is not given away before it was read

    def bring_back(self) -> torch.Tensor:
        """The tensor, on its card; the one that is wanted after it is sent for."""
        if self.device.type == "cpu":
            return self.on_host.clone()  # where the host is all there is: the same copies
        self._send_for()
        found, self.on_card = self.on_card, None
        assert found is not None
        present = torch.cuda.current_stream(self.device)
        present.wait_stream(self._stream())
        found.record_stream(present)
        if (following := self.before()) is not None:
            following._send_for()
        return found

    def _send_for(self) -> None:
        if self.on_card is None:
            # After its own way out: both are on the one stream of copies.
            with torch.cuda.stream(self._stream()):
                self.on_card = self.on_host.to(self.device, non_blocking=True)

    def _stream(self) -> Any:
        if self.device not in self.streams:
            self.streams[self.device] = torch.cuda.Stream(self.device)
        return self.streams[self.device]


class EmbeddingOnHost:
    """What stands in an embedding's ``forward`` when its table lies with the host.

    The ids come to the host, once a pass; the rows go back to where the ids were.
    """

    def __init__(self, module: nn.Embedding) -> None:
        self.module = module

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        own: Any = type(self.module).forward  # Gemma 3's also scales
        rows = own(self.module, ids.to("cpu"))
        if ids.device.type == "cpu":
            return rows
        return rows.pin_memory().to(ids.device, non_blocking=True)


def leave_embedding_with_host(base: Any) -> None:
    """Keep a base's embedding table in the host's memory, wherever the rest of the base goes.

    Its ``state_dict`` and names stay what they were. A table that the head shares cannot be spared. It
    becomes a buffer: libraries take the device of a model's first parameter for the model's own.
    """
    module = base.get_input_embeddings()
    assert module.weight is not base.get_output_embeddings().weight, "the head needs the table"
    if not module.weight.is_meta:  # a plan's model has no contents to move
        module.to("cpu")
    table = module._parameters.pop("weight")
    module.register_buffer("weight", table.detach())
    module.forward = EmbeddingOnHost(module)
    module._apply = lambda fn, recurse=True: module  # a later .to(device) of the model passes it by


def _is_hidden_state(tensor: torch.Tensor) -> bool:
    return (
        tensor.requires_grad
        and tensor.ndim == 3
        and not isinstance(tensor, nn.Parameter)
        and tensor.nbytes >= MIN_BYTES
    )
