"""What training did to the model: the same held-out rows before and after."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora import answering, rundir
from qlora.answering import Answered
from qlora.data import Example, Prepared
from qlora.errors import CheckpointError, TrainingDiverged
from qlora.generation import Answer
from qlora.screen import Screen
from qlora.settings import Recipe

SAMPLES = 24  # answers that are kept with their question
SAMPLE_CHARS = 2000  # of a question, and of what was expected

Measured = tuple[float | None, Answered | None]


def measure(
    trainer: Any, model: Any, prepared: Prepared, recipe: Recipe, screen: Screen, when: str
) -> Measured:
    """Held-out loss and, if asked, answers; says both in one line.

    Raises:
        TrainingDiverged: The loss is not a finite number.
    """
    loss = None
    if prepared.held_out is not None:
        loss = float(trainer.evaluate()["eval_loss"])
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"The held-out loss {when} training is {loss}, not a finite number. "
                + (
                    "The base overflows as it is: on a T4 some models do in fp16 (quant.compute_dtype: "
                    "float32)."
                    if when == "before"
                    else "Lower train.learning_rate or raise train.warmup_steps."
                )
            )
    answered = None
    if recipe.eval.generate and prepared.held_out_examples:
        answered = answering.answer(
            model, prepared.renderer, prepared.held_out_examples, recipe, screen.track
        )
    _say((loss, answered), screen, when)
    return loss, answered


def keep(
    measured: Measured, seconds: float, recipe: Recipe, of: Mapping[str, str], path: Path
) -> None:
    """Write what was measured: a resumed run need not do it again, and a report needs no data file.

    The first answers stand with their question and what was expected, cut where these are very long.

    Args:
        measured: By :func:`measure`.
        seconds: That it took.
        recipe: Its ``eval`` says what was asked.
        of: Digests of what was measured on what: ``held_out`` and ``base``.
        path: Where it is kept.
    """
    loss, answered = measured
    found = answered and [
        {"text": a.text, "stopped": a.stopped, "right": right}
        | (_asked(example) if number < SAMPLES else {})
        for number, (example, a, right) in enumerate(
            zip(answered.examples, answered.answers, answered.right, strict=True)
        )
    ]
    values = {
        "of": dict(of),
        "eval": recipe.eval.model_dump(mode="json", exclude={"samples"}),
        "seconds": seconds,
    }
    kept = values | {"loss": loss, "answers": found}
    rundir.write_json(path, kept | {"sha256": _digest(kept)})


def recall(
    prepared: Prepared, recipe: Recipe, of: Mapping[str, str], path: Path, screen: Screen
) -> tuple[Measured | None, float]:
    """What :func:`keep` wrote, with the seconds it took; None if it was of other rows, base or settings.

    None, too, if it is not as it was written.
    """
    try:
        kept = rundir.read_json(path)
    except CheckpointError:
        kept = {}
        if not path.is_file():
            return None, 0.0
    if kept.pop("sha256", None) != _digest(kept):
        screen.say("before", f"{path.name} is damaged: measured again")
        return None, 0.0
    asked = recipe.eval.model_dump(mode="json", exclude={"samples"})
    if kept.get("of") != of or kept.get("eval") != asked:
        return None, 0.0
    answered = None
    if kept["answers"] is not None:
        examples = [e for e in prepared.held_out_examples if e.record.turns][: recipe.eval.generate]
        answers = [Answer(one["text"], one["stopped"]) for one in kept["answers"]]
        answered = Answered(examples, answers, [one["right"] for one in kept["answers"]])
    measured = (kept["loss"], answered)
    _say(measured, screen, "before")
    return measured, kept["seconds"]


def _asked(example: Example) -> dict[str, str]:
    *asked, wanted = example.record.turns
    question = (
        asked[0].content if len(asked) == 1 else "\n".join(f"{t.role}: {t.content}" for t in asked)
    )
    return {"question": question[:SAMPLE_CHARS], "expected": wanted.content[:SAMPLE_CHARS]}


def _digest(kept: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


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
