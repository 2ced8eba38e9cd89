"""Fused layers for a run: put on its model and proven there, or left off, and then planned anew."""

from __future__ import annotations

import dataclasses
from typing import Any

from qlora import adapter, fused, hardware, loader, memory, packing, rehearsal
from qlora.attention import BOUNDED, sdpa_on
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import RecipeError
from qlora.fitting import Fitted
from qlora.kernels import attached
from qlora.kernels.attached import Fused
from qlora.kernels.family import NotFused
from qlora.screen import Screen
from qlora.settings import Recipe
from qlora.shape import Shape


def fuse(
    model: Any,
    recipe: Recipe,
    shape: Shape,
    card: Card,
    prepared: Prepared,
    facts: dict[str, Any],
    screen: Screen,
) -> Fused | None:
    """The layers of :mod:`qlora.kernels` on this model, or None; what becomes of them is told."""
    facts["kernels"] = "off"
    if not fused.applies(recipe, shape):
        if recipe.train.kernels == "auto":
            facts["kernels"] = f"off: {shape.model_type!r} is no family that they know"
        screen.say("kernels", facts["kernels"])
        return None
    asked = packing.sample(
        prepared.train[:3]["input_ids"], facts["attention"], hardware.device(card)
    )
    try:
        levels, tile = fused.levels_of(recipe, shape), recipe.train.mlp_tile
        tokens = min(recipe.train.per_device_train_batch_size * recipe.data.max_length, 8192)
        found = attached.fuse(model, card, levels, tile, tokens, asked)
    except NotFused as why:
        facts["kernels"] = f"off: {why}"
        return None
    facts["kernels"] = str(found.proof)
    screen.say("kernels", f"on, proven on this model: {found.proof}")
    screen.say("layers", fused.in_words(recipe, shape))
    if found.attention is not None:
        facts["attention_race"] = found.attention
        screen.say("attention", found.attention)
    return found


def unfuse(
    model: Any,
    loaded: Recipe,
    written: Recipe,
    shape: Shape,
    card: Card,
    facts: dict[str, Any],
    screen: Screen,
) -> Fitted:
    """Go on by the libraries' own layers, which need another plan; told, and refused if it does not fit.

    Args:
        model: With the base as it was loaded for fused layers.
        loaded: The recipe that it was loaded for.
        written: The recipe before anything was chosen.
    """
    screen.say("kernels", f"{facts['kernels']}; the libraries' own layers train")
    if written.quant.head == "8bit":
        raise RecipeError(
            "quant.head is 8bit, which the loss of qlora.kernels alone can read, and the kernels are "
            f"{facts['kernels']}. Write quant.head=16bit."
        )
    train = written.train.model_copy(update={"kernels": "off", "levels": None, "mlp_tile": None})
    fitted = rehearsal.fit(written.model_copy(update={"train": train}), shape, card)
    for reason in fitted.reasons:
        screen.say("fit", reason)
    base = model.get_base_model()
    if fitted.recipe.train.embedding_offload and not loaded.train.embedding_offload:
        loader.spare_tables(base, fitted.recipe)
    elif loaded.train.embedding_offload:  # the table stays where it is, and the plan says so
        train = fitted.recipe.train.model_copy(update={"embedding_offload": True})
        with_host = fitted.recipe.model_copy(update={"train": train})
        plan = memory.plan(with_host, shape, card)
        fitted = dataclasses.replace(fitted, recipe=with_host, plan=plan)
    if facts["attention"] == BOUNDED:
        facts["attention"] = sdpa_on(card)
        base.set_attn_implementation(facts["attention"])
    adapter.checkpoint_layers(base, fitted.recipe.train.activation_checkpointing)
    return fitted
