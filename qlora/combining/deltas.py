"""A saved adapter as what it adds to each linear of its base, read and written one linear at a time.

For a linear of shape (out, in) LoRA adds ``scaling * B @ A``, with A (r, in) and B (out, r): what two
adapters of one base have in common: their A and B mean nothing to each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qlora import adapter, rundir
from qlora.errors import CheckpointError

SAMPLED = (
    2**22
)  # entries of a linear that are looked at for its signs; of a larger one every n-th row
STRONG = 0.2  # the largest entries of an adapter, of which TIES (arXiv:2306.01708) keeps as many
LARGEST_RANK = 1024  # as of lora.r
FILE, PREFIX = "adapter_model.safetensors", "base_model.model."  # of peft
_A, _B, _TOKENS = ".lora_A.weight", ".lora_B.weight", ".trainable_tokens_delta"
# Settings of peft that qlora never writes, with which what is added is not scaling * B @ A everywhere.
_OTHER_KINDS = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "target_parameters",
    "layer_replication", "layers_to_transform",
)  # fmt: skip


@dataclass(frozen=True)
class Deltas:
    """An adapter on disk; its matrices are read when they are asked for.

    Attributes:
        name: As people call it, for messages.
        folder: Where it lies.
        config: Its ``adapter_config.json``.
        shapes: (out, in) by the name of each linear that it adds to.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        root = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"]) / root

    @cached_property
    def tokens(self) -> dict[str, torch.Tensor]:
        """Rows of the embedding that were trained, by their names in the file; mostly none."""
        with self._open() as file:
            names = [name for name in list(file.keys()) if name.endswith(_TOKENS)]
            return {name: file.get_tensor(name) for name in names}

    def factors(self, linear: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and ``scaling * B`` (out, r) of a linear, in fp32."""
        with self._open() as file:
            a, b = (file.get_tensor(linear + end).to(device).float() for end in (_A, _B))
        return a, b * self.scaling

    def delta(self, linear: str, device: torch.device) -> torch.Tensor:
        """What it adds to a linear's weight: (out, in), in fp32."""
        a, b = self.factors(linear, device)
        return b @ a

    def _open(self) -> Any:
        return safe_open(self.folder / FILE, framework="pt")


def read(folder: Path, name: str) -> Deltas:
    """A saved adapter, checked to be plain LoRA of finite numbers.

    Raises:
        CheckpointError: It is missing or damaged, or adds something else than ``scaling * B @ A``.
    """
    adapter.require_adapter(folder)
    config = rundir.read_json(folder / "adapter_config.json")
    odd = [key for key in _OTHER_KINDS if config.get(key)]
    if odd or config.get("peft_type") != "LORA":
        what = odd[0] if odd else f"peft_type {config.get('peft_type')}"
        raise CheckpointError(
            f"{folder}: cannot be combined: it was made with {what}, and only plain LoRA, as qlora trains "
            "it, adds up."
        )
    shapes: dict[str, tuple[int, int]] = {}
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            names = set(file.keys())
            for one in sorted(names):
                if not bool(file.get_tensor(one).isfinite().all()):
                    raise CheckpointError(
                        f"{folder}: {one} is not finite; the adapter is worthless."
                    )
            linears = sorted(one.removesuffix(_A) for one in names if one.endswith(_A))
            other = names - {linear + end for linear in linears for end in (_A, _B)}
            other -= {one for one in names if one.endswith(_TOKENS)}
            if other or not linears or not {linear + _B for linear in linears} <= names:
                raise CheckpointError(
                    f"{folder}: the adapter is damaged or of another tool: "
                    + (
                        f"{min(other)} is no LoRA matrix."
                        if other
                        else "a lora_A or lora_B is missing."
                    )
                )
            for linear in linears:
                (r, inside), (outside, again) = (
                    file.get_slice(linear + end).get_shape() for end in (_A, _B)
                )
                if not r == again == config.get("r"):
                    raise CheckpointError(
                        f"{folder}: the adapter is damaged: {linear} has rank {r} and {again}, and "
                        f"adapter_config.json says {config.get('r')}."
                    )
                shapes[linear] = outside, inside
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: the adapter is damaged: {error}.") from None
    return Deltas(name, folder, config, shapes)


def write(
    folder: Path,
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int,
    parts: Sequence[Deltas],
) -> None:
    """Save a sum of adapters as one of their kind, with a scaling of 1.

    Args:
        folder: Where; it exists.
        matrices: A and B of each linear; of a lower rank than ``rank`` they are filled up with zeros.
        rank: Of every linear.
        parts: The adapters that it was made of: trained rows of the embedding are theirs.
    """
    tensors: dict[str, torch.Tensor] = {}
    for linear, (a, b) in matrices.items():
        a, b = a.float().cpu(), b.float().cpu()
        missing = rank - len(a)
        tensors[linear + _A] = torch.cat([a, a.new_zeros(missing, a.shape[1])]).contiguous()
        tensors[linear + _B] = torch.cat([b, b.new_zeros(len(b), missing)], 1).contiguous()
    config = parts[0].config | {
        "r": rank, "lora_alpha": float(rank), "use_rslora": False, "lora_dropout": 0.0,
        "target_modules": targets(parts),
    }  # fmt: skip
    for part in parts:
        if part.tokens:
            tensors |= part.tokens
            config["trainable_token_indices"] = part.config["trainable_token_indices"]
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    rundir.write_json(folder / "adapter_config.json", config)


def targets(parts: Sequence[Deltas]) -> list[str]:
    """Names that match the linears of all parts and no other."""
    asked = [part.config.get("target_modules") for part in parts]
    if all(isinstance(names, list) for names in asked):
        return sorted({name for names in asked for name in names})
    linears = {linear for part in parts for linear in part.shapes}
    return sorted(linear.removeprefix(PREFIX) for linear in linears)


def require_same(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare what a model loaded with the file that it loaded, tensor by tensor.

    Raises:
        CheckpointError: A tensor is missing on one side, or differs.
    """
    saved = load_file(folder / FILE)
    for name in sorted(saved.keys() | tensors.keys()):
        one, other = saved.get(name), tensors.get(name)
        if one is None or other is None or not torch.equal(one, other.cpu()):
            raise CheckpointError(f"{folder}: {name} in memory is not what is on disk.")


@dataclass(frozen=True)
class Agreement:
    """How far two adapters pull the same way.

    Attributes:
        cosine: Of the angle between all that the two add: 1 the same direction, 0 nothing in common.
        conflicts: Share of the entries that both change, which they change in opposite directions.
        strong: The same of entries among the largest fifth of both; None where there are none.
    """

    cosine: float
    conflicts: float
    strong: float | None


def agreement(one: Deltas, other: Deltas, device: torch.device) -> Agreement:
    """Held against each other over the linears of both; a linear that only one has counts in the norms."""
    dot, differ, both, strong_differ, strong_both = 0.0, 0, 0, 0, 0
    for linear in sorted(one.shapes.keys() & other.shapes.keys()):
        (a, b), (c, d) = (part.factors(linear, device) for part in (one, other))
        dot += _dot(a, b, c, d)
        step = -(-len(b) * a.shape[1] // SAMPLED)
        first, second = b[::step] @ a, d[::step] @ c
        opposed = first * second < 0
        changed = (first != 0) & (second != 0)
        strong = (first.abs() >= largest(first, STRONG)) & (second.abs() >= largest(second, STRONG))
        strong &= changed
        differ, both = differ + int(opposed.sum()), both + int(changed.sum())
        strong_differ += int((opposed & strong).sum())
        strong_both += int(strong.sum())
    length = math.sqrt(norm_squared(one, device) * norm_squared(other, device))
    return Agreement(
        cosine=dot / length if length else 0.0,
        conflicts=differ / both if both else 0.0,
        strong=strong_differ / strong_both if strong_both else None,
    )


def norm_squared(part: Deltas, device: torch.device) -> float:
    """The sum of the squares of all that an adapter adds."""
    pairs = (part.factors(linear, device) for linear in part.shapes)
    return sum(_dot(a, b, a, b) for a, b in pairs)


def largest(delta: torch.Tensor, share: float) -> torch.Tensor:
    """The magnitude that so many of a matrix's entries reach.

    >>> float(largest(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5))
    3.0
    """
    at = delta.numel() - max(1, round(share * delta.numel()))
    sizes = delta.abs().flatten()
    if sizes.is_cuda:
        return sizes.kthvalue(at + 1).values
    # On a CPU torch 2.13 takes three times as long.
    return torch.from_numpy(np.partition(sizes.numpy(), at)[at : at + 1])[0]


def _dot(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
    """The sum of the products of the entries of ``b @ a`` and ``d @ c``, without making these."""
    a, b, c, d = (one.double() for one in (a, b, c, d))
    return float(((b.T @ d) * (a @ c.T)).sum())
