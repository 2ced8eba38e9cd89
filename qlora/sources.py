"""Rows from local files, each with the address people can find it by: file and line or index.

Plain Python over the file formats (pyarrow for parquet, arrow and zstd), because a loader that knows the
line can say ``train.jsonl:9: not valid JSON (column 43)`` where a table library can only say that it
failed. A row that cannot be read is reported in its place and reading goes on, so that one pass finds
every problem of every file. No reason ever prints what a row holds: it may be private.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import shlex
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from qlora.errors import DataError

LISTED = 20  # problems shown before "and N more"
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_TABLES = (".parquet", ".arrow")  # these compress on their own
_TOOLS = {".gz": "gzip", ".zst": "zstd"}  # on top of the text endings: what undoes it
_CHUNK = 1024  # rows of a table turned into Python at a time


@dataclass(frozen=True, slots=True)
class _Place:
    """``number`` is the line in which the row begins, or in .json and tables its position from 1."""

    origin: str
    number: int

    @property
    def address(self) -> str:
        return f"{self.origin}:{self.number}"


@dataclass(frozen=True, slots=True)
class Row(_Place):
    """One object of a data file."""

    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad(_Place):
    """A row that cannot be read: why (without its content), and its text for whoever may see it."""

    reason: str
    raw: str = field(default="", repr=False)


def stream(path: Path, origin: str | None = None) -> Iterator[Row | Bad]:
    """The rows of a file by its ending, one at a time and in constant memory (``.json``: as a whole).

    A ``.txt`` file gives one ``{"text": ...}`` row a paragraph (blank lines between). Text files may be
    compressed (``.jsonl.gz``, ``.csv.zst``). Nothing is opened before the first row is asked for.

    Raises:
        DataError: What concerns the whole file: missing, empty, of an unknown kind, UTF-16, a damaged
            container, a ``.json`` or ``.csv`` that cannot be parsed any further, or no rows at all.
    """
    origin = origin or path.name or str(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise DataError(f"{origin}: a folder; name the data files in it.")
    _refuse_nul(path)
    kind, packing = _ending(path)
    if kind not in ENDINGS or (packing and kind in _TABLES):
        raise DataError(
            f"{origin}: files of kind {kind + packing or '(no ending)'!r} are not read. Known endings: "
            f"{' '.join(sorted(ENDINGS))}; and .gz or .zst after those of text files."
        )
    anything = False
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{origin}: the file is empty (0 bytes).")
        for item in _table(path, origin) if kind in _TABLES else _text(path, origin):
            anything = True
            yield item
    except (OSError, EOFError, zlib.error) as error:
        code, tool = getattr(error, "errno", None), _TOOLS.get(packing)
        if code or not tool:
            said = f"cannot be read: {os.strerror(code) if code else error}"
        elif isinstance(error, EOFError) or "Truncated" in str(error):
            said = f"the {tool} stream is cut short; fetch the file again"
        else:
            said = f"not a {tool} file, or a damaged one"
        raise DataError(f"{origin}: {said}.") from None
    if not anything:
        raise DataError(f"{origin}: no rows in it.")


def read(path: Path, origin: str | None = None) -> list[Row]:
    """All rows of a file, none of them bad.

    Raises:
        DataError: As :func:`stream`, or there are bad rows: the first twenty are listed.
    """
    origin = origin or path.name or str(path)
    rows: list[Row] = []
    problems: list[str] = []
    total = 0
    for item in stream(path, origin):
        if isinstance(item, Row):
            rows.append(item)
            continue
        total += 1
        if total <= LISTED:
            problems.append(f"{item.address}: {item.reason}")
    noun = "entries" if _ending(path)[0] in (".json", *_TABLES) else "lines"
    fail(problems, f"{origin}: {total:,} {noun} cannot be read. Mend or remove them:", total)
    return rows


def fail(problems: list[str], heading: str, total: int | None = None) -> None:
    """Raise one DataError that lists the problems, if there are any; ``total``, if only some are kept."""
    if problems:
        shown = problems[:LISTED]
        more = (total or len(problems)) - len(shown)
        tail = [f"... and {more:,} more"] if more > 0 else []
        raise DataError("\n".join([heading, *(f"  {p}" for p in shown), *tail]))


def holds_json_lines(path: Path) -> bool:
    """Whether a .json file is one object a line, as many tools write it, and is read as that."""
    kind, packing = _ending(path)
    if kind != ".json":
        return False
    try:
        with _opened(path, packing) as file:
            first = file.readline().removeprefix(b"\xef\xbb\xbf")
            return _are_json_lines([first, file.readline()])
    except (OSError, EOFError, zlib.error):
        return False  # reading it says what is wrong


def is_pattern(name: str | Path) -> bool:
    """Whether a name holds one of the characters that make it a pattern of file names."""
    return any(character in str(name) for character in "*?[")


def expand(name: str | Path) -> list[Path]:
    """The files a path or pattern (``data/*.jsonl``, ``**`` for any depth) stands for, sorted.

    What exists under exactly this name is meant literally.

    Raises:
        DataError: A pattern that matches no file, or cannot.
    """
    path = Path(name)
    if not is_pattern(name) or os.path.exists(path):  # noqa: PTH110 - Path.exists raises, as is_dir
        return [path]
    _refuse_nul(path)
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes hidden files too
    found = sorted(Path(match) for match in names if os.path.isfile(match))  # noqa: PTH113
    if not found:
        plain = next(parent for parent in path.parents if not is_pattern(parent))
        folder = Path(os.path.realpath(plain))  # Path.resolve raises for links in a circle
        there = "" if os.path.isdir(folder) else ", which does not exist"  # noqa: PTH112
        raise DataError(f"the pattern {str(name)!r} matches no file. Looked in {folder}{there}.")
    return found


def _refuse_nul(path: Path) -> None:
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: no file can have a name with a NUL character in it.")


def _ending(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of ``rows.jsonl.gz``; the second is "" for a file that is not compressed."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in _TOOLS else (last, "")


# --- text files


@dataclass
class _Text:
    """An open text file behind its byte order mark; offsets count from its (uncompressed) start."""

    path: Path
    origin: str
    stream: io.BufferedReader
    offset: int = 0
    advised: bool = False
    pending: list[str] = field(default_factory=list)

    def not_utf8(self, offset: int, guess: str = "LATIN1") -> str:
        """The reason to give; the first of a file comes with the command that mends the file."""
        if self.advised:
            return f"not UTF-8 at byte {offset}"
        self.advised = True
        kind, packing = _ending(self.path)
        name, convert = shlex.quote(self.path.name), f"iconv -f {guess} -t UTF-8"
        command = f"{_TOOLS[packing]} -dc {name} | {convert}" if packing else f"{convert} {name}"
        return f"not UTF-8 at byte {offset}. If it is {guess}, convert it: {command} > fixed{kind}"

    def lines(self) -> Iterator[str]:
        """The lines, with a surrogate in the place of each byte that is not UTF-8."""
        with io.TextIOWrapper(self.stream, "utf-8", "surrogateescape", newline="") as lines:
            for line in lines:
                self.pending.append(line)
                yield line

    def taken(self) -> tuple[str, str]:
        """The text of the lines since the last call; and why it cannot be used, or nothing."""
        raw, reason = "".join(self.pending), ""
        try:
            size = len(raw.encode())
        except UnicodeEncodeError as error:
            reason = self.not_utf8(self.offset + len(raw[: error.start].encode()))
            size = len(raw.encode(errors="surrogateescape"))
        self.offset += size
        self.pending.clear()
        return raw, reason

    def bad(self, number: int, reason: str, raw: str | bytes) -> Bad:
        data = raw if isinstance(raw, bytes) else raw.encode(errors="surrogateescape")
        return Bad(self.origin, number, reason, data.decode(errors="replace").strip("\r\n"))


def _text(path: Path, origin: str) -> Iterator[Row | Bad]:
    kind, packing = _ending(path)
    with _opened(path, packing) as file:
        text = _Text(path, origin, file)
        head = file.peek(3)[:3]
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{origin}: {text.not_utf8(0, 'UTF-16')}")
        if head == b"\xef\xbb\xbf":
            text.offset = len(file.read(3))
        yield from _READERS[kind](text)


def _opened(path: Path, packing: str) -> io.BufferedReader:
    if not packing:
        return path.open("rb")
    raw: Any
    if packing == ".gz":
        raw = gzip.open(path)  # noqa: SIM115 - closing the reader closes it
    else:
        import pyarrow  # Python has no zstd before 3.14

        raw = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(raw, 1 << 16)


def _jsonl(text: _Text, begun: Sequence[bytes] = ()) -> Iterator[Row | Bad]:
    lines = chain(begun, text.stream)  # bytes: nothing but \n ends a line
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            value, reason = _parsed(line, text)
            yield text.bad(number, reason, line) if reason else Row(text.origin, number, value)
        text.offset += len(line)


def _parsed(line: bytes, text: _Text) -> tuple[Any, str]:
    """The object in a line, or why there is none."""
    torn = not line.endswith(b"\n")
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        if torn and error.reason == "unexpected end of data":
            return None, "not valid JSON: the file's last line is cut short"
        return None, text.not_utf8(text.offset + error.start)
    except (ValueError, RecursionError) as error:
        return None, _invalid(error, torn and line.lstrip().startswith(b"{"))
    return value, "" if isinstance(value, dict) else f"a JSON {_kind(value)}, expected an object"


def _json(text: _Text) -> Iterator[Row | Bad]:
    origin = text.origin
    begun = [text.stream.readline(), text.stream.readline()]
    if _are_json_lines(begun):
        yield from _jsonl(text, begun)
        return
    try:
        whole = b"".join([*begun, text.stream.read()]).decode()
        value = _DECODER.decode(whole)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: {text.not_utf8(text.offset + error.start)}") from None
    except (ValueError, RecursionError) as error:
        line = ""
        if isinstance(error, json.JSONDecodeError):
            line = f":{error.lineno}"
        elif isinstance(error, _Refused):
            line = f":{_line_refused(whole)}"
        raise DataError(f"{origin}{line}: {_invalid(error)}.") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) != 1:
            raise DataError(f"{origin}: expected a list of objects, or an object holding one list.")
        value = lists[0]
    if not isinstance(value, list):
        raise DataError(f"{origin}: expected a list of objects, found a {_kind(value)}.")
    for number, inner in enumerate(value, start=1):
        if isinstance(inner, dict):
            yield Row(origin, number, inner)
        else:
            reason = f"a JSON {_kind(inner)}, expected an object"
            yield Bad(origin, number, reason, json.dumps(inner))


def _are_json_lines(first: Sequence[bytes]) -> bool:
    """Whether a file's first two lines say that each of its lines is an object."""
    try:
        return bool(first[1].strip()) and isinstance(json.loads(first[0].decode()), dict)
    except (ValueError, RecursionError):
        return False


def _csv(text: _Text) -> Iterator[Row | Bad]:
    csv.field_size_limit(2**31 - 1)  # by default a field may have 128 KiB
    delimiter = "\t" if _ending(text.path)[0] == ".tsv" else ","
    reader = csv.reader(text.lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            number = reader.line_num - len(text.pending) + 1  # a quoted field may hold line ends
            raw, reason = text.taken()
            if header is None and fields:
                header = fields
                named = list(filter(None, header))  # commas after the last name are common
                if len(set(named)) != len(named):
                    reason = "two columns have the same name"
                if reason:
                    raise DataError(f"{text.origin}:{number}: {reason}")
            elif header and fields:
                if len(fields) != len(header) and not reason:
                    counts = f"({len(fields)} instead of {len(header)})"
                    reason = f"not as many fields as the header has {counts}"
                if reason:
                    yield text.bad(number, reason, raw)
                else:
                    yield Row(text.origin, number, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        number = reader.line_num - len(text.pending) + 1
        raise DataError(f"{text.origin}:{number}: not valid CSV: {error}.") from None


def _txt(text: _Text) -> Iterator[Row | Bad]:
    start = 0
    for number, line in enumerate(chain(text.lines(), [""]), start=1):
        if line.strip():
            start = start or number
            continue
        raw, reason = text.taken()
        if reason:
            yield text.bad(start, reason, raw)
        elif start:
            value = raw.replace("\r\n", "\n").replace("\r", "\n").strip()
            yield Row(text.origin, start, {"text": value})
        start = 0


_READERS: dict[str, Callable[[_Text], Iterator[Row | Bad]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt,
}  # fmt: skip


# --- JSON, more strictly than Python: what it would read in silence is refused


class _Refused(ValueError):
    pass


def _constant(name: str) -> object:
    raise _Refused(f"{name} is not JSON; write null or a number")


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) != len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise _Refused(f"the key {twice[:40]!r} is there twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_object)


def _invalid(error: Exception, torn: bool = False) -> str:
    """Why the decoder gave up; of an object without a line end it may be that the end is missing."""
    if isinstance(error, json.JSONDecodeError):
        said, text = error.msg, error.doc.rstrip()
        if torn and said != "Extra data" and (error.pos >= len(text) or not text.endswith("}")):
            said = "the file's last line is cut short"
        return f"not valid JSON (column {error.colno}): {said.removesuffix(' at')}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, _Refused) else "a number of more than 4,300 digits"


def _line_refused(text: str) -> int:
    """The decoder refuses without a place, but exactly those beginnings that hold the cause."""
    lines = text.split("\n")

    def refused(count: int) -> bool:
        try:
            _DECODER.decode("\n".join(lines[:count]))
        except ValueError as error:
            return isinstance(error, _Refused)
        return False

    return bisect_left(range(len(lines)), True, key=refused)


def _kind(value: object) -> str:
    names = {list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


# --- tables


def _table(path: Path, origin: str) -> Iterator[Row | Bad]:
    import pyarrow

    kind = path.suffix.lower()
    batches = _parquet(path) if kind == ".parquet" else _arrow(path)
    number = 0
    try:
        for batch in batches:
            for value in _values(batch):
                number += 1
                bad = isinstance(value, str)
                yield Bad(origin, number, value) if bad else Row(origin, number, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        said = str(error).partition("\n")[0]
        raise DataError(f"{origin}: not {kind[1:]}, or damaged: {said}") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_CHUNK)


def _arrow(path: Path) -> Iterator[Any]:
    """Either IPC format: the file with an index at its end, or the stream."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        indexed = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if indexed else pyarrow.ipc.open_stream(file)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader:
            batch.validate(full=True)  # a damaged offset could end the process
            for start in range(0, batch.num_rows, _CHUNK):
                yield batch.slice(start, _CHUNK)


def _values(batch: Any) -> Iterator[Any]:
    """The rows as dicts; for a row that has no form in Python, the reason why."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for at in range(batch.num_rows):
                yield from _values(batch.slice(at, 1))
        elif isinstance(error, UnicodeDecodeError):
            yield "a text that is not UTF-8"
        else:
            yield "a value that Python cannot hold, such as a date out of range"
