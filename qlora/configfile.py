"""A base's ``config.json``, read without the libraries that would load the base: a plan takes a moment."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from qlora import hub
from qlora.errors import ModelError
from qlora.recipe import is_local, local_path
from qlora.settings import Recipe


def read(recipe: Recipe) -> dict[str, Any]:
    """What the ``config.json`` of ``model.name`` says; from the hub only this one file is fetched.

    Raises:
        ModelError: It is not there, cannot be fetched, or is no JSON object.
    """
    name, revision = recipe.model.name, recipe.model.revision
    if is_local(name):
        path = str(local_path(name) / "config.json")
    else:
        path = _fetched(name, revision)
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - hub paths are text
            values = json.load(file)
    except FileNotFoundError:
        raise ModelError(
            f"model.name is {name!r}, which is not a model: there is no config.json in it. Name a folder "
            "written by save_pretrained, or a hub id."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name is {name!r}, whose config.json cannot be read: {error}"
        ) from None
    if not isinstance(values, dict):
        raise ModelError(f"model.name is {name!r}, whose config.json holds no JSON object.")
    return values


def positions(values: dict[str, Any]) -> int | None:
    """The longest sequence that a base knows, if its configuration says so."""
    text = values.get("text_config")
    found = (text if isinstance(text, dict) else values).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _fetched(name: str, revision: str) -> str:
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return cached
    if problem := hub.unreachable():
        raise ModelError(
            f"model.name is {name!r}: not a folder here, its config.json is not in the local hub cache, "
            f"and {problem}. Check the spelling of a local path, or the network; a plan needs that file."
        )
    try:
        return str(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        gated = "gated" in str(error).lower() or "401" in first or "403" in first
        hint = (
            " Accept its licence on its hub page, then set HF_TOKEN in the environment."
            if gated
            else ""
        )
        raise ModelError(
            f"model.name is {name!r} (revision {revision}), whose config.json cannot be fetched: "
            f"{first}{hint}"
        ) from None
