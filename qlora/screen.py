"""What a person sees: the lines of the story, and bars with the time left."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import PurePath
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


class Screen:
    """Lines and progress bars with time left; on a terminal or in a notebook live, else as lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Without ipywidgets rich can only print a notebook's bar over and over: lines are better.
        widgets = importlib.util.find_spec("ipywidgets") is not None
        self.live = console.is_terminal or (console.is_jupyter and widgets)

    def say(self, label: str, text: str) -> None:
        """One line of the story, under its label."""
        self.console.print(f"[bold]{label:<9}[/bold] {text}", highlight=False, soft_wrap=True)

    def track(self, items: Sequence[T], label: str) -> Iterable[T]:
        """The items, with a bar while they are worked through."""
        if not self.live or len(items) < 2:
            yield from items
            return
        with self.bar() as bar:
            task = bar.add_task(label, total=len(items), facts="")
            for item in items:
                yield item
                bar.advance(task)

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
        for source in ledger.sources:
            name = PurePath(source["name"]).name
            self.say("data", f"{name}: {source['rows']:,} rows, read as {source['format']}")
        trained = ledger.train["supervised_tokens"] / max(1, ledger.train["tokens"])
        how = "through the chat template" if ledger.rendering == "chat" else "as plain text"
        self.say(
            "rows",
            f"{ledger.train['rows']:,} train, {ledger.held_out['rows']:,} held out, rendered {how}; "
            f"{ledger.train['tokens']:,} tokens, {trained:.0%} of them train; "
            f"the longest row has {ledger.train['longest']:,}",
        )
        for count, what in (
            (len(ledger.too_long), "longer than data.max_length, dropped"),
            (ledger.duplicates, "duplicates, kept"),
            (ledger.leaked, "also held out, dropped from training"),
        ):
            if count:
                self.say("rows", f"{count:,} {what}")
        if pad_note:
            self.say("padding", pad_note)
        first = prepared.train[0]
        text = Text("example   ", style="bold")
        shown = zip(first["input_ids"][:400], first["labels"], strict=False)
        for trained, stretch in groupby(shown, key=lambda pair: pair[1] != IGNORED):
            style = "green not bold" if trained else "dim not bold"
            text.append(tok.decode([token for token, _ in stretch]), style=style)
        self.console.print(text, soft_wrap=True)


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
