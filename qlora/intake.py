"""Where rows come from: files by name or pattern, hub data sets, each with its format and content hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora import hub, records, sources, table
from qlora.errors import DataError
from qlora.recipe import HUB, local_path
from qlora.settings import Recipe, Source
from qlora.sources import Bad, Row


def inputs(recipe: Recipe) -> tuple[list[Input], list[Input]]:
    """Every file and hub data set of a recipe: (those of data.train, those of data.held_out).

    Raises:
        DataError: A pattern matches nothing, or a hub data set cannot be read.
    """
    given = recipe.data.sources
    train = [found for index, source in enumerate(given) for found in _inputs(source, index)]
    held_out = []
    if recipe.data.held_out is not None:
        asked = given[0].model_copy(update={"name": recipe.data.held_out, "weight": None})
        held_out = _inputs(asked, 0)
    _tell_apart([*train, *held_out])
    return train, held_out


@dataclass
class Input:
    """One file, or one hub data set, of one source."""

    settings: Source
    source: int
    origin: str
    path: Path | None = None
    rows_of_hub: Any = None
    digest: str = ""  # of its content; empty where that cannot be told
    rows: int | None = None  # about how many, if known before reading
    _form: records.Format | None = field(default=None, repr=False)

    def stream(self) -> Iterator[Row | Bad]:
        if self.path is not None:
            yield from sources.stream(self.path, self.origin)
        else:
            for number, value in enumerate(self.rows_of_hub, start=1):
                yield Row(self.origin, number, dict(value))

    def form(self) -> records.Format:
        """The format of its first readable row: asked for, or found out by the columns.

        Raises:
            DataError: Nothing fits, several fit, or ``columns`` names what is not there.
        """
        if self._form is None:
            first = next((row for row in self.stream() if isinstance(row, Row)), None)
            if first is None:
                sources.read(self.path or Path(), self.origin)  # raises, with what is wrong
            assert first is not None
            self._form = self._detect(first)
        return self._form

    def _detect(self, first: Row) -> records.Format:
        mapping = self.settings.columns or {}
        unknown = sorted(set(mapping) - set(records.COLUMNS))
        if unknown:
            raise DataError(
                f"data.columns maps {unknown[0]!r}, which is not one of our columns: "
                f"{', '.join(records.COLUMNS)}. Write ours first: {{prompt: question}}."
            )
        absent = sorted(n for n in mapping.values() if not _has(first.value, n))
        if absent:
            raise DataError(
                f"data.columns names {absent[0]!r}, but {self.origin} has the columns "
                f"{', '.join(first.value)}."
            )
        asked = self.settings.format or "auto"
        if asked != "auto":
            return asked
        return records.detect(records.renamed(first.value, mapping), self.origin)


def _has(row: dict[str, Any], name: str) -> bool:
    return name in row or records.reached(row, name) is not None


def _inputs(source: Source, index: int) -> list[Input]:
    if source.name.startswith(HUB):
        rows = _hub_rows(source)
        digest = table.hub_digest(rows)
        return [Input(source, index, source.name, None, rows, digest, len(rows))]
    found = []
    for path in sources.expand(local_path(source.name)):
        digest, rows = _digest(path)
        found.append(Input(source, index, path.name, path, None, digest, rows))
    return found


def _tell_apart(inputs: Sequence[Input]) -> None:
    """Files of one name are called by their folder, too."""
    names = [found.origin for found in inputs]
    for found in inputs:
        if names.count(found.path.name if found.path else "") > 1 and found.path:
            found.origin = f"{found.path.parent.name}/{found.path.name}"


def _hub_rows(source: Source) -> Any:
    problem = hub.unreachable()
    try:
        rows = table.from_hub(
            source.name.removeprefix(HUB), str(source.split), str(source.revision)
        )
    except table.HUB_ERRORS as error:
        reason = problem or str(error).splitlines()[0]
        raise DataError(
            f"data.train names {source.name!r} (split {source.split!r}), which cannot be read: "
            f"{reason}. Check its name and split, or download it and name the files."
        ) from None
    if not len(rows):
        raise DataError(f"data.train names {source.name!r}, which has no rows in {source.split!r}.")
    return rows


def _digest(path: Path) -> tuple[str, int | None]:
    """SHA-256 of a file, and its number of lines where a line is a row."""
    digest, lines = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                lines += block.count(b"\n")
    except OSError:
        return "", None  # reading it says what is wrong
    counted = path.suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv")
    return digest.hexdigest(), lines if counted else None
