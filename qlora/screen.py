"""What a person sees: the lines of the story, and bars with the time left."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Mapping, Sized
from itertools import groupby
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qlora.data import Prepared
from qlora.rendering import IGNORED

T = TypeVar("T")
GIB = 2**30

# Controls as their pictures; what reorders, hides or breaks text as its code.
_SHOWN = {code: chr(0x2400 + code) for code in range(32)} | {127: "␡"}
_SHOWN |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_CODES = [
    0x061C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF,
    *range(0xD800, 0xE000),
]  # fmt: skip
_SHOWN |= {code: f"\\u{code:04x}" for code in _CODES}
_SHOWN |= {code: f"\\U{code:08x}" for code in range(0xE0000, 0xE0080)}
_OF_ROWS = {code: shown for code, shown in _SHOWN.items() if chr(code) not in "\n\t"}


class Screen:
    """Lines and progress bars with time left; on a terminal or in a notebook live, else as lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Without ipywidgets rich can only print a notebook's bar over and over: lines are better.
        widgets = importlib.util.find_spec("ipywidgets") is not None
        self.live = console.is_terminal or (console.is_jupyter and widgets)

    def say(self, label: str, text: str) -> None:
        """One line of the story, under its label."""
        line = Text.assemble((f"{label:<9}", "bold"), " ", flat(text))
        self.console.print(line, soft_wrap=True)

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
        """The items, with a bar and the time left while they are worked through.

        Where nothing can be redrawn, a line every half minute. ``total`` is their number, where they
        cannot be counted.
        """
        if total is None and isinstance(items, Sized):
            total = len(items)
        if total is not None and total < 2:
            yield from items
            return
        if self.live:
            with self.bar() as bar:
                task = bar.add_task(label, total=total, facts="")
                for done, item in enumerate(items, start=1):
                    yield item
                    if done % 64 == 0 or total is None or total < 10_000:
                        bar.update(task, completed=done)
            return
        began = said = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - said > 30:
                said = now
                left = f"  {duration((now - began) / done * (total - done))} left" if total else ""
                of = f"/{total:,}" if total else ""
                self.say(label, f"{done:,}{of}{left}")

    def bar(self) -> Progress:
        return Progress(
            TextColumn("[bold]{task.description:<9}[/bold]"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            transient=True,
        )

    def tell_data(self, prepared: Prepared, tok: Any, pad_note: str) -> None:
        """The ledger in a few lines, and the first row with what trains in green."""
        ledger = prepared.ledger
        for account in ledger.sources:
            how = "read as" if account.detected else "asked for as"
            self.say("data", f"{account.name}: {account.rows:,} rows, {how} {account.format}")
        share = ledger.train.supervised_tokens / max(1, ledger.train.tokens)
        how = "through the chat template" if ledger.rendering == "chat" else "as plain text"
        self.say(
            "rows",
            f"{ledger.train.rows:,} train, {ledger.held_out.rows:,} held out, rendered {how}; "
            f"{ledger.train.tokens:,} tokens, {share:.0%} of them train; "
            f"the longest row has {ledger.train.longest:,}"
            + (" (tokenized before, from the cache)" if prepared.from_cache else ""),
        )
        for count, what in (
            (ledger.over_length.dropped.count, "longer than data.max_length, dropped"),
            (ledger.over_length.shortened.count, "longer than data.max_length, shortened"),
            (ledger.over_length.split.count, "longer than data.max_length, split"),
            (ledger.duplicates.count, f"duplicate{'s' * (ledger.duplicates.count != 1)}, kept"),
            (ledger.rejected.count, "not usable, left out; they are in rejected.jsonl"),
        ):
            if count:
                self.say("rows", f"{count:,} {what}")
        if prepared.cache_defect:
            self.say(
                "rows", f"made again: those in the cache were damaged ({prepared.cache_defect})"
            )
        for note in ledger.notes:
            self.say("note", note)
        if pad_note:
            self.say("padding", pad_note)
        text = Text("example   ", style="bold")
        text.append_text(coloured(tok, prepared.train[0], 400))
        self.console.print(text, soft_wrap=True)


def visible(text: str) -> str:
    """A row's text with everything a terminal would obey made visible; lines and tabs stay.

    >>> visible("a\\x1b[31mb")
    'a␛[31mb'
    """
    return text.translate(_OF_ROWS)


def flat(text: str) -> str:
    """:func:`visible`, in one line."""
    return text.translate(_SHOWN)


def stretches(tok: Any, row: Mapping[str, Any], limit: int | None = None) -> list[tuple[str, bool]]:
    """A row's text in pieces that train and pieces that do not, of its first ``limit`` tokens.

    Each piece is what it adds to the text before it: on its own a piece may lose a leading space.
    """
    ids = row["input_ids"][:limit]
    pieces, before, end = [], "", 0
    for trains, group in groupby(row["labels"][:limit], key=lambda label: label != IGNORED):
        end += len(list(group))
        text = tok.decode(ids[:end])
        pieces.append((text.removeprefix(before), trains))
        before = text
    return pieces


def coloured(tok: Any, row: Mapping[str, Any], limit: int | None = None) -> Text:
    """A row's text: green where it trains, dim where it does not."""
    text = Text()
    for piece, trains in stretches(tok, row, limit):
        text.append(visible(piece), style="green not bold" if trains else "dim not bold")
    return text


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(75), duration(3.2), duration(7300)
    ('1m15s', '3s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
