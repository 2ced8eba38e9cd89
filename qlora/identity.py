"""What makes a run this run, and what may change when it is resumed.

A resumed run goes on with the same mathematics: the same weights trained on the same rows by the same rule.
What changes that is refused, unless it is allowed by name; what does not, such as where logs go or which
kernels compute a layer, is told. Rounding may differ with the latter: they are not bit-identical.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.errors import CheckpointError, RecipeError
from qlora.recipe import SYNONYMS
from qlora.settings import Recipe

# Recipe fields that do not decide what is learned. Of some, a derived field below tells what of it does.
INCIDENTAL = {
    "model.name": "base", "model.revision": "base", "model.attn_implementation": "",
    "quant.cache": "", "quant.compute_dtype": "compute_dtype",
    "data.train": "rows", "data.split": "rows", "data.revision": "rows", "data.format": "rows",
    "data.columns": "rows", "data.on_bad_row": "rows", "data.rendering": "rows",
    "data.chat_template": "template", "data.loss_on": "rows", "data.max_length": "rows",
    "data.over_length": "rows", "data.max_lost_fraction": "rows", "data.held_out_fraction": "rows",
    "data.held_out": "rows", "data.packing": "", "data.cache": "",
    "train.per_device_train_batch_size": "rows_per_step",
    "train.gradient_accumulation_steps": "rows_per_step", "train.optim": "optimizer",
    "train.activation_checkpointing": "", "train.kernels": "", "train.levels": "",
    "train.activation_offload": "", "train.mlp_tile": "", "train.embedding_offload": "",
    "train.fit": "", "train.rehearse": "", "train.logging_steps": "", "train.eval_steps": "",
    "train.save_steps": "", "train.save_total_limit": "", "train.after_bad_steps": "",
    "train.oom_retries": "",
}  # fmt: skip
# What the recipe alone does not tell, and decides what is learned.
DERIVED = ("rows", "tokenizer", "template", "base", "rows_per_step", "optimizer", "compute_dtype")
# What these are, for a message.
MEANING = {
    "rows": "the tokens and labels of data.train's rows, in their order",
    "tokenizer": "its vocabulary and rules",
    "template": "the chat template",
    "base": "the frozen weights",
    "rows_per_step": "per_device_train_batch_size times gradient_accumulation_steps",
    "optimizer": "what train.optim means here",
    "compute_dtype": "what quant.compute_dtype means here",
}
# The matrices in a checkpoint have their shapes from these: no run can go on with others.
FIXED = ("lora.r", "lora.target_modules")
# What is told when it differs, and no more.
SURROUNDINGS = ("packages", "python", "card", "threads")


@dataclass(frozen=True)
class Change:
    """One field that is not what it was."""

    field: str
    was: Any
    now: Any
    decides: bool  # what is learned

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.was)} -> {_short(self.now)}"


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by their addresses, ``section.key``."""
    values = recipe.model_dump(mode="json")
    return {f"{s}.{key}": value for s, section in values.items() for key, value in section.items()}


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every field in which two identities differ; a field that one of them lacks counts as different.

    Args:
        was: Of the checkpoint: ``recipe``, and what of :data:`DERIVED` and :data:`SURROUNDINGS` was known.
        now: Of this start. What it does not know yet is not compared.
    """
    found = [
        Change(field, *pair, decides=_decides(field))
        for field, pair in _pairs(was.get("recipe", {}), now.get("recipe", {}))
    ]
    found += [
        Change(field, was.get(field), now[field], decides=True)
        for field in DERIVED
        if field in now and was.get(field) != now[field]
    ]
    for field in SURROUNDINGS:
        if field in now and was.get(field) != now[field]:
            old, new = was.get(field), now[field]
            if isinstance(new, dict):
                pairs = _pairs(old or {}, new)
                found += [Change(name, *pair, decides=False) for name, pair in pairs]
            else:
                found.append(Change(field, old, new, decides=False))
    return found


def require_same(found: list[Change], allowed: Collection[str], where: str, way_back: str) -> None:
    """Refuse changes that decide what is learned and were not allowed.

    Args:
        found: From :func:`changes`.
        allowed: Fields named by ``--allow-change``.
        where: The run.
        way_back: A command that goes on without any change.

    Raises:
        CheckpointError: Lists them field by field, with both ways on.
    """
    refused = [
        change
        for change in found
        if change.decides and (change.field not in allowed or change.field in FIXED)
    ]
    if not refused:
        return
    listed = "\n".join(f"  {change}{_meaning(change.field)}" for change in refused)
    way = (
        f"Go on as it was: {way_back}"
        if _of_the_recipe(found, {change.field for change in refused})
        else "Put it back as it was, and resume again."
    )
    flags = " ".join(f"--allow-change {change.field}" for change in refused)
    other = (
        "With another shape of adapter no run can go on: start a new one, without --resume."
        if any(change.field in FIXED for change in refused)
        else f"Or with the change, if you mean it: {flags}"
    )
    raise CheckpointError(
        f"{where}: the run was started otherwise, in what decides what is learned:\n{listed}\n"
        f"{way}\n{other}"
    )


def require_known(allowed: Collection[str]) -> None:
    """Refuse a field of ``--allow-change`` that does not exist.

    Raises:
        RecipeError: Names it and the nearest one.
    """
    sections = {
        name: field.annotation for name, field in Recipe.model_fields.items() if field.annotation
    }
    known = {
        f"{section}.{key}"
        for section, kind in sections.items()
        for key in getattr(kind, "model_fields", {})
    } | set(DERIVED)
    for field in allowed:
        if field not in known:
            section, _, key = field.rpartition(".")
            meant = f"{section}.{SYNONYMS.get(key, key)}"
            near = [meant] if meant in known else difflib.get_close_matches(field, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"--allow-change {field}: there is no such field.{hint}")


def _of_the_recipe(found: list[Change], refused: Collection[str]) -> bool:
    """Whether it is another recipe that changed what is refused, rather than a file or a machine."""
    return any(
        change.field in refused or INCIDENTAL.get(change.field) in refused
        for change in found
        if "." in change.field
    )


def _meaning(field: str) -> str:
    return f"  ({MEANING[field]})" if field in MEANING else ""


def _decides(field: str) -> bool:
    return field not in INCIDENTAL and field.partition(".")[0] not in ("run", "eval")


def _pairs(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    names = [*now, *(name for name in was if name not in now)]
    return [(n, (was.get(n), now.get(n))) for n in names if was.get(n) != now.get(n)]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:12]
    return text if len(text) <= 80 else f"{text[:77]}..."
