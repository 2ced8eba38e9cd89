"""Rows in any of the field's five shapes, as one form: who said what, and what is to be learned.

==================  =============================================================
format              columns
==================  =============================================================
messages            messages: [{role, content}, ...]
sharegpt            conversations: [{from, value}, ...], optional system
prompt_completion   prompt, completion (texts)
alpaca              instruction, output, optional input and system
text                text
==================  =============================================================

Pure Python: no tokenizer, no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import DataError

Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": (),
    "sharegpt": ("system",),
    "prompt_completion": (),
    "alpaca": ("input", "system"),
    "text": (),
}
COLUMNS = sorted({column for form in REQUIRED for column in REQUIRED[form] + OPTIONAL[form]})

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message. ``role`` is system, user or assistant; what the assistant says is learned."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One example: a conversation that ends with the assistant, or (``turns`` empty) a plain text."""

    turns: tuple[Turn, ...]
    text: str = ""
    plain_prompt: str | None = None  # the text before the answer where there is no chat template

    @property
    def needs_template(self) -> bool:
        """Whether only a chat template can render it: it is a conversation, not a question."""
        return bool(self.turns) and self.plain_prompt is None


class RowError(ValueError):
    """What is wrong with one row, without its address and without its content."""


def detect(columns: Iterable[str], origin: str) -> Format:
    """The one format whose required columns are all there.

    Raises:
        DataError: None fits (says how to map columns), or several do (lists them).

    >>> detect(["instruction", "input", "output"], "demo.json")
    'alpaca'
    """
    found = set(columns)
    fits = [name for name, needed in REQUIRED.items() if found.issuperset(needed)]
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(sorted(found)) or "none"
    if not fits:
        shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in REQUIRED.items())
        raise DataError(
            f"{origin}: the columns ({listed}) fit no known format.\n"
            f"  Known formats: {shapes}.\n"
            "  Map yours in the recipe, for example data.columns: {prompt: question, completion: answer}."
        )
    raise DataError(
        f"{origin}: the columns ({listed}) fit several formats: {', '.join(fits)}.\n"
        "  Say which one you mean in the recipe: data.format."
    )


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; ``columns`` maps ours to theirs. Others pass unchanged."""
    theirs = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in theirs}
    return kept | {ours: row[name] for ours, name in columns.items() if name in row}


def parse(row: Mapping[str, Any], form: Format) -> Record:
    """One row as a record.

    Raises:
        RowError: A column is missing, is not text, an answer is empty, a role is unknown, or the
            turns do not alternate and end with the assistant.
    """
    for column in REQUIRED[form]:
        if column not in row:
            raise RowError(f"column {column!r} is missing")
    if form == "text":
        return Record((), _text(row["text"], "text"))
    if form == "messages":
        return _conversation(_turns(row["messages"], "messages", "role", "content"))
    if form == "sharegpt":
        turns = _turns(row["conversations"], "conversations", "from", "value")
        return _conversation([*_system(row), *(Turn(_role(t.role), t.content) for t in turns)])
    if form == "alpaca":
        instruction = _text(row["instruction"], "instruction")
        given = _text(row["input"], "input") if str(row.get("input") or "").strip() else ""
        question = f"{instruction}\n\n{given}" if given else instruction
        answer = Turn("assistant", _text(row["output"], "output"))
        system = _system(row)
        prompt = None if system else alpaca_prompt(instruction, given)
        return _conversation([*system, Turn("user", question), answer], prompt)
    question = _text(row["prompt"], "prompt")
    answer = Turn("assistant", _text(row["completion"], "completion"))
    return _conversation([Turn("user", question), answer], question)


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """What stands before the answer of an alpaca row where there is no chat template.

    The headings of the data set's own prompt, without its preamble, so that the answer begins on a
    line of its own.
    """
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def fingerprint(record: Record) -> str:
    """SHA-256 of the content. Equal rows have equal fingerprints, in any file and any order."""
    turns = [[turn.role, turn.content] for turn in record.turns]
    content = turns if turns else record.text
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def _turns(value: object, column: str, role: str, content: str) -> list[Turn]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column!r} must be a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or role not in turn or content not in turn:
            raise RowError(f"turn {number} of {column!r} has no {role!r} and {content!r}")
        where = f"turn {number} of {column!r}"
        turns.append(Turn(_text(turn[role], f"{where}, {role!r}"), _text(turn[content], where)))
    return turns


def _conversation(turns: list[Turn], plain_prompt: str | None = None) -> Record:
    if not turns:
        raise RowError("there are no turns")
    roles = [turn.role for turn in turns]
    for number, role in enumerate(roles, start=1):
        if role not in ("system", "user", "assistant"):
            raise RowError(
                f"turn {number} has the role {role!r}; known are system, user, assistant"
            )
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[-1] != "assistant":
        raise RowError("there is no answer: the last turn is not the assistant's")
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise RowError(
                f"user and assistant do not alternate (turn {number + 1 + len(roles) - len(spoken)} "
                f"is {role!r}); a system turn may only come first"
            )
    return Record(tuple(turns), plain_prompt=plain_prompt)


def _system(row: Mapping[str, Any]) -> list[Turn]:
    return (
        [Turn("system", _text(row["system"], "system"))]
        if str(row.get("system") or "").strip()
        else []
    )


def _role(name: str) -> str:
    if name not in SHAREGPT_ROLES:
        raise RowError(f"the role {name!r} is unknown; known are {', '.join(SHAREGPT_ROLES)}")
    return SHAREGPT_ROLES[name]


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, found {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half of a surrogate pair, which is not valid text") from None
    return value
