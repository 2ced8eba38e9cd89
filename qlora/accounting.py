"""A ledger told in sections: sources, what was left out, totals, lengths, packing, serving."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qlora import data, ledger
from qlora.ledger import Ledger
from qlora.page import Bars, Block, Grid, Listing, Section
from qlora.settings import Recipe

LISTED = 20  # addresses shown of each kind
TURNS = 12  # assistant turns with a line of their own


def sections(
    recipe: Recipe, account: Ledger, lengths: Sequence[int], tok: Any, pad_note: str, rejected: str
) -> list[Section]:
    """Everything the ledger says.

    Args:
        recipe: What was asked for.
        account: Its ledger.
        lengths: Tokens of each row that trains, ascending.
        tok: What made them.
        pad_note: A sentence about the pad token, or nothing.
        rejected: Where the rejected rows lie, if anywhere.
    """
    return [
        Section("sources", _sources(account)),
        Section("left out, or worth a look", _left_out(account, rejected)),
        Section("totals", _totals(account)),
        Section("lengths of the rows that train, in tokens", _lengths(account, lengths)),
        Section("packing", _packing(recipe, account)),
        Section("training beside serving", _parity(account, tok, pad_note)),
    ]


def recorded(account: Ledger) -> list[Block]:
    """What a run's ledger says where neither its rows nor its tokenizer are at hand."""
    parity = account.parity.get("checked", 0)
    differ = sum(account.parity.get("differences", {}).values())
    asked = f"{parity:,} rows were asked as `qlora chat` asks: {differ:,} differ from training"
    return [
        *_sources(account),
        *_left_out(account, "rejected.jsonl of the run" if account.rejected.count else ""),
        *_totals(account),
        *(
            [Listing("", ["rows that train, by their tokens"]), _bars(account)]
            if any(account.lengths.values())
            else []
        ),
        Listing("", [asked] * bool(parity)),
        *([Listing("notes", account.notes)] if account.notes else []),
    ]


def share(part: float, whole: float) -> str:
    """A part as people read it.

    >>> share(1, 8), share(0, 0)
    ('12.5%', '-')
    """
    return f"{part / whole:.1%}" if whole else "-"


def _sources(account: Ledger) -> list[Block]:
    how = "through the chat template" if account.rendering == "chat" else "as plain text"
    supervised = sum(one.supervised_tokens for one in account.sources)
    lines: list[tuple[str, list[str]]] = [
        ("format", [one.format or "-" for one in account.sources]),
        ("", ["detected" if one.detected else "asked for" for one in account.sources]),
    ]
    for name, field in (
        ("rows read", "rows"), ("rejected", "rejected"), ("  of them leaked", "leaked"),
        ("held out", "held_out"), ("over-long", "over_length"), ("not drawn (weights)", "not_drawn"),
        ("rows that train", "trained"), ("tokens", "tokens"), ("supervised", "supervised_tokens"),
    ):  # fmt: skip
        lines.append((name, [f"{getattr(one, field):,}" for one in account.sources]))
    shares = [(one.supervised_tokens, one.tokens) for one in account.sources]
    lines.append(("  of its tokens", [share(*pair) for pair in shares]))
    lines.append(("  of all supervised", [share(pair[0], supervised) for pair in shares]))
    return [
        Listing(
            "",
            [
                f"rendered {how}",
                f"data.loss_on: {account.loss_on}; data.max_length: {account.max_length:,}",
            ],
        ),
        Grid([one.name for one in account.sources], [(name, *cells) for name, cells in lines]),
    ]


def _listed(what: str, listing: ledger.Listing) -> list[Block]:
    if not listing.count:
        return []
    lines = listing.first[:LISTED]
    more = listing.count - len(lines)
    return [
        Listing(f"{listing.count:,} {what}", [*lines, *([f"... and {more:,} more"] * (more > 0))])
    ]


def _left_out(account: Ledger, rejected: str) -> list[Block]:
    over = account.over_length
    leaked = f", {account.leaked.count:,} of them leaked" if account.leaked.count else ""
    where = f"; they lie in {rejected}" if rejected else ""
    long = over.dropped.count + over.shortened.count + over.split.count
    blocks = [
        *_listed(f"rejected{leaked}{where}", account.rejected),
        *_listed(f"duplicate{'s' * (account.duplicates.count != 1)}, kept", account.duplicates),
    ]
    if long:
        lost = (
            f"{over.tokens_lost:,} tokens lost, {over.supervised_lost:,} of them supervised: "
            f"{over.share_lost:.1%} of all supervised tokens"
        )
        blocks.append(
            Listing(
                f"{long:,} longer than data.max_length, by data.over_length {over.policy}: {lost}"
            )
        )
        for what in ("dropped", "shortened", "split"):
            blocks += _listed(f"{what} for their length", getattr(over, what))
    blocks += _listed("held out and longer than data.max_length, dropped", over.held_out)
    one = account.control_text.count == 1
    blocks += _listed(
        f"{'holds' if one else 'hold'} one of the tokenizer's own tokens as text",
        account.control_text,
    )
    return blocks or [Listing("", ["nothing: every row trains or is held out"])]


def _totals(account: Ledger) -> list[Block]:
    both = [("train", account.train), ("held out", account.held_out)]
    sides = [
        (name, f"{side.rows:,}", f"{side.tokens:,}", f"{side.supervised_tokens:,}",
         share(side.supervised_tokens, side.tokens), f"{side.longest:,}")
        for name, side in both
    ]  # fmt: skip
    turns = sorted((int(number), counts) for number, counts in account.turns.items())
    lines = [(f"assistant turn {number}", counts) for number, counts in turns[:TURNS]]
    if len(turns) > TURNS:
        later = [sum(column) for column in zip(*(c for _, c in turns[TURNS:]), strict=True)]
        lines.append((f"assistant turns {turns[TURNS][0]} to {turns[-1][0]}", later))
    cells = [(name, f"{n:,}", f"{t:,}", f"{s:,}", share(s, t)) for name, (n, t, s) in lines]
    drawn = any(one.not_drawn for one in account.sources)
    if not drawn:
        rest = account.train.tokens - sum(counts[1] for _, counts in lines)
        learned = max(0, account.train.supervised_tokens - sum(counts[2] for _, counts in lines))
        cells.append(("the rest", "", f"{rest:,}", f"{learned:,}", share(learned, rest)))
    note = (
        "by turn, of all rows before the draw"
        if drawn
        else "by turn; the rest is prompts, template tokens and plain texts"
    )
    return [
        Grid(["rows", "tokens", "supervised", "share", "longest"], sides),
        Listing("", [note]),
        Grid(["turns", "tokens", "supervised", "share"], cells),
    ]


def _lengths(account: Ledger, lengths: Sequence[int]) -> list[Block]:
    if not lengths:
        return [Listing("", ["none"])]
    median, most, nearly = (ledger.quantile(lengths, part) for part in (0.5, 0.9, 0.99))
    said = f"median {median:,}; 90% have at most {most:,}, 99% at most {nearly:,}; longest {lengths[-1]:,}"
    return [_bars(account), Listing("", [said])]


def _bars(account: Ledger) -> Bars:
    edges = [0, *(int(edge) for edge in account.lengths)]
    names = [f"{low + 1:,}-{high:,}" for low, high in pairwise(edges)]
    return Bars(list(zip(names, account.lengths.values(), strict=True)))


def _packing(recipe: Recipe, account: Ledger) -> list[Block]:
    asked = recipe.train
    size = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    steps = -(-account.train.rows // size)
    tried = min(steps, data.MEASURED_STEPS)
    rows = [
        (name, f"{facts['fill']:.1%}", f"{facts['useful']:.1%}", f"{facts['passes']:g}",
         f"{1 / facts['useful']:.2f}" if facts["useful"] else "-")
        for name, facts in account.packing.items()
    ]  # fmt: skip
    head = ["fill", "useful", "passes a step", "computed tokens per useful token"]
    packing = str(recipe.data.packing).lower()
    return [
        Listing(
            "",
            [
                f"data.packing: {packing}; tried on {tried:,} of {steps:,} steps of an epoch "
                f"(at most {data.MEASURED_STEPS}), {size:,} rows a step"
            ],
        ),
        Grid(head, rows),
    ]


def _parity(account: Ledger, tok: Any, pad_note: str) -> list[Block]:
    checked, found = account.parity.get("checked", 0), account.parity.get("differences", {})
    if not checked:
        said = "no row was tried: none of them has a turn that could be asked for"
    elif not found:
        said = f"{checked:,} rows were asked as `qlora chat` asks: the same tokens as in training"
    else:
        said = f"{checked:,} rows were asked as `qlora chat` asks, and differ from training"
    blocks: list[Block] = [
        Listing(said, [f"{differ:,} rows: {difference}" for difference, differ in found.items()])
    ]
    if account.special_tokens:
        counted = sorted(account.special_tokens.items(), key=lambda item: (-item[1], int(item[0])))
        rows = [(tok.convert_ids_to_tokens(int(i)) or "?", i, f"{n:,}") for i, n in counted]
        drawn = any(one.not_drawn for one in account.sources)
        told = "special tokens in use" + (", of all rows before the draw" if drawn else "")
        blocks += [Listing("", [told]), Grid(["id", "count"], rows)]
    notes = [n for n in account.notes if not n.endswith(tuple(found))] if found else account.notes
    notes = [*notes, *([pad_note] if pad_note else [])]
    return [*blocks, Listing("notes", notes)] if notes else blocks
