"""The settings that fill a card: ``train.fit: auto``, and how far a recipe's own settings reach.

Memory left unused is speed left unused: what does not have to be computed again, packed base that is
unpacked once for more tokens. Of all settings that fit, the one with the least arithmetic is taken; the
rows of an optimizer step stay the same, so what is learned does too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora import fused, memory
from qlora.cards import GIB, Card, optimizer
from qlora.errors import CheckpointError, DoesNotFit
from qlora.memory import Plan
from qlora.settings import Recipe
from qlora.shape import Shape
from qlora.speed import checkpointed_layers, cost_per_token, flops_per_token

MARGIN = 0.03  # of the free bytes: how far the quick plan may be off (scripts/bench_plan.py)
CHOSEN = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing",
    "kernels", "levels", "mlp_tile", "activation_offload", "embedding_offload", "optim",
)  # fmt: skip
# transformers' names (5.23) of one optimizer, unpaged and paged.
_FROM_PAGED = {
    "paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit",
    "paged_lion_32bit": "lion_32bit", "paged_lion_8bit": "lion_8bit",
    "paged_ademamix_32bit": "ademamix", "paged_ademamix_8bit": "ademamix_8bit",
}  # fmt: skip
_TO_PAGED = {plain: paged for paged, plain in _FROM_PAGED.items()} | {
    "adamw_torch_fused": "paged_adamw_32bit",
    "adamw_bnb_8bit": "paged_adamw_8bit",
}
TILE = 1024  # rows of the MLP at a time, if it must be: enough for the matrix units
_TOKENS = 64  # lengths are looked for in multiples of this
MOST_TOKENS, MOST_ROWS = 1 << 20, 4096  # as far as anybody looks


@dataclass(frozen=True)
class Fitted:
    """A recipe with settings for one card, its plan, and why these settings."""

    recipe: Recipe
    plan: Plan
    reasons: tuple[str, ...]

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of ``train`` that were decided here."""
        return {name: getattr(self.recipe.train, name) for name in CHOSEN}

    def to_json(self) -> dict[str, Any]:
        """The plan, with what was chosen and why, for ``plan.json``."""
        return self.plan.to_json() | {"chosen": self.chosen, "reasons": list(self.reasons)}


def fit(recipe: Recipe, shape: Shape, card: Card) -> Fitted:
    """The recipe that runs: as it is written, or with settings chosen for the card.

    Raises:
        DoesNotFit: Nothing that may be chosen fits; says what would have to change.
        RecipeError: A setting is about fused layers, and the family is not known to them.
        HardwareError: As :func:`qlora.memory.plan`.
        ModelError: As :func:`qlora.memory.plan`.
    """
    recipe = fused.on_card(recipe, card)
    fused.require(recipe, shape)
    if recipe.train.fit == "as_written":
        plan = memory.plan(recipe, shape, card)
        try:
            memory.require_fit(plan)
        except DoesNotFit as error:
            raise DoesNotFit(f"{error}{_by_auto(recipe, shape, card)}") from None
        return Fitted(recipe, plan, ())
    for margin in (MARGIN, 0.0):  # a tight fit is better than none
        room = replace(card, free_bytes=int(card.free_bytes * (1 - margin)))
        fitting = [
            (cost_per_token(candidate, shape), number, candidate)
            for number, candidate in enumerate(_candidates(recipe, shape, room))
            if memory.predict(candidate, shape, room).fits
        ]
        if fitting:
            chosen = min(fitting)[2]
            plan = memory.plan(chosen, shape, card)
            return Fitted(chosen, plan, _reasons(recipe, chosen, shape, plan))
    memory.require_fit(memory.plan(most_frugal(recipe, shape, card), shape, card))
    raise AssertionError("the most frugal settings fit and were not found")


def _by_auto(recipe: Recipe, shape: Shape, card: Card) -> str:
    """What to add for somebody whose recipe does not fit as it is written, where ``auto`` would."""
    chosen = most_frugal(_with(recipe, fit="auto"), shape, card)
    if not shape.known or not memory.predict(chosen, shape, card).fits:
        return ""
    return "\nOr write train.fit: auto, which finds settings that fit."


def again(recipe: Recipe, shape: Shape, card: Card, stored: dict[str, Any]) -> Fitted:
    """The recipe with what an earlier start of its run chose, so that a resumed run goes on the same.

    Args:
        recipe: As it is written.
        shape: Its base's.
        card: The card now; it may have less room than then.
        stored: The ``plan.json`` of the run.

    Raises:
        CheckpointError: The plan holds no choice.
        DoesNotFit: What was chosen then does not fit now.
    """
    if recipe.train.fit == "as_written":
        return fit(recipe, shape, card)
    try:
        values = {name: stored["chosen"][name] for name in CHOSEN}
        values["levels"] = values["levels"] and tuple(values["levels"])
    except (KeyError, TypeError):
        raise CheckpointError(
            "plan.json does not say which settings train.fit: auto chose for this run. Start it again."
        ) from None
    chosen = _with(recipe, **values)
    fused.require(chosen, shape)
    plan = memory.plan(chosen, shape, card)
    memory.require_fit(plan)
    return Fitted(chosen, plan, ("as at the first start of this run",))


def longest(recipe: Recipe, shape: Shape, card: Card, *, anew: bool = False) -> int:
    """The largest ``data.max_length`` that fits with all else as it is, in steps of 64; 0 if none.

    With ``anew``, what ``train.fit: auto`` may choose is chosen again for each length.
    """

    def fits(length: int) -> bool:
        data = recipe.data.model_copy(update={"max_length": length * _TOKENS})
        asked = recipe.model_copy(update={"data": data})
        if anew:
            asked = most_frugal(asked, shape, card)
        return memory.predict(asked, shape, card).fits

    found = _TOKENS * _last(fits, MOST_TOKENS // _TOKENS)
    if found < recipe.data.max_length and memory.predict(recipe, shape, card).fits:
        return recipe.data.max_length
    return found


def largest_micro_batch(recipe: Recipe, shape: Shape, card: Card) -> int:
    """The largest ``per_device_train_batch_size`` that fits with all else as it is; 0 if none."""

    def fits(rows: int) -> bool:
        wanted = _with(recipe, per_device_train_batch_size=rows)
        return memory.predict(wanted, shape, card).fits

    return _last(fits, MOST_ROWS)


def most_frugal(recipe: Recipe, shape: Shape, card: Card) -> Recipe:
    """The recipe with the settings, of those that may be chosen, that need the least."""
    return min(
        (frugal for base in _bases(recipe, shape, card) for frugal in _frugal(base, shape, card)),
        key=lambda candidate: memory.predict(candidate, shape, card).total_bytes,
    )


def _candidates(recipe: Recipe, shape: Shape, card: Card) -> Iterator[Recipe]:
    """Settings worth trying: those that keep the most, and where none fits, those that need the least."""
    keeping = _levels if fused.applies(recipe, shape) else _layers
    for base in _bases(recipe, shape, card):
        fitting = list(keeping(base, shape, card))
        yield from fitting or _frugal(base, shape, card)


def _bases(recipe: Recipe, shape: Shape, card: Card) -> Iterator[Recipe]:
    """Every micro-batch, paging and place of the embedding, with every layer computed again."""
    rows = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
    sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
    tables = (False, True) if _can_spare_table(recipe, shape, card) else (False,)
    for size, paged, away in itertools.product(sizes, (False, True), tables):
        yield _with(
            recipe,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=rows // size,
            optim=_paged(optimizer(recipe, card), paged and card.kind == "cuda"),
            activation_checkpointing=True,
            activation_offload=False,
            embedding_offload=away,
            levels=None,
            mlp_tile=None,
        )


def _frugal(base: Recipe, shape: Shape, card: Card) -> Iterator[Recipe]:
    """Every layer computed again, with the levers for the smallest cards."""
    tiles = (None, TILE) if fused.applies(base, shape) else (None,)
    offloads = (False, True) if card.kind == "cuda" else (False,)
    for tile, offload in itertools.product(tiles, offloads):
        yield _with(base, mlp_tile=tile, activation_offload=offload)


def _layers(base: Recipe, shape: Shape, card: Card) -> Iterator[Recipe]:
    """The fewest recomputed layers that fit, by the libraries."""

    def kept(layers: int) -> Recipe:
        again: bool | int = shape.layers - layers
        return _with(
            base, activation_checkpointing=again if 0 < layers < shape.layers else not layers
        )

    most = _last(lambda n: memory.predict(kept(n), shape, card).fits, shape.layers)
    if most:
        yield kept(most)


def _levels(base: Recipe, shape: Shape, card: Card) -> Iterator[Recipe]:
    """For each two levels of fused layers the fewest layers at the higher one that fit.

    More than two levels at once would save nothing: what a level costs and what it saves are proportional
    to its layers.
    """

    def mixed(low: int, high: int, layers: int) -> Recipe:
        counts = [0] * len(fused.LEVELS)
        counts[low - 1] += layers
        counts[high - 1] += shape.layers - layers
        return _with(base, activation_checkpointing=high == 5, levels=tuple(counts))

    for low, high in itertools.combinations(fused.LEVELS, 2):
        most = _last(
            lambda n, a=low, b=high: memory.predict(mixed(a, b, n), shape, card).fits,  # type: ignore[misc]
            shape.layers,
        )
        if most:
            yield mixed(low, high, most)


def _can_spare_table(recipe: Recipe, shape: Shape, card: Card) -> bool:
    """Whether the embedding can stay with the host."""
    frozen = recipe.quant.quant_type == "nf4" and not recipe.lora.train_new_tokens
    return card.kind == "cuda" and not shape.tied and frozen


def _last(holds: Callable[[int], bool], most: int) -> int:
    """A number up to ``most`` for which it holds, the largest if it stops holding once; 0 if none.

    >>> _last(lambda n: n * n < 50, 100), _last(lambda n: False, 100), _last(lambda n: True, 100)
    (7, 0, 100)
    """
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _paged(optim: str, paged: bool) -> str:
    """The same optimizer, the same update, with its state on the card or paged; others stay as they are.

    >>> _paged("adamw_torch", True), _paged("paged_adamw_8bit", False), _paged("sgd", True)
    ('paged_adamw_32bit', 'adamw_8bit', 'sgd')
    """
    return _TO_PAGED.get(optim, optim) if paged else _FROM_PAGED.get(optim, optim)


def _of_levels(chosen: Recipe, shape: Shape, more: float, most: float) -> list[str]:
    """What the layers keep, in a sentence."""
    if set(fused.levels_of(chosen, shape)) == {1}:
        return [f"every layer keeps all it needs: to compute it again would cost {most:.0%} more"]
    kept = fused.in_words(chosen, shape)
    return [f"{kept}: {more:.0%} more arithmetic; everything again would cost {most:.0%}"]


def _with(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def _reasons(written: Recipe, chosen: Recipe, shape: Shape, plan: Plan) -> tuple[str, ...]:
    """Why these settings, in sentences with figures."""
    train, free = chosen.train, plan.card.free_bytes
    again = checkpointed_layers(chosen, shape)
    freed = {"levels": None, "mlp_tile": None, "activation_offload": False}
    least = flops_per_token(_with(chosen, activation_checkpointing=False, **freed), shape)
    most = flops_per_token(_with(chosen, activation_checkpointing=True, **freed), shape)
    more = flops_per_token(chosen, shape) / least - 1
    asked = {name: getattr(written.train, name) for name in CHOSEN}
    now = {name: getattr(train, name) for name in CHOSEN}
    changed = [
        f"{name} {asked[name]} -> {now[name]}" for name in CHOSEN if asked[name] != now[name]
    ]
    said = [
        f"train.{', '.join(changed)}" if changed else "everything as written",
        f"{train.per_device_train_batch_size} x {chosen.data.max_length:,} tokens a pass, "
        f"at most {train.gradient_accumulation_steps} a step: "
        f"{train.per_device_train_batch_size * train.gradient_accumulation_steps} rows, as written",
    ]
    if fused.applies(chosen, shape):
        said += _of_levels(chosen, shape, more, most / least - 1)
    elif again == 0:
        said.append(
            f"no layer is computed again: that would cost {most / least - 1:.0%} more arithmetic"
        )
    elif again < shape.layers:
        said.append(
            f"{again} of {shape.layers} layers are computed again, for {more:.0%} more arithmetic; all of "
            f"them would cost {most / least - 1:.0%}"
        )
    else:
        said.append(
            f"all {again} layers are computed again, for {more:.0%} more arithmetic: fewer do not fit"
        )
    if train.mlp_tile is not None:
        said.append(f"the MLP is computed {train.mlp_tile:,} rows at a time")
    if train.embedding_offload:
        said.append("the embedding table stays with the host")
    if train.activation_offload:
        said.append(
            f"the layers' inputs wait with the host: {plan.host_bytes / GIB:.2f} GiB of its memory in all"
        )
    if train.optim != optimizer(written, plan.card):
        where = "paged out when room is short" if "paged" in train.optim else "kept on the card"
        said.append(f"{train.optim}: the same update, its state {where}")
    spare = free - plan.total_bytes
    margin = f"{MARGIN * free / GIB:.2f} of them as margin"
    if spare < MARGIN * free:
        margin = f"less than the margin of {MARGIN * free / GIB:.2f} that a plan wants"
    said.append(f"{spare / GIB:.2f} GiB stay free, {margin}")
    return tuple(said)
