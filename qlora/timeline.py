"""Where a run's memory is: what holds it, and which micro-batch took it to its highest point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from qlora import hardware, phantom
from qlora.cards import Card


class Timeline:
    """Follows the memory of a run by asking, step by step; the device is never waited for.

    What is told of a micro-batch is the highest point of what torch's allocator handed out by its end.
    A CPU has no such counter: there it is the process's resident memory at that moment.

    Attributes:
        peak_bytes: The highest point so far.
        peak_step: The optimizer step it was reached in; None before the first one, and where no
            micro-batch reached it but an evaluation, a save or the optimizer.
        peak_tokens: Tokens of that micro-batch as the model saw them, padding included.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self.peak_bytes = 0
        self.peak_step: int | None = None
        self.peak_tokens: int | None = None
        self._gradients = 0
        self._allocated = 0

    def saw(self, step: int, tokens: int) -> None:
        """A micro-batch of so many tokens, padding included, was forward and backward."""
        self._look(step, tokens)

    def between(self) -> None:
        """No micro-batch is to blame for what was reached since the last one."""
        if self.card.kind == "cuda":  # the counter of a CPU knows no highest point, only now
            self._look(None, None)

    def stepped(self, model: nn.Module) -> None:
        """Take the gradients' size at the end of a step, before they are freed."""
        self._gradients = total(p.grad for p in model.parameters() if p.grad is not None)
        if self.card.kind == "cuda":
            self._allocated = torch.cuda.memory_allocated(0)

    def held(self, model: nn.Module, optimizer: Any) -> dict[str, int]:
        """Bytes by what holds them, as they were at the end of the last step.

        ``base`` is the quantized weights with their scales, ``unquantized`` what else is frozen. On a
        card ``other`` is what the allocator had handed out beside these, and ``paged`` (where there is
        any) optimizer state in managed memory, which it does not hand out.
        """
        base, unquantized = _frozen(model)
        state = list(state_tensors(optimizer))
        paged = total(tensor for tensor in state if _is_paged(tensor))
        found = {
            "base": total(base),
            "unquantized": total(unquantized),
            "adapters": total(p for p in model.parameters() if p.requires_grad),
            "gradients": self._gradients,
            "optimizer": total(
                tensor
                for tensor in state
                if not _is_paged(tensor)
                and tensor.device.type == self.card.kind  # torch keeps step counts on the host
            ),
        }
        if self.card.kind == "cuda":
            found["other"] = self._allocated - sum(found.values())
        return found | ({"paged": paged} if paged else {})

    def _look(self, step: int | None, tokens: int | None) -> None:
        now, highest = hardware.memory_in_use(self.card)
        reached = highest if self.card.kind == "cuda" else now
        if reached > self.peak_bytes:
            self.peak_bytes, self.peak_step, self.peak_tokens = reached, step, tokens


def state_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """What an optimizer keeps between steps; nothing, if there is none yet."""
    for state in () if optimizer is None else optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def total(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors; storage that several share counts once."""
    storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _frozen(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(quantized, unquantized) tensors of the base."""
    found = list(phantom.frozen(model))
    base = [tensor for category, tensor in found if category in ("base_nf4", "scales")]
    return base, [tensor for category, tensor in found if category == "unquantized"]


def _is_paged(tensor: torch.Tensor) -> bool:
    return bool(getattr(tensor, "is_paged", False))  # as bitsandbytes marks them
