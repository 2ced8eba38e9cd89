"""A model's tensors written as safetensors files of bounded size, with the index that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora import rundir

LIMIT_BYTES = 2**30  # of a file: what is in memory beside the model while it is written


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
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    make: Callable[[str], torch.Tensor],
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
    limit_bytes: int = LIMIT_BYTES,
) -> int:
    """Write a model file by file, each tensor made when its file is filled.

    Args:
        folder: Where; it is there already.
        shapes: Of every tensor, by name.
        dtype: What they will have, for the sizes of files.
        make: Gives a tensor.
        watch: Wraps the names, to show how far it is.
        limit_bytes: Of a file.

    Returns:
        Bytes of all tensors.

    Raises:
        OSError, SafetensorError: The disk is full or not to be written.
    """
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    groups = parts(sizes, limit_bytes)
    names = iter(watch(list(sizes)))
    index: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            file = SAFE_WEIGHTS_NAME
        filled = {}
        for name in group:
            assert next(names) == name
            filled[name] = make(name).contiguous().cpu()
            index[name] = file
        total += sum(tensor.nbytes for tensor in filled.values())
        save_file(filled, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors 0.6 leaves it to its owner alone
        del filled
    if len(groups) > 1:
        rundir.write_json(
            folder / SAFE_WEIGHTS_INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": index},
        )
    return total
