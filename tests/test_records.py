"""Five shapes of a row become one: who said what, and what is to be learned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from qlora import records
from qlora.errors import DataError
from qlora.records import Record, RowError, Turn

Q, A = "What is two plus two?", "Four."
PAIR = (Turn("user", Q), Turn("assistant", A))
CONVERSATION = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHARED = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
WHOLE: dict[str, dict[str, Any]] = {
    "messages": {"messages": CONVERSATION},
    "sharegpt": {"conversations": SHARED},
    "prompt_completion": {"prompt": Q, "completion": A},
    "alpaca": {"instruction": Q, "output": A},
    "text": {"text": Q},
}
SECRET = "the patient's diagnosis"


def refusal(row: dict[str, Any], form: Any) -> str:
    with pytest.raises(RowError) as caught:
        records.parse(row, form)
    return str(caught.value)


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]}


def test_the_formats_are_the_five_of_the_field() -> None:
    assert set(get_args(records.Format)) == set(records.REQUIRED) == set(WHOLE)
    assert len(WHOLE) == 5


@pytest.mark.parametrize("form", [name for name in WHOLE if name != "text"])
def test_one_question_and_answer_means_the_same_in_every_format(form: Any) -> None:
    record = records.parse(WHOLE[form], form)
    assert record.turns == PAIR and record.text == ""


def test_a_text_has_no_turns() -> None:
    assert records.parse({"text": "Once."}, "text") == Record((), "Once.")


def test_text_is_kept_to_the_letter() -> None:
    odd = "  \ttwo  spaces\r\n<|im_end|> naïve 漢字 🙂\n\n"
    assert records.parse({"text": odd}, "text").text == odd
    turns = records.parse({"prompt": odd, "completion": odd}, "prompt_completion").turns
    assert [turn.content for turn in turns] == [odd, odd]


# --- which format it is


@pytest.mark.parametrize("form", list(WHOLE))
def test_a_format_is_known_by_its_columns_whatever_else_is_there(form: str) -> None:
    columns = [*records.REQUIRED[form], "id", "source"]  # type: ignore[index]
    for order in itertools.permutations(columns):
        assert records.detect(order, "demo") == form


def test_formats_that_fit_are_listed() -> None:
    assert records.fits(["text", "prompt", "completion", "tools"]) == ["prompt_completion", "text"]
    assert records.fits(iter(["messages"])) == ["messages"]
    assert records.fits(["prompt", "tools"]) == []


@pytest.mark.parametrize("columns", [[], ["question", "answer"], ["prompt"], ["Text"]])
def test_unknown_columns_are_listed_with_a_mapping_to_try(columns: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        records.detect(columns, "demo.jsonl")
    message = str(caught.value)
    assert message.startswith("demo.jsonl: the columns (" + (", ".join(sorted(columns)) or "none"))
    assert "data.columns: {prompt: question, completion: answer}" in message
    for form, needed in records.REQUIRED.items():
        assert f"{form}: {', '.join(needed)}" in message


@pytest.mark.parametrize("pair", list(itertools.combinations(WHOLE, 2)))
def test_columns_that_fit_two_formats_are_not_guessed_at(pair: tuple[Any, Any]) -> None:
    first, second = pair
    with pytest.raises(DataError) as caught:
        records.detect([*records.REQUIRED[first], *records.REQUIRED[second]], "demo")
    assert f"several formats: {first}, {second}" in str(caught.value)
    assert "data.format" in str(caught.value)


def test_a_dotted_name_reaches_into_a_column() -> None:
    row = {"instruction": Q, "instances": [{"input": "", "output": A}, {"output": "no"}], "a.b": 1}
    columns = {"instruction": "instruction", "output": "instances.0.output"}
    assert records.renamed(row, columns) == {"instruction": Q, "output": A, "a.b": 1}
    for missing in ("instances.5.output", "instances.x", "instances.0.none", "nothing.0", "id.0"):
        assert "output" not in records.renamed(row, {"output": missing})
    assert records.renamed(row, {"text": "a.b"})["text"] == 1  # a real name comes first


def test_columns_are_renamed_and_the_rest_passes_unchanged() -> None:
    row = {"question": Q, "answer": A, "id": 3}
    columns = {"prompt": "question", "completion": "answer"}
    assert records.renamed(row, columns) == {"prompt": Q, "completion": A, "id": 3}
    assert row == {"question": Q, "answer": A, "id": 3}


def test_columns_can_change_places() -> None:
    row = {"prompt": A, "completion": Q}
    swapped = records.renamed(row, {"prompt": "completion", "completion": "prompt"})
    assert swapped == {"prompt": Q, "completion": A}


def test_a_column_that_a_row_lacks_is_missing_and_not_invented() -> None:
    row = records.renamed({"question": Q}, {"prompt": "question", "completion": "answer"})
    assert row == {"prompt": Q}
    assert refusal(row, "prompt_completion") == "column 'completion' is missing"


# --- whose turn it is


@pytest.mark.parametrize("turns", [1, 2, 5])
@pytest.mark.parametrize("system", [False, True])
def test_conversations_may_be_long_and_begin_with_a_system_turn(turns: int, system: bool) -> None:
    roles = ["system"] * system + ["user", "assistant"] * turns
    record = records.parse(chat(*roles), "messages")
    assert [turn.role for turn in record.turns] == roles
    assert [turn.content for turn in record.turns] == [f"{r} {n}" for n, r in enumerate(roles)]


@pytest.mark.parametrize(
    ("roles", "part"),
    [
        ([], "there are no turns in 'messages'"),
        (["user"], "there is no assistant turn"),
        (["system"], "there is no assistant turn"),
        (["user", "user"], "there is no assistant turn"),
        (
            ["user", "assistant", "user"],
            "turn 3 of 'messages' is 'user', but the last must be assistant",
        ),
        (
            ["assistant"],
            "turn 1 of 'messages' is 'assistant'; at the beginning may only stand system or user",
        ),
        (["assistant", "user", "assistant"], "turn 1 of 'messages' is 'assistant'"),
        (["tool", "assistant"], "turn 1 of 'messages' is 'tool'"),
        (
            ["user", "user", "assistant"],
            "turn 2 of 'messages' is 'user'; after user may only stand assistant",
        ),
        (
            ["system", "assistant"],
            "turn 2 of 'messages' is 'assistant'; after system may only stand user",
        ),
        (["system", "user", "user", "assistant"], "turn 3 of 'messages' is 'user'"),
        (
            ["user", "assistant", "assistant"],
            "turn 3 of 'messages' is 'assistant'; after assistant without tool_calls may only stand user",
        ),
        (
            ["user", "system", "assistant"],
            "turn 2 of 'messages' is 'system'; after user may only stand assistant",
        ),
        (
            ["system", "system", "user", "assistant"],
            "turn 2 of 'messages' is 'system'; after system",
        ),
        (["system", "developer", "user", "assistant"], "turn 2 of 'messages' is 'system'"),
        (
            ["user", "assistant", "tool", "assistant"],
            "turn 3 of 'messages' is 'tool'; after assistant without tool_calls",
        ),
        (
            ["user", "bot"],
            "turn 2 of 'messages' has the role 'bot'; known are system, developer, user, assistant, tool",
        ),
        (["User", "assistant"], "turn 1 of 'messages' has the role 'User'"),
    ],
)
def test_a_conversation_in_disorder_is_refused(roles: list[str], part: str) -> None:
    assert part in refusal(chat(*roles), "messages")


def test_what_stands_in_place_of_a_role_is_not_shown_unless_it_is_a_name() -> None:
    for role in (SECRET, "x" * 33, "line\n"):
        row = {"messages": [{"role": role, "content": Q}, CONVERSATION[1]]}
        message = refusal(row, "messages")
        assert "turn 1 of 'messages' has a role that is no name; known are" in message
        assert role not in message


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("user", "user"), ("gpt", "assistant"), ("chatgpt", "assistant")],
)
def test_sharegpt_speakers_are_known_by_several_names(name: str, role: str) -> None:
    rest = [] if role == "assistant" else [{"from": "gpt", "value": A}]
    first = [{"from": "human", "value": Q}] if role == "assistant" else []
    row = {"conversations": [*first, {"from": name, "value": "x"}, *rest]}
    assert Turn(role, "x") in records.parse(row, "sharegpt").turns


def test_an_unknown_sharegpt_speaker_is_refused_with_the_known_ones() -> None:
    row = {"conversations": [{"from": "narrator", "value": Q}, *SHARED]}
    assert "'narrator'" in refusal(row, "sharegpt") and "human" in refusal(row, "sharegpt")


@pytest.mark.parametrize("form", ["sharegpt", "alpaca"])
def test_a_system_column_becomes_the_first_turn(form: Any) -> None:
    row = WHOLE[form] | {"system": "Be brief."}
    assert records.parse(row, form).turns == (Turn("system", "Be brief."), *PAIR)


@pytest.mark.parametrize("empty", ["", None, "  ", "\n"])
@pytest.mark.parametrize("column", ["input", "system"])
def test_an_optional_column_may_be_empty(column: str, empty: str | None) -> None:
    assert records.parse(WHOLE["alpaca"] | {column: empty}, "alpaca").turns == PAIR


def test_an_alpaca_input_belongs_to_the_question() -> None:
    record = records.parse(WHOLE["alpaca"] | {"input": "Count."}, "alpaca")
    assert record.turns == (Turn("user", f"{Q}\n\nCount."), Turn("assistant", A))


# --- rows that would train something else than meant


@pytest.mark.parametrize("form", list(WHOLE))
def test_each_required_column_must_be_there(form: Any) -> None:
    for column in records.REQUIRED[form]:
        row = {key: value for key, value in WHOLE[form].items() if key != column}
        assert refusal(row, form) == f"column {column!r} is missing"
        assert refusal(row | {column: None}, form) == f"column {column!r} is missing"


@pytest.mark.parametrize(("form", "other"), list(itertools.permutations(WHOLE, 2)))
def test_a_row_of_another_format_is_called_that_without_showing_it(form: Any, other: Any) -> None:
    absent = dict.fromkeys(records.REQUIRED[form])  # as pyarrow reads a file of mixed rows
    for row in (WHOLE[other], WHOLE[other] | absent):
        columns = ", ".join(records.REQUIRED[other])
        expected = f"has the columns ({columns}), which is {other}; one format a file"
        assert refusal(row, form) == expected


@pytest.mark.parametrize("bad", [3, 2.5, True, [], {}, [{"type": "text", "text": SECRET}]])
@pytest.mark.parametrize(
    ("form", "column"),
    [
        ("text", "text"),
        ("prompt_completion", "prompt"),
        ("prompt_completion", "completion"),
        ("alpaca", "instruction"),
        ("alpaca", "output"),
    ],
)
def test_what_is_no_text_is_named_by_column_and_kind(form: Any, column: str, bad: object) -> None:
    message = refusal(WHOLE[form] | {column: bad}, form)
    assert column in message and "must be text" in message
    assert SECRET not in message


@pytest.mark.parametrize("bad", [3, True, {"type": "text", "text": SECRET}])
def test_a_turn_whose_content_is_no_text_is_named_by_its_number(bad: object) -> None:
    row = {"messages": [CONVERSATION[0], {"role": "assistant", "content": bad}]}
    message = refusal(row, "messages")
    assert "turn 2 of 'messages'" in message and "must be text" in message
    assert SECRET not in message


def test_a_role_that_is_no_text_is_named_by_its_turn() -> None:
    row = {"messages": [CONVERSATION[0], {"role": 3, "content": A}]}
    assert refusal(row, "messages") == "turn 2 of 'messages', 'role' must be text, found int"


@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u00a0"])
@pytest.mark.parametrize(
    ("form", "column"),
    [("prompt_completion", "completion"), ("alpaca", "output"), ("text", "text")],
)
def test_an_empty_answer_is_refused(form: Any, column: str, empty: str) -> None:
    assert refusal(WHOLE[form] | {column: empty}, form) == f"{column} is empty"


@pytest.mark.parametrize("empty", ["", " ", "\n\t", [], [{"type": "text", "text": ""}]])
def test_an_empty_turn_is_refused(empty: object) -> None:
    asked = {"messages": [{"role": "user", "content": empty}, CONVERSATION[1]]}
    assert refusal(asked, "messages") == "turn 1 of 'messages' is empty"
    answered = {"messages": [CONVERSATION[0], {"role": "assistant", "content": empty}]}
    assert refusal(answered, "messages") == "turn 2 of 'messages': the answer is empty"


def test_missing_content_is_called_missing() -> None:
    for turn in ({"role": "assistant"}, {"role": "assistant", "content": None, "tool_calls": None}):
        row = {"messages": [CONVERSATION[0], turn]}
        assert refusal(row, "messages") == "turn 2 of 'messages': content is missing"
    row = {"conversations": [SHARED[0], {"from": "gpt", "value": None}]}
    assert refusal(row, "sharegpt") == "turn 2 of 'conversations': value is missing"


@pytest.mark.parametrize(
    "turns",
    [SECRET, {"role": "user"}, None, 3, [SECRET], [3], [{"role": "user"}], [{"content": SECRET}]],
)
def test_what_is_no_list_of_turns_is_refused_without_showing_it(turns: object) -> None:
    message = refusal({"messages": turns}, "messages")
    assert "'messages'" in message
    assert SECRET not in message


def test_half_a_surrogate_pair_is_refused() -> None:
    assert "surrogate" in refusal({"text": "broken \ud83d here"}, "text")


def test_columns_that_are_not_ours_are_dropped() -> None:
    """TRL lets a row's chat_template_kwargs replace the template."""
    row = WHOLE["messages"] | {"chat_template_kwargs": {"chat_template": SECRET}, "id": SECRET}
    assert records.parse(row, "messages") == records.parse(WHOLE["messages"], "messages")
    turns = [turn | {"chat_template": SECRET} for turn in CONVERSATION]
    assert records.parse({"messages": turns}, "messages").turns == PAIR


# --- tools: who calls, who answers


AREA = {"name": "area", "parameters": {"type": "object", "properties": {"r": {"type": "number"}}}}
TOOL = {"type": "function", "function": AREA}
CALL = {"type": "function", "function": {"name": "area", "arguments": {"r": 4, "unit": "m"}}}
TEXT_CALL = {"name": "area", "arguments": '{"r": 4, "unit": "m"}'}
CALLING = Turn("assistant", "", fields={"tool_calls": [CALL]})


def with_turn(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [CONVERSATION[0], *turns]}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": " \n", "tool_calls": [CALL["function"]]},
        {"content": "", "tool_calls": [{"type": "function", "function": TEXT_CALL}]},
        {"content": "", "tool_calls": json.dumps([CALL])},
        {"content": None, "function_call": TEXT_CALL},
        {"content": [{"type": "tool_call", "value": json.dumps(TEXT_CALL)}]},
        {"content": [{"type": "tool_call", "value": CALL["function"], "text": None}]},
        {"content": None, "tool_calls": [CALL | {"id": None, "index": None}], "name": None},
    ],
)
def test_a_tool_call_means_the_same_in_every_spelling(turn: dict[str, Any]) -> None:
    record = records.parse(with_turn({"role": "assistant", **turn}), "messages")
    assert record.turns == (PAIR[0], CALLING)


@pytest.mark.parametrize("value", [TEXT_CALL, [TEXT_CALL], CALL["function"]])
def test_a_sharegpt_function_call_is_the_assistants(value: object) -> None:
    for spelled in (value, json.dumps(value)):
        turns = [SHARED[0], {"from": "function_call", "value": spelled}]
        assert records.parse({"conversations": turns}, "sharegpt").turns == (PAIR[0], CALLING)


def test_calls_in_several_places_are_all_kept_in_order() -> None:
    names = ["a", "b", "c"]
    parts = [{"type": "tool_call", "value": {"name": n, "arguments": {}}} for n in names[:2]]
    last = [{"id": "3", "function": {"name": "c", "arguments": ""}}]
    turn = {"role": "assistant", "content": parts, "tool_calls": last}
    calls = records.parse(with_turn(turn), "messages").turns[-1].fields["tool_calls"]
    assert [call["function"]["name"] for call in calls] == names
    assert [call["function"]["arguments"] for call in calls] == [{}, {}, {}]
    assert [call.get("id") for call in calls] == [None, None, "3"]


def test_a_message_is_given_to_the_template_with_its_fields() -> None:
    call = CALL | {"id": "one"}
    said = {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "Hm.",
        "tool_calls": [call],
    }
    result = {"role": "tool", "content": "50.27", "tool_call_id": "one", "name": "area"}
    record = records.parse(with_turn(said, result, CONVERSATION[1]), "messages")
    assert [t.message() for t in record.turns] == [CONVERSATION[0], said, result, CONVERSATION[1]]


def test_pyarrows_none_is_as_if_absent() -> None:
    fields = ("tool_calls", "tool_call_id", "name", "reasoning_content", "train", "weight")
    turns = [turn | dict.fromkeys(fields) for turn in CONVERSATION]
    row = {"messages": turns, "tools": None}
    assert records.parse(row, "messages") == records.parse(WHOLE["messages"], "messages")
    padded = {"name": "area", "arguments": {"r": 4, "unit": "m", "depth": None}}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": padded}]}
    assert records.parse(with_turn(turn), "messages").turns[-1] == CALLING


def test_a_null_that_json_text_spells_out_is_kept() -> None:
    call = {"name": "area", "arguments": '{"r": null}'}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    made = records.parse(with_turn(turn), "messages").turns[-1].fields["tool_calls"][0]
    assert made["function"]["arguments"] == {"r": None}


@pytest.mark.parametrize(
    "tools", [[TOOL], [AREA], json.dumps([TOOL]), [{"type": "function", **AREA}]]
)
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_tools_are_wrapped_functions_however_they_are_given(form: Any, tools: object) -> None:
    assert records.parse(WHOLE[form] | {"tools": tools}, form).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_no_tools_are_no_tools(tools: object) -> None:
    record = records.parse(WHOLE["messages"] | {"tools": tools}, "messages")
    assert record == records.parse(WHOLE["messages"], "messages") and record.tools == ()


@pytest.mark.parametrize(
    ("tools", "part"),
    [
        (SECRET, "tools is not valid JSON"),
        ({"name": SECRET}, "tools must be a list of functions"),
        ([SECRET], "item 1 of tools is no function with a name"),
        ([AREA, {"type": "web_search"}], "item 2 of tools"),
        ([{"name": "x", "parameters": b"bytes"}], "tools is not valid JSON"),
        ([{"name": "half \ud83d"}], "tools is not valid JSON"),
        ('[{"name": "x", "parameters": NaN}]', "tools is not valid JSON"),
        ("[" * 100_000, "tools is not valid JSON"),
    ],
)
def test_malformed_tools_are_refused_without_showing_them(tools: object, part: str) -> None:
    message = refusal(WHOLE["messages"] | {"tools": tools}, "messages")
    assert part in message and SECRET not in message


@pytest.mark.parametrize(
    ("calls", "part"),
    [
        (SECRET, "the tool call is not valid JSON"),
        ([SECRET], "a tool call needs 'name' and 'arguments'"),
        ([{"name": SECRET}], "a tool call needs 'name' and 'arguments'"),
        ([{"name": 3, "arguments": {}}], "a tool call's name must be text, found int"),
        ([{"name": "x", "arguments": SECRET}], "a tool call's arguments is not valid JSON"),
        ([{"name": "x", "arguments": "[1]"}], "a tool call's arguments must be a mapping"),
        ([{"name": "x", "arguments": [SECRET]}], "a tool call's arguments must be a mapping"),
        ([{"name": "x", "arguments": '{"a": "\\ud83d"}'}], "arguments is not valid JSON"),
        ([{"id": 3, **TEXT_CALL}], "a tool call's id must be text, found int"),
    ],
)
def test_malformed_tool_calls_are_refused_without_showing_them(calls: object, part: str) -> None:
    message = refusal(
        with_turn({"role": "assistant", "content": None, "tool_calls": calls}), "messages"
    )
    assert message.startswith("turn 2 of 'messages': ") and part in message
    assert SECRET not in message


@pytest.mark.parametrize("field", ["tool_call_id", "name", "reasoning_content"])
def test_a_field_that_is_no_text_is_named(field: str) -> None:
    message = refusal(with_turn({**CONVERSATION[1], field: 3}), "messages")
    assert message == f"turn 2 of 'messages', {field!r} must be text, found int"


CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "50.27"}


@pytest.mark.parametrize(
    "turns",
    [
        [CALLS],
        [CALLS, RESULT, CONVERSATION[1]],
        [CALLS, RESULT, RESULT, CALLS, RESULT, CONVERSATION[1]],
        [CALLS, CONVERSATION[0], CONVERSATION[1]],
        [CALLS, {"role": "function", "name": "area", "content": "50.27"}, CONVERSATION[1]],
    ],
)
def test_tool_results_stand_between_the_call_and_the_answer(turns: list[dict[str, Any]]) -> None:
    known = {"function": "tool"}
    roles = [turn.role for turn in records.parse(with_turn(*turns), "messages").turns]
    assert roles == ["user", *(known.get(turn["role"], turn["role"]) for turn in turns)]


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        (
            [RESULT, CONVERSATION[1]],
            "turn 2 of 'messages' is 'tool'; after user may only stand assistant",
        ),
        ([CALLS, RESULT], "turn 3 of 'messages' is 'tool', but the last must be assistant"),
        (
            [CALLS, RESULT, CONVERSATION[0], CONVERSATION[1]],
            "turn 4 of 'messages' is 'user'; after tool may only stand tool or assistant",
        ),
        (
            [CALLS, CONVERSATION[1]],
            "turn 3 of 'messages' is 'assistant'; after assistant with tool_calls may only stand tool",
        ),
        (
            [CALLS, {"role": "tool", "content": ""}, CONVERSATION[1]],
            "turn 3 of 'messages' is empty",
        ),
        (
            [{"role": "user", "content": Q, "tool_calls": [CALL]}],
            "turn 2 of 'messages' is 'user'; only assistant may have tool_calls",
        ),
        (
            [RESULT | {"reasoning_content": SECRET}],
            "turn 2 of 'messages' is 'tool'; only assistant may have",
        ),
    ],
)
def test_tool_turns_in_disorder_are_refused(turns: list[dict[str, Any]], part: str) -> None:
    message = refusal(with_turn(*turns), "messages")
    assert part in message and SECRET not in message


@pytest.mark.parametrize("name", ["observation", "tool", "function_response"])
def test_a_sharegpt_observation_is_the_tools(name: str) -> None:
    call = {"from": "function_call", "value": json.dumps(TEXT_CALL)}
    row = {"conversations": [SHARED[0], call, {"from": name, "value": "50.27"}, SHARED[1]]}
    turns = records.parse(row, "sharegpt").turns
    assert turns == (PAIR[0], CALLING, Turn("tool", "50.27"), PAIR[1])


def test_a_turn_is_numbered_with_the_system_column_and_says_so() -> None:
    row = {"conversations": [SHARED[1]], "system": "Be brief."}
    message = refusal(row, "sharegpt")
    assert message.startswith("turn 2 of 'conversations' (the system column counts as turn 1) is")


# --- content in parts


def test_parts_are_joined_and_reasoning_stands_apart() -> None:
    parts = [
        {"type": "reasoning", "value": "Hm. "},
        {"type": "text", "text": "Fo", "value": None},
        {"type": "reasoning", "text": "Yes."},
        {"type": "text", "value": "ur."},
    ]
    turn = records.parse(with_turn({"role": "assistant", "content": parts}), "messages").turns[-1]
    assert turn == Turn("assistant", A, fields={"reasoning_content": "Hm. Yes."})


def test_reasoning_alone_is_no_answer() -> None:
    parts = [{"type": "reasoning", "value": "Hm."}]
    message = refusal(with_turn({"role": "assistant", "content": parts}), "messages")
    assert message == "turn 2 of 'messages': the answer is empty"


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (
            {"type": "image", "image": SECRET},
            "has the type 'image'; known are text, reasoning, tool_call",
        ),
        ({"type": "image_url", "image_url": {"url": SECRET}}, "has the type 'image_url'"),
        ({"type": SECRET}, "has a type that is no name"),
        ({"type": ["text"]}, "has a type that is no name"),
        ({"text": SECRET}, "has no 'type'"),
        (SECRET, "has no 'type'"),
        ({"type": "text"}, "must have a text as 'text' or 'value'"),
        ({"type": "text", "text": {"secret": SECRET}}, "must have a text as 'text' or 'value'"),
        ({"type": "tool_call", "value": SECRET}, "the tool call is not valid JSON"),
    ],
)
def test_a_part_of_another_kind_is_refused_by_its_type(bad: object, part: str) -> None:
    content = [{"type": "text", "text": A}, bad]
    message = refusal(with_turn({"role": "assistant", "content": content}), "messages")
    assert message.startswith("turn 2 of 'messages', part 2") and part in message
    assert SECRET not in message


# --- what the row itself says of training


@pytest.mark.parametrize(
    ("says", "train"),
    [
        ({}, None), ({"train": True}, True), ({"train": False}, False), ({"weight": 1}, True),
        ({"weight": 0}, False), ({"weight": 1.0}, True), ({"weight": 0, "train": False}, False),
    ],
)  # fmt: skip
def test_a_turn_may_say_whether_it_trains(says: dict[str, Any], train: bool | None) -> None:
    row = {"messages": [*CONVERSATION, CONVERSATION[0], CONVERSATION[1] | says]}
    assert [turn.train for turn in records.parse(row, "messages").turns] == [None] * 3 + [train]
    shared = {"conversations": [*SHARED, SHARED[0], SHARED[1] | says]}
    assert records.parse(shared, "sharegpt").turns[-1].train is train


@pytest.mark.parametrize(
    ("says", "part"),
    [
        ({"train": "yes"}, "'train' must be true or false, found str"),
        ({"train": 1}, "'train' must be true or false, found int"),
        ({"weight": 0.5}, "only 0 and 1 are known as 'weight'"),
        ({"weight": -1}, "only 0 and 1 are known as 'weight'"),
        ({"weight": "1"}, "only 0 and 1 are known as 'weight'"),
        ({"train": True, "weight": 0}, "'train' and 'weight' contradict each other"),
    ],
)
def test_an_unknown_mark_is_refused(says: dict[str, Any], part: str) -> None:
    message = refusal(with_turn(CONVERSATION[1] | says), "messages")
    assert message == f"turn 2 of 'messages': {part}"


def test_only_the_assistants_turns_may_say_that_they_train() -> None:
    for says, part in (({"train": True}, "'train' is true"), ({"weight": 1}, "'weight' is 1")):
        row = {"messages": [CONVERSATION[0] | says, CONVERSATION[1]]}
        assert f"turn 1 of 'messages': {part}, but it is 'user'" in refusal(row, "messages")
    for says in ({"train": False}, {"weight": 0}):
        row = {"messages": [CONVERSATION[0] | says, CONVERSATION[1]]}
        assert [turn.train for turn in records.parse(row, "messages").turns] == [False, None]


def test_a_row_whose_every_answer_says_not_to_train_is_refused() -> None:
    quiet = CONVERSATION[1] | {"train": False}
    row = {"messages": [CONVERSATION[0], quiet, CONVERSATION[0], CONVERSATION[1] | {"weight": 0}]}
    assert "every assistant turn says train: false" in refusal(row, "messages")
    row = {"messages": [CONVERSATION[0], quiet, *CONVERSATION]}
    assert [turn.train for turn in records.parse(row, "messages").turns] == [
        None,
        False,
        None,
        None,
    ]


# --- where the prompt ends


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    prompt = [{"role": "developer", "content": "Be brief."}, *CONVERSATION, CONVERSATION[0]]
    row = {"prompt": prompt, "completion": [CALLS, RESULT, CONVERSATION[1]], "tools": [AREA]}
    record = records.parse(row, "prompt_completion")
    expected = (
        Turn("system", "Be brief."),
        *PAIR,
        PAIR[0],
        CALLING,
        Turn("tool", "50.27"),
        PAIR[1],
    )
    assert record == Record(expected, tools=(TOOL,), prompt_turns=4)
    assert record.needs_template and record.plain_prompt is None


@pytest.mark.parametrize(
    ("prompt", "completion", "part"),
    [
        (
            CONVERSATION[:1],
            A,
            "prompt is a list and the other is not; prompt and completion must be text",
        ),
        (Q, CONVERSATION[1:], "completion is a list and the other is not"),
        ([], CONVERSATION[1:], "there are no turns in 'prompt'"),
        (CONVERSATION[:1], [], "there are no turns in 'completion'"),
        (CONVERSATION[:1], CONVERSATION[:1], "there is no assistant turn"),
        (
            CONVERSATION,
            CONVERSATION[1:],
            "turn 3 of 'prompt' and 'completion' together is 'assistant'",
        ),
        (
            CONVERSATION[:1],
            [{"role": "assistant", "content": ""}],
            "turn 1 of 'completion': the answer is empty",
        ),
    ],
)
def test_a_prompt_and_a_completion_that_do_not_go_together_are_refused(
    prompt: object, completion: object, part: str
) -> None:
    message = refusal({"prompt": prompt, "completion": completion}, "prompt_completion")
    assert part in message and Q not in message


def test_tools_need_messages_and_not_texts() -> None:
    assert "tools need" in refusal(
        WHOLE["prompt_completion"] | {"tools": [AREA]}, "prompt_completion"
    )


@pytest.mark.parametrize(
    ("form", "more", "turns"),
    [
        ("text", {}, 0),
        ("messages", {}, 0),
        ("sharegpt", {"system": "Be brief."}, 0),
        ("prompt_completion", {}, 1),
        ("alpaca", {}, 1),
        ("alpaca", {"input": "Count.", "system": "Be brief."}, 2),
    ],
)
def test_a_record_knows_how_many_turns_are_its_prompt(
    form: Any, more: dict[str, str], turns: int
) -> None:
    assert records.parse(WHOLE[form] | more, form).prompt_turns == turns


# --- to JSON and back


RICH = {
    "messages": [
        {"role": "system", "content": "naïve 漢字 🙂"},
        CONVERSATION[0],
        CALLS | {"train": False, "reasoning_content": "Hm."},
        RESULT | {"tool_call_id": "one"},
        CONVERSATION[1] | {"weight": 1},
    ],
    "tools": [TOOL],
}


@pytest.mark.parametrize("form", [*WHOLE, "rich", "listed"])
def test_a_record_comes_back_from_json_as_it_was(form: Any) -> None:
    rows: dict[str, tuple[Any, dict[str, Any]]] = {
        "rich": ("messages", RICH),
        "listed": ("prompt_completion", {"prompt": RICH["messages"][:2], "completion": [CALLS]}),
    }
    name, row = rows.get(form, (form, WHOLE.get(form, {})))
    record = records.parse(row, name)
    assert records.from_json(record.to_json()) == record
    again = records.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record and hash(again) == hash(record)
    assert [list(turn.message()) for turn in again.turns] == [
        list(t.message()) for t in record.turns
    ]


def test_a_record_does_not_change_with_the_row_that_it_came_from() -> None:
    row = json.loads(json.dumps(RICH))
    record = records.parse(row, "messages")
    row["messages"][2]["tool_calls"][0]["function"]["arguments"]["r"] = 5
    row["tools"][0]["function"]["name"] = "volume"
    assert record == records.parse(RICH, "messages")


# --- real files


def test_every_row_of_a_real_tool_calling_file_in_sharegpt_parses(real_data: Path) -> None:
    path = real_data / "llamafactory_demo" / "glaive_toolcall_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        record = records.parse(row, records.detect(row, path.name))
        assert [tool["function"] for tool in record.tools] == json.loads(row["tools"])
        assert len(record.turns) == len(row["conversations"])
        for turn, said in zip(record.turns, row["conversations"], strict=True):
            if said["from"] == "function_call":
                called = [call["function"] for call in turn.fields["tool_calls"]]
                assert called == [json.loads(said["value"])]
            else:
                assert turn.content == said["value"] and not turn.fields
    assert len(rows) == 300


def test_every_row_of_a_real_file_of_reasoning_and_tools_parses(real_data: Path) -> None:
    path = real_data / "llamafactory_demo" / "reason_tool_use_demo_50.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        record = records.parse(row, records.detect(row, path.name))
        assert list(record.tools) == json.loads(row["tools"])
        for turn, said in zip(record.turns, row["messages"], strict=True):
            parts = [(part["type"], part["value"]) for part in said["content"]]
            calls = [json.loads(value) for kind, value in parts if kind == "tool_call"]
            assert [c["function"] for c in turn.fields.get("tool_calls", [])] == calls
            assert turn.content == "".join(value for kind, value in parts if kind == "text")
            reasoning = "".join(value for kind, value in parts if kind == "reasoning")
            assert turn.fields.get("reasoning_content", "") == reasoning
        assert records.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert len(rows) == 50


# --- without a template


@pytest.mark.parametrize(
    ("form", "row", "needs"),
    [
        ("text", {}, False),
        ("prompt_completion", {}, False),
        ("alpaca", {}, False),
        ("alpaca", {"system": "Be brief."}, True),
        ("messages", {}, True),
        ("sharegpt", {}, True),
    ],
)
def test_only_conversations_need_a_chat_template(
    form: Any, row: dict[str, str], needs: bool
) -> None:
    assert records.parse(WHOLE[form] | row, form).needs_template is needs


def test_a_plain_prompt_is_the_question_itself() -> None:
    record = records.parse(WHOLE["prompt_completion"], "prompt_completion")
    assert record.plain_prompt == Q


@pytest.mark.parametrize("given", ["", "Count."])
def test_a_plain_alpaca_prompt_has_the_headings_of_the_data_set(given: str) -> None:
    prompt = records.parse(WHOLE["alpaca"] | {"input": given}, "alpaca").plain_prompt or ""
    headings = [line for line in prompt.splitlines() if line.startswith("### ")]
    inner = ["### Input:"] if given else []
    assert headings == ["### Instruction:", *inner, "### Response:"]
    assert prompt.endswith("\n") and Q in prompt and given in prompt


# --- fingerprints


def test_equal_content_has_equal_fingerprints_in_any_format() -> None:
    prints = {records.fingerprint(records.parse(WHOLE[f], f)) for f in WHOLE if f != "text"}  # type: ignore[arg-type]
    assert len(prints) == 1


ADD = {"instruction": "Add the numbers.", "input": "2, 2", "output": A}
LONG = [
    {"role": "system", "content": "Be brief."},
    *CONVERSATION,
    {"role": "user", "content": "naïve 漢字 🙂?"},
    {"role": "assistant", "content": " Yes.\n"},
]


@pytest.mark.parametrize(
    ("digest", "form", "row"),
    [
        (
            "e5fdf84f39650622736a208cdfefb7336f31812426913f37e46d226c0e8c0b51",
            "text",
            {"text": "Once upon a time, naïve 漢字 🙂.\n"},
        ),
        ("9a1a6cc9546ca446672d8aaad50864ea5d995e28f26d2b184e374760314a6cb9", "alpaca", ADD),
        (
            "792ddab3d2cd559400c38910d394b3f5bd567829d4acad93a620ed4bee7dad80",
            "alpaca",
            ADD | {"system": "Be brief."},
        ),
        (
            "4e9270347a309c85042f0c7a07d1cda7bb71663f9f3914d7715e33f73b0de210",
            "prompt_completion",
            WHOLE["prompt_completion"],
        ),
        (
            "94856bfc2349b82dcbdf7489fbd4788fc62a37c35681ce3fba7216f22acea9a4",
            "messages",
            {"messages": LONG},
        ),
    ],
)
def test_fingerprints_are_those_of_the_first_release(
    digest: str, form: Any, row: dict[str, Any]
) -> None:
    """Which rows are held out follows from them. Computed by the code before it knew of tools."""
    assert records.fingerprint(records.parse(row, form)) == digest


def test_what_the_model_is_shown_besides_makes_a_fingerprint_differ() -> None:
    called = with_turn(CALLS, RESULT, CONVERSATION[1])
    other = CALLS | {"tool_calls": [{"name": "area", "arguments": {"r": 5, "unit": "m"}}]}
    rows = [
        WHOLE["messages"],
        WHOLE["messages"] | {"tools": [TOOL]},
        WHOLE["messages"] | {"tools": [TOOL, TOOL]},
        with_turn(CONVERSATION[1] | {"reasoning_content": "Hm."}),
        with_turn(CONVERSATION[1] | {"name": "Hm."}),
        called,
        called | {"tools": [TOOL]},
        with_turn(other, RESULT, CONVERSATION[1]),
    ]
    prints = {records.fingerprint(records.parse(row, "messages")) for row in rows}
    assert len(prints) == len(rows)


def test_what_trains_and_where_the_prompt_ends_do_not_matter_to_a_fingerprint() -> None:
    turns = [CONVERSATION[0] | {"train": False}, CONVERSATION[1] | {"weight": 1}]
    listed = {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}
    prints = {
        records.fingerprint(records.parse(WHOLE["messages"], "messages")),
        records.fingerprint(records.parse({"messages": turns}, "messages")),
        records.fingerprint(records.parse(listed, "prompt_completion")),
    }
    assert len(prints) == 1


def test_the_order_of_arguments_does_not_matter_to_a_fingerprint() -> None:
    turned = CALLS | {"tool_calls": [{"arguments": {"unit": "m", "r": 4}, "name": "area"}]}
    prints = {records.fingerprint(records.parse(with_turn(c), "messages")) for c in (CALLS, turned)}
    assert len(prints) == 1


def test_different_content_has_different_fingerprints() -> None:
    rows: list[tuple[Any, dict[str, Any]]] = [
        ("text", {"text": Q}),
        ("text", {"text": Q + " "}),
        ("text", {"text": f'[["user", "{Q}"], ["assistant", "{A}"]]'}),
        ("prompt_completion", {"prompt": Q, "completion": A}),
        ("prompt_completion", {"prompt": A, "completion": Q}),
        ("prompt_completion", {"prompt": Q + A, "completion": A}),
        ("alpaca", WHOLE["alpaca"] | {"system": "Be brief."}),
        ("messages", chat("user", "assistant", "user", "assistant")),
    ]
    prints = [records.fingerprint(records.parse(row, form)) for form, row in rows]
    assert len(set(prints)) == len(rows)
    assert all(len(print_) == 64 and int(print_, 16) >= 0 for print_ in prints)
