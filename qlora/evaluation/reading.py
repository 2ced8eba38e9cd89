"""Rows of a file that are only asked: tokenized as training would, and none of them learned."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import records, rundir, table
from qlora.errors import DataError, QLoRAError
from qlora.intake import Input, inputs
from qlora.ledger import Ledger
from qlora.preparation import Example, Preparation, Progress, unwatched
from qlora.rendering import Renderer
from qlora.settings import Recipe
from qlora.sources import Row


@dataclass(frozen=True)
class Asked:
    """A file's rows.

    Attributes:
        rows: With ``input_ids`` and ``labels``, as :data:`qlora.table.SCHEMA` has them.
        examples: The same rows as records.
        ledger: What was left out, and why.
        digest: As :func:`qlora.table.digest`, of all rows.
    """

    rows: list[dict[str, Any]]
    examples: list[Example]
    ledger: Ledger
    digest: str


def read(
    file: str, recipe: Recipe, renderer: Renderer, vocab_size: int, progress: Progress = unwatched
) -> Asked:
    """All rows of a file that can be used, in its order.

    A row that cannot be used, or that is longer than ``data.max_length``, is left out and counted in the
    ledger: ``rejected`` and ``over_length.held_out``.

    Args:
        file: Or a pattern, a hub data set, ``embedded:...``: as an entry of ``data.train``.
        recipe: Its ``data`` says how rows are read: as those of the run were, if they have that form, else
            by their columns.
        renderer: As in training.
        vocab_size: Of the model.
        progress: Wraps the rows as they are read.

    Raises:
        DataError: The file cannot be read, its format is not clear, or none of its rows can be used.
        ModelError: Rows need a chat template and the tokenizer has none.
    """
    found = _inputs(recipe, file)
    changed = {"train": ("-",), "held_out": file, "on_bad_row": "skip"}
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})
    folder = Path(tempfile.mkdtemp(prefix="qlora-asked-"))
    try:
        Preparation(asked, renderer, vocab_size, folder).run([], found, progress)
        rows = table.load(folder / "held_out.arrow")
        account = Ledger.from_json(rundir.read_json(folder / "ledger.json"))
        if not len(rows):
            over = account.over_length.held_out
            first = [*account.rejected.first, *over.first][:5]
            raise DataError(
                f"{file}: none of its rows can be used: {account.rejected.count:,} are no rows, "
                f"{over.count:,} are longer than data.max_length ({recipe.data.max_length:,} tokens):\n"
                + "\n".join(f"  {line}" for line in first)
            )
        digest, listed = table.digest(rows), list(rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    examples = [
        Example(row["address"], records.from_json(json.loads(row["record"]))) for row in listed
    ]
    return Asked(listed, examples, account, digest)


def trained_on(
    recipe: Recipe, examples: Sequence[Example], progress: Progress = unwatched
) -> int | None:
    """How many of some rows a run's training rows hold too, by content; None if those are not at hand.

    Args:
        recipe: The run's. Its held-out rows are among those of ``data.train`` where a fraction is held out,
            and do not count.
        examples: The rows.
        progress: Wraps the training rows as they are read.
    """
    wanted = {records.fingerprint(example.record) for example in examples}
    limit = int(recipe.data.held_out_fraction * 2**64) if recipe.data.held_out is None else 0
    met: set[str] = set()
    try:
        train, held_out = inputs(recipe)
        held = {mark for found in held_out for mark in _fingerprints(found)}
        for found in train:
            met.update(
                mark
                for mark in _fingerprints(found, progress)
                if mark in wanted and mark not in held and int(mark[:16], 16) >= limit
            )
    except QLoRAError:
        return None
    return sum(records.fingerprint(example.record) in met for example in examples)


def _fingerprints(found: Input, progress: Progress = unwatched) -> Iterator[str]:
    """Of every row that can be used."""
    for row in progress(found.stream(), "comparing", found.rows):
        if not isinstance(row, Row):
            continue
        try:
            mapped = records.renamed(row.value, found.settings.columns or {})
            yield records.fingerprint(records.parse(mapped, found.form()))
        except records.RowError:
            continue


def _inputs(recipe: Recipe, file: str) -> list[Input]:
    """A file as what its own columns say, read through the run's ``columns``, or as the run's format."""
    first = recipe.data.sources[0]
    errors: list[DataError] = []
    for columns, form in ((first.columns, "auto"), ({}, "auto"), (first.columns, first.format)):
        changed = {"train": ("-",), "held_out": file, "columns": columns, "format": form}
        _, found = inputs(
            recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})
        )
        try:
            for one in found:
                one.form()
        except DataError as error:
            errors.append(error)
        else:
            return found
    raise errors[0]
