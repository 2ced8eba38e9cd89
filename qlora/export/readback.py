"""A GGUF file read back: what its head says, and whether its matrices are those of a model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora import weights
from qlora.errors import ExportError

# Of a row of a matrix, how far its length may be off.
ROUNDING = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2}


def matrices(folder: Path, file: Path, quant: str, place: Path) -> tuple[int, int]:
    """How many matrices of the file have the rows of the merged model's, in any order, and how many it has.

    The converter reorders the rows of some (Llama's queries and keys): the lengths of rows are compared.

    Raises:
        ExportError: One that can be compared has other rows.
    """
    library = _library(place)
    reader = library.GGUFReader(file)
    tensors = {one.name: one for one in reader.tensors if len(one.shape) == 2}
    architecture = fields(file, place).get("general.architecture", "")
    layers = int(fields(file, place).get(f"{architecture}.block_count", 0))
    numbers = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
    if quant not in ROUNDING or architecture not in numbers:
        return 0, len(tensors)
    names = library.get_tensor_name_map(numbers[architecture], layers)
    right = 0
    for path in sorted(folder.glob("*.safetensors")):
        stored = weights.tensors([path])
        for name in stored:
            theirs = tensors.get(names.get_name(name, try_suffixes=(".weight",)) or "")
            if theirs is None:
                continue
            ours = stored[name][...].float()
            other = torch.tensor(library.quants.dequantize(theirs.data, theirs.tensor_type)).float()
            if ours.shape != other.shape or not _same_rows(ours, other, ROUNDING[quant]):
                raise ExportError(
                    f"the GGUF file is not the model: {theirs.name} does not hold the rows of {name}. "
                    "Nothing is kept. Try another version of llama.cpp with --llama-cpp."
                )
            right += 1
    return right, len(tensors)


def _same_rows(ours: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    one, two = (matrix.norm(dim=1).sort().values for matrix in (ours, other))
    return bool(((one - two).abs() <= tolerance * one.clamp(min=1e-6) + 1e-6).all())


def fields(file: Path, place: Path) -> Mapping[str, Any]:
    """Numbers and texts of a GGUF file's head, by key."""
    reader = _library(place).GGUFReader(file)
    return {
        key: value
        for key, field in reader.fields.items()
        if isinstance(
            value := field.contents() if len(field.types) == 1 else None, str | int | float | bool
        )
    }


def _library(place: Path) -> Any:
    """The package gguf, installed or of the converter."""
    with suppress(ImportError):
        return importlib.import_module("gguf")
    sys.path.append(str(place / "gguf-py"))
    try:
        return importlib.import_module("gguf")
    finally:
        sys.path.remove(str(place / "gguf-py"))
