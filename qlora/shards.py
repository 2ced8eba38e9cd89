"""A model's tensors written as safetensors files of bounded size, with the index that names them.

Each tensor is made, written and let go of before the next one: the library's own writer wants all of a file
in memory, and copies it. The format is a header of JSON that says where each tensor begins, and then their
bytes (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora import rundir

LIMIT_BYTES = 2**30  # of a file, for those who fetch it; a larger tensor has one of its own
_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """What a tensor will be."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def parts(sizes: Mapping[str, int], limit_bytes: int = LIMIT_BYTES) -> list[list[str]]:
    """Names in their order, in as few runs as stay within the limit; a larger tensor has its own.

    >>> parts({"a": 3, "b": 3, "c": 9, "d": 1}, 6)
    [['a', 'b'], ['c'], ['d']]
    """
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = limit_bytes
        found[-1].append(name)
        room -= size
    return found


def write(
    folder: Path,
    slots: Mapping[str, Slot],
    make: Callable[[str], torch.Tensor],
    watch: Callable[[Sequence[str]], Iterable[str]] = iter,
    limit_bytes: int | None = None,
) -> int:
    """Write a model file by file, tensor by tensor.

    Args:
        folder: Where; it is there already.
        slots: What each tensor will be, by name.
        make: Gives a tensor.
        watch: Wraps the names, to show how far it is.
        limit_bytes: Of a file; :data:`LIMIT_BYTES` by default.

    Returns:
        Bytes of all tensors.

    Raises:
        OSError: The disk is full or not to be written.
    """
    sizes = {name: slot.nbytes for name, slot in slots.items()}
    groups = parts(sizes, LIMIT_BYTES if limit_bytes is None else limit_bytes)
    names = iter(watch(list(sizes)))
    index: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            file = SAFE_WEIGHTS_NAME
        with (folder / file).open("wb") as opened:
            opened.write(_header({name: slots[name] for name in group}))
            for name in group:
                assert next(names) == name
                tensor = make(name)
                assert (tensor.shape, tensor.dtype) == (slots[name].shape, slots[name].dtype), name
                flat = tensor.detach().contiguous().cpu().flatten()
                opened.write(flat.view(torch.uint8).numpy().data)
                index[name] = file
            opened.flush()
            os.fsync(opened.fileno())
    next(names, None)  # the bar ends
    if len(groups) > 1:
        rundir.write_json(
            folder / SAFE_WEIGHTS_INDEX_NAME,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index},
        )
    return sum(sizes.values())


def _header(slots: Mapping[str, Slot]) -> bytes:
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, slot in slots.items():
        said[name] = {
            "dtype": _NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [at, at + slot.nbytes],
        }
        at += slot.nbytes
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
