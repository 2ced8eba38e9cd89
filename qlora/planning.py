"""Will it fit? A recipe and a card in, a sheet of bytes, verdict and reach out.

Nothing heavy is imported for a plan on a named card: its arithmetic takes a moment. torch comes in to ask
this machine for its card, or to trace the step.
"""

from __future__ import annotations

from pathlib import Path

from qlora import cards, configfile, fitting, plansheet, siblings
from qlora.cards import Card
from qlora.errors import ModelError
from qlora.plansheet import Sheet
from qlora.recipe import load_recipe
from qlora.settings import Recipe
from qlora.shape import Shape


def plan(
    recipe: Recipe | str | Path, card: str | Card | None = None, *, exact: bool = False
) -> Sheet:
    """What a recipe needs on a card, from its base's ``config.json`` alone; printed, it explains itself.

    Args:
        recipe: What would run, or its file or name.
        card: A name such as ``12GB`` or ``t4``; the card of this machine by default.
        exact: Trace the real training step on fake tensors, too, beside the prediction that a run goes
            by. For a family that the prediction does not know, the trace is the plan.

    Raises:
        HardwareError: An unknown card, or one that cannot compute what the recipe asks.
        ModelError: The configuration cannot be read, nobody knows its family, or it cannot be trained.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe)
    if isinstance(card, str):
        card = cards.named_card(card)
    if card is None:
        from qlora import hardware

        card = hardware.card()
    cards.require_attention(recipe, card)
    shape, positions, note = _shape(recipe)
    decide = fitting.fit
    if not shape.known:
        from qlora import rehearsal

        decide = rehearsal.fit
    sheet = plansheet.Sheet(recipe, shape, card, positions, decide)
    sheet.note = note
    if exact and sheet.plan.method == "predicted":
        from qlora import rehearsal

        sheet.traced = rehearsal.exact(sheet.recipe, card, sheet.plan)
    return sheet


def _shape(recipe: Recipe) -> tuple[Shape, int | None, str | None]:
    """A base's shape and positions; of a published one also where its file is out of reach, with a note."""
    try:
        values = configfile.read(recipe)
    except configfile.OutOfReach as problem:
        found = siblings.known(recipe.model.name)
        if found is None:
            raise
        name, shape = found
        configfile.require_positions(recipe, siblings.positions(name))
        return (
            shape,
            siblings.positions(name),
            f"planned with the published shape of {name}: {problem}",
        )
    configfile.require_trainable(recipe, values)
    try:
        shape = Shape.from_config(values)
    except ModelError:
        # A file that leaves keys to the defaults of transformers, which knows them.
        from qlora import loader

        values = loader.read_config(recipe).values
        shape = Shape.from_config(values)
    return shape, configfile.positions(values), None
