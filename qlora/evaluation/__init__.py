"""Is the tuned model better, and at what cost: the same rows for it and for its base, and how sure that is.

:func:`evaluate` is meant to be read from top to bottom. What can be refused is refused before the weights
are read; every figure of the tuned model stands beside the base's, with an interval of their difference.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora import adapter, answering, hardware, rundir, scoring, trained
from qlora.answering import Answered, Fields
from qlora.errors import DoesNotFit, RecipeError
from qlora.evaluation import forgetting, harness, heldout, interval
from qlora.evaluation.harness import TaskScore
from qlora.evaluation.heldout import Rows
from qlora.evaluation.interval import Interval
from qlora.evaluation.scorecard import Evaluation, Figures, Sample
from qlora.places import expanded
from qlora.preparation import Example
from qlora.scoring import RowScore
from qlora.screen import Screen
from qlora.settings import Recipe
from qlora.trained import Trained

ANSWERED = 200  # rows, where neither the recipe nor the caller asks for more or fewer
SAMPLES = 5  # that are kept


@dataclass(frozen=True)
class _Measured:
    """Of one model: the rows' losses, its answers, the general text, the harness's tasks."""

    scores: list[RowScore]
    answered: Answered
    fields: Fields | None
    general: list[RowScore] | None
    tasks: list[TaskScore]


def evaluate(
    where: str | Path | rundir.Run,
    *,
    file: str | None = None,
    answers: int | None = None,
    base: bool = True,
    general: bool = True,
    lm_eval: Sequence[str] = (),
    lm_eval_path: str | Path | None = None,
    lm_eval_limit: int | None = None,
    lm_eval_chat: bool | None = None,
    batch_size: int | None = None,
    quant: trained.QuantType | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """How good a tuned model is beside its base, on rows that it was not trained on.

    Args:
        where: A run, one of its checkpoints, or a model; as :func:`qlora.trained.find`.
        file: Rows to ask, all of them; without, those that the run held out.
        answers: How many rows are answered, the first ones; without, 200 or ``eval.generate``, if that is
            more. The loss is always that of all rows.
        base: Measure the base of a run beside it.
        general: Measure the loss on general text, too.
        lm_eval: Tasks of EleutherAI's harness.
        lm_eval_path: A folder with more tasks.
        lm_eval_limit: Documents of a task at most.
        lm_eval_chat: Whether these go through the chat template; without, if the run's rows did.
        batch_size: Rows answered at a time; without, ``eval.batch_size``.
        quant: Of a model that is no run: as :func:`qlora.trained.find`.
        out: A file to write the figures to, as JSON.
        console: Where progress is told; nowhere by default.

    Returns:
        The figures. Those of a run are also written to ``<run>/evaluations/<time>.json``.

    Raises:
        QLoRAError: Anything the user can mend, before weights are read where that is possible.
    """
    screen = Screen(console or Console(quiet=True))
    if out is not None:
        _require_writable(expanded(out))
    found = trained.find(where.dir if isinstance(where, rundir.Run) else where, quant=quant)
    tasks = harness.find(lm_eval, lm_eval_path) if lm_eval else None
    rows, examples, listed = heldout.find(found, file, screen)
    recipe = _asking(found.recipe, answers, batch_size)
    screen.say("rows", heldout.described(rows))
    for note in rows.notes:
        screen.say("note", note)

    model = trained.load(found, bars=screen.live)
    chat = found.renderer.chat if lm_eval_chat is None else lm_eval_chat
    asked = (found, listed, examples, recipe, general, tasks, chat, lm_eval_limit, screen)
    compares = base and found.source is not None
    try:
        was = None
        if compares:
            with adapter.disabled(model):
                was = _measure(model, "base", *asked)
        now = _measure(model, "tuned" if found.source else "model", *asked)
    except (RuntimeError, MemoryError) as error:
        if not hardware.ran_out_of_memory(error):
            raise
        raise DoesNotFit(
            f"Answering {recipe.eval.batch_size} rows at a time needs more memory than is free. Write "
            f"--batch-size {max(1, recipe.eval.batch_size // 4)}, or --rows 0 to measure losses alone."
        ) from None
    result = _compared(found, rows, recipe, was, now)
    return _written(result, found, out, screen)


def _asking(recipe: Recipe, answers: int | None, batch_size: int | None) -> Recipe:
    """The recipe with as many answers, and as many at a time, as are asked for here."""
    asked = recipe.eval
    count = max(ANSWERED, asked.generate) if answers is None else answers
    size = asked.batch_size if batch_size is None else batch_size
    return recipe.model_copy(
        update={"eval": asked.model_copy(update={"generate": count, "batch_size": size})}
    )


def _measure(
    model: Any,
    who: str,
    found: Trained,
    rows: list[dict[str, Any]],
    examples: list[Example],
    recipe: Recipe,
    general: bool,
    tasks: harness.Harness | None,
    chat: bool,
    limit: int | None,
    screen: Screen,
) -> _Measured:
    """All that is asked of one model; its losses are said as soon as they are known."""
    tok = found.tok

    def told(starts: Sequence[int], label: str) -> Any:
        return screen.track(starts, f"{who}: {label}")

    scores = scoring.score(
        model, rows, tok.pad_token_id, found.renderer.closing, progress=told, label="loss"
    )
    answered = answering.answer(model, found.renderer, examples, recipe, told)
    fields = answering.compare_fields(
        answered.expected, [answer.text for answer in answered.answers], recipe.eval.exact_match
    )
    read = forgetting.read(model, tok, told, _positions(found)) if general else None
    said = f"loss {scoring.mean(scores):.4f}"
    if answered.right:
        said += f", exact match {sum(answered.right)}/{len(answered.right)}"
    screen.say(who, said)
    scored = []
    if tasks is not None:
        scored = tasks.run(model, tok, chat=chat, limit=limit, batch_size=recipe.eval.batch_size)
    return _Measured(scores, answered, fields, read, scored)


def _positions(found: Trained) -> int | None:
    known = getattr(found.config.config.get_text_config(), "max_position_embeddings", None)
    return None if known is None else int(known)


def _compared(
    found: Trained, rows: Rows, recipe: Recipe, was: _Measured | None, now: _Measured
) -> Evaluation:
    """Both models' figures, and the intervals of their differences."""
    differences: dict[str, Interval] = {}
    if was is not None:
        tokens = [one.tokens for one in now.scores]
        ends = [one.closing_tokens for one in now.scores]
        pairs: dict[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]] = {
            "loss": ([s.nll for s in was.scores], [s.nll for s in now.scores], tokens),
            "closing_loss": (
                [s.closing_nll for s in was.scores],
                [s.closing_nll for s in now.scores],
                ends if any(ends) else [],
            ),
            "exact_match": (was.answered.right, now.answered.right, None),
            "stop_rate": (
                [a.stopped for a in was.answered.answers],
                [a.stopped for a in now.answered.answers],
                None,
            ),
        }
        if was.fields is not None and now.fields is not None:
            pairs["field_match"] = (was.fields.right, now.fields.right, None)
            pairs["valid_json"] = (was.fields.valid, now.fields.valid, None)
        for name, (before, after, weights) in pairs.items():
            if before and weights != []:
                differences[name] = interval.paired(before, after, weights)
    meter = None
    if now.general is not None:
        meter = forgetting.compare(found.tok, was and was.general, now.general, _positions(found))
    return Evaluation(
        name=found.name,
        adapter="" if found.source is None else found.source.name,
        rows=rows,
        base=was and _figures(was),
        tuned=_figures(now),
        differences=differences,
        forgetting=meter,
        lm_eval=tuple(_tasks(was and was.tasks, now.tasks)),
        samples=tuple(_samples(was, now)),
        scored_fields=recipe.eval.exact_match,
    )


def _figures(one: _Measured) -> Figures:
    loss = scoring.mean(one.scores)
    assert loss is not None
    asked = bool(one.answered.answers)
    fields = one.fields
    return Figures(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond it a float overflows
        closing_loss=scoring.closing_mean(one.scores),
        answered=len(one.answered.answers),
        exact_match=one.answered.exact_match if asked else None,
        field_match=fields and fields.share,
        fields={n: hits / of for n, (hits, of) in fields.by_field.items()} if fields else {},
        valid_json=fields and fields.valid_share,
        stop_rate=one.answered.stop_rate if asked else None,
    )


def _tasks(was: list[TaskScore] | None, now: list[TaskScore]) -> list[dict[str, Any]]:
    before = {(one.task, one.metric): one for one in was or ()}
    listed = []
    for one in now:
        old = before.get((one.task, one.metric))
        found: dict[str, Any] = {
            "task": one.task, "metric": one.metric, "higher_is_better": one.higher_is_better,
            "base": old and old.value, "tuned": one.value, "difference": None, "verdict": None,
        }  # fmt: skip
        if old is not None and one.rows and len(one.rows) == len(old.rows):
            paired = interval.paired(old.rows, one.rows)
            found["difference"] = paired.to_json()
            found["verdict"] = paired.verdict(lower_is_better=not one.higher_is_better)
        listed.append(found)
    return listed


def _samples(was: _Measured | None, now: _Measured) -> list[Sample]:
    listed = []
    answers = now.answered
    for index, example in enumerate(answers.examples[:SAMPLES]):
        listed.append(
            Sample(
                example.address,
                example.record.turns[-2].content,
                answers.expected[index],
                was and was.answered.answers[index].text,
                answers.answers[index].text,
            )
        )
    return listed


def _written(
    result: Evaluation, found: Trained, out: str | Path | None, screen: Screen
) -> Evaluation:
    """The evaluation with where it was written: where it was asked for, and into its run."""
    path = None
    told = result.to_json() | {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if out is not None:
        path = expanded(out)
        try:
            rundir.write_json(path, told)
        except OSError as error:
            raise RecipeError(_unwritable(path, error)) from None
    if found.run is not None:
        try:
            path = path or _free_name(found.run.dir / "evaluations")
            if out is not None:
                rundir.write_json(_free_name(found.run.dir / "evaluations"), told)
            else:
                rundir.write_json(path, told)
        except (
            OSError
        ) as error:  # a run on a drive that can only be read is evaluated none the less
            path = path if out is not None else None
            screen.say("note", f"not written into the run: {error.strerror or error}")
    return replace(result, path=path)


def _free_name(folder: Path) -> Path:
    rundir.make_folder(folder)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{stamp}.json" if n == 1 else f"{stamp}-{n}.json" for n in range(1, 1000))
    return next(folder / name for name in names if not (folder / name).exists())


def _require_writable(path: Path) -> None:
    """Refuse an --out that could not be written, before an hour is spent."""
    if path.is_dir():
        raise RecipeError(
            f"--out is {str(path)!r}, which is a folder. Name a file, such as scores.json."
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RecipeError(
            f"--out is {str(path)!r}, but {str(path.parent)!r} is no folder that can be written. Make "
            "it, or name another."
        )


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"--out is {str(path)!r}, which cannot be written: {error.strerror or error}. Name another."
    )
