"""A row that is too long loses what can be missed, never an answer's end; a text falls into pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import EVERY, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora import records
from qlora.errors import DataError
from qlora.records import Record, Turn
from qlora.rendering import IGNORED, Encoded, Renderer
from qlora.shortening import GAP, pieces, shortened

LONG = "The user asks and asks, and the assistant has to read all of it. " * 8


def chat(name: str = "qwen2.5", **asked) -> Renderer:
    return Renderer(tokenizer_of(name), chat=True, **asked)


def plain(name: str = "zephyr", **asked) -> Renderer:
    return Renderer(tokenizer_of(name), chat=False, **asked)


def size(made: Renderer, record: Record) -> int:
    return len(made.encode(record).input_ids)


def text(made: Renderer, row: Encoded) -> str:
    return made.tok.backend_tokenizer.decode(row.input_ids, skip_special_tokens=False)


def said(made: Renderer, row: Encoded) -> list[str]:
    decode = made.tok.backend_tokenizer.decode
    return [decode(row.input_ids[a:b], skip_special_tokens=False) for a, b in row.trained]


def exchange(number: int, length: int = 1) -> tuple[Turn, Turn]:
    return Turn("user", f"question {number} " * length), Turn("assistant", f"answer {number}")


THREE = Record((Turn("system", "Be brief."), *exchange(1), *exchange(2), *exchange(3)))
LAST = replace(THREE, turns=(THREE.turns[0], *THREE.turns[5:]))
LAST_TWO = replace(THREE, turns=(THREE.turns[0], *THREE.turns[3:]))


def test_early_exchanges_go_first_and_only_as_many_as_must():
    made = chat()
    assert shortened(made, THREE, size(made, THREE)) == made.encode(THREE)
    assert shortened(made, THREE, size(made, THREE) - 1) == made.encode(LAST_TWO)
    assert shortened(made, THREE, size(made, LAST_TWO)) == made.encode(LAST_TWO)
    assert shortened(made, THREE, size(made, LAST_TWO) - 1) == made.encode(LAST)
    assert shortened(made, THREE, size(made, LAST)) == made.encode(LAST)


def test_an_exchange_goes_with_its_tool_calls_and_results():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
    asked = (
        Turn("user", "How is it?"),
        Turn("assistant", "", fields={"tool_calls": [call]}),
        Turn("tool", "20 degrees"),
        Turn("assistant", "It has 20 degrees."),
    )
    made, record = chat(), Record((*asked, *exchange(2)))
    row = shortened(made, record, size(made, record) - 1)
    assert row == made.encode(Record(exchange(2)))


def test_what_belongs_to_the_prompt_stays_the_prompts():
    made, record = chat(), replace(THREE, prompt_turns=4)
    row = shortened(made, record, size(made, record) - 1)
    assert said(made, row) == ["answer 2<|im_end|>", "answer 3<|im_end|>"]
    row = shortened(made, replace(record, prompt_turns=6), size(made, record) - 1)
    assert said(made, row) == ["answer 3<|im_end|>"]


def test_then_the_middle_of_the_longest_text_that_is_no_answer_goes():
    made = chat()
    question = f"At the beginning. {LONG}At the end?"
    answer = "A long answer. " * 5
    record = Record(
        (Turn("system", "Be brief."), Turn("user", question), Turn("assistant", answer))
    )
    limit = size(made, record) // 2
    row = shortened(made, record, limit)
    shown = text(made, row)
    assert limit * 0.8 < len(row.input_ids) <= limit
    assert "Be brief.<|im_end|>" in shown and "user\nAt the beginning." in shown
    assert "At the end?<|im_end|>" in shown and shown.count(GAP) >= 1
    assert said(made, row) == [f"{answer}<|im_end|>"]


def test_a_long_system_turn_loses_its_middle_before_a_short_question_does():
    made = chat()
    record = Record((Turn("system", LONG), *exchange(1)))
    shown = text(made, shortened(made, record, size(made, record) - 40))
    assert "question 1 <|im_end|>" in shown and LONG not in shown and GAP in shown


def test_a_plain_prompt_loses_its_middle_too():
    row = {"prompt": f"At the beginning. {LONG}At the end?", "completion": " It is."}
    for made in (plain(), chat()):
        record = records.parse(row, "prompt_completion")
        limit = size(made, record) // 2
        found = shortened(made, record, limit)
        assert len(found.input_ids) <= limit and GAP in text(made, found)
        assert said(made, found) == [f" It is.{made.closing_text}"]
        assert "At the beginning." in text(made, found) and "At the end?" in text(made, found)


def test_a_plain_alpaca_row_keeps_its_headings():
    row = {"instruction": LONG, "output": "It is."}
    made = plain()
    record = records.parse(row, "alpaca")
    shown = text(made, shortened(made, record, size(made, record) // 2))
    assert "### Instruction:\nThe user" in shown and "### Response:\nIt is.</s>" in shown


@pytest.mark.parametrize("made", [chat(), plain()])
def test_a_row_whose_answer_alone_is_too_long_is_none(made):
    record = records.parse({"prompt": LONG, "completion": LONG}, "prompt_completion")
    assert shortened(made, record, size(made, record) // 3) is None


def test_a_row_that_would_keep_next_to_nothing_of_its_prompt_is_none():
    made, record = chat(), Record(exchange(1))
    assert shortened(made, record, size(made, record) - 1) is None


def test_an_exchange_is_not_taken_out_with_all_that_was_to_be_learned():
    turns = list(THREE.turns)
    turns[2] = replace(turns[2], train=True)
    for index in (4, 6):
        turns[index] = replace(turns[index], train=False)
    made, record = chat(), Record(tuple(turns))
    assert shortened(made, record, size(made, record) - 1) is None
    turns[1] = Turn("user", LONG)  # of which enough can go
    record = Record(tuple(turns))
    row = shortened(made, record, size(made, record) - 20)
    assert said(made, row) == ["answer 1<|im_end|>"] and GAP in text(made, row)


def test_a_text_keeps_its_beginning_and_its_end_of_text():
    made = plain()
    whole = made.encode(Record((), LONG))
    row = shortened(made, Record((), LONG), 20)
    assert row.input_ids == [*whole.input_ids[:19], made.tok.eos_token_id]
    assert row.labels == [IGNORED, *row.input_ids[1:]]


def test_a_text_that_fits_stays_as_it_is():
    made = plain()
    whole = made.encode(Record((), "Once upon a time."))
    for limit in (len(whole.input_ids), 1000):
        assert shortened(made, Record((), "Once upon a time."), limit) == whole


def test_pieces_have_no_straggler_of_one_token():
    row = Encoded(list(range(9)), ((1, 9),))
    assert [piece.input_ids for piece in pieces(row, 4)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    assert [piece.input_ids for piece in pieces(row, 9)] == [list(range(9))]
    assert [piece.labels for piece in pieces(row, 8)][1] == [IGNORED, 8]


# --- any row at all

SHORT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
WORDS = st.one_of(SHORT, st.tuples(SHORT, st.integers(1, 60)).map(lambda pair: pair[0] * pair[1]))
EXCHANGES = st.lists(
    st.tuples(WORDS, WORDS, st.sampled_from([None, None, True, False])), min_size=1, max_size=4
)


@given(
    name=st.sampled_from(sorted(EVERY)),
    exchanges=EXCHANGES,
    loss_on=st.sampled_from(["completions", "assistant", "last_assistant", "all"]),
    share=st.floats(0.1, 1.1),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_shortened_row_fits_and_has_the_last_of_what_was_learned(name, exchanges, loss_on, share):
    turns = []
    for question, answer, train in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer, train)]
    record, made = Record(tuple(turns)), chat(name, loss_on=loss_on)
    if not all(turn.content.strip() for turn in turns):
        return
    try:
        whole = made.encode(record)
    except DataError as error:
        assert "no token of it would train" in str(error)
        return
    limit = max(8, int(len(whole.input_ids) * share))
    row = shortened(made, record, limit)
    if row is None:
        assert len(whole.input_ids) > limit
        return
    assert len(row.input_ids) <= limit
    assert (row == whole) is (len(whole.input_ids) <= limit)
    assert row.input_ids[row.answers[-1].end - 1] == made.closing
    a, b = whole.trained[-1]
    c, d = row.trained[-1]
    assert row.input_ids[d - 1] == whole.input_ids[b - 1]
    if loss_on != "all":
        assert row.input_ids[d - 1] == made.closing
        assert row.input_ids[c:d] == whole.input_ids[a:b]  # a whole answer, as it was


@given(words=WORDS, limit=st.integers(8, 64), name=st.sampled_from(sorted(EVERY)))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_shortened_text_is_its_beginning_and_the_end_of_text(words, limit, name):
    if not words.strip():
        return
    made, record = plain(name), Record((), words)
    whole, row = made.encode(record), shortened(made, record, limit)
    assert len(row.input_ids) == min(limit, len(whole.input_ids))
    assert row.input_ids[:-1] == whole.input_ids[: len(row.input_ids) - 1]
    assert row.input_ids[-1] == row.labels[-1] == made.tok.eos_token_id
    assert row.labels == [IGNORED, *row.input_ids[1:]]


@given(length=st.integers(2, 300), limit=st.integers(3, 64))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_pieces_lose_and_double_no_token(length, limit):
    ids = list(range(length))
    parts = pieces(Encoded(ids, ((1, length),)), limit)
    assert [token for part in parts for token in part.input_ids] == ids
    assert all(2 <= len(part.input_ids) <= limit for part in parts)
    assert all(part.labels == [IGNORED, *part.input_ids[1:]] for part in parts)
    assert len(parts) == -(-length // limit)
