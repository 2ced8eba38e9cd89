"""Five shapes of a row become one: who said what, and what is to be learned."""

from __future__ import annotations

import itertools
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
        ([], "there are no turns"),
        (["user"], "the last turn is not the assistant's"),
        (["system"], "there is no answer"),
        (["system", "user"], "there is no answer"),
        (["user", "assistant", "user"], "there is no answer"),
        (["assistant"], "do not alternate (turn 1 is 'assistant')"),
        (["assistant", "user", "assistant"], "(turn 1 is 'assistant')"),
        (["user", "user", "assistant"], "(turn 2 is 'user')"),
        (["system", "user", "user", "assistant"], "(turn 3 is 'user')"),
        (["user", "assistant", "assistant"], "(turn 3 is 'assistant')"),
        (["user", "system", "assistant"], "a system turn may only come first"),
        (["system", "system", "user", "assistant"], "a system turn may only come first"),
        (["user", "bot"], "known are system, user, assistant"),
        (["user", "assistant", "tool", "assistant"], "turn 3"),
        (["User", "assistant"], "turn 1"),
    ],
)
def test_a_conversation_in_disorder_is_refused(roles: list[str], part: str) -> None:
    assert part in refusal(chat(*roles), "messages")


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


@pytest.mark.parametrize("bad", [None, 3, 2.5, True, [], {}, [{"type": "text", "text": SECRET}]])
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


@pytest.mark.parametrize("bad", [None, 3, [{"type": "text", "text": SECRET}]])
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


def test_an_empty_turn_is_refused() -> None:
    row = {"messages": [CONVERSATION[0], {"role": "assistant", "content": " "}]}
    assert "turn 2 of 'messages' is empty" in refusal(row, "messages")


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
    row = WHOLE["messages"] | {"chat_template_kwargs": {"chat_template": SECRET}, "tools": [SECRET]}
    assert records.parse(row, "messages") == records.parse(WHOLE["messages"], "messages")


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
