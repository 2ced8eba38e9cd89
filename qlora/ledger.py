"""What became of every row: read, refused, held out, too long, tokens, and how many of them train.

Plain numbers and addresses, no row content. A run keeps its ledger as ``data.json``.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LISTED = 10_000  # addresses kept of each kind; the counts are always whole


@dataclass
class Account:
    """One source's share of the ledger. ``rows`` are all rows read; the others are parts of them."""

    name: str
    format: str = ""
    detected: bool = False
    rows: int = 0
    rejected: int = 0
    leaked: int = 0
    held_out: int = 0
    over_length: int = 0
    not_drawn: int = 0
    trained: int = 0
    tokens: int = 0
    supervised_tokens: int = 0


@dataclass
class Totals:
    """One side of the split. ``supervised_tokens`` are those a loss is taken over."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def add(self, tokens: int, supervised: int) -> None:
        self.rows += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self.longest = max(self.longest, tokens)


@dataclass
class Listing:
    """Rows of one kind: how many, and the first of them by address with what there is to say."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(line)


@dataclass
class OverLength:
    """Rows longer than ``max_length``, and what they cost."""

    policy: str = "drop"
    dropped: Listing = field(default_factory=Listing)
    shortened: Listing = field(default_factory=Listing)
    split: Listing = field(default_factory=Listing)
    held_out: Listing = field(default_factory=Listing)  # held-out rows, which are dropped
    tokens_lost: int = 0
    supervised_lost: int = 0
    supervised_before: int = 0
    length_that_keeps: int = 0  # the smallest max_length within data.max_lost_fraction
    share_it_keeps: float = 0.0

    @property
    def share_lost(self) -> float:
        """Of the supervised tokens that the rows had."""
        return self.supervised_lost / max(1, self.supervised_before)


@dataclass
class Ledger:
    """The whole account of a data preparation; JSON both ways."""

    rendering: str = ""
    loss_on: str = ""
    max_length: int = 0
    vocabulary: str = ""  # the digest of the tokenizer's tokens and ids; empty in older ledgers
    sources: list[Account] = field(default_factory=list)
    rejected: Listing = field(default_factory=Listing)
    duplicates: Listing = field(default_factory=Listing)
    leaked: Listing = field(default_factory=Listing)
    over_length: OverLength = field(default_factory=OverLength)
    train: Totals = field(default_factory=Totals)
    held_out: Totals = field(default_factory=Totals)
    # Per n-th assistant turn of a conversation: [turns, tokens, tokens that train].
    turns: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    special_tokens: dict[str, int] = field(default_factory=dict)
    control_text: Listing = field(default_factory=Listing)
    packing: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rows_read(self) -> int:
        """Rows of all training sources."""
        return sum(account.rows for account in self.sources)

    def count_turn(self, number: int, tokens: int, trains: bool) -> None:
        """Add one assistant turn, the ``number``-th of its conversation, counted from 1."""
        entry = self.turns.setdefault(str(number), [0, 0, 0])
        entry[0] += 1
        entry[1] += tokens
        entry[2] += tokens if trains else 0

    def to_json(self) -> dict[str, Any]:
        """JSON for ``data.json``."""
        return dataclasses.asdict(self) | {"rows_read": self.rows_read}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The ledger that :meth:`to_json` wrote.

        Raises:
            TypeError, KeyError: It is of another version.
        """
        over = dict(value["over_length"])
        for kind in ("dropped", "shortened", "split", "held_out"):
            over[kind] = Listing(**over[kind])
        listings = ("rejected", "duplicates", "leaked", "control_text")
        return cls(
            **{k: v for k, v in value.items() if k != "rows_read"}
            | {"sources": [Account(**account) for account in value["sources"]]}
            | {"train": Totals(**value["train"]), "held_out": Totals(**value["held_out"])}
            | {name: Listing(**value[name]) for name in listings}
            | {"over_length": OverLength(**over)}
        )


def counted(rows: int, one: str, more: str) -> str:
    """A number of rows with what is said of one row, or of several.

    >>> counted(1, "is a duplicate", "are duplicates"), counted(2000, "is a duplicate", "are duplicates")
    ('1 row is a duplicate', '2,000 rows are duplicates')
    """
    return f"1 row {one}" if rows == 1 else f"{rows:,} rows {more}"


def length_that_keeps(rows: Iterable[tuple[int, int]], share: float) -> int:
    """The smallest length at which rows no longer than it hold this share of the supervised tokens.

    Args:
        rows: (tokens, supervised tokens) of each row.
        share: Between 0 and 1.

    >>> length_that_keeps([(10, 5), (20, 5), (900, 1)], 0.9)
    20
    """
    ordered = sorted(rows)
    wanted = share * sum(supervised for _, supervised in ordered)
    kept = 0
    for length, supervised in ordered:
        kept += supervised
        if kept >= wanted:
            return length
    return ordered[-1][0] if ordered else 0


def histogram(lengths: Sequence[int], bars: int = 12) -> dict[str, int]:
    """Rows by length: ``bars`` even steps up to the longest, each named by its upper end.

    >>> histogram([3, 4, 9, 12], bars=3)
    {'4': 2, '8': 0, '12': 2}
    """
    if not lengths:
        return {}
    step = -(-max(lengths) // bars)
    edges = [step * (n + 1) for n in range(-(-max(lengths) // step))]
    counts = [0] * len(edges)
    for length in lengths:
        counts[bisect_left(edges, length)] += 1
    return {str(edge): count for edge, count in zip(edges, counts, strict=True)}


def quantile(lengths: Sequence[int], share: float) -> int:
    """The length that this share of the rows does not exceed, of ascending ``lengths``.

    >>> quantile([1, 2, 3, 40], 0.5)
    2
    """
    return lengths[max(0, -(-int(share * 1000) * len(lengths) // 1000) - 1)] if lengths else 0
