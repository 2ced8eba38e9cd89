"""Rows that are longer than they may be: shortened without losing an answer's end, or cut in pieces."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from qlora.errors import DataError
from qlora.records import Record
from qlora.rendering import Encoded, Renderer

SHORTEST = 32  # characters: a text that would keep less of itself says nothing any more
GAP = "\n...\n"
ATTEMPTS = 12


def shortened(renderer: Renderer, record: Record, limit: int) -> Encoded | None:
    """The record in at most ``limit`` tokens, or None if an answer would have to be cut for it.

    Early exchanges go first; then the longest text that is not an answer loses its middle. A plain text
    keeps its beginning and its end-of-text token.
    """
    row = renderer.encode(record)
    if len(row.input_ids) <= limit:
        return row
    if not record.turns:
        return Encoded([*row.input_ids[: limit - 1], row.input_ids[-1]], ((1, limit),))
    while len(row.input_ids) > limit and (shorter := _without_first_exchange(record)) is not None:
        try:
            row = renderer.encode(shorter)
        except DataError:
            break  # only what would go was to be learned
        record = shorter
    for _ in range(ATTEMPTS):
        excess = len(row.input_ids) - limit
        if excess <= 0:
            return row
        cut = _with_less(record, excess, len(row.input_ids))
        if cut is None:
            return None
        record = cut
        row = renderer.encode(record)
    return None


def pieces(row: Encoded, limit: int) -> list[Encoded]:
    """A plain text as rows of at most ``limit`` tokens: every token once, in order.

    The first token of a later piece is read but not learned, for it has nothing before it.
    """
    edges = [*range(0, len(row.input_ids), limit), len(row.input_ids)]
    if edges[-1] - edges[-2] == 1 and limit > 2:
        edges[-2] -= 1  # a piece of one token would teach nothing
    cut = [row.input_ids[start:end] for start, end in pairwise(edges)]
    return [Encoded(ids, ((1, len(ids)),)) for ids in cut]


def _without_first_exchange(record: Record) -> Record | None:
    """The conversation without its first question and answer, or None if there is only one."""
    users = [i for i, turn in enumerate(record.turns) if turn.role == "user"]
    if len(users) < 2:
        return None
    kept = record.turns[: users[0]] + record.turns[users[1] :]
    gone = users[1] - users[0]
    return replace(record, turns=kept, prompt_turns=max(0, record.prompt_turns - gone))


def _with_less(record: Record, excess: int, tokens: int) -> Record | None:
    if record.plain_prompt is not None:
        prompt = _without_middle(record.plain_prompt, excess, tokens)
        question = record.turns[-2].content if len(record.turns) > 1 else ""
        shorter = _without_middle(question, excess, tokens)
        if prompt is None or shorter is None:
            return None
        asked = replace(record.turns[-2], content=shorter)
        return replace(
            record, plain_prompt=prompt, turns=(*record.turns[:-2], asked, record.turns[-1])
        )
    index = max(
        (i for i, turn in enumerate(record.turns) if turn.role != "assistant"),
        key=lambda i: len(record.turns[i].content),
    )
    turn = record.turns[index]
    middle = _without_middle(turn.content, excess, tokens)
    if middle is None:
        return None
    turns = (*record.turns[:index], replace(turn, content=middle), *record.turns[index + 1 :])
    return replace(record, turns=turns)


def _without_middle(text: str, excess: int, tokens: int) -> str | None:
    """The text without enough of its middle to save ``excess`` of ``tokens``; None if little is left."""
    per_token = max(1.0, len(text) / tokens)
    keep = len(text) - int(excess * per_token) - 2 * len(GAP)
    if keep < SHORTEST:
        return None
    return text[: keep - keep // 2] + GAP + text[len(text) - keep // 2 :]
