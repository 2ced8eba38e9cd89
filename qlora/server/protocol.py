"""What clients of OpenAI's API send and get: requests read strictly, answers and errors in its shapes.

Of its fields, some are honoured (``HONOURED``), some ask for nothing that an answer could lack and are
taken and left alone (``HARMLESS``), some may only say what holds anyway (``NEUTRAL``). Any other is
refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora import records
from qlora.records import RowError, Turn

Kind = Literal["chat", "completion"]
HARMLESS = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "service_tier", "parallel_tool_calls",
)  # fmt: skip
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "functions": ([],),
}  # fmt: skip
SHARED = ("model", "stream", "stream_options", "temperature", "top_p", "seed", "max_tokens", "stop")
HONOURED: dict[Kind, tuple[str, ...]] = {
    "chat": (*SHARED, "messages", "max_completion_tokens", "tools", "tool_choice"),
    "completion": (*SHARED, "prompt"),
}
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_SEED = 2**63 - 1


class BadRequest(ValueError):
    """What is wrong with a request, and in which of its fields."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request that was read. ``prompts`` are texts or token ids; a conversation has ``turns``."""

    model: str
    turns: tuple[Turn, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    stream: bool = False
    include_usage: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


def read(body: bytes, kind: Kind) -> Asked:
    """A request's body, checked field by field.

    Raises:
        BadRequest: Says what was found, and what is taken instead.
    """
    fields = _object(body)
    _require_known(fields, kind)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be text: one of the names of GET /v1/models.", "model")
    stream = _flag(fields, "stream")
    options = fields.get("stream_options")
    if options is not None and not stream:
        raise BadRequest(
            "stream_options may only be given together with stream: true.", "stream_options"
        )
    given = {"tools": _tools(fields)} if kind == "chat" else {"prompts": _prompts(fields)}
    return Asked(
        model,
        turns=_turns(fields) if kind == "chat" else (),
        stream=stream,
        include_usage=_usage(options),
        temperature=_number(fields, "temperature", 0.0, 2.0, 0.0),
        top_p=_number(fields, "top_p", 0.0, 1.0, 1.0),
        seed=_whole(fields, "seed", -MAX_SEED, MAX_SEED),
        max_tokens=_max_tokens(fields),
        stop=_stop(fields),
        **given,
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(text: str) -> object:
        raise ValueError(f"{text} is no number of JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest(
            "the body holds half of a surrogate pair, which is not valid text."
        ) from None
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRequest(f"the body is not valid JSON: {why}{where}.") from None
    if not isinstance(found, dict):
        raise BadRequest(f"the body must be a JSON object, found {_kind(found)}.")
    return found


def _require_known(fields: Mapping[str, Any], kind: Kind) -> None:
    known = {*HONOURED[kind], *HARMLESS, *NEUTRAL}
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, HONOURED[kind], 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            shown = name if len(name) <= 64 else f"{name[:64]}..."
            raise BadRequest(f"{shown!r} is not a field that is known here.{meant}", shown)
        if name not in NEUTRAL or value is None or _is_one_of(value, NEUTRAL[name]):
            continue
        only = " or ".join(json.dumps(one) for one in NEUTRAL[name])
        raise BadRequest(f"{name} cannot be honoured here; leave it out, or write {only}.", name)


def _is_one_of(value: object, allowed: Sequence[object]) -> bool:
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in allowed)


def _turns(fields: Mapping[str, Any]) -> tuple[Turn, ...]:
    if fields.get("messages") is None:
        raise BadRequest("messages is missing: the conversation so far, a list.", "messages")
    try:
        turns = records.turns(fields["messages"])
    except RowError as error:
        raise BadRequest(f"{error}.", "messages") from None
    if turns[-1].role not in ("user", "tool"):
        raise BadRequest(
            f"the last of messages is of {turns[-1].role}, and it must be of the user (or of a tool): "
            "the assistant answers it.",
            "messages",
        )
    return turns


def _tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    choice = fields.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise BadRequest("tool_choice cannot be forced here; write auto or none.", "tool_choice")
    tools = fields.get("tools")
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise BadRequest(f"tools must be a list of functions, found {_kind(tools)}.", "tools")
    try:
        found = records.tools(tools)
    except RowError as error:
        raise BadRequest(f"{error}.", "tools") from None
    return () if choice == "none" else found


def _prompts(fields: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    prompt = fields.get("prompt")
    many = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    found: list[str | tuple[int, ...]] = []
    for one in many:
        if isinstance(one, str) and one:
            found.append(one)
        elif isinstance(one, list) and _is_ids(one):
            found.append(tuple(one))
    if not many or len(found) != len(many):
        raise BadRequest(
            "prompt must be a text that is not empty, a list of token ids, or a list of these.",
            "prompt",
        )
    return tuple(found)


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in value
    )


def _usage(options: object) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise BadRequest(f"stream_options must be an object, found {_kind(options)}.")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise BadRequest("stream_options may only hold include_usage.", "stream_options")
    if options.get("include_obfuscation"):
        raise BadRequest("include_obfuscation cannot be honoured here.", "stream_options")
    return _flag(options, "include_usage")


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, found {_kind(value)}.", name)
    return bool(value)


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} must be a number, found {_kind(value)}.", name)
    if not low <= value <= high:
        raise BadRequest(f"{name} is {_brief(value)}; it may be from {low:g} to {high:g}.", name)
    return float(value)


def _whole(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of number, and 1.0 is 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name} must be a whole number, found {_kind(value)}.", name)
    if not low <= value <= high:
        raise BadRequest(f"{name} is {_brief(value)}; it may be from {low} to {high}.", name)
    return value


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    found = [
        value
        for name in ("max_completion_tokens", "max_tokens")
        if (value := _whole(fields, name, 1, 2**31 - 1)) is not None
    ]
    if len(set(found)) > 1:
        raise BadRequest("max_tokens and max_completion_tokens differ; give one.", "max_tokens")
    return found[0] if found else None


def _stop(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("stop")
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or not all(
        isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in found
    ):
        raise BadRequest(
            f"stop must be a text, or a list of texts, of 1 to {MAX_STOP_CHARS} characters.", "stop"
        )
    if len(found) > MAX_STOPS:
        raise BadRequest(f"stop holds {len(found)} texts; at most {MAX_STOPS} are taken.", "stop")
    return tuple(found)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _brief(value: float) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:24]}..."
