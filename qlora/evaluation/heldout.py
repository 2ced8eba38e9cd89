"""Which rows a tuned model is asked: a file's, or those that its run held out, and whether it saw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import data, rundir, table
from qlora.errors import CheckpointError, DataError
from qlora.evaluation import reading
from qlora.ledger import counted
from qlora.places import expanded
from qlora.preparation import Example
from qlora.screen import Screen
from qlora.trained import MERGED, UNKNOWN, Trained


@dataclass(frozen=True)
class Rows:
    """What was asked.

    Attributes:
        source: Where the rows come from, as people would say it.
        count: How many.
        tokens: Of those, how many are supervised.
        digest: SHA-256 of their tokens and labels.
        are_the_runs: Whether they are the rows that the run held out; None where that cannot be told.
        trained_on: How many of them the run was trained on; None where that cannot be told.
        notes: What was left out, and why.
    """

    source: str
    count: int
    tokens: int
    digest: str
    are_the_runs: bool | None = None
    trained_on: int | None = None
    notes: tuple[str, ...] = ()


def find(
    found: Trained, file: str | None, screen: Screen
) -> tuple[Rows, list[Example], list[dict[str, Any]]]:
    """The rows to ask: a file's, or those that the run held out; as told, as records, and tokenized.

    Args:
        found: A run or a model.
        file: All of its rows; None for the run's own.
        screen: Shows how far reading them is.

    Raises:
        DataError: The file cannot be read or none of its rows be used; the run held out no rows, or they
            cannot be read again; it is a model that no run made.
    """
    if file is None and found.run is None and found.recipe.data.sources[0].name == UNKNOWN:
        what = "a model that no run of qlora made, so it held out no rows"
        if (expanded(found.recipe.model.name) / MERGED).is_file():
            what = "a merged model away from its run, and which rows that held out it does not say"
        raise DataError(f"{found.name} is {what}. Name a file with rows to ask: --data FILE.")
    if file is not None:
        asked = reading.read(
            file, found.recipe, found.renderer, found.config.vocab_size, screen.track
        )
        known = found.recipe.data.sources[0].name != UNKNOWN
        met = reading.trained_on(found.recipe, asked.examples, screen.track) if known else None
        notes = [
            f"{counted(listing.count, one, many)} (first: {listing.first[0]})"
            for listing, one, many in (
                (asked.ledger.rejected, "cannot be used", "cannot be used"),
                (
                    asked.ledger.over_length.held_out,
                    "is longer than data.max_length",
                    "are longer than data.max_length",
                ),
            )
            if listing.count
        ]
        same = _is_of_run(found, asked.digest)
        rows = _counted(Path(file).name, asked.rows, asked.digest, same, met, notes)
        return rows, asked.examples, asked.rows
    try:
        prepared = data.prepare(found.recipe, found.tok, found.config.vocab_size, screen.track)
    except DataError as error:
        raise DataError(
            f"The rows that {found.name} held out cannot be read again:\n{error}\n"
            "Or name rows to ask: --data FILE."
        ) from None
    if prepared.held_out is None:
        raise DataError(
            f"{found.name} held out no rows (data.held_out_fraction is "
            f"{found.recipe.data.held_out_fraction:g}). Name a file with rows it was not trained on: "
            "--data FILE."
        )
    digest = table.digest(prepared.held_out)
    same, notes = _is_of_run(found, digest), []
    if same is False:
        notes.append(
            "these are not the rows that the run held out: its data has changed since, so some of them "
            "may have been trained on"
        )
    source = found.recipe.data.held_out or "the rows held out of data.train"
    listed = list(prepared.held_out)
    met = None if same is False else 0
    rows = _counted(Path(source).name, listed, digest, same, met, notes)
    return rows, prepared.held_out_examples, listed


def _counted(
    source: str,
    rows: Sequence[dict[str, Any]],
    digest: str,
    same: bool | None,
    met: int | None,
    notes: Sequence[str],
) -> Rows:
    tokens = sum(int(row["supervised"]) for row in rows)
    return Rows(source, len(rows), tokens, digest, same, met, tuple(notes))


def _is_of_run(found: Trained, digest: str) -> bool | None:
    """Whether rows are those that the run held out; None where these are not known."""
    if found.run is None:
        return None
    try:
        kept = rundir.read_json(found.run.dir / "before.json")["of"]["held_out"]
    except (CheckpointError, LookupError, TypeError):
        return None
    return bool(kept == digest) if kept else None


def described(rows: Rows) -> str:
    """In one line: how many, from where, and whether the model may have seen them."""
    said = f"{rows.count:,} of {rows.source}, {rows.tokens:,} supervised tokens"
    if rows.are_the_runs:
        return f"{said}; they are the rows that the run held out"
    if rows.trained_on:
        return (
            f"{said}; the run was TRAINED on {rows.trained_on:,} of them "
            f"({rows.trained_on / rows.count:.0%}): these figures are too good"
        )
    if rows.trained_on == 0 and rows.are_the_runs is not None:
        return f"{said}; none of them is among the run's training rows"
    if rows.trained_on is None:
        return f"{said}; whether the model was trained on some of them is not known"
    return said
