"""A base with its adapter folded into it, tensor by tensor: no two of them need be in memory.

There are two bases to fold an adapter into. ``nf4``: the 4-bit one that it was trained on, unpacked; the
sum then is what the trained model multiplies with, up to rounding. ``16bit``: the checkpoint that was
quantized; the sum is then off by the error of quantization, which the adapter learned to live with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from qlora import adapter, nf4
from qlora.errors import ExportError
from qlora.kernels.head import PackedHead
from qlora.shards import Slot
from qlora.weights import Stored

PROBES = 16  # random inputs of a linear
TOLERANCE = 0.1  # of its adapter's effect; a scale that is off by two gives 0.5 or 1
Onto = Literal["nf4", "16bit"]


class Folded:
    """The tensors of a merged model by their checkpoint names, each made when it is asked for.

    Args:
        model: The loaded base with an adapter on it, or a bare one. It is left as it is.
        originals: The tensors of its checkpoint, to fold into them; None for what is loaded.
        with_adapter: Whether the adapter is added.

    Raises:
        ExportError: A linear of the model has no tensor of its shape in the checkpoint.
    """

    def __init__(
        self,
        model: Any,
        originals: Mapping[str, Stored] | None = None,
        *,
        with_adapter: bool = True,
    ) -> None:
        self.model = model
        self.with_adapter = with_adapter
        self.base = adapter.bare(model)
        self.shapes: dict[str, torch.Size] = {}
        self._modules: dict[str, tuple[str, nn.Module, str]] = {}  # wrapper's name, module, key
        self._originals: dict[str, Stored] = {}
        seen: set[int] = set()
        for raw, module in self.base.named_modules():
            if adapter.is_of_adapter(raw):
                continue
            path = adapter.bare_name(raw)
            for key, tensor in _own(module):
                if id(tensor) in seen:  # a head that is the embedding
                    continue
                seen.add(id(tensor))
                name = f"{path}.{key}" if path else key
                self.shapes[name] = _shape(module, tensor, key)
                self._modules[name] = (path, module, key)
        self.packed = [
            name
            for name, (_, module, key) in self._modules.items()
            if key == "weight" and getattr(module.weight, "quant_state", None) is not None
        ]
        self._adapted = {
            name
            for name, (path, _, key) in self._modules.items()
            if with_adapter and key == "weight" and adapter.is_adapted(model, path)
        }
        if originals is not None:
            for name in self.packed:
                self._originals[name] = _original(name, self.shapes[name], originals)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor of the merged model; the sum is made in fp32 and rounded once."""
        path, module, key = self._modules[name]
        if key == "weight" and self.with_adapter:
            rows = adapter.token_rows(self.model, path)
            if rows is not None:
                return rows.to(dtype)
        if isinstance(module, PackedHead):
            return module.whole(dtype)
        found = getattr(module, key).detach()
        if name in self._originals:
            found = self._originals[name][:].to(found.device)
        elif key == "weight" and getattr(module.weight, "quant_state", None) is not None:
            found = nf4.unpacked(module)
        if name in self._adapted:
            return adapter.delta(self.model, path).add_(found).to(dtype)
        return found.to(dtype) if found.is_floating_point() else found

    def slots(self, dtype: torch.dtype) -> dict[str, Slot]:
        """What :meth:`tensor` gives for each name."""
        found = {}
        for name, (_, module, key) in self._modules.items():
            stored = getattr(module, key)
            numbers = stored.is_floating_point() or isinstance(module, PackedHead)
            kept = not numbers and name not in self.packed
            found[name] = Slot(self.shapes[name], stored.dtype if kept else dtype)
        return found

    @torch.inference_mode()
    def prove(self) -> float:
        """Ask each linear of the trained model, and find in its answer what the merged matrix adds.

        Random inputs go through the layer with nothing under its adapter: added to a base's answer in 16
        bits, most of a small effect is rounded away. Projected onto what the change of the matrix gives for
        them, what comes out must be once that, whatever else rounding does to it.

        Returns:
            How far from 1 it is where it is furthest.

        Raises:
            ExportError: In a layer the merged matrix adds something else: another scale, or direction.
        """
        worst = 0.0
        for name in sorted(self._adapted):
            path, module, _ = self._modules[name]
            change = adapter.delta(self.model, path)
            generator = torch.Generator().manual_seed(0)
            inputs = torch.randn(PROBES, change.shape[1], generator=generator).to(change)
            added = functional.linear(inputs, change)
            asked = inputs.to(self.base.dtype)
            alone = module.register_forward_hook(_nothing)
            try:
                found = self.base.get_submodule(path)(asked).float()
            finally:
                alone.remove()
            length = float(added.square().sum())
            if length == 0.0 and bool((found == 0.0).all()):
                continue
            apart = abs(float((found * added).sum()) / max(length, 1e-30) - 1.0)
            if not apart <= TOLERANCE:
                raise ExportError(
                    f"the merged model is not what was trained: {name} adds something else than the "
                    "adapter does there. Nothing is kept. Please report this with the versions that `qlora "
                    "doctor` prints."
                )
            worst = max(worst, apart)
        return worst

    @contextmanager
    def in_place(self, dtype: torch.dtype) -> Iterator[None]:
        """In this block the loaded model computes with the merged weights, rounded to ``dtype``.

        Each is made when its layer is reached and dropped after it.
        """
        swapped: list[nn.Module] = []
        try:
            for name in {*self.packed, *self._adapted}:
                path, module, _ = self._modules[name]
                outer = self.base.get_submodule(path)
                outer.forward = self._linear(name, module, dtype)
                swapped.append(outer)
            yield
        finally:
            for outer in swapped:
                del outer.forward

    def _linear(self, name: str, module: nn.Module, dtype: torch.dtype) -> Any:
        def forward(hidden: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            bias = module.bias
            weight = self.tensor(name, dtype).to(hidden.dtype)
            return functional.linear(hidden, weight, None if bias is None else bias.to(hidden))

        return forward


def _nothing(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own tensors as its checkpoint has them; an 8-bit head counts as one."""
    if isinstance(module, PackedHead):
        yield "weight", module.weight
        return
    yield from module.named_parameters(recurse=False)
    for key, buffer in module.named_buffers(recurse=False):
        if key not in module._non_persistent_buffers_set:
            yield key, buffer


def _shape(module: nn.Module, tensor: torch.Tensor, key: str) -> torch.Size:
    state = getattr(tensor, "quant_state", None) if key == "weight" else None
    return torch.Size(tensor.shape if state is None else state.shape)


def _original(name: str, shape: torch.Size, originals: Mapping[str, Stored]) -> Stored:
    """The checkpoint's tensor of a weight. A model with towers keeps its language model one level down."""
    tail = f".{name.removeprefix('model.')}"
    exact = [name] if name in originals else []
    below = [key for key in originals if key.endswith(tail)]
    towers = [key for key in below if "language_model" in key]
    for found in (exact, towers, below):
        if len(found) == 1 and originals[found[0]].shape == tuple(shape):
            return originals[found[0]]
    raise ExportError(
        f"the base's checkpoint has no 16-bit tensor {name} of {tuple(shape)}: it may be quantized "
        "already, or arranged in another way. Merge with --onto nf4."
    )
