"""A tree of Python values and tensors as one JSON file and one safetensors file; never a pickle.

What optimizers, schedulers and random generators call their state is nested dictionaries, lists, numbers
and tensors. ``state.json`` holds the tree with a name in place of each tensor, ``state.safetensors`` the
tensors. Reading it runs nobody's code (CVE-2025-32434 is about what pickles may do).
"""

from __future__ import annotations

import json
import math
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


def write(folder: Path, tree: dict[str, Any]) -> None:
    """Write a tree of dict (keys text or int), list, tuple, str, number, bool, None, array and tensor.

    Raises:
        CheckpointError: Something else is in it; says where. It is not written in another way.
        OSError: The disk does not take it.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    said = {"format": FORMAT, "tree": _encode(tree, "state", tensors, names)}
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
    said = rundir.read_json(folder / TREE)
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / TREE}: its format is {said.get('format')!r}; this version of qlora reads {FORMAT}."
        )
    try:
        tree = _decode(said["tree"], load_file(folder / TENSORS))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder}: its state cannot be read: {error}.") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / TREE}: expected a dictionary.")
    return tree


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
        return [
            "array",
            _name(torch.from_numpy(value.astype(np.int64)), tensors, names),
            str(value.dtype),
        ]
    if isinstance(value, torch.Tensor):
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
        tensors[names[key]] = tensor.to("cpu").contiguous().clone()
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
        return tensors[held].numpy().astype(value[2])
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
