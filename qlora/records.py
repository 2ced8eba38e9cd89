"""Rows in any of the field's five shapes, as one form: who said what, and what is to be learned.

==================  =================================================================
format              columns
==================  =================================================================
messages            messages: [{role, content, ...}, ...], optional tools
sharegpt            conversations: [{from, value, ...}, ...], optional system and tools
prompt_completion   prompt, completion: texts, or lists of messages with optional tools
alpaca              instruction, output, optional input and system
text                text
==================  =================================================================

A message may also have tool_calls, tool_call_id, name, reasoning_content, and train (true or false) or
OpenAI's weight (1 or 0). None means absent, as pyarrow writes it. Pure Python: no tokenizer, no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qlora.errors import DataError

Tools = tuple[Mapping[str, Any], ...]
Calls = list[dict[str, Any]]
Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
    "alpaca": ("input", "system"),
    "text": (),
}
COLUMNS = sorted({column for form in REQUIRED for column in REQUIRED[form] + OPTIONAL[form]})

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
MESSAGE = ("role", "content", ROLES)
SHAREGPT = ("from", "value", SHAREGPT_ROLES)

MAY_STAND = {
    "at the beginning": ("system", "user"),
    "after system": ("user",),
    "after user": ("assistant",),
    "after assistant without tool_calls": ("user",),
    "after assistant with tool_calls": ("tool", "user"),
    "after tool": ("tool", "assistant"),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``role`` is system, user, assistant or tool."""

    role: str
    content: str  # empty only where an assistant turn has tool_calls
    train: bool | None = None  # what the row itself says; None leaves it to the recipe
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)  # for the chat template

    def message(self) -> dict[str, Any]:
        """What the chat template is given."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, slots=True)
class Record:
    """One example: a conversation that ends with the assistant, or (``turns`` empty) a plain text."""

    turns: tuple[Turn, ...]
    text: str = ""
    plain_prompt: str | None = None  # the text before the answer where there is no chat template
    tools: Tools = field(default=(), hash=False)  # JSON schemas that the template shows
    prompt_turns: int = 0  # how many of the turns are the prompt; 0 for a conversation

    @property
    def needs_template(self) -> bool:
        """Whether only a chat template can render it: it is a conversation, not a question."""
        return bool(self.turns) and self.plain_prompt is None

    def to_json(self) -> dict[str, Any]:
        """What :func:`from_json` reads, also after a trip through JSON."""
        return asdict(self)


def from_json(value: Mapping[str, Any]) -> Record:
    """The record that :meth:`Record.to_json` wrote."""
    turns = tuple(Turn(**turn) for turn in value["turns"])
    return Record(**{**value, "turns": turns, "tools": tuple(value["tools"])})


class RowError(ValueError):
    """What is wrong with one row, without its address and without its content."""


def fits(columns: Iterable[str]) -> list[Format]:
    """The formats whose required columns are all there.

    >>> fits(["prompt", "completion", "text"])
    ['prompt_completion', 'text']
    """
    found = set(columns)
    return [form for form, needed in REQUIRED.items() if found.issuperset(needed)]


def detect(columns: Iterable[str], origin: str) -> Format:
    """The one format whose required columns are all there.

    Raises:
        DataError: None fits (says how to map columns), or several do (lists them).

    >>> detect(["instruction", "input", "output"], "demo.json")
    'alpaca'
    """
    found = set(columns)
    fitting = fits(found)
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(sorted(found)) or "none"
    if not fitting:
        shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in REQUIRED.items())
        raise DataError(
            f"{origin}: the columns ({listed}) fit no known format.\n"
            f"  Known formats: {shapes}.\n"
            "  Map yours in the recipe, for example data.columns: {prompt: question, completion: answer}."
        )
    raise DataError(
        f"{origin}: the columns ({listed}) fit several formats: {', '.join(fitting)}.\n"
        "  Say which one you mean in the recipe: data.format."
    )


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; ``columns`` maps ours to theirs. Others pass unchanged.

    Theirs may lie inside a value: ``instances.0.output`` is a key of the first of some objects.

    >>> renamed({"q": "2+2?", "a": [{"text": "4"}]}, {"prompt": "q", "completion": "a.0.text"})
    {'prompt': '2+2?', 'completion': '4'}
    """
    theirs = {name if name in row else name.partition(".")[0] for name in columns.values()}
    kept = {key: value for key, value in row.items() if key not in theirs}
    found = {ours: reached(row, name) for ours, name in columns.items()}
    return kept | {ours: value for ours, value in found.items() if value is not None}


def reached(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or inside one by a dotted name; None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def parse(row: Mapping[str, Any], form: Format) -> Record:
    """One row as a record.

    Raises:
        RowError: A column is missing or belongs to another format, content is missing, empty or not
            text, a role is unknown or out of order, tools or tool calls are malformed, or the row's own
            marks leave nothing to train.
    """
    missing = [column for column in REQUIRED[form] if row.get(column) is None]
    if missing:
        others = fits(column for column, value in row.items() if value is not None)
        if not others:
            raise RowError(f"column {missing[0]!r} is missing")
        listed = ", ".join(REQUIRED[others[0]])
        raise RowError(f"has the columns ({listed}), which is {others[0]}; one format a file")
    if form == "text":
        return Record((), _text(row["text"], "text"))
    if form == "messages":
        turns = _turns(row["messages"], "messages", MESSAGE)
        return _conversation(turns, "of 'messages'", _tools(row))
    if form == "sharegpt":
        system = _system(row)
        turns = system + _turns(row["conversations"], "conversations", SHAREGPT)
        where = "of 'conversations'" + " (the system column counts as turn 1)" * len(system)
        return _conversation(turns, where, _tools(row))
    if form == "alpaca":
        instruction = _text(row["instruction"], "instruction")
        given = _text(row["input"], "input") if str(row.get("input") or "").strip() else ""
        question = f"{instruction}\n\n{given}" if given else instruction
        answer = Turn("assistant", _text(row["output"], "output"))
        system = _system(row)
        prompt = None if system else alpaca_prompt(instruction, given)
        turns = [*system, Turn("user", question), answer]
        return Record(tuple(turns), plain_prompt=prompt, prompt_turns=len(turns) - 1)
    return _prompt_completion(row)


def turns(messages: object) -> tuple[Turn, ...]:
    """The turns of a conversation that need not end with the assistant, in any order of roles.

    Raises:
        RowError: As :func:`parse`, for what is wrong with one turn.
    """
    return tuple(_turns(messages, "messages", MESSAGE))


def tools(given: object) -> Tools:
    """Tools as the chat template is given them.

    Raises:
        RowError: One of them is no function with a name.
    """
    return _tools({"tools": given})


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """What stands before the answer of an alpaca row where there is no chat template.

    The headings of the data set's own prompt, without its preamble, so that the answer begins on a
    line of its own.
    """
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def fingerprint(record: Record) -> str:
    """SHA-256 of the content. Equal rows have equal fingerprints, in any file and any order.

    What trains does not matter to it, nor where the prompt ends.
    """
    turns = [[t.role, t.content, *([t.fields] if t.fields else ())] for t in record.turns]
    content: object = turns or record.text
    if record.tools:
        content = {"turns": turns, "tools": record.tools}
    return hashlib.sha256(_ENCODER.encode(content).encode()).hexdigest()


_ENCODER = json.JSONEncoder(sort_keys=True)


def _prompt_completion(row: Mapping[str, Any]) -> Record:
    asked, answered, tools = row["prompt"], row["completion"], _tools(row)
    listed = [key for key in ("prompt", "completion") if isinstance(row[key], (list, tuple))]
    if len(listed) == 2:
        prompt = _turns(asked, "prompt", MESSAGE)
        turns = prompt + _turns(answered, "completion", MESSAGE)
        return _conversation(turns, "of 'prompt' and 'completion' together", tools, len(prompt))
    if listed:
        both = "prompt and completion must be text both, or lists of messages both"
        raise RowError(f"{listed[0]} is a list and the other is not; {both}")
    if tools:
        raise RowError("tools need prompt and completion as lists of messages, not as texts")
    question = _text(asked, "prompt")
    turns = [Turn("user", question), Turn("assistant", _text(answered, "completion"))]
    return Record(tuple(turns), plain_prompt=question, prompt_turns=1)


def _turns(value: object, column: str, shape: tuple[str, str, Mapping[str, str]]) -> list[Turn]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column!r} must be a list of turns")
    if not value:
        raise RowError(f"there are no turns in {column!r}")
    return [_turn(turn, f"turn {n} of {column!r}", *shape) for n, turn in enumerate(value, 1)]


def _turn(value: object, where: str, speaker: str, said: str, roles: Mapping[str, str]) -> Turn:
    if not isinstance(value, Mapping) or value.get(speaker) is None:
        raise RowError(f"{where} has no {speaker!r}")
    name, content = value[speaker], value.get(said)
    role = roles.get(_text(name, f"{where}, {speaker!r}"))
    if role is None:
        raise RowError(f"{where} has {_shown('role', name)}; known are {', '.join(roles)}")
    reasoning, calls, fields, train = "", [], {}, None
    if name == "function_call":
        content, calls = "", _calls(content, where)
    elif isinstance(content, (list, tuple)):
        content, reasoning, calls = _parts(content, where)
    elif content is not None and not isinstance(content, str):
        raise RowError(f"{where} must be text or a list of parts, found {type(content).__name__}")
    if len(value) > 2 or content is None or reasoning or calls:
        fields = _fields(value, where, reasoning, calls)
        train = _train(value, where, role)
    if fields and role != "assistant" and ("tool_calls" in fields or "reasoning_content" in fields):
        raise RowError(f"{where} is {role!r}; only assistant may have tool_calls and reasoning")
    if "tool_calls" in fields and not (content or "").strip():
        return Turn(role, "", train, fields)
    if content is None:
        raise RowError(f"{where}: {said} is missing")
    if role == "assistant" and not content.strip():
        raise RowError(f"{where}: the answer is empty")
    return Turn(role, _text(content, where), train, fields)


def _parts(parts: Iterable[object], where: str) -> tuple[str, str, Calls]:
    """The text, the reasoning and the tool calls of content that is a list of parts."""
    text, calls = {"text": "", "reasoning": ""}, []
    for number, part in enumerate(parts, start=1):
        here = f"{where}, part {number}"
        if not isinstance(part, Mapping) or part.get("type") is None:
            raise RowError(f"{here} has no 'type'")
        kind: Any = part["type"]
        value = part.get("text") if part.get("value") is None else part["value"]
        if kind == "tool_call":
            calls += _calls(value, here)
        elif kind not in ("text", "reasoning"):
            known = "text, reasoning, tool_call"
            raise RowError(f"{here} has {_shown('type', kind)}; known are {known}")
        elif not isinstance(value, str):
            raise RowError(f"{here} must have a text as 'text' or 'value'")
        else:
            text[kind] += value
    return text["text"], text["reasoning"], calls


def _fields(message: Mapping[str, Any], where: str, reasoning: str, calls: Calls) -> dict[str, Any]:
    """What a message has for the chat template beside role and content."""
    own = {
        key: _text(message[key], f"{where}, {key!r}")
        for key in ("reasoning_content", "tool_call_id", "name")
        if str(message.get(key) or "").strip()
    }
    reasoning += own.pop("reasoning_content", "")
    for key in ("tool_calls", "function_call"):  # the second is OpenAI's old form
        calls = calls + _calls(message[key], where) if message.get(key) else calls
    fields: dict[str, Any] = {}
    if reasoning.strip():
        fields["reasoning_content"] = _text(reasoning, f"{where}, reasoning")
    return fields | ({"tool_calls": calls} if calls else {}) | own


def _train(message: Mapping[str, Any], where: str, role: str) -> bool | None:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}: 'train' must be true or false, found {type(train).__name__}")
    if weight is not None:
        if weight not in (0, 1):
            raise RowError(f"{where}: only 0 and 1 are known as 'weight'")
        if train is not None and train != weight:
            raise RowError(f"{where}: 'train' and 'weight' contradict each other")
        train = bool(weight)
    if train and role != "assistant":
        key = "'train' is true" if weight is None else "'weight' is 1"
        raise RowError(f"{where}: {key}, but it is {role!r}; only assistant turns are learned")
    return train


def _calls(value: object, where: str) -> Calls:
    """Tool calls in the one form that chat templates know, their arguments as a mapping."""
    found = _plain(value, f"{where}: the tool call")
    return [_call(call, where) for call in (found if isinstance(found, list) else [found])]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.keys() >= {"name", "arguments"}:
        raise RowError(f"{where}: a tool call needs 'name' and 'arguments'")
    name, arguments = _text(function["name"], f"{where}: a tool call's name"), function["arguments"]
    if isinstance(arguments, str):
        arguments = _plain(arguments, f"{where}: a tool call's arguments") if arguments else {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: a tool call's arguments must be a mapping, or its JSON text")
    known = {"id": _text(call["id"], f"{where}: a tool call's id")} if call.get("id") else {}
    return {"type": "function", **known, "function": {"name": name, "arguments": arguments}}


def _tools(row: Mapping[str, Any]) -> Tools:
    given = row.get("tools")
    found = _plain(given, "tools") or [] if given else []
    if not isinstance(found, list):
        raise RowError("tools must be a list of functions, or the JSON text of such a list")
    tools = []
    for number, item in enumerate(found, start=1):
        bare = {k: v for k, v in item.items() if k != "type"} if isinstance(item, dict) else {}
        function = bare.get("function", bare)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"item {number} of tools is no function with a name")
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _plain(value: object, what: str) -> Any:
    """What a JSON text holds, or a copy of what is given, with nothing in it but JSON's own kinds."""
    try:
        found = json.loads(value) if isinstance(value, str) else _present(value)
        return json.loads(json.dumps(found, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"{what} is not valid JSON") from None


def _present(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _conversation(turns: list[Turn], where: str, tools: Tools, prompt_turns: int = 0) -> Record:
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise RowError("there is no assistant turn, so there is nothing to learn")
    place = "at the beginning"
    for number, turn in enumerate(turns, start=1):
        role = turn.role
        if role not in MAY_STAND[place]:
            allowed = " or ".join(MAY_STAND[place])
            raise RowError(f"turn {number} {where} is {role!r}; {place} may only stand {allowed}")
        place = f"after {role}"
        if role == "assistant":
            place += " with tool_calls" if "tool_calls" in turn.fields else " without tool_calls"
    if turns[-1].role != "assistant":
        raise RowError(f"turn {number} {where} is {role!r}, but the last must be assistant")
    if all(turn.train is False for turn in answers):
        raise RowError("every assistant turn says train: false or weight: 0, so nothing is learned")
    return Record(tuple(turns), tools=tools, prompt_turns=prompt_turns)


def _system(row: Mapping[str, Any]) -> list[Turn]:
    given = str(row.get("system") or "").strip()
    return [Turn("system", _text(row["system"], "system"))] if given else []


def _shown(kind: str, name: object) -> str:
    """A name as it is, if it looks like one; what a mistaken row has in its place is never shown."""
    plain = isinstance(name, str) and name.replace("-", "_").isidentifier() and len(name) <= 32
    return f"the {kind} {name!r}" if plain else f"a {kind} that is no name"


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
