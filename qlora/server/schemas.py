"""Requests and answers as JSON schemas: what :mod:`qlora.server.protocol` takes, and what comes back."""

from __future__ import annotations

from typing import Any

from qlora.server.protocol import HARMLESS, MAX_SEED, MAX_STOP_CHARS, MAX_STOPS, NEUTRAL, Kind

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}


def _object(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> Schema:
    wanted = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": wanted, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_PART = _object({"type": {"const": "text"}, "text": {"type": "string", "pattern": r"\S"}})
_SAID: Schema = {"anyOf": [{"type": "string", "pattern": r"\S"}, _list(_PART, minItems=1)]}
# Turns of the assistant and of tools may hold more (tool_calls, tool_call_id): see qlora.records.
_MESSAGE = _object(
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _SAID,
    }
)
_FUNCTION = _object(
    {"name": {"type": "string", "pattern": r"\S"}, "parameters": {"type": "object"}}, ["name"]
)
_TOOL = _object({"type": {"const": "function"}, "function": _FUNCTION}, ["function"])
_TOKENS: Schema = _or_null({"type": "integer", "minimum": 1, "maximum": 2**31 - 1})
_IDS = _list({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, minItems=1)
_PROMPT: Schema = {"type": "string", "minLength": 1}

_SHARED: dict[str, Any] = {
    "model": {"type": "string", "minLength": 1, "description": "A name of GET /v1/models."},
    "stream": _or_null({"type": "boolean"}),
    "stream_options": {
        "description": "Only with stream: true.",
        **_or_null(
            _object(
                {"include_usage": _or_null({"type": "boolean"})}, [], additionalProperties=False
            )
        ),
    },
    "temperature": {
        "description": "0, which is also what holds without it, takes the likeliest token each time.",
        **_or_null({"type": "number", "minimum": 0, "maximum": 2}),
    },
    "top_p": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
    "seed": _or_null({"type": "integer", "minimum": -MAX_SEED, "maximum": MAX_SEED}),
    "max_tokens": _TOKENS,
    "stop": _or_null({"anyOf": [_STOP, _list(_STOP, maxItems=MAX_STOPS)]}),
}
_OWN: dict[Kind, tuple[dict[str, Any], str]] = {
    "chat": (
        {
            "messages": _list(_MESSAGE, minItems=1),
            "max_completion_tokens": _TOKENS,
            "tools": {
                "description": "Shown to the model, where its template can; calls come back as text.",
                **_or_null(_list(_TOOL)),
            },
            "tool_choice": {"enum": ["auto", "none", None]},
        },
        "messages",
    ),
    "completion": (
        {
            "prompt": {
                "anyOf": [_PROMPT, _IDS, _list({"anyOf": [_PROMPT, _IDS]}, minItems=1)],
                "description": "A text, token ids, or a list of these; each is one choice.",
            }
        },
        "prompt",
    ),
}


def request(kind: Kind) -> Schema:
    """What may be sent."""
    own, needed = _OWN[kind]
    left = {name: {"description": "Taken and left alone."} for name in HARMLESS}
    neutral = {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    return _object(
        {**_SHARED, **own, **left, **neutral}, ["model", needed], additionalProperties=False
    )


_USAGE = _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), WHOLE))
_HEAD = {"id": TEXT, "created": WHOLE, "model": TEXT}
_END: Schema = {"enum": ["stop", "length"]}
_CHAT_CHOICE = _object(
    {
        "index": WHOLE,
        "message": _object({"role": {"const": "assistant"}, "content": TEXT}),
        "finish_reason": _END,
    }
)
_TEXT_CHOICE = _object({"index": WHOLE, "text": TEXT, "finish_reason": _END})
ANSWER: dict[Kind, Schema] = {
    "chat": _object(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(_CHAT_CHOICE),
            "usage": _USAGE,
        }
    ),
    "completion": _object(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(_TEXT_CHOICE),
            "usage": _USAGE,
        }
    ),
}
_MODEL = _object(
    {"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT},
)
MODELS = _object({"object": {"const": "list"}, "data": _list(_MODEL)})
EVENT: Schema = {
    "description": "With stream: true. A chunk an event, in OpenAI's shapes; [DONE] in the last."
}
HEALTH = _object({"status": {"enum": ["ok", "failed"]}})
_FAULT = _object(
    {
        "message": TEXT,
        "type": TEXT,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
)
ERROR = _object({"error": _FAULT})
