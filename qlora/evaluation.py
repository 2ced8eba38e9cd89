"""What the model answers, held against what it should have answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    expected = [example.record.turns[-1].content for example in asked]
    right = [
        is_right(want, got.text, recipe.eval.exact_match)
        for want, got in zip(expected, answers, strict=True)
    ]
    return Answered(asked, answers, right)


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


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
