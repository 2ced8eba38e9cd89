"""Whether serving agrees with training: the same conversation, asked as ``qlora chat`` would ask it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora.records import Record
from qlora.rendering import Renderer


def differences(renderer: Renderer, record: Record) -> list[str]:
    """In what ways serving this conversation would differ from training it; none is as it should be.

    Every assistant turn is asked for, and the tokens that ask are held against the beginning of the
    training row: equal, one BOS, the end-of-turn token last, earlier answers in the form they have when
    they are the last.
    """
    found = []
    tok = renderer.tok
    row = renderer.encode(record)
    if tok.bos_token_id is not None and row.input_ids[:2] == [tok.bos_token_id] * 2:
        found.append("the row begins with two BOS tokens")
    for answer in row.answers:
        if not answer.spoken:
            continue
        until = replace(record, turns=record.turns[: answer.turn + 1])
        asked = renderer.prompt_ids(until)
        if row.input_ids[: len(asked)] != asked:
            found.append(
                "the prompt that asks for an answer has other tokens than the row it trains in"
            )
        if row.input_ids[answer.end - 1] != renderer.closing:
            found.append("an answer does not end with the end-of-turn token")
        if renderer.chat and answer.trains and answer.turn < len(record.turns) - 1:
            alone = renderer.encode(replace(until, prompt_turns=0)).input_ids
            if row.input_ids[: answer.end] != alone[: answer.end]:
                found.append(
                    "an earlier answer trains in another form than it has as the last one (a thinking "
                    "block?); data.loss_on: last_assistant trains only the last"
                )
    return list(dict.fromkeys(found))


def report(renderer: Renderer, records: Sequence[Record]) -> dict[str, Any]:
    """``checked``: how many rows; ``differences``: each difference and in how many of them."""
    counted = Counter(found for record in records for found in differences(renderer, record))
    return {"checked": len(records), "differences": dict(counted)}
