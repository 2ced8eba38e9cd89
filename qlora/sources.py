"""Rows from local files, each with the address people can find it by: file and line or index.

Plain Python over the file formats (pyarrow for parquet), because a loader that knows the line can say
``train.jsonl:9: not valid JSON (column 43)`` where a table library can only say that it failed.
Error texts never print what a row holds: it may be private.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import DataError

LISTED = 20  # problems shown before "and N more"


@dataclass(frozen=True)
class Row:
    """One object of a data file: ``number`` is the line of a line-based file, else the position."""

    origin: str
    number: int
    value: dict[str, Any]

    @property
    def address(self) -> str:
        return f"{self.origin}:{self.number}"


def read(path: Path, origin: str | None = None) -> list[Row]:
    """Every row of a file, by its ending: .jsonl .ndjson .json .csv .tsv .parquet .txt.

    A ``.txt`` file gives one ``{"text": ...}`` row a paragraph (blank lines between).

    Raises:
        DataError: Missing, empty, of an unknown kind, not UTF-8, or with rows that cannot be parsed;
            the first twenty are listed with their lines.
    """
    origin = origin or path.name or str(path)
    if path.is_dir():
        raise DataError(f"{origin}: a folder; name the data files in it.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = " ".join(sorted(_READERS))
        raise DataError(f"{origin}: files of kind {path.suffix or '(no ending)'!r} are not read. "
                        f"Known endings: {known}.")  # fmt: skip
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{origin}: the file is empty (0 bytes).")
        rows = list(reader(path, origin))
    except UnicodeDecodeError:
        start, utf16 = _first_undecodable(path)
        guess = "UTF-16" if utf16 else "LATIN1"
        raise DataError(
            f"{origin}: not UTF-8 at byte {start}. If it is {guess}, convert it: "
            f"iconv -f {guess} -t UTF-8 {path.name} > fixed{path.suffix}"
        ) from None
    except OSError as error:
        raise DataError(f"{origin}: cannot be read: {error.strerror or error}.") from None
    if not rows:
        raise DataError(f"{origin}: no rows in it.")
    return rows


def _first_undecodable(path: Path) -> tuple[int, bool]:
    """(offset in the file, whether it begins as UTF-16): a reader's own error counts from its buffer."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start, data[:2] in (b"\xff\xfe", b"\xfe\xff")
    return 0, False


def fail(problems: list[str], heading: str) -> None:
    """Raise one DataError that lists the problems, if there are any."""
    if problems:
        more = len(problems) - LISTED
        tail = [f"... and {more:,} more"] if more > 0 else []
        raise DataError("\n".join([heading, *(f"  {p}" for p in problems[:LISTED]), *tail]))


def _jsonl(path: Path, origin: str) -> Iterator[Row]:
    problems: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                problems.append(
                    f"{origin}:{number}: not valid JSON (column {error.colno}): {error.msg}"
                )
                continue
            except ValueError:
                problems.append(f"{origin}:{number}: a number of more than 4,300 digits")
                continue
            except RecursionError:
                problems.append(f"{origin}:{number}: nested too deeply")
                continue
            if isinstance(value, dict):
                yield Row(origin, number, value)
            else:
                problems.append(f"{origin}:{number}: a JSON {_kind(value)}, expected an object")
    fail(problems, f"{origin}: {len(problems):,} lines cannot be read. Mend or remove them:")


def _json(path: Path, origin: str) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = (
            " It looks like JSON lines; rename it to .jsonl." if error.msg == "Extra data" else ""
        )
        raise DataError(
            f"{origin}:{error.lineno}: not valid JSON (column {error.colno}): {error.msg}.{hint}"
        ) from None
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"{origin}: a number of more than 4,300 digits.") from None
    except RecursionError:
        raise DataError(f"{origin}: nested too deeply.") from None
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        if len(lists) != 1:
            raise DataError(f"{origin}: expected a list of objects, or an object holding one list.")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{origin}: expected a list of objects, found a {_kind(value)}.")
    problems = [f"{origin}:{n}: a JSON {_kind(v)}, expected an object"
                for n, v in enumerate(value, start=1) if not isinstance(v, dict)]  # fmt: skip
    fail(problems, f"{origin}: {len(problems):,} entries cannot be read:")
    yield from (Row(origin, number, inner) for number, inner in enumerate(value, start=1))


def _csv(path: Path, origin: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # by default a field may have 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as lines:
        tab = path.suffix.lower() == ".tsv"
        reader = csv.DictReader(lines, delimiter="\t" if tab else ",", strict=True)
        problems: list[str] = []
        try:
            for value in reader:
                if None in value or None in value.values():
                    problems.append(
                        f"{origin}:{reader.line_num}: not as many fields as the header has"
                    )
                else:
                    yield Row(origin, reader.line_num, dict(value))
        except csv.Error as error:
            raise DataError(f"{origin}:{reader.line_num}: not valid CSV: {error}.") from None
    fail(problems, f"{origin}: {len(problems):,} lines cannot be read:")


def _parquet(path: Path, origin: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(origin, number, value)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{origin}: not a parquet file: {str(error).splitlines()[0]}") from None


def _txt(path: Path, origin: str) -> Iterator[Row]:
    paragraph: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                if not paragraph:
                    start = number
                paragraph.append(line)
            elif paragraph:
                yield Row(origin, start, {"text": "".join(paragraph).strip()})
                paragraph = []
    if paragraph:
        yield Row(origin, start, {"text": "".join(paragraph).strip()})


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
