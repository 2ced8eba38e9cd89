"""A tree of Python values and tensors as one JSON file and one safetensors file; never a pickle.

What optimizers, schedulers and random generators call their state is nested dictionaries, lists, numbers
and tensors. ``state.json`` holds the tree with a name in place of each tensor, ``state.safetensors`` the
tensors. Reading it runs nobody's code (CVE-2025-32434 is about what pickles may do).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora import rundir
from qlora.errors import CheckpointError

TREE, TENSORS = "state.json", "state.safetensors"
FORMAT = 1
# What safetensors 0.8 and torch both hold. Complex numbers are left out: no optimizer keeps any.
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
    torch.uint64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip


def write(folder: Path, tree: dict[str, Any]) -> None:
    """Write a tree of dict (keys text or int), list, tuple, str, number, bool, None, array and tensor.

    Raises:
        CheckpointError: Something else is in it; says where. It is not written in another way.
        OSError: The disk does not take it.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    said = {"format": FORMAT, "tree": _encode(tree, "state", tensors, names)}
    # safetensors refuses tensors that share memory. Copying all would take longer than writing them.
    held = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    for name, tensor in tensors.items():
        if held[tensor.untyped_storage().data_ptr()] > 1:
            tensors[name] = tensor.clone()
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        raise OSError(*_as_os_error(error)) from None
    rundir.write_text(folder / TREE, json.dumps(said, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The tree that :func:`write` wrote, its tensors on the host.

    Raises:
        CheckpointError: A file is missing, torn, or of another format.
    """
    said = require_format(folder)
    try:
        tree = _decode(said["tree"], load_file(folder / TENSORS))
    except (
        SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{folder}: its state cannot be read: {error}.") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / TREE}: expected a dictionary.")
    return tree


def require_format(folder: Path) -> dict[str, Any]:
    """What ``state.json`` says, if it is of the format that is written here.

    Raises:
        CheckpointError: It is of another one, or cannot be read.
    """
    said = rundir.read_json(folder / TREE)
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / TREE}: its format is {said.get('format')!r}; this version of qlora reads {FORMAT}. "
            "Resume with the version that wrote it, or start the run again."
        )
    return said


def _encode(
    value: Any, at: str, tensors: dict[str, torch.Tensor], names: dict[tuple[Any, ...], str]
) -> Any:
    """JSON for a value. What JSON cannot tell apart becomes a list that begins with its kind."""
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else ["float", str(number)]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise CheckpointError(f"{at} is an array of {value.dtype}; {_ADVICE}")
        # Its bytes: torch knows fewer dtypes, and each a value that another one rounds.
        name = f"{len(tensors):06d}"
        tensors[name] = torch.frombuffer(bytearray(value.tobytes() or b"-"), dtype=torch.uint8)
        return ["array", name, value.dtype.str, list(value.shape)]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPES:
            raise CheckpointError(
                f"{at} is a tensor of {value.dtype}, {value.layout}, on {value.device}; {_ADVICE}"
            )
        return ["tensor", _name(value.detach(), tensors, names)]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encode(v, f"{at}[{i}]", tensors, names) for i, v in enumerate(value)]]
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(f"{at} has a key of type {type(key).__name__}; {_ADVICE}")
        return ["dict", [[k, _encode(v, f"{at}.{k}", tensors, names)] for k, v in value.items()]]
    raise CheckpointError(f"{at} is a {type(value).__name__}; {_ADVICE}")


_ADVICE = (
    "a checkpoint holds tensors, numbers and text only. Choose another train.optim or "
    "train.lr_scheduler_type."
)


def _name(
    tensor: torch.Tensor, tensors: dict[str, torch.Tensor], names: dict[tuple[Any, ...], str]
) -> str:
    """The tensor's name in the file. bitsandbytes' states share one quantization map: it is kept once."""
    key = (
        tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape),
        tensor.stride(), tensor.dtype, str(tensor.device),
    )  # fmt: skip
    if key not in names or not tensor.numel():
        names[key] = f"{len(tensors):06d}"
        tensors[names[key]] = tensor.to("cpu").contiguous()
    return names[key]


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, held = value[0], value[1]
    if kind == "float":
        return float(held)
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        held_bytes, shape = tensors[held].numpy().tobytes(), value[3]
        return np.frombuffer(held_bytes, value[2], math.prod(shape)).reshape(shape).copy()
    if kind == "dict":
        return {key: _decode(v, tensors) for key, v in held}
    parts = [_decode(v, tensors) for v in held]
    if kind not in ("list", "tuple"):
        raise ValueError(f"{kind!r} is no kind of value")
    return parts if kind == "list" else tuple(parts)


def _as_os_error(error: SafetensorError) -> tuple[int, str]:
    """(errno, text) of what safetensors 0.8 wraps in its own error, such as a full disk."""
    said = str(error)
    number = said.rpartition("os error ")[2].rstrip(")\"' ")
    return (int(number) if number.isdigit() else 5, said)
