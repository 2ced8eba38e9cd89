"""How long a sequence trains on emulated cards, by growing it until it no longer does.

Not a command: :mod:`gpu_suite` runs it. The same code runs on small shapes on a CPU.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_plan
from gpu_step import Work, ours, recipe_of, turn
from gpu_weights import TINY, Weights, config_of, dtype_on, quiet

# Tokens of the longest sequence of a Llama-3.1-8B at rank 32 that Unsloth has published, by card.
PUBLISHED = {"8GB": 2_972, "12GB": 21_848, "16GB": 40_724, "24GB": 78_475}


def longest_that_runs(
    runs: Callable[[int], bool], start: int, *, step: int = 64, within: float = 0.02
) -> int:
    """The longest length that runs, within 2 %; 0 if not even one step does.

    >>> longest_that_runs(lambda n: n <= 5000, 4096), longest_that_runs(lambda n: n <= 100, 4096)
    (4992, 64)
    >>> longest_that_runs(lambda n: False, 4096)
    0
    """
    runs_at, fails_at, tried = 0, 0, max(step, start // step * step)
    while True:
        if runs(tried):
            runs_at = tried
        else:
            fails_at = tried
        if not fails_at:
            tried = int(tried * 1.1) // step * step + step
        elif not runs_at:
            if tried <= step:
                return 0
            tried = max(step, int(tried * 0.7) // step * step)
        elif fails_at - runs_at <= max(step, within * runs_at):
            return runs_at
        else:
            tried = (runs_at + fails_at) // 2 // step * step
            if tried in (runs_at, fails_at):
                return runs_at


def longest(
    model: str, sizes: Sequence[str], *, r: int = 32, small: bool = False
) -> dict[str, Any]:
    """The longest sequence that trains in the memory of each card, planned and tried, one row a step.

    Without a card nothing runs out of memory: one short length is tried on each.
    """
    from qlora import fitting, hardware
    from qlora.cards import named_card
    from qlora.shape import Shape

    real = hardware.card()
    config = config_of(TINY if small else model)
    shape = Shape.from_config(config.to_dict())
    with tempfile.TemporaryDirectory() as folder, quiet():
        weights = _weights_on(real, config)
        cells = []
        for size in sizes:
            card = named_card(size)
            if real.kind == "cuda":
                card = dataclasses.replace(card, capability=real.capability)
            one = recipe_of(Work(weights, card, 64, [], Path(folder)), r=r, rows=1, fit="auto")
            planned = fitting.longest(one, shape, card, anew=True)
            tries: dict[int, bool] = {}

            def runs(
                length: int, card: Any = card, one: Any = one, tries: dict[int, bool] = tries
            ) -> bool:
                data = one.data.model_copy(update={"max_length": length})
                here = real if real.kind == "cpu" else card
                least = fitting.most_frugal(one.model_copy(update={"data": data}), shape, here)
                tries[length] = runs_at(weights, card, least, Path(folder))
                return tries[length]

            found = longest_that_runs(runs, planned) if real.kind == "cuda" else 64 * runs(64)
            cells.append(
                {
                    "card": size, "planned_tokens": planned, "tokens": found, "tries": tries,
                    "published_tokens": PUBLISHED.get(size),
                }
            )  # fmt: skip
    return {"model": model, "r": r, "cells": cells}


def runs_at(weights: Weights, card: Any, recipe: Any, folder: Path) -> bool:
    """Whether two steps of one full row run in the memory of a card, as a recipe has it."""
    import torch

    from qlora import hardware

    length = recipe.data.max_length
    rows = _one_row(length, weights.config.vocab_size) * 2
    here = hardware.card() if weights.device.type == "cpu" else card
    written = recipe.train.model_copy(update={"fit": "as_written"})
    recipe = recipe.model_copy(update={"train": written})
    try:
        with gpu_plan.limited_to(card):
            work = Work(weights, here, length, rows, folder)
            turn(lambda *a: ours(recipe, *a), work, 1, 1, logging=10**6)
    except torch.OutOfMemoryError:
        return False
    return True


def _one_row(length: int, vocab: int) -> list[list[int]]:
    import numpy as np

    return [np.random.default_rng(length).integers(4, vocab, length).tolist()]


def _weights_on(card: Any, config: Any) -> Weights:
    from qlora import hardware

    return Weights(config, hardware.device(card), dtype_on(card))


def fits_on(model: str, size: str, length: int, *, small: bool = False) -> dict[str, Any]:
    """Whether a model trains on rows of a length in a card's memory, by what the planner chooses."""
    from qlora import fitting, hardware
    from qlora.cards import named_card
    from qlora.errors import DoesNotFit
    from qlora.shape import Shape

    real, card = hardware.card(), named_card(size)
    if real.kind == "cuda":
        card = dataclasses.replace(card, capability=real.capability)
    config = config_of(TINY if small else model)
    length = 64 if small else length
    with tempfile.TemporaryDirectory() as folder, quiet():
        weights = _weights_on(real, config)
        work = Work(weights, card, length, [], Path(folder))
        recipe, here = recipe_of(work, rows=1, fit="auto"), real if real.kind == "cpu" else card
        shape = Shape.from_config(config.to_dict())
        try:
            planned = fitting.fit(recipe, shape, here)
            recipe = planned.recipe
            chosen: dict[str, Any] = {"planned_bytes": planned.plan.total_bytes, **planned.chosen}
        except DoesNotFit as error:  # it is tried all the same, with what needs least
            recipe = fitting.most_frugal(recipe, shape, here)
            chosen = {"refused": str(error).splitlines()[0]}
        ran = runs_at(weights, card, recipe, Path(folder))
    return {"model": model, "card": card.name, "length": length, "ran": ran, "chosen": chosen}
