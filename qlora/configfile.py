"""A base's ``config.json``, read without the libraries that would load the base: a plan takes a moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora import hub
from qlora.errors import ModelError
from qlora.recipe import is_local, local_path
from qlora.settings import Recipe


class OutOfReach(ModelError):
    """The base is neither here nor can the hub be asked for it."""


def locate(recipe: Recipe) -> str:
    """The folder of a local base, or the hub id of another, once it is known that it can be read.

    Raises:
        ModelError: The folder holds no ``config.json``.
        OutOfReach: The hub is needed, and cannot be reached: said within seconds, not after the
            libraries' minute of retries.
    """
    name = recipe.model.name
    if is_local(name):
        path = local_path(name)
        if not (path / "config.json").is_file():
            found = "a file"
            if path.is_dir():
                found = ", ".join(sorted(p.name for p in path.iterdir())[:6])
            raise ModelError(
                f"model.name is {name!r}, which is not a model: there is no config.json in it "
                f"(found: {found or 'nothing'}). Name a folder written by save_pretrained, or a hub id."
            )
        return str(path)
    cached = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    if not isinstance(cached, str) and (problem := hub.unreachable()):
        raise OutOfReach(
            f"model.name is {name!r}: not a folder here, not in the local hub cache, and {problem}. "
            "Check the spelling of a local path, or the network, or download the model first."
        )
    return name


def read(recipe: Recipe) -> dict[str, Any]:
    """What the ``config.json`` of ``model.name`` says; from the hub only this one file is fetched.

    Raises:
        ModelError: It is not there, cannot be fetched, or is no JSON object.
        OutOfReach: As :func:`locate`.
    """
    name, where = recipe.model.name, locate(recipe)
    file = Path(where) / "config.json" if is_local(name) else _fetched(name, recipe.model.revision)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name is {name!r}, whose config.json cannot be read: {error}"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"model.name is {name!r}, whose config.json holds no JSON object.")
    return values


def require_trainable(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Refuse, before anything is read, a base that a run would refuse once it has read it.

    Raises:
        ModelError: Rows may be longer than the base has positions, it is quantized in a way that cannot
            be trained, or it is a mixture of experts whose experts the libraries leave in 16 bits.
    """
    name, quantized = recipe.model.name, values.get("quantization_config")
    require_positions(recipe, positions(values))
    if quantized is not None:
        require_nf4(recipe, quantized)
    text = values.get("text_config")
    inner = text if isinstance(text, Mapping) else values
    experts = inner.get("num_experts") or inner.get("num_local_experts")
    if experts and recipe.quant.quant_type == "nf4":
        raise ModelError(
            f"quant.quant_type is nf4, but {name!r} is a mixture of {experts} experts, which the libraries "
            "keep in 16 bits. Choose a dense model, or write quant.quant_type: none if the card holds it."
        )


def require_positions(recipe: Recipe, known: int | None) -> None:
    """Refuse rows that may be longer than the base has positions.

    Raises:
        ModelError: Names the length that it has.
    """
    if known is not None and recipe.data.max_length > known:
        raise ModelError(
            f"data.max_length is {recipe.data.max_length:,}, but {recipe.model.name!r} has {known:,} "
            f"positions. Write data.max_length={known}."
        )


def require_nf4(recipe: Recipe, quantized: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is quantized, but not as it can be trained here.

    Raises:
        ModelError: Says how it is quantized.
    """
    if quantized.get("quant_method") not in (None, "bitsandbytes") or not quantized.get(
        "load_in_4bit"
    ):
        raise ModelError(
            f"model.name is {recipe.model.name!r}, which is quantized as "
            f"{quantized.get('quant_method', 'something else')!r}; only bitsandbytes 4-bit checkpoints "
            "can be trained here. Name the 16-bit original; it is quantized while loading."
        )
    if recipe.quant.quant_type == "nf4" and quantized.get("bnb_4bit_quant_type") != "nf4":
        raise ModelError(
            f"quant.quant_type is nf4, but {recipe.model.name!r} was saved as "
            f"{quantized.get('bnb_4bit_quant_type')!r}. Name the 16-bit original instead."
        )


def positions(values: Mapping[str, Any]) -> int | None:
    """The longest sequence that a base knows, if its configuration says so."""
    text = values.get("text_config")
    found = (text if isinstance(text, Mapping) else values).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _fetched(name: str, revision: str) -> Path:
    """The file from the hub, or from its local cache."""
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        if said := refusal(error):
            raise ModelError(f"model.name is {name!r} (revision {revision}), {said}") from None
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model.name is {name!r} (revision {revision}), whose config.json cannot be fetched: {first}"
        ) from None


def refusal(error: BaseException) -> str:
    """Why the hub does not hand out a file, and what to do; empty if an error is none of its refusals.

    Told by the classes of the error and of those behind it: a 401 in a text may as well be of a path.
    """
    seen: BaseException | None = error
    while seen is not None:
        for kind, said in _REFUSALS.items():
            if isinstance(seen, kind):
                return said
        seen = seen.__cause__ or seen.__context__
    return ""


# In the order in which they are tried: a gated repository counts as one that is not found.
_REFUSALS: dict[type[Exception], str] = {
    GatedRepoError: "which is gated. Accept its licence on its hub page, then set HF_TOKEN in the "
    "environment (or run `hf auth login`).",
    RepositoryNotFoundError: "which the hub does not know, or shows only to those who may see it. Check "
    "the spelling; for a private one set HF_TOKEN in the environment (or run `hf auth login`).",
    RevisionNotFoundError: "of which the hub has no such revision. Name another in model.revision.",
    RemoteEntryNotFoundError: "which holds no config.json, so no model that can be loaded here. Name the "
    "repository of the model itself.",
}
