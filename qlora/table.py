"""Tokenized rows on disk: written in one pass in constant memory, mapped into memory, found again.

A table is one Arrow stream, so rows larger than memory train as well as small ones. A prepared data set
is a folder of tables and their ledger; it appears under its name in the cache only when it is whole.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from qlora import places, rundir
from qlora.errors import DataError
from qlora.rendering import IGNORED, Encoded

VERSION = 1  # of the tables and of what decides them; another one is another entry of the cache
HUB_ERRORS = (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError, OSError)
ABANDONED_SECONDS = 24 * 3600  # after which nobody is still writing
KEPT = 16  # prepared data sets in the cache; the least recently used goes first

_TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "length": pa.int32(),
        "supervised": pa.int32(),
        "row": pa.int32(),
        "source": pa.int16(),
        "address": pa.string(),
        "record": pa.string(),
    }
)


class Writer:
    """Appends encoded rows to an Arrow stream. ``rows`` and ``largest_token`` say what was written."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self.largest_token = 0
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, SCHEMA)

    def add(
        self,
        rows: Sequence[Encoded],
        addresses: Sequence[str],
        source: int,
        records: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Write some rows of one source; ``records`` are their JSON, where they are asked again.

        Returns:
            All their token ids, one after the other.
        """
        lengths = np.fromiter((len(row.input_ids) for row in rows), np.int32, len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int32, offsets[-1])
        labels = np.full(len(ids), IGNORED, np.int32)
        for row, offset in zip(rows, offsets, strict=False):
            for start, end in row.trained:
                labels[offset + start : offset + end] = ids[offset + start : offset + end]
        self._stream.write_batch(
            pa.record_batch(
                [
                    pa.ListArray.from_arrays(offsets, ids),
                    pa.ListArray.from_arrays(offsets, labels),
                    lengths,
                    np.fromiter((row.supervised for row in rows), np.int32, len(rows)),
                    np.arange(self.rows, self.rows + len(rows), dtype=np.int32),
                    np.full(len(rows), source, np.int16),
                    pa.array(addresses, pa.string()),
                    pa.array(records or [""] * len(rows), pa.string()),
                ],
                schema=SCHEMA,
            )
        )
        self.rows += len(rows)
        self.largest_token = max(self.largest_token, int(ids.max(initial=0)))
        return ids

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._file.close()


def load(path: Path) -> Dataset:
    """A written table, mapped and not read."""
    return Dataset.from_file(str(path))


def column(rows: Dataset, name: str) -> np.ndarray:
    """A column of numbers of a whole table, without a detour through Python."""
    return rows.data.column(name).to_numpy()  # type: ignore[no-any-return]


def from_hub(name: str, split: str, revision: str) -> Any:
    """A hub data set's rows, downloaded once and mapped.

    Raises:
        One of HUB_ERRORS: It is not there, or the hub is not.
    """
    return load_dataset(name, split=split, revision=revision)


def hub_digest(rows: Any) -> str:
    """What tells a downloaded data set from another one; empty where nothing does."""
    files = [Path(file["filename"]) for file in getattr(rows, "cache_files", [])]
    said = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("|".join(said).encode()).hexdigest() if said else ""


def cached(key: str, build: Callable[[Path], None], *, keep: bool) -> tuple[Path, bool, str | None]:
    """The folder that ``build`` fills, made once per key; whether it was there, and what was wrong.

    What is there is used if every byte is as it was written; else it is made again, and the defect is
    returned. Interrupted or failed, ``build`` leaves nothing behind. Without ``keep`` the folder lives as
    long as this process.

    Raises:
        DataError: The cache cannot be written; says where it is and how to move it.
    """
    if not keep:
        folder = Path(tempfile.mkdtemp(prefix="qlora-data-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        build(folder)
        return folder, False, None
    folder = places.cache() / "data" / key
    defect = None
    if folder.is_dir():
        defect = _defect(folder)
        if defect is None:
            with contextlib.suppress(OSError):  # a cache that can only be read still serves
                os.utime(folder)
            return folder, True, None
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with rundir.writing_aside(folder) as aside:
            build(aside)
            rundir.seal(aside)
    except OSError as error:
        if not folder.is_dir() or _defect(folder):  # else another process was faster with the same
            raise DataError(
                f"tokenized rows cannot be kept in {places.shown(folder.parent)}: "
                f"{error.strerror or error}. Name another place in QLORA_CACHE, free some space, or "
                "write data.cache: false."
            ) from None
    kept = sorted(
        (p for p in folder.parent.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: p.stat().st_mtime,
    )
    for old in kept[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    for part in folder.parent.glob(".*.part"):  # of a process that was killed while it wrote
        if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(part, ignore_errors=True)
    return folder, False, defect


def _defect(folder: Path) -> str | None:
    try:
        return rundir.defect(folder)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def digest(rows: Dataset) -> str:
    """SHA-256 of what of some rows trains, in their order: tokens, labels and where each row ends."""
    found = hashlib.sha256()
    for part in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(8192):
        for name in ("input_ids", "labels"):
            lists = part.column(name).combine_chunks()
            found.update(lists.value_lengths().to_numpy().tobytes())
            found.update(lists.flatten().to_numpy().tobytes())
    return found.hexdigest()


class Numbered:
    """Rows of a table by the number that each carries, which a draw does not change."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows
        self._at: dict[int, int] = {}

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not self._at:
            self._at = {int(found): index for index, found in enumerate(self._rows["row"])}
        row: dict[str, Any] = self._rows[self._at[number]]
        return row
