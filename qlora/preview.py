"""What would train, before anything does: the ledger of a recipe's data and rendered rows, in minutes.

Reads the data, the tokenizer and the base's config.json; never a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from qlora import accounting, data, intake, ledger, loader, page, places, rundir, tokenizer
from qlora.data import Prepared
from qlora.errors import DataError
from qlora.ledger import Ledger
from qlora.page import Block, Legend, Listing, Piece, Sample, Section
from qlora.preparation import Progress, unwatched
from qlora.recipe import load_recipe
from qlora.rendering import IGNORED
from qlora.screen import Screen, stretches
from qlora.settings import Recipe

SHORT, LONG = 400, 4000  # tokens of a row that are shown: beside others, and on a page or alone
PIECES = 20  # of one split text


def show(
    recipe: Recipe | str | Path, *, rows: int | None = None, row: int | str | None = None
) -> Preview:
    """A recipe's data as it would train; the last expression of a notebook's cell renders it.

    Args:
        recipe: A recipe, or what :func:`qlora.load_recipe` takes.
        rows: Show this many rows from the beginning, instead of four chosen ones.
        row: Show this row: an address such as ``rows.jsonl:41``, or a line of the first source.

    Raises:
        QLoRAError: As :func:`preview`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return preview(loaded, Screen(Console()).track, rows=rows, row=row)


def preview(
    recipe: Recipe,
    progress: Progress = unwatched,
    *,
    rows: int | None = None,
    row: int | str | None = None,
) -> Preview:
    """The data as training would be given it, whatever over-long rows cost; see :func:`show`.

    Raises:
        DataError: As :func:`qlora.data.tokenize`; or there is no such row.
        ModelError: The tokenizer cannot be used.
    """
    config = loader.read_config(recipe)
    tok, pad_note = tokenizer.load(recipe, config.commit)
    prepared = data.tokenize(recipe, tok, config.vocab_size, progress)
    if row is not None:
        address, remarks, shown = _asked(recipe, prepared, str(row))
        return Preview(recipe, prepared, pad_note, shown, address, remarks)
    chosen = _first(prepared, rows) if rows is not None else _telling(recipe, prepared)
    shown = [Shown.of(label, prepared.train[index]) for label, index in chosen]
    return Preview(recipe, prepared, pad_note, shown)


@dataclass(frozen=True)
class Shown:
    """One row to look at."""

    label: str
    address: str
    input_ids: Sequence[int]
    labels: Sequence[int]

    @classmethod
    def of(cls, label: str, row: Mapping[str, Any]) -> Shown:
        return cls(label, row["address"], row["input_ids"], row["labels"])

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def pieces(self, tok: Any, limit: int | None = None) -> list[Piece]:
        """The row's text; of one longer than ``limit`` the middle is replaced by how much it was."""
        size = len(self.input_ids)
        if limit is None or size <= limit:
            return list(self._between(tok, 0, size))
        start, end = limit - limit // 2, size - limit // 2
        learned = sum(label != IGNORED for label in self.labels[start:end])
        gap = f"... {end - start:,} tokens are not shown here, {learned:,} of them train ..."
        return [*self._between(tok, 0, start), (gap, None), *self._between(tok, end, size)]

    def _between(self, tok: Any, start: int, end: int) -> list[tuple[str, bool]]:
        row = {"input_ids": self.input_ids[start:end], "labels": self.labels[start:end]}
        return stretches(tok, row)


@dataclass(frozen=True, repr=False)
class Preview:
    """The ledger and some rows: as text, as JSON, as a page, and in a notebook."""

    recipe: Recipe
    prepared: Prepared
    pad_note: str
    shown: Sequence[Shown]
    asked: str | None = None  # the address of the row that was asked for
    remarks: Sequence[str] = ()  # what became of it

    @property
    def ledger(self) -> Ledger:
        return self.prepared.ledger

    @cached_property
    def refusal(self) -> str:
        """Why training would refuse to start; empty if it would not."""
        try:
            data.require_little_lost(self.recipe, self.ledger)
        except DataError as error:
            return str(error)
        return ""

    def print(self, console: Console) -> None:
        """All but the refusal, on a terminal or into a file."""
        coloured = console.is_terminal and console.color_system is not None and not console.no_color
        width = max(60, console.width)
        text = page.text(self._sections(self._rejected()), width=width, coloured=coloured)
        console.print(text, soft_wrap=True, end="")

    def write(self, path: Path) -> None:
        """The page, whole or not at all.

        Raises:
            DataError: It is a folder, not an HTML file, or cannot be written.
        """
        require_page(path)
        try:
            rundir.write_text(
                path, page.document(f"{self.recipe.run.name}: what would train", self._page())
            )
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}.") from None

    def to_json(self) -> dict[str, Any]:
        """The ledger, and ``rows`` with their whole text in pieces that train or do not."""
        rows = [
            {
                "label": one.label,
                "address": one.address,
                "tokens": len(one.input_ids),
                "supervised": one.supervised,
                "text": [list(piece) for piece in one.pieces(self._tok)],
            }
            for one in self.shown
        ]
        asked = {"address": self.asked, "remarks": list(self.remarks)} if self.asked else None
        return self.ledger.to_json() | {"rows": rows, "asked": asked, "refusal": self.refusal}

    def __str__(self) -> str:
        return page.text([*self._sections(self._rejected()), *self._refused()]).plain

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return page.body(self._page())

    @property
    def _tok(self) -> Any:
        return self.prepared.renderer.tok

    def _page(self) -> list[Section]:
        """A page may be handed on, so it names no folder of this machine."""
        where = "rejected.jsonl" if self.prepared.rejected else ""
        return [*self._sections(where), *self._refused()]

    def _refused(self) -> list[Section]:
        lines = self.refusal.splitlines()
        return [Section("training would refuse this", [Listing("", lines)])] if lines else []

    def _rejected(self) -> str:
        """Where the rejected rows lie, for people at this machine."""
        path = self.prepared.rejected
        if path is None:
            return ""
        if not path.is_relative_to(places.cache()):
            return "rejected.jsonl of a run (without a cache, none is kept here)"
        home = Path.home()
        return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else places.shown(path)

    def _sections(self, rejected: str) -> list[Section]:
        lengths = sorted(_column(self.prepared.train, "length").tolist())
        told = accounting.sections(
            self.recipe, self.ledger, lengths, self._tok, self.pad_note, rejected
        )
        return [*told, Section("rows", self._rows())]

    def _rows(self) -> list[Block]:
        blocks: list[Block] = []
        if self.asked is not None:
            blocks.append(Listing(self.asked, self.remarks))
        if self.shown:
            blocks.append(Legend())
        for one in self.shown:
            size, learned = len(one.input_ids), one.supervised
            title = (
                f"{one.label}: {one.address}, {size:,} tokens, {learned:,} of them train "
                f"({accounting.share(learned, size)})"
            )
            limit = SHORT if self.asked is None else LONG
            short, long = one.pieces(self._tok, limit), one.pieces(self._tok, LONG)
            blocks.append(Sample(title, (), short, long))
        return blocks or [Listing("", ["none"])]


def require_page(path: Path) -> None:
    """Refuse a page that would take the place of something else.

    Raises:
        DataError: It is a folder, lies in none, or is named like another kind of file.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder. Name the file to write, such as {path / 'data.html'}.")
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{path}: a page is written to a file whose name ends in .html.")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent} to write it in.")


# --- which rows


def _column(rows: Any, name: str) -> np.ndarray:
    return np.array(rows[name][:], dtype=np.int64)


def _first(prepared: Prepared, count: int) -> list[tuple[str, int]]:
    return [(f"row {i + 1}", i) for i in range(min(count, len(prepared.train)))]


def _telling(recipe: Recipe, prepared: Prepared) -> list[tuple[str, int]]:
    """The first row, the longest, one by chance and the one of which least trains, each once."""
    lengths, supervised = (_column(prepared.train, name) for name in ("length", "supervised"))
    if not len(lengths):
        return []
    chosen = {
        "first": 0,
        "longest": int(lengths.argmax()),
        "random": int(np.random.default_rng(recipe.train.seed).integers(len(lengths))),
        "most masked": int((supervised / lengths).argmin()),
    }
    labels: dict[int, list[str]] = {}
    for label, index in chosen.items():
        labels.setdefault(index, []).append(label)
    return [(", ".join(names), index) for index, names in labels.items()]


def _asked(recipe: Recipe, prepared: Prepared, asked: str) -> tuple[str, list[str], list[Shown]]:
    """The address, what became of the row, and the row or its pieces where they were tokenized."""
    address = asked
    if asked.isascii() and asked.isdecimal():
        address = f"{intake.inputs(recipe)[0][0].origin}:{int(asked)}"
    remarks = _fate(prepared.ledger, address)
    trained = _at(prepared.train, address)
    held = _at(prepared.held_out, address) if prepared.held_out is not None else []
    if held:
        why = (
            "it stands in data.held_out"
            if recipe.data.held_out
            else "the hash of its content falls below data.held_out_fraction "
            f"({recipe.data.held_out_fraction:g})"
        )
        remarks.insert(0, f"held out: {why}; it is never trained on")
    elif trained:
        remarks.insert(0, "trains")
    elif address in prepared.addresses[:]:
        remarks.insert(0, "not drawn: the weights of data.train leave it out of the epoch")
    elif not any(_final(remark) for remark in remarks):
        remarks.insert(0, _unlisted(recipe, prepared.ledger, address))
    table, found = (prepared.held_out, held) if held else (prepared.train, trained)
    label = "held out" if held else "asked for"
    if len(found) > PIECES:
        remarks.append(f"the first {PIECES} of its {len(found):,} pieces are shown")
    shown = [
        Shown.of(label if len(found) == 1 else f"{label}, piece {n} of {len(found):,}", table[i])
        for n, i in enumerate(found[:PIECES], start=1)
    ]
    return address, remarks, shown


def _at(rows: Any, address: str) -> list[int]:
    return [i for i, found in enumerate(rows["address"][:]) if found == address]


def _fate(account: Ledger, address: str) -> list[str]:
    """What the ledger's listings say of a row."""
    over = account.over_length
    limit = f"longer than data.max_length ({account.max_length:,})"
    said = []
    for listing, joint, what in (
        (account.rejected, ": ", "rejected: {}"),
        (over.dropped, ": ", f"dropped: {{}}, {limit}"),
        (over.held_out, ": ", f"dropped: held out and {{}}, {limit}"),
        (over.shortened, ": ", f"shortened: it had {{}}, {limit}"),
        (over.split, ": ", f"split: it had {{}}, {limit}"),
        (account.duplicates, " equals ", "a duplicate, kept: it equals {}"),
    ):
        start = address + joint
        for line in listing.first:
            if line.startswith(start):
                said.append(what.format(line.removeprefix(start)))
                break
    if address in account.control_text.first:
        said.append("holds one of the tokenizer's own tokens as text")
    return said


def _final(remark: str) -> bool:
    return remark.startswith(("rejected: ", "dropped: "))


def _unlisted(recipe: Recipe, account: Ledger, address: str) -> str:
    """What can be said of a row that neither trains nor is listed.

    Raises:
        DataError: It was never read; names the files.
    """
    train, held_out = intake.inputs(recipe)
    everything = [*train, *held_out]
    if not any(
        row.address == address
        for found in everything
        if address.startswith(f"{found.origin}:")
        for row in found.stream()
    ):
        names = ", ".join(dict.fromkeys(found.origin for found in everything))
        raise DataError(
            f"--row {address}: no row has this address. Write a file and the line (in .json and tables: "
            f"the position, from 1) in which the row begins, such as {everything[0].origin}:1; the files "
            f"are {names}."
        )
    return f"rejected or dropped, but not among the first {ledger.LISTED:,} that are listed"
