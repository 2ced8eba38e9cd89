"""What the model answers, held against what it should have answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora import generation
from qlora.data import Example
from qlora.generation import Answer, Sampling
from qlora.rendering import Renderer
from qlora.settings import Recipe


@dataclass(frozen=True)
class Answered:
    """Answers to some held-out rows and how many were right."""

    examples: list[Example]
    answers: list[Answer]
    right: list[bool]

    @property
    def exact_match(self) -> float:
        return sum(self.right) / len(self.right) if self.right else 0.0

    @property
    def expected(self) -> list[str]:
        """What should have been answered."""
        return [example.record.turns[-1].content for example in self.examples]

    @property
    def stop_rate(self) -> float:
        """Share of answers that end by themselves; far below 1, the end of turn was not learned."""
        return sum(a.stopped for a in self.answers) / len(self.answers) if self.answers else 0.0


def answer(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    recipe: Recipe,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda starts, _: starts,
) -> Answered:
    """Let the model answer the last turn of each example greedily, and compare.

    The first ``eval.generate`` examples are asked; plain texts have no question and are passed over.
    """
    asked = [e for e in examples if e.record.turns][: recipe.eval.generate]
    answers = generation.answer_all(
        model,
        renderer.tok,
        [renderer.prompt_ids(example.record) for example in asked],
        Sampling(max_new_tokens=recipe.eval.max_new_tokens),
        recipe.eval.batch_size,
        progress,
    )
    answered = Answered(asked, answers, [])
    right = [
        is_right(want, got.text, recipe.eval.exact_match)
        for want, got in zip(answered.expected, answers, strict=True)
    ]
    return replace(answered, right=right)


def is_right(expected: str, answer: str, fields: Sequence[str]) -> bool:
    """Whether an answer equals the expected one: as text, or in the named fields of its JSON object.

    An answer that is not one strict JSON object with these fields is wrong, whatever it contains.

    >>> is_right('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', ["a"])
    True
    >>> is_right('{"a": 1}', 'Sure! {"a": 1}', ["a"])
    False
    """
    if not fields:
        return expected.strip() == answer.strip()
    want, got = _json_object(expected), _json_object(answer)
    if want is None or got is None:
        return False
    return all(name in want and name in got and want[name] == got[name] for name in fields)


@dataclass(frozen=True)
class Fields:
    """How answers agree with expected JSON objects, field by field.

    Attributes:
        rows: Which of the answers should be a JSON object, by their places.
        valid: Whether each of those is one.
        right: Of each of those, the share of its expected fields that are right; 0 where it is none.
        by_field: Of each field, in how many answers it is right, and in how many rows it is expected.
    """

    rows: list[int]
    valid: list[bool]
    right: list[float]
    by_field: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        """Of all fields that are expected in all rows, every row alike."""
        return sum(self.right) / len(self.right)

    @property
    def valid_share(self) -> float:
        return sum(self.valid) / len(self.valid)


def compare_fields(
    expected: Sequence[str], answers: Sequence[str], fields: Sequence[str] = ()
) -> Fields | None:
    """Field-level agreement; None where no expected answer is a JSON object with a field.

    Args:
        expected: What should have been answered.
        answers: What was, in the same order.
        fields: Which to look at; all that the expected object has, where none is named.

    >>> found = compare_fields(['{"a": 1, "b": 2}', "Hello"], ['{"a": 1, "b": 3}', "Hello"])
    >>> found.by_field, found.share
    ({'a': (1, 1), 'b': (0, 1)}, 0.5)
    """
    rows: list[int] = []
    valid: list[bool] = []
    shares: list[float] = []
    by_field: dict[str, tuple[int, int]] = {}
    for index, (meant, said) in enumerate(zip(expected, answers, strict=True)):
        want = _json_object(meant)
        names = [name for name in (fields or want or ()) if want is not None and name in want]
        if want is None or not names:
            continue
        got = _json_object(said)
        right = [got is not None and name in got and got[name] == want[name] for name in names]
        for name, hit in zip(names, right, strict=True):
            hits, of = by_field.get(name, (0, 0))
            by_field[name] = (hits + hit, of + 1)
        rows.append(index)
        valid.append(got is not None)
        shares.append(sum(right) / len(names))
    return Fields(rows, valid, shares, by_field) if rows else None


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
