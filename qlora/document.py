"""One strict YAML document: what the text says, and on which line each value stands.

YAML 1.1, which PyYAML reads, turns ``no`` into False, ``012`` into 10 and ``2e-4`` into text, lets
the last of two equal keys win in silence, and expands aliases without bound. A recipe is read by
the rules of YAML 1.2's core schema instead, and everything surprising is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from qlora.errors import RecipeError

MAX_CHARS = 64 * 1024
MAX_DEPTH = 20

Address = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """The value of a YAML text and the 1-based line of every key in it."""

    value: Any
    lines: dict[Address, int]


class _CoreSchemaLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2: true/false, decimal ints, floats with exponents."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # declared per instance in the stubs


_FLOAT = (
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_CoreSchemaLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_CoreSchemaLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_CoreSchemaLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789")
)
_CoreSchemaLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # SafeLoader reads 012 as octal and 1:30 in base 60


_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, origin: str) -> Document:
    """Read one YAML mapping strictly.

    Args:
        text: The document, at most 64 KiB.
        origin: Its name in error messages, usually a path.

    Raises:
        RecipeError: Not YAML, not a mapping, a duplicate key, an alias, a tag, or too deep.

    >>> parse("lora: {r: 8}\\ntrain: {learning_rate: 2e-4}", "demo").value
    {'lora': {'r': 8}, 'train': {'learning_rate': 0.0002}}
    """
    if len(text) > MAX_CHARS:
        raise RecipeError(
            f"{origin}: {len(text):,} characters; a recipe has at most {MAX_CHARS:,}."
        )
    if bad := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise RecipeError(f"{origin}:{line}: the control character U+{ord(bad[0]):04X}; remove it.")
    loader = _CoreSchemaLoader(text)
    try:
        _refuse_aliases_and_depth(text, origin)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(
                f"{origin}: the file is empty. Start from `qlora recipes copy quickstart DEST` "
                "or `qlora init DATA --model MODEL`."
            )
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(
                f"{origin}:1: expected sections such as `model:`, found a bare value."
            )
        lines: dict[Address, int] = {}
        _index(node, (), lines, origin)
        return Document(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{where}: not valid YAML: {problem}.") from None
    except ValueError as error:  # an int of more than 4300 digits
        raise RecipeError(f"{origin}: {error}.") from None
    finally:
        loader.dispose()


def scalar(text: str) -> Any:
    """One value as a recipe would read it: ``8`` is a number, ``[a, b]`` a list, ``no`` a word."""
    try:
        return yaml.load(text, Loader=_CoreSchemaLoader)  # SafeLoader's subclass: data only
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def dump(value: dict[str, Any], width: int = 100) -> str:
    """YAML that :func:`parse` reads back to the same value; order is kept."""
    return yaml.dump(
        value, Dumper=_CoreSchemaDumper, sort_keys=False, allow_unicode=True, width=width
    )


class _CoreSchemaDumper(yaml.SafeDumper):
    """SafeDumper that quotes what YAML 1.2 would misread and writes 0.0002 so that it stays a float."""

    yaml_implicit_resolvers = _CoreSchemaLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


_CoreSchemaDumper.add_representer(
    float,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:float",
        {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value)),
    ),
)


def _refuse_aliases_and_depth(text: str, origin: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{origin}:{event.start_mark.line + 1}" if event.start_mark else origin
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{where}: aliases (*name) are not read; write the value out.")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            tag = getattr(event, "tag", None)
            if tag not in (None, "!"):
                raise RecipeError(f"{where}: tag {tag!r} is not read; remove it.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH} levels.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _index(node: yaml.MappingNode, above: Address, lines: dict[Address, int], origin: str) -> None:
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise RecipeError(f"{origin}:{line}: a key must be a plain word.")
        address = (*above, str(key.value))
        if address in lines:
            raise RecipeError(
                f"{origin}:{line}: {'.'.join(address)!r} is set twice (first on line "
                f"{lines[address]}). Keep one."
            )
        lines[address] = line
        if isinstance(value, yaml.MappingNode):
            _index(value, address, lines, origin)
