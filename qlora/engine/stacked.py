"""Many adapters on one base, each row of a batch with its own, in one forward.

The adapters' matrices stand one under the other: a linear of the base adds ``((x A^T) * gate) B^T``, in
which a row's gate is 1 for its own adapter and 0 for the others. So a batch costs two small products a
linear, however many adapters are in it, and what a row gets does not depend on whose rows stand beside
it: the shapes are always the same. (peft's ``adapter_names`` takes the rows of each adapter apart:
products of other shapes, which round in other ways, and four times as many of them for four adapters.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora.adapter import Matrices

Chosen = str | None | Sequence[str | None]  # None is the bare base


@dataclass(frozen=True)
class Stack:
    """The adapters of one linear, one under the other; one that leaves it alone has no rows in it."""

    a: torch.Tensor  # (R, in), R the ranks of all adapters together
    b: torch.Tensor  # (out, R), scaled
    ranks: tuple[int, ...]

    def span(self, index: int) -> slice:
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])


class Stacked:
    """Hangs the adapters on a base, which no peft is on; :meth:`use` says whose a forward is.

    Not for several threads at once.
    """

    def __init__(self, base: Any, adapters: Mapping[str, Matrices]) -> None:
        self.names = tuple(adapters)
        self._one: int | None = None
        self._rows: torch.Tensor | None = None  # (B, adapters), one 1 a row or none
        self._gates: dict[tuple[int, ...], torch.Tensor] = {}
        linears = dict.fromkeys(name for matrices in adapters.values() for name in matrices)
        self._hooks = []
        for name in linears:
            stack = _stack([matrices.get(name) for matrices in adapters.values()])
            add = partial(self._add, stack)
            self._hooks.append(base.get_submodule(name).register_forward_hook(add))

    @contextmanager
    def use(self, chosen: Chosen) -> Iterator[None]:
        """In the block, forwards are an adapter's, the bare base's, or each row of a batch has its own."""
        if chosen is None or isinstance(chosen, str):
            self._one = None if chosen is None else self.names.index(chosen)
        elif self.names:
            which = torch.zeros(len(chosen), len(self.names))
            for row, name in enumerate(chosen):
                if name is not None:
                    which[row, self.names.index(name)] = 1.0
            self._rows = which
        try:
            yield
        finally:
            self._one = self._rows = None
            self._gates.clear()

    def take_off(self) -> None:
        """Leave the base as it was found."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(
        self, stack: Stack, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """What the linear gives and what its adapters add, rounded where peft rounds."""
        if self._one is not None:
            span = stack.span(self._one)
            if span.start == span.stop:
                return None
            low = functional.linear(inputs[0].to(stack.a.dtype), stack.a[span])
            added = functional.linear(low, stack.b[:, span])
        elif self._rows is not None:
            low = functional.linear(inputs[0].to(stack.a.dtype), stack.a)
            added = functional.linear(low * self._gate(stack, low), stack.b)
        else:
            return None
        return output + added.to(output.dtype)

    def _gate(self, stack: Stack, like: torch.Tensor) -> torch.Tensor:
        """(B, 1, R), made once a forward for all linears of like ranks."""
        found = self._gates.get(stack.ranks)
        if found is None:
            assert self._rows is not None
            repeats = torch.tensor(stack.ranks)
            found = self._rows.repeat_interleave(repeats, dim=1)[:, None].to(like)
            self._gates[stack.ranks] = found
        return found


def _stack(found: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None]) -> Stack:
    having = [one for one in found if one is not None]
    return Stack(
        torch.cat([a for a, _, _ in having]),
        torch.cat([b * scale for _, b, scale in having], dim=1).contiguous(),
        tuple(0 if one is None else one[0].shape[0] for one in found),
    )
