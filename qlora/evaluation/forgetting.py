"""What tuning cost: the loss on general text that ships with the package, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from qlora import scoring
from qlora.evaluation import interval
from qlora.evaluation.interval import Interval
from qlora.rendering import IGNORED
from qlora.scoring import Progress, RowScore

LONGEST = 1024  # tokens of a passage; what comes after them is not read


@dataclass(frozen=True)
class Passage:
    """A general text: what kind of text it is, and its words."""

    field: str
    text: str


@dataclass(frozen=True)
class Forgetting:
    """The same passages read by a base and by its tuned model.

    Attributes:
        base: Nats a token; None where there is no base to compare with.
        tuned: Of the tuned model, or of the only one.
        bits_per_byte: Of base and tuned: a figure that two tokenizers share.
        interval: Of the difference in nats a token, tuned less base.
        by_field: Base and tuned of every kind of text.
        passages: How many were read.
        tokens: How many of their tokens count.
    """

    base: float | None
    tuned: float
    bits_per_byte: tuple[float | None, float]
    interval: Interval | None
    by_field: dict[str, tuple[float | None, float]]
    passages: int
    tokens: int

    def __str__(self) -> str:
        """One line, with what these passages allow to be said."""
        if self.base is None or self.interval is None:
            return f"{self.tuned:.3f} nats a token, {self.bits_per_byte[1]:.3f} bits a byte"
        found = self.interval
        verdict = found.verdict(lower_is_better=True)
        if verdict == "worse":
            verdict = f"worse: the tuned model lost some of it, most in {self._most()}"
        return (
            f"{self.base:.3f} -> {self.tuned:.3f} nats a token ({found.difference:+.3f}, interval "
            f"{found.low:+.3f} to {found.high:+.3f}): {verdict.replace('rows', 'passages')}"
        )

    def _most(self) -> str:
        rises = {name: tuned - (base or 0.0) for name, (base, tuned) in self.by_field.items()}
        name = max(rises, key=lambda field: rises[field])
        return f"{name} ({rises[name]:+.2f})"

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base, "tuned": self.tuned, "bits_per_byte": list(self.bits_per_byte),
            "difference": self.interval and self.interval.to_json(),
            "by_field": {name: list(pair) for name, pair in self.by_field.items()},
            "passages": self.passages, "tokens": self.tokens,
        }  # fmt: skip


@cache
def passages() -> tuple[Passage, ...]:
    """The general text that ships with the package."""
    file = files("qlora") / "embedded" / "general" / "passages.jsonl"
    return tuple(Passage(**json.loads(line)) for line in file.read_text("utf-8").splitlines())


def tokenized(tok: Any, longest: int = LONGEST) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Every passage as a row whose tokens all count, and how many bytes of text these stand for.

    The first token counts where the tokenizer begins a text with a token of its own; else nothing stands
    before it that could predict it, and its bytes do not count either.
    """
    rows, sizes = [], []
    for passage in passages():
        found = tok(passage.text, return_offsets_mapping=True, verbose=False)
        ids, places = found["input_ids"][:longest], found["offset_mapping"][:longest]
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
        sizes.append(len(passage.text[places[0][1] : max(end for _, end in places)].encode()))
    return rows, sizes


def read(model: Any, tok: Any, progress: Progress, positions: int | None = None) -> list[RowScore]:
    """What a model makes of every passage.

    Args:
        model: As for :func:`qlora.scoring.score`.
        tok: Its tokenizer.
        progress: Shows how far it is.
        positions: That the model has; a longer passage is cut there.
    """
    rows, _ = tokenized(tok, min(LONGEST, positions or LONGEST))
    return scoring.score(model, rows, tok.pad_token_id, progress=progress, label="general")


def compare(
    tok: Any,
    base: Sequence[RowScore] | None,
    tuned: Sequence[RowScore],
    positions: int | None = None,
) -> Forgetting:
    """What :func:`read` gave for a base and its tuned model, side by side; or of one model alone."""
    _, sizes = tokenized(tok, min(LONGEST, positions or LONGEST))
    found = passages()
    mean = scoring.mean(tuned)
    assert mean is not None and len(tuned) == len(found)
    by_field: dict[str, tuple[float | None, float]] = {}
    for name in dict.fromkeys(one.field for one in found):
        own = [index for index, one in enumerate(found) if one.field == name]
        now = scoring.mean([tuned[index] for index in own])
        assert now is not None
        by_field[name] = (base and scoring.mean([base[index] for index in own]), now)
    difference = None
    if base is not None:
        tokens = [one.tokens for one in tuned]
        difference = interval.paired([b.nll for b in base], [t.nll for t in tuned], tokens)
    return Forgetting(
        base=base and scoring.mean(base),
        tuned=mean,
        bits_per_byte=(base and _bits(base, sizes), _bits(tuned, sizes)),
        interval=difference,
        by_field=by_field,
        passages=len(found),
        tokens=sum(one.tokens for one in tuned),
    )


def _bits(scores: Sequence[RowScore], sizes: Sequence[int]) -> float:
    return math.fsum(one.nll for one in scores) / math.log(2) / sum(sizes)
