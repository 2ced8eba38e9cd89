"""Where a computation loses its numbers: the first module, or weight, whose value is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from qlora import randomness


def where_lost(model: nn.Module, passes: Sequence[Callable[[], torch.Tensor]]) -> str:
    """Where a step loses its numbers first, in words.

    Args:
        model: Its weights and gradients are left as they are.
        passes: Compute the loss of each micro-batch once more. The random state is theirs to use.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for loss_again in passes:
        before = randomness.take()
        # Without gradients a fused layer is passed module by module, and named as closely.
        for mode in (torch.no_grad(), nullcontext()):
            randomness.put(before)  # of dropout: the same pass
            with first_non_finite(model) as found, mode:
                loss = loss_again()
            if found.name:
                return f"first in the output of {found.name}"
            if not bool(loss.isfinite()):
                return "first in the loss itself"
        # Not by backward(): that would add to the gradients that are there.
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        lost = last_non_finite([(n, g) for (n, _), g in zip(named, grads, strict=True)])
        if lost:
            return f"first in the gradient of {lost}"
    return "a second pass of it is finite"


class Finding:
    """What was found so far: the module's name, empty if all values were finite."""

    name = ""


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[Finding]:
    """Watch the outputs of all modules in this block; the device is waited for after each.

    Modules are named as the base names them, without peft's wrappers.
    """
    found = Finding()

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found.name and not all(bool(t.isfinite().all()) for t in _tensors(output)):
                found.name = name

        return hook

    hooks = [
        module.register_forward_hook(hook_of(plain(name) or "the model"))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def last_non_finite(named: Sequence[tuple[str, torch.Tensor | None]]) -> str:
    """The weight, of some with their gradients, that lost its gradient first; empty if none did.

    The gradient flows backwards: that is the last of them.
    """
    lost = (
        n for n, grad in reversed(named) if grad is not None and not bool(grad.isfinite().all())
    )
    return plain(next(lost, ""))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def plain(name: str) -> str:
    """A module's or weight's name as the base names it, without peft's wrappers; empty for the model."""
    bare = f"{name}.".removeprefix("base_model.model.").removeprefix("base_model.")
    return bare.removesuffix(".").replace(".base_layer", "").replace(".default", "")
