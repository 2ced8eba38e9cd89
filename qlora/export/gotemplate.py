"""The little of Go's text/template that the export writes, evaluated: what Ollama will make of it.

Text, ``.System``, ``.Prompt``, one ``range $i, $m := .Messages`` with ``.Role`` and ``.Content``,
conditions with ``eq``, whether a message is the last one, and constants. Anything else is an error,
never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_RANGE = re.compile(r"range \$i, \$m := \.Messages")
_ROLE = re.compile(r'eq \.Role "(\w+)"')
LAST = "eq (len (slice $.Messages $i)) 1"
_FIELDS = (".System", ".Prompt", ".Content", ".Role")


@dataclass
class _Node:
    """An action with what is inside it; ``otherwise`` is the else branch."""

    action: str
    inside: list[_Node | str] = field(default_factory=list)
    otherwise: list[_Node | str] = field(default_factory=list)


def quoted(text: str) -> str:
    """A text as the template gives it back: as it is, or as a constant where it holds braces or quotes.

    >>> quoted("a\\n"), quoted('{{x')
    ('a\\n', '{{ "\\\\u007b\\\\u007bx" }}')
    """
    if (
        "{{" in text
        or "}}" in text
        or '"""' in text
        or text.startswith("}")
        or text.endswith(("{", '"'))
        or text[:1] == '"'
    ):
        constant = (
            json.dumps(text, ensure_ascii=False).replace("{", "\\u007b").replace("}", "\\u007d")
        )
        return "{{ " + constant + " }}"
    return text


def evaluate(
    template: str, *, system: str = "", prompt: str = "", messages: Sequence[Any] = ()
) -> str:
    """What Go's text/template gives for a template of ours.

    Args:
        template: As :mod:`qlora.export.ollama` writes it.
        system: ``.System``.
        prompt: ``.Prompt``.
        messages: ``.Messages``: objects with ``role`` and ``content``.

    Raises:
        ValueError: It holds what this evaluator does not know.
    """
    values = {".System": system, ".Prompt": prompt, ".Messages": messages}
    return _run(_parse(template), values)


def _parse(template: str) -> list[_Node | str]:
    root: list[_Node | str] = []
    stack: list[tuple[_Node | None, list[_Node | str]]] = [(None, root)]
    at, trim = 0, False
    for hit in _ACTION.finditer(template):
        text = template[at : hit.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if hit[1] else text
        at, trim = hit.end(), bool(hit[3])
        words = hit[2]
        node, into = stack[-1]
        if text:
            into.append(text)
        if words == "end":
            # An `else if` opened a node within the else of the one before it: one end closes them all.
            while node is not None and node.action.startswith("else "):
                stack.pop()
                node, into = stack[-1]
            if node is None:
                raise ValueError("an end without a beginning")
            stack.pop()
        elif words == "else" or words.startswith("else if "):
            if node is None:
                raise ValueError("an else without an if")
            if words == "else":
                stack[-1] = (node, node.otherwise)
            else:
                chained = _Node("else " + words.removeprefix("else "))
                node.otherwise.append(chained)
                stack.append((chained, chained.inside))
        elif words.startswith(("if ", "range ")):
            opened = _Node(words)
            into.append(opened)
            stack.append((opened, opened.inside))
        else:
            into.append(_Node(words))
    rest = template[at:].lstrip() if trim else template[at:]
    stack[-1][1].append(rest)
    if len(stack) != 1:
        raise ValueError("an if or range that does not end")
    return root


def _run(nodes: Sequence[_Node | str], values: Mapping[str, Any]) -> str:
    return "".join(node if isinstance(node, str) else _act(node, values) for node in nodes)


def _act(node: _Node, values: Mapping[str, Any]) -> str:
    words = node.action.removeprefix("else ")
    if words in _FIELDS and words in values:
        return str(values[words])
    if words.startswith('"'):
        return str(json.loads(words))
    if _RANGE.fullmatch(words):
        messages = values[".Messages"]
        rounds = [
            {
                **values,
                ".Role": one.role,
                ".Content": one.content,
                "last": index + 1 == len(messages),
            }
            for index, one in enumerate(messages)
        ]
        return "".join(_run(node.inside, one) for one in rounds)
    if words.startswith("if "):
        return _run(node.inside if _holds(words[3:], values) else node.otherwise, values)
    raise ValueError(f"{words!r} is not known")


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    if condition == LAST and "last" in values:
        return bool(values["last"])
    if (role := _ROLE.fullmatch(condition)) and ".Role" in values:
        return bool(values[".Role"] == role[1])
    if condition in values:
        return bool(values[condition])
    raise ValueError(f"the condition {condition!r} is not known")
