"""One pass over all rows: parsed, checked, split, rendered, tokenized, written, and accounted for.

Rows stream through to tables on disk; what stays in memory of each is its content hash with its address,
to tell duplicates, and its length. While the tokenizer works on a
chunk, in parallel and on a thread of its own, the next one is read and rendered.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qlora import ledger, parity, records, rundir, shortening, sources, table, tokenizer
from qlora.errors import DataError
from qlora.intake import Input
from qlora.ledger import Account, Ledger
from qlora.recipe import HUB
from qlora.records import Record
from qlora.rendering import Encoded, Renderer
from qlora.settings import Recipe
from qlora.sources import Bad, Row

CHUNK = 512  # rows handed to the tokenizer at a time
MAX_ROW_CHARS = 1_000_000
PARITY_ROWS = 32
# Columns by which a row would choose its own template in other tools.
TEMPLATES = ("chat_template", "chat_template_kwargs")

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


def unwatched(rows: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """No progress shown."""
    return rows


def vocabulary_digest(tok: Any) -> str:
    """What tells a tokenizer from one that gives other ids: SHA-256 of its tokens with their ids.

    The serialized tokenizer would tell more, and another one with every release that adds a field.
    """
    pairs = sorted(tok.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Example:
    """A record with its address in the data."""

    address: str
    record: Record


def require_renderable(renderer: Renderer, record: Record, address: str) -> None:
    """Refuse a conversation where there is no chat template, or where none is to be used.

    Raises:
        ModelError: There is none; says what can be done.
        DataError: ``data.rendering`` is plain.
    """
    if renderer.chat or not record.needs_template:
        return
    if renderer.tok.chat_template:
        raise DataError(
            f"data.rendering is plain, but {address} holds a conversation, which only a chat "
            "template can render. Write data.rendering: chat."
        )
    tokenizer.require_template(renderer.tok, f"{address} holds a conversation")


class Problems:
    """Rows that cannot be used: counted, the first listed, and written aside if they are skipped."""

    def __init__(self, strict: bool, folder: Path, account: Ledger) -> None:
        self.account = account
        self.path = None if strict else folder / "rejected.jsonl"

    def add(self, account: Account, address: str, reason: str, value: Any) -> None:
        account.rejected += 1
        self.account.rejected.add(f"{address}: {reason}")
        if self.path is not None:
            line = {"row": address, "reason": reason, "value": value}
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def require_none(self, rows: int) -> None:
        """Raise one error for all of them, unless they are skipped."""
        listing = self.account.rejected
        if self.path is None:
            formats = ", ".join(
                f"{a.name} read as {a.format}" for a in self.account.sources if a.rejected
            )
            sources.fail(
                listing.first,
                f"{listing.count:,} of {rows:,} rows cannot be used ({formats or 'held out'}). Mend or "
                "remove them, or leave them out with data.on_bad_row: skip:",
                total=listing.count,
            )


class Preparation:
    """One pass over the rows: checked, split, rendered here; tokenized on a second thread; written."""

    def __init__(self, recipe: Recipe, renderer: Renderer, vocab_size: int, folder: Path) -> None:
        asked = recipe.data
        self.recipe = recipe
        self.renderer = renderer
        self.vocab_size = vocab_size
        self.folder = folder
        names = [Path(s.name).name if not s.name.startswith(HUB) else s.name for s in asked.sources]
        self.ledger = Ledger(
            rendering="chat" if renderer.chat else "plain",
            loss_on=asked.loss_on,
            max_length=asked.max_length,
            vocabulary=vocabulary_digest(renderer.tok),
            sources=[Account(name) for name in names],
        )
        self.ledger.over_length.policy = asked.over_length
        self.asked_account = Account("held out")
        self.problems = Problems(asked.on_bad_row == "error", folder, self.ledger)
        self.limit = int(asked.held_out_fraction * 2**64) if asked.held_out is None else 0
        self.seen: dict[int, str] = {}
        self.held: dict[int, str] = {}
        self.templates: Counter[str] = Counter()
        self.sample: list[Record] = []
        self.lengths, self.supervised = array("i"), array("i")  # of all rows to train, however long
        self.waiting: deque[tuple[Chunk, Future[list[Any]]]] = deque()
        specials = [*renderer.tok.all_special_ids, *renderer.tok.added_tokens_decoder]
        self.special_ids = np.unique(np.array(specials, dtype=np.int32))
        texts = [t for t in map(renderer.tok.convert_ids_to_tokens, self.special_ids.tolist()) if t]
        self.first_chars = tuple({text[0] for text in texts})
        self.control = re.compile("|".join(map(re.escape, sorted(texts)))) if texts else None

    def run(self, train: Sequence[Input], held_out: Sequence[Input], progress: Progress) -> None:
        counts = [found.rows for found in [*held_out, *train]]
        total = None if None in counts else sum(filter(None, counts))
        with (
            table.Writer(self.folder / "train.arrow") as trained,
            table.Writer(self.folder / "held_out.arrow") as asked,
            ThreadPoolExecutor(1) as pool,
        ):
            self.pool = pool
            self.train, self.asked = Side(trained, held_out=False), Side(asked, held_out=True)
            rows = chain(
                ((found, row) for found in held_out for row in found.stream()),
                ((found, row) for found in train for row in found.stream()),
            )
            self.learns = bool(train)  # else these rows are only asked
            given = {id(found) for found in held_out}
            self.ledger.notes += [
                f"{found.origin} holds one JSON object a line, and is read as such"
                for found in [*held_out, *train]
                if found.path is not None and sources.holds_json_lines(found.path)
            ]
            for found, row in progress(rows, "reading", total):
                self._take(found, row, given=id(found) in given)
            for side in (self.train, self.asked):
                self._send(side)
            while self.waiting:
                self._receive()
            self._finish(trained, asked)

    def _take(self, found: Input, row: Row | Bad, *, given: bool) -> None:
        """One row, from what the file gave to the side it stands on."""
        account = self.asked_account if given else self.ledger.sources[found.source]
        account.rows += 1
        if isinstance(row, Bad):
            self.problems.add(account, row.address, row.reason, row.raw)
            return
        form = found.form()
        account.format, account.detected = form, found.settings.format == "auto"
        try:
            record = records.parse(records.renamed(row.value, found.settings.columns or {}), form)
            self._require_reasonable(record)
        except records.RowError as error:
            self.problems.add(account, row.address, str(error), row.value)
            return
        require_renderable(self.renderer, record, row.address)
        self.templates.update(name for name in TEMPLATES if row.value.get(name) is not None)
        address, code = row.address, int(records.fingerprint(record)[:16], 16)
        if given:
            self.held.setdefault(code, address)
        elif code in self.held:
            account.leaked += 1
            self.ledger.leaked.add(f"{address} is held out as {self.held[code]}")
            reason = f"is also held out ({self.held[code]})"
            self.problems.add(account, address, reason, row.value)
            return
        elif (first := self.seen.setdefault(code, address)) is not address:
            self.ledger.duplicates.add(f"{address} equals {first}")
        out = given or code < self.limit
        if any(map(self._holds_control, _texts(record))):
            self.ledger.control_text.add(address)
        side = self.asked if out else self.train
        if side.source != found.source:
            self._send(side)
            side.source = found.source
        side.examples.append(Example(address, record))
        if len(side.examples) == CHUNK:
            self._send(side)

    def _require_reasonable(self, record: Record) -> None:
        chars = len(record.text) + sum(len(turn.content) for turn in record.turns)
        if chars > MAX_ROW_CHARS and (record.turns or self.recipe.data.over_length != "split"):
            raise records.RowError(
                f"one row of {chars:,} characters; up to {MAX_ROW_CHARS:,} are read. Is it several rows "
                "in one? A long text can be cut with data.over_length: split"
            )

    def _holds_control(self, content: str) -> bool:
        """Whether somebody typed one of the tokenizer's own tokens, which becomes a real one."""
        return (
            self.control is not None
            and any(char in content for char in self.first_chars)
            and self.control.search(content) is not None
        )

    def _send(self, side: Side) -> None:
        """Render a side's rows and have them tokenized while the next ones are read."""
        given = side.held_out and self.recipe.data.held_out is not None
        account = self.asked_account if given else self.ledger.sources[side.source]
        chunk = Chunk(side, side.source, account)
        spelled = []
        self.renderer.expect([example.record for example in side.examples])
        for example in side.examples:
            try:
                spelled.append(self.renderer.spell(example.record))
                chunk.examples.append(example)
            except DataError as error:
                self._refuse(chunk, example, error)
        side.examples = []
        if spelled:
            self.waiting.append((chunk, self.pool.submit(self.renderer.tokenize, spelled)))
        if len(self.waiting) > 2:
            self._receive()

    def _refuse(self, chunk: Chunk, example: Example, error: DataError) -> None:
        value = example.record.to_json()
        self.problems.add(chunk.account, example.address, str(error), value)

    def _receive(self) -> None:
        """Write what has been tokenized, or what the over-length policy leaves of it."""
        chunk, future = self.waiting.popleft()
        learned = not chunk.side.held_out
        kept: list[tuple[Example, Encoded]] = []
        for example, row in zip(chunk.examples, future.result(), strict=True):
            if isinstance(row, DataError):
                self._refuse(chunk, example, row)
                continue
            if learned:
                self.lengths.append(len(row.input_ids))
                self.supervised.append(row.supervised)
                self._sample(example.record)
            kept += [(example, part) for part in self._within_limit(chunk, example, row)]
        if not kept:
            return
        rows, addresses = [row for _, row in kept], [example.address for example, _ in kept]
        if not learned:
            asked = [json.dumps(e.record.to_json(), ensure_ascii=False) for e, _ in kept]
            chunk.side.writer.add(rows, addresses, chunk.source, asked)
            chunk.account.held_out += len(rows)
            for row in rows:
                self.ledger.held_out.add(len(row.input_ids), row.supervised)
            return
        ids = chunk.side.writer.add(rows, addresses, chunk.source)
        for row in rows:
            self._count(row)
        used, counts = np.unique(ids[np.isin(ids, self.special_ids)], return_counts=True)
        for token, count in zip(used.tolist(), counts.tolist(), strict=True):
            entry = self.ledger.special_tokens
            entry[str(token)] = entry.get(str(token), 0) + count

    def _within_limit(self, chunk: Chunk, example: Example, row: Encoded) -> Sequence[Encoded]:
        limit, over = self.recipe.data.max_length, self.ledger.over_length
        if len(row.input_ids) <= limit:
            return (row,)
        policy = self.recipe.data.over_length
        said = f"{example.address}: {len(row.input_ids):,} tokens"
        text = policy == "split" and not example.record.turns
        if chunk.side.held_out and not text:
            over.held_out.add(said)  # what is asked must be what is answered: never shortened
            return ()
        if chunk.side.held_out:
            return shortening.pieces(row, limit)
        parts: Sequence[Encoded] = ()
        kind = over.dropped
        if text:
            parts, kind = shortening.pieces(row, limit), over.split
        elif policy == "split":
            said += " (only plain texts are split)"
        elif policy == "truncate":
            shorter = shortening.shortened(self.renderer, example.record, limit)
            if shorter is None:
                said += " (its last answer leaves no room to shorten)"
            else:
                parts, kind = (shorter,), over.shortened
        chunk.account.over_length += 1
        kind.add(said)
        if kind is not over.split:
            over.tokens_lost += len(row.input_ids) - sum(len(p.input_ids) for p in parts)
            over.supervised_lost += max(0, row.supervised - sum(p.supervised for p in parts))
        return parts

    def _count(self, row: Encoded) -> None:
        spoken = [answer for answer in row.answers if answer.spoken]
        for number, answer in enumerate(spoken, start=1):
            self.ledger.count_turn(number, answer.end - answer.start, answer.trains)

    def _sample(self, record: Record) -> None:
        """Rows to try parity on: the first ones, half of them conversations of several answers."""
        several = sum(turn.role == "assistant" for turn in record.turns) > 1
        room = PARITY_ROWS if several else PARITY_ROWS // 2
        if record.turns and len(self.sample) < room:
            self.sample.append(record)

    def _finish(self, trained: table.Writer, asked: table.Writer) -> None:
        self.problems.require_none(self.ledger.rows_read + self.asked_account.rows)
        over = self.ledger.over_length
        largest = max(trained.largest_token, asked.largest_token)
        if largest >= self.vocab_size:
            raise DataError(
                f"the tokenizer gives token {largest}, but the model's embedding has "
                f"{self.vocab_size:,} rows. The tokenizer belongs to another model."
            )
        if not self.learns:
            rundir.write_json(self.folder / "ledger.json", self.ledger.to_json())
            return
        if not self.lengths:
            usable = self.ledger.rows_read - self.ledger.rejected.count
            raise DataError(
                f"data.train holds {self.ledger.rows_read:,} rows, of which {usable:,} can be used, and "
                "all of those are held out. Bring more rows or lower data.held_out_fraction."
            )
        over.supervised_before = sum(self.supervised)
        over.length_that_keeps = ledger.length_that_keeps(
            zip(self.lengths, self.supervised, strict=True),
            1 - self.recipe.data.max_lost_fraction,
        )
        pairs = zip(self.lengths, self.supervised, strict=True)
        kept = sum(trains for length, trains in pairs if length <= over.length_that_keeps)
        over.share_it_keeps = kept / over.supervised_before
        self.ledger.parity = parity.report(self.renderer, self.sample)
        self._note(sum(bool(record.tools) for record in self.sample))
        rundir.write_json(self.folder / "ledger.json", self.ledger.to_json())

    def _note(self, with_tools: int) -> None:
        notes, account = self.ledger.notes, self.ledger
        if account.duplicates.count > 0.01 * account.rows_read:
            count = account.duplicates.count
            said = ledger.counted(
                count, "is a duplicate; it is kept", "are duplicates; they are kept"
            )
            notes.append(said)
        if account.control_text.count:
            who = ledger.counted(account.control_text.count, "holds", "hold")
            notes.append(
                f"{who} one of the tokenizer's own tokens as text, which the model reads as the token "
                f"(first: {account.control_text.first[0]})"
            )
        for name, count in self.templates.items():
            notes.append(
                f"{ledger.counted(count, 'brings', 'bring')} {name!r}, which is not read: no row chooses "
                "its template; data.chat_template names one for all"
            )
        if with_tools and not any(
            str(tool["function"]["name"]) in self.renderer.spell(record).text
            for record in self.sample
            for tool in record.tools
        ):
            notes.append("the chat template does not show the rows' tools to the model")
        for difference, rows in self.ledger.parity["differences"].items():
            notes.append(f"training and serving differ in {rows} of "
                         f"{self.ledger.parity['checked']} rows tried: {difference}")  # fmt: skip


def _texts(record: Record) -> Iterator[str]:
    """Everything of a record that the tokenizer is given, as far as the row itself says it."""
    yield record.text
    for turn in record.turns:
        yield turn.content
        if turn.fields:
            yield json.dumps(turn.fields, ensure_ascii=False)
    if record.tools:
        yield json.dumps(record.tools, ensure_ascii=False)


@dataclass
class Side:
    """Rows to train on, or rows held out, waiting to be rendered."""

    writer: table.Writer
    held_out: bool
    source: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass
class Chunk:
    """Rendered rows of one source that the tokenizer works on."""

    side: Side
    source: int
    account: Account
    examples: list[Example] = field(default_factory=list)
