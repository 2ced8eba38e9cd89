"""YAML as people mean it: 1.2 scalars, no duplicate keys, no aliases, every problem with its line."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from qlora import document
from qlora.errors import RecipeError

NASTY = [
    "", " ", "no", "yes", "on", "off", "y", "null", "~", "true", "True", "012", "0x1F", "0o17",
    "1:30", "1_000", "2e-4", ".5", "1.", "+7", ".inf", ".nan", "2026-01-01", "<<", "=", "*a", "&a",
    "!b", "- a", "a: b", "a #b", "#a", "'", '"', "@x", "`x", "%x", "{}", "[]", "[a", "a\nb", "\ttab",
    "a\r\nb", "\x07", "\u2028", "naïve – 漢字", "trailing ", "back\\slash", "x" * 300,
]  # fmt: skip


def value(text: str) -> Any:
    return document.parse(text, "demo.yaml").value


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        document.parse(text, "demo.yaml")
    return str(caught.value)


def random_json(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind == 1:
        return rng.randrange(-(10**12), 10**12)
    if kind == 2:
        return rng.choice([-1, 1]) * 10 ** rng.uniform(-12, 12)
    if kind <= 4:
        return rng.choice(NASTY)
    if kind <= 5:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {f"k{n}": random_json(rng, depth - 1) for n in range(rng.randrange(4))}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2e-4", 0.0002),
        ("2E-4", 0.0002),
        ("4e3", 4000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-0.25", -0.25),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("012", 12),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("'2e-4'", "2e-4"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{a: no}", {"a": "no"}),
    ],
)
def test_scalars_are_read_by_the_rules_of_yaml_1_2(written: str, meant: object) -> None:
    found = value(f"key: {written}\n")["key"]
    assert found == meant and type(found) is type(meant)
    again = document.scalar(written)
    assert again == meant and type(again) is type(meant)


def test_nan_is_read_as_a_number() -> None:
    assert math.isnan(value("key: .nan")["key"])


@pytest.mark.parametrize("seed", range(20))
def test_any_json_is_read_as_json_reads_it(seed: int) -> None:
    rng = random.Random(seed)
    text = json.dumps({f"k{n}": random_json(rng) for n in range(8)}, indent=2)
    assert value(text) == json.loads(text)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_dumped_is_read_back_equal_in_value_and_type_and_order(seed: int) -> None:
    rng = random.Random(seed)
    before = {f"k{9 - n}": random_json(rng) for n in range(8)}
    after = value(document.dump(before))
    assert json.dumps(after) == json.dumps(before)  # 1, 1.0 and True differ here; order counts


@pytest.mark.parametrize("text", [*NASTY, "🙂"])
def test_every_text_survives_a_dump_as_a_value_and_as_a_key(text: str) -> None:
    assert value(document.dump({text: [text], "other": text})) == {text: [text], "other": text}


@pytest.mark.parametrize("number", [math.inf, -math.inf, 1e-300, 1e300, 5e-324, 0.1, -0.0, 2e-5])
def test_every_float_survives_a_dump(number: float) -> None:
    found = value(document.dump({"key": number}))["key"]
    assert repr(found) == repr(number)


def test_equal_objects_are_dumped_without_aliases() -> None:
    shared = [1, 2]
    assert value(document.dump({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


def test_every_key_has_its_line() -> None:
    read = document.parse("# head\nmodel:\n  name: x\n\ndata: {train: a,\n  split: b}\n", "demo")
    assert read.lines == {
        ("model",): 2,
        ("model", "name"): 3,
        ("data",): 5,
        ("data", "train"): 5,
        ("data", "split"): 6,
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora:\n  r: 8\n  alpha: 1\n  r: 16\n", [":4", "'lora.r'", "twice", "line 2", "Keep one"]),
        ("a: 1\na: 2\n", [":2", "'a'", "line 1"]),
        ("a: {b: {c: 1, c: 2}}\n", [":1", "'a.b.c'", "twice"]),
        ("a: &x [1]\nb: *x\n", [":2", "aliases", "write the value out"]),
        ("a: 1\nb: !!python/name:os.system x\n", [":2", "tag", "python/name:os.system", "remove"]),
        ("a: !!int '3'\n", [":1", "tag"]),
        ("a: " + "[" * 25 + "]" * 25, [":1", "nested deeper than 20"]),
        ("a: 1\n[b]: 2\n", [":2", "a key must be a plain word"]),
        ("a: 1\n b: 2\n", [":2", "not valid YAML"]),
        ("a: [1, 2\n", ["not valid YAML"]),
        ("a: 'open\n", ["not valid YAML"]),
        ("a: 1\n---\nb: 2\n", [":2", "not valid YAML"]),
        ("\tmodel: x\n", [":1", "not valid YAML"]),
        ("- a\n- b\n", [":1", "expected sections such as `model:`"]),
        ("just words", [":1", "expected sections"]),
        ("", ["empty", "qlora recipes copy quickstart", "qlora init"]),
        ("# only a comment\n", ["empty", "qlora recipes copy"]),
        ("a: 1 #" + "x" * 70_000, ["70,006 characters", "65,536"]),
    ],
)
def test_what_surprises_is_refused_with_its_line(text: str, parts: list[str]) -> None:
    message = refusal(text)
    assert message.startswith("demo.yaml")
    assert [part for part in parts if part not in message] == []


def test_a_control_character_is_refused_with_its_line() -> None:
    message = refusal("run:\n  name: a\x07b\n")
    assert message.startswith("demo.yaml:2: ") and "0007" in message


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    """int() gives up at 4300 digits, with an error of its own."""
    assert refusal("train:\n  max_steps: " + "9" * 5000).startswith("demo.yaml")


def test_the_same_key_in_two_sections_is_no_duplicate() -> None:
    assert value("a: {x: 1}\nb: {x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}


def test_windows_line_ends_change_nothing() -> None:
    text = "lora:\n  r: 8 # rank\ntrain:\n  optim: auto\n"
    windows = document.parse(text.replace("\n", "\r\n"), "demo")
    assert windows == document.parse(text, "demo")


@pytest.mark.parametrize("text", ["[a", "{a", "'a", "@x", "a: b: c", "*x", "!x y", "%"])
def test_an_override_that_is_no_yaml_is_taken_as_text(text: str) -> None:
    assert document.scalar(text) == text


def test_an_override_never_builds_an_object() -> None:
    text = "!!python/object/apply:os.getcwd []"
    assert document.scalar(text) == text
