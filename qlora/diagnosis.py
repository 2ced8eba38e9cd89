"""Which module computes the first value that is no finite number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
