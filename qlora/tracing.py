"""Every byte that a piece of work allocates, by following the lifetimes of storages.

A dispatch mode sees each operator's outputs. A storage that is new counts from then until it is freed,
so the running total is what an allocator would hand out, on real tensors as on fake ones. What an opaque
kernel allocates and frees inside is invisible to it; for the 4-bit product, the one that matters, the
bytes are added by formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KEPT, WORKING = "activations", "working_set"
HOST = "host"  # a category that is counted, but not on the card
ATTENTION_BACKWARD = ("_flash_attention_backward", "efficient_attention_backward")


def inside_attention(
    name: str, q: torch.Tensor, k: torch.Tensor, offsets: torch.Tensor | None
) -> int:
    """Bytes that a card's attention allocates in its backward pass beside the three gradients.

    Both kernels sum the gradient of the queries in fp32 and keep a number for each score's row; flash, in
    addition, makes the gradients of shared key heads for every query head first (torch 2.13,
    ``flash_api.cpp`` and ``kernel_backward.h``).
    """
    heads, dim = q.shape[-2:]
    tokens = q.numel() // (heads * dim)
    sums = 4 * tokens * heads
    if name == "efficient_attention_backward":
        return sums + 4 * q.numel()
    rows = q.shape[0] if offsets is None else offsets.numel() - 1
    wide = -(-dim // 32) * 32
    expanded = 2 * q.nbytes if k.shape[-2] < heads else 0
    return sums + 4 * (tokens + 128 * rows) * heads * wide + expanded


class MemoryTracer(TorchDispatchMode):
    """Counts live bytes by category while it is entered, and remembers the highest point.

    Tensors that exist already are told to it by :meth:`own`. What an operator makes belongs to the
    current :meth:`phase`; if autograd keeps it for the backward pass, to ``activations``. Both stay
    right in a checkpointed region, where only the inputs are kept and the rest is made again.

    Attributes:
        live: Bytes now, by category.
        peak: Bytes by category at the moment of the highest total.
        at_peak: The operator that reached it.
        peaks: The same by phase: what was highest in each.
    """

    def __init__(self, *, scale_copies: int = 1) -> None:
        super().__init__()
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.peak_bytes = 0
        self.at_peak = ""
        self.peaks: dict[str, dict[str, int]] = {}
        self._highest: dict[str, int] = {}
        self._total = 0
        self._storages: dict[int, tuple[int, str]] = {}
        self._phase, self._category = "", WORKING
        self._scale_copies = (
            scale_copies  # bitsandbytes: one of its CPU kernel, two of the CUDA one
        )

    def own(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count these tensors' storages under a category; known ones are moved to it."""
        for tensor in tensors:
            self._count(tensor.untyped_storage(), category, moves=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow everything in this block, and tell what autograd keeps from what it does not."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            key = tensor.untyped_storage()._cdata
            if self._storages.get(key, (0, ""))[1] in (WORKING, self._category):
                self._move(key, KEPT)
            return tensor

        with self, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    def phase(self, name: str, category: str = WORKING) -> None:
        """A part of the work begins; what it allocates belongs to ``category``."""
        self._phase, self._category = name, category

    def forget_peaks(self) -> None:
        """Look for the highest points from here on."""
        self.peak_bytes, self.peak, self.peaks, self._highest = 0, {}, {}, {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            # The matrix in the compute dtype and its scales in fp32, while the product is made.
            weights = args[2][0] * args[2][1]
            scales = 4 * weights // args[4] * (self._scale_copies if args[3] is not None else 0)
            inside = weights * args[0].element_size() + scales
            self._reached(inside + out.untyped_storage().nbytes(), str(func))
        if (name := func._opname if hasattr(func, "_opname") else "") in ATTENTION_BACKWARD:
            made = sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            self._reached(made + inside_attention(name, args[1], args[2], args[6]), str(func))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), self._category)
        self._reached(0, str(func))
        return out

    def _count(self, storage: Any, category: str, *, moves: bool = False) -> None:
        key = storage._cdata
        if key in self._storages:
            if moves:
                self._move(key, category)
            return
        size = storage.nbytes()
        self._storages[key] = size, category
        self._add(category, size)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, category = self._storages.pop(key)
        self._add(category, -size)

    def _move(self, key: int, category: str) -> None:
        size, old = self._storages[key]
        self._storages[key] = size, category
        self._add(old, -size)
        self._add(category, size)

    def _add(self, category: str, size: int) -> None:
        self.live[category] = self.live.get(category, 0) + size
        self._total += size if category != HOST else 0

    def _reached(self, inside: int, operator: str) -> None:
        total = self._total + inside
        if total <= self._highest.get(self._phase, -1):
            return
        self._highest[self._phase] = total
        found = {name: size for name, size in self.live.items() if size and name != HOST}
        if inside:
            found[WORKING] = found.get(WORKING, 0) + inside
        self.peaks[self._phase] = found
        if total > self.peak_bytes:
            self.peak_bytes, self.at_peak, self.peak = total, operator, found
