"""What training did to the model: the same held-out rows before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora import evaluation, rundir
from qlora.data import Prepared
from qlora.errors import CheckpointError
from qlora.evaluation import Answered
from qlora.generation import Answer
from qlora.screen import Screen
from qlora.settings import Recipe

Measured = tuple[float | None, Answered | None]


def measure(
    trainer: Any, model: Any, prepared: Prepared, recipe: Recipe, screen: Screen, when: str
) -> Measured:
    """Held-out loss and, if asked, answers; says both in one line."""
    loss = None
    if prepared.held_out is not None:
        loss = float(trainer.evaluate()["eval_loss"])
    answered = None
    if recipe.eval.generate and prepared.held_out_examples:
        answered = evaluation.answer(
            model, prepared.renderer, prepared.held_out_examples, recipe, screen.track
        )
    _say((loss, answered), screen, when)
    return loss, answered


def keep(measured: Measured, recipe: Recipe, held_out: str, path: Path) -> None:
    """Write what was measured, so that a resumed run need not do it again."""
    loss, answered = measured
    found = answered and [
        {"text": a.text, "stopped": a.stopped, "right": right}
        for a, right in zip(answered.answers, answered.right, strict=True)
    ]
    asked = recipe.eval.model_dump(mode="json")
    rundir.write_json(path, {"held_out": held_out, "eval": asked, "loss": loss, "answers": found})


def recall(
    prepared: Prepared, recipe: Recipe, held_out: str, path: Path, screen: Screen
) -> Measured | None:
    """What :func:`keep` wrote, if it was measured on these rows with these settings; else None."""
    try:
        kept = rundir.read_json(path)
    except CheckpointError:
        return None
    asked = recipe.eval.model_dump(mode="json")
    if kept.get("held_out") != held_out or kept.get("eval") != asked:
        return None
    answered = None
    if kept["answers"] is not None:
        examples = [e for e in prepared.held_out_examples if e.record.turns][: recipe.eval.generate]
        answers = [Answer(one["text"], one["stopped"]) for one in kept["answers"]]
        answered = Answered(examples, answers, [one["right"] for one in kept["answers"]])
    measured = (kept["loss"], answered)
    _say(measured, screen, "before")
    return measured


def figures(measured: Measured) -> dict[str, Any]:
    """For ``result.json``."""
    loss, answered = measured
    found: dict[str, Any] = {"held_out_loss": loss}
    if answered is not None:
        found |= {
            "exact_match": answered.exact_match,
            "stop_rate": answered.stop_rate,
            "answered": len(answered.examples),
        }
    return found


def tell(before: Measured, after: Measured, recipe: Recipe, screen: Screen) -> None:
    """Three rows side by side, and the scores."""
    base, tuned = before[1], after[1]
    if base is not None and tuned is not None:
        table = Table(title="The same held-out rows, asked before and after", show_lines=True)
        for heading in ("expected", "base", "tuned"):
            table.add_column(heading, overflow="fold", ratio=1)
        for example, was, now in list(
            zip(tuned.examples, base.answers, tuned.answers, strict=True)
        )[:3]:
            wanted = example.record.turns[-1].content
            table.add_row(*(Text(cell[:400]) for cell in (wanted, was.text, now.text)))
        screen.console.print(table)
        what = " + ".join(recipe.eval.exact_match) or "whole answer"
        screen.say(
            "score",
            f"exact match ({what}) on {len(tuned.right)} held-out rows: "
            f"{base.exact_match:.1%} before, {tuned.exact_match:.1%} after",
        )
    if before[0] is not None and after[0] is not None:
        screen.say("loss", f"held out: {before[0]:.4f} before, {after[0]:.4f} after")


def _say(measured: Measured, screen: Screen, when: str) -> None:
    loss, answered = measured
    said = [] if loss is None else [f"held-out loss {loss:.4f}"]
    if answered is not None and answered.examples:
        said.append(f"exact match {sum(answered.right)}/{len(answered.right)}")
    if said:
        screen.say(when, ", ".join(said))
