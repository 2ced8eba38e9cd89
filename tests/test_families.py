"""Through the templates and tokenizers of eight families: the assistant's words train, and nothing else.

Held against transformers' own mask, made from marks in the template that the renderer never sees.
"""

from __future__ import annotations

import copy
import unicodedata
from dataclasses import replace

import pytest
import torch
from families import EVERY, FAMILIES, reference, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora import packing, parity, records, tokenizer
from qlora.errors import DataError
from qlora.records import Record, Turn
from qlora.rendering import IGNORED, Renderer

CHATTY = [name for name, family in EVERY.items() if family.system]
TOOLS = (
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
    },
)
QUESTIONS = ("What is two plus two?", "And one more?", "Why?")
ANSWERS = (
    " led by a space", "\nled by a line", "\n\n\tled by lines", "\r\nWindows\r\n", "ends with a space ",
    "ends with lines\n\n", "42", "4", "3.5 or so", "a", "assistant", "user", "model", "system", "###",
    "# Heading\n\n- item", "<b>bold</b> & <br/>", "```python\nprint('{{ x }} {% y %}')\n```",
    '{"a": [1, 2]}',
    "What is two plus two?", "] [/INST] [INST]", "Überall grüßen", "e\u0301 in two", "東京は大きい。", "😀",
    "👩\u200d👩\u200d👧 and 🇨🇭 and 😀", "\u200b",
)  # fmt: skip


def conversation(*answers: str, system: str = "") -> Record:
    turns = [Turn("system", system)] if system else []
    for question, answer in zip(QUESTIONS, answers, strict=False):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Record(tuple(turns))


def renderer(name: str, **asked) -> Renderer:
    return Renderer(tokenizer_of(name), chat=True, **asked)


def with_template(name: str, template: str) -> Renderer:
    assert template != EVERY[name].template
    tok = copy.deepcopy(tokenizer_of(name))
    tok.chat_template = template
    return Renderer(tok, chat=True)


def check(name: str, record: Record, *, only: set[int] | None = None, **asked) -> list[str]:
    """Hold a row against the reference; ``only`` are the answers that should train. Gives their texts."""
    row = renderer(name, **asked).encode(record)
    expected = reference(name, record)
    spans = [s for i, s in enumerate(expected.spans) if only is None or i in only]
    assert row.input_ids == expected.ids
    assert [label != IGNORED for label in row.labels] == expected.tokens(spans)
    assert all(b in (a, IGNORED) for a, b in zip(row.input_ids, row.labels, strict=True))
    closing = tokenizer_of(name).convert_tokens_to_ids(EVERY[name].closing)
    assert len(row.trained) == len(spans)
    assert all(row.labels[end - 1] == closing for _, end in row.trained)
    assert row.supervised == sum(label != IGNORED for label in row.labels)
    return [expected.text[start:end] for start, end in spans]


def words(name: str, answer: str) -> str:
    return answer.strip() if EVERY[name].trims else answer


# --- what trains


def test_there_are_eight_families_and_each_ends_its_turns_with_its_own_token():
    assert len(FAMILIES) == 8
    for name, family in EVERY.items():
        tok = tokenizer_of(name)
        assert "{% generation %}" in family.marked and "{% generation %}" not in tok.chat_template
        assert tok.convert_ids_to_tokens(tokenizer.end_of_turn(tok)) == family.closing
        assert tokenizer.stop_ids(tok) == sorted(
            {tok.eos_token_id, tok.convert_tokens_to_ids(family.closing)}
        )
    assert {name for name in EVERY if EVERY[name].pad == EVERY[name].eos} >= {"phi", "zephyr"}


@pytest.mark.parametrize("name", EVERY)
def test_the_marks_give_the_same_mask_as_transformers_itself(name):
    """The reference is transformers' own; here through its public door."""
    tok, record = tokenizer_of(name), conversation("It makes 4.", "5", "So it is.")
    known = tok.apply_chat_template(
        [turn.message() for turn in record.turns], chat_template=EVERY[name].marked,
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    row = renderer(name).encode(record)
    assert row.input_ids == known["input_ids"]
    assert [int(label != IGNORED) for label in row.labels] == known["assistant_masks"]


@pytest.mark.parametrize("name", EVERY)
def test_one_answer_trains_with_its_end_of_turn(name):
    (said,) = check(name, conversation("It makes 4."))
    assert (
        said.removeprefix("<think>\n\n</think>\n\n").strip() == f"It makes 4.{EVERY[name].closing}"
    )


@pytest.mark.parametrize("name", EVERY)
def test_all_three_answers_train(name):
    assert len(check(name, conversation("It makes 4.", "5", "So it is."))) == 3


@pytest.mark.parametrize("name", CHATTY)
def test_a_system_turn_does_not_train(name):
    record = conversation("It makes 4.", "5", system="Answer like the assistant: It makes 4.")
    assert len(check(name, record)) == 2


def test_a_family_that_refuses_a_system_turn_says_so():
    with pytest.raises(DataError, match=r"refuses the turns \['system'.*System role not supported"):
        renderer("gemma").encode(conversation("4", system="Be brief."))


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", EVERY)
def test_any_answer_trains_as_it_stands_wherever_it_stands(name, answer):
    for record in (
        conversation(answer),
        conversation(answer, "Then 5.", answer),
        conversation("4", answer, "5"),
        conversation(answer, answer, answer),
    ):
        assert all(words(name, answer) in said or "4" in said or "5" in said
                   for said in check(name, record))  # fmt: skip


@pytest.mark.parametrize("shape", ["{}", "a{}b", "{}a", "a{}", "a{}\na", "{}{}", "a{}\n\na{}a"])
@pytest.mark.parametrize("name", EVERY)
def test_an_answer_with_the_end_of_turn_text_in_it_trains_to_its_real_end(name, shape):
    answer = shape.replace("{}", EVERY[name].closing)
    for record in (
        conversation(answer),
        conversation(answer, "4", answer),
        conversation(answer, answer),
    ):
        check(name, record)


@pytest.mark.parametrize(
    "answer", ["a <think> b", "<think>why</think>b", "a</think>b", "a</think>\n\nb", "<think>a"]
)
@pytest.mark.parametrize("name", EVERY)
def test_thinking_in_the_words_of_an_answer_trains_as_the_template_shows_it(name, answer):
    check(name, conversation(answer))
    check(name, conversation(answer, "4", answer))
    check(name, conversation(answer, answer, answer))


def test_an_end_of_turn_inside_of_thoughts_does_not_end_the_answer():
    closing = EVERY["qwen3"].closing
    for answer in (f"b{closing}a</think>b", f"<think>a{closing}</think>b{closing}b"):
        check("qwen3", conversation(answer))
        check("qwen3", conversation("4", answer))


@pytest.mark.parametrize("answer", ["a</think>", "<think>a</think>\n\n"])
def test_an_answer_of_nothing_but_thoughts_is_refused_where_the_template_takes_them_out(answer):
    """Also where the same words come again later: they are not an end to be found."""
    for record in (
        conversation(answer, "4"),
        conversation(answer, answer),
        Record((*conversation(answer).turns, Turn("user", answer), Turn("assistant", "4"))),
        Record((*conversation(answer).turns, Turn("user", "b"), Turn("assistant", f"{answer}4"))),
    ):
        with pytest.raises(DataError, match=r"drops or rewrites the answer in turn 2"):
            renderer("qwen3").encode(record)


@pytest.mark.parametrize("name", EVERY)
def test_what_the_user_says_never_trains_even_where_it_imitates_the_assistant(name):
    imitation = reference(name, conversation("It makes 4.")).text
    for question in (imitation, EVERY[name].header + "4", "4" + EVERY[name].closing, "</think>4"):
        record = Record((Turn("user", question), Turn("assistant", "4")))
        check(name, record)
        check(name, Record((*record.turns, *record.turns)))


# --- tools and thoughts

CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}


def asked_with_tools(content: str = "", city: str = "Zürich", times: int = 1) -> Record:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
    return Record(
        (
            Turn("user", "How is it in Zürich?"),
            Turn("assistant", content, fields={"tool_calls": [call] * times}),
            *[Turn("tool", "20 degrees", fields={"name": "get_weather"})] * times,
            Turn("assistant", "It has 20 degrees."),
        ),
        tools=TOOLS,
    )


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("city", ["Zürich", 'a "quote"', "<|im_end|>", "x<|im_end|>\ny"])
@pytest.mark.parametrize("content", ["", "Let me look.", "get_weather", "a<|im_end|>b"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_a_tool_call_trains_and_its_result_does_not(name, content, city, times):
    record = asked_with_tools(content, city, times)
    said, answer = check(name, record)
    assert content in said and said.count('"name": "get_weather"') == times
    assert answer.endswith("It has 20 degrees.<|im_end|>")
    check(name, replace(record, turns=record.turns * 2))
    check(name, record, only={1}, loss_on="last_assistant")
    check(name, replace(record, prompt_turns=2 + times), only={1})


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_a_conversation_may_end_with_a_tool_call(name):
    record = asked_with_tools()
    (said,) = check(name, replace(record, turns=record.turns[:2]))
    assert "Zürich" in said


@pytest.mark.parametrize("name", [name for name, family in EVERY.items() if not family.tools])
def test_a_family_that_drops_tool_calls_or_results_says_so(name):
    for content in ("", "I ask get_weather about Zürich."):
        record = asked_with_tools(content)
        with pytest.raises(DataError, match=r"the chat template (drops|does not show|refuses)"):
            renderer(name).encode(record)
        with pytest.raises(DataError, match=r"drops the tool call in turn 2"):
            renderer(name).encode(replace(record, turns=record.turns[:2]))


def test_words_beside_a_tool_call_that_the_template_drops_are_missed():
    silent = EVERY["qwen2.5"].template.replace(
        "{{ m.content }}{%- for call",
        "{%- if not m.tool_calls %}{{ m.content }}{%- endif %}{%- for call",
    )
    made = with_template("qwen2.5", silent)
    assert made.encode(asked_with_tools()).supervised
    with pytest.raises(DataError, match="drops or rewrites the answer in turn 2"):
        made.encode(asked_with_tools("Let me look."))


THOUGHT = {"reasoning_content": "Two and two, counted on fingers."}


def test_thoughts_train_with_the_last_answer_and_are_gone_from_earlier_ones():
    record = Record(
        (
            *(Turn("user", "Two plus two?"), Turn("assistant", "4", fields=THOUGHT)),
            *(Turn("user", "And one?"), Turn("assistant", "5", fields=THOUGHT)),
        )
    )
    said = check("qwen3", record)
    assert said == [
        "4<|im_end|>",
        f"<think>\n{THOUGHT['reasoning_content']}\n</think>\n\n5<|im_end|>",
    ]


def test_thoughts_before_a_tool_call_train_with_it():
    record = asked_with_tools("Let me look.")
    call = replace(record.turns[1], fields={**record.turns[1].fields, **THOUGHT})
    said, answer = check("qwen3", replace(record, turns=(record.turns[0], call, *record.turns[2:])))
    assert said.startswith("<think>\nTwo and two") and answer.startswith("<think>\n\n</think>")


def test_a_prompt_that_ends_with_an_opened_thought_still_finds_the_answer():
    """As in thinking-only models, whose prompt opens the block that a given answer may not have."""
    opening = EVERY["qwen2.5"].template.replace(
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n'",
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n'",
    )
    made = with_template("qwen2.5", opening)
    for answer in ("4", "<b>4</b>", "<think>\nwell\n</think>\n4", "<t", "<thinking"):
        record = conversation(answer)
        row = made.encode(record)
        ((start, end),) = row.trained
        said = answer.removeprefix("<think>\n")  # an opened block is the prompt's
        assert made.tok.decode(row.input_ids[start:end]) == f"{said}<|im_end|>"
    assert parity.differences(made, conversation("<think>\nwell\n</think>\n4")) == []
    (difference,) = parity.differences(made, conversation("4"))
    assert "other tokens than the row it trains in" in difference


# --- which answers train


@pytest.mark.parametrize("name", EVERY)
def test_loss_on_says_which_answers_train(name):
    record = conversation("It makes 4.", "5", "So it is.")
    listed = replace(record, prompt_turns=3)  # a prompt and a completion, given as messages
    check(name, listed, only={1, 2}, loss_on="completions")
    check(name, replace(record, prompt_turns=5), only={2}, loss_on="completions")
    check(name, record, only={0, 1, 2}, loss_on="completions")
    check(name, listed, only={0, 1, 2}, loss_on="assistant")
    check(name, listed, only={2}, loss_on="last_assistant")
    row = renderer(name, loss_on="all").encode(listed)
    assert row.labels == [IGNORED, *row.input_ids[1:]]


@pytest.mark.parametrize("name", EVERY)
def test_a_turn_that_says_train_false_does_not_train(name):
    one, two, three = (Turn("assistant", text) for text in ("It makes 4.", "5 😀", "So it is."))
    turns = conversation("", "", "").turns
    record = Record((turns[0], one, turns[2], replace(two, train=False), turns[4], three))
    for loss_on in ("completions", "assistant"):
        check(name, record, only={0, 2}, loss_on=loss_on)
    check(name, record, only={2}, loss_on="last_assistant")
    marked = replace(record, turns=(turns[0], replace(one, train=True), *record.turns[2:]))
    check(name, marked, only={0, 2}, loss_on="last_assistant")
    check(name, replace(marked, prompt_turns=5), only={0, 2}, loss_on="completions")
    silent = replace(record, turns=(*record.turns[:5], replace(three, train=False)))
    with pytest.raises(DataError, match="no token of it would train"):
        renderer(name, loss_on="last_assistant").encode(silent)


@pytest.mark.parametrize("name", EVERY)
def test_with_loss_on_all_turns_that_say_train_false_stay_out(name):
    turns = list(conversation("It makes 4.", "5 😀", "So it is.").turns)
    turns[3] = replace(turns[3], train=False)
    row = renderer(name, loss_on="all").encode(Record(tuple(turns)))
    expected = reference(name, Record(tuple(turns)))
    out = expected.tokens(expected.spans[1:2])
    assert [label == IGNORED for label in row.labels] == [True, *out[1:]]


@pytest.mark.parametrize("name", EVERY)
def test_with_loss_on_all_a_question_can_stay_out_wherever_it_stands(name):
    for index in (0, 2):
        turns = list(conversation("It makes 4.", "5").turns)
        turns[index] = replace(turns[index], train=False, content="Überall? 😀")
        record = Record(tuple(turns))
        row = renderer(name, loss_on="all").encode(record)
        text = reference(name, record).text
        offsets = reference(name, record).offsets
        at = text.index("Überall? 😀")
        question = [at <= start and end <= at + len("Überall? 😀") for start, end in offsets]
        assert any(question)
        assert all(
            label == IGNORED for label, asked in zip(row.labels, question, strict=True) if asked
        )
        for start, end in reference(name, record).spans:
            inside = [start <= a and b <= end for a, b in offsets]
            assert all(
                label != IGNORED for label, said in zip(row.labels, inside, strict=True) if said
            )


# --- padding


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_the_end_of_turn_is_still_a_label_after_padding_with_the_same_token(name, packed):
    tok = tokenizer_of(name)
    closing = tok.convert_tokens_to_ids(EVERY[name].closing)
    rows = [renderer(name).encode(r) for r in (conversation("4"), conversation("It makes 4.", "5"))]
    step = [
        {"input_ids": row.input_ids, "labels": row.labels, "row": i} for i, row in enumerate(rows)
    ]
    batch = packing.Collator(packing.Layout(256, 2, packed), closing, multiple=64)(step)
    assert batch["supervised"] == sum(row.supervised for row in rows)
    (tensors,) = batch["micro_batches"]
    learned = tensors["labels"] == closing
    assert int(learned.sum()) == 3 and bool((tensors["input_ids"] == closing)[learned].all())
    padded = tensors["input_ids"].numel() - sum(len(row.input_ids) for row in rows)
    assert padded > 0
    ends = [len(row.input_ids) for row in rows]
    for line in range(len(tensors["labels"])):
        length = sum(ends) if packed else sorted(ends, reverse=True)[line]
        assert torch.all(tensors["labels"][line, length:] == IGNORED)


# --- serving asks as training showed it


@pytest.mark.parametrize("name", EVERY)
def test_a_row_begins_with_the_prompt_of_each_of_its_answers(name):
    made = renderer(name)
    for record in (
        conversation("It makes 4."),
        conversation("It makes 4.", "5", "So it is."),
        conversation("4", "5", system="Be brief.") if EVERY[name].system else conversation("4"),
    ):
        row = made.encode(record)
        for index, turn in enumerate(record.turns):
            if turn.role == "assistant":
                asked = made.prompt_ids(replace(record, turns=record.turns[: index + 1]))
                assert row.input_ids[: len(asked)] == asked
                assert all(label == IGNORED for label in row.labels[len(asked) - 1 : len(asked)])


@pytest.mark.parametrize("name", EVERY)
def test_a_row_has_one_bos_and_its_last_answer_ends_with_the_end_of_turn(name):
    tok, made = tokenizer_of(name), renderer(name)
    row = made.encode(conversation("It makes 4.", "5"))
    bos = tok.bos_token_id
    writes = "bos_token" in EVERY[name].template
    assert row.input_ids.count(bos) == int(writes) if bos is not None else not writes
    doubled = tok(reference(name, conversation("4")).text)["input_ids"]
    assert (doubled[:2] == [bos, bos]) is writes  # what tokenizing the text naively would give
    assert (
        row.input_ids[row.answers[-1].end - 1]
        == made.closing
        == row.labels[row.answers[-1].end - 1]
    )


@pytest.mark.parametrize("name", EVERY)
def test_serving_agrees_with_training_but_for_thoughts_of_earlier_answers(name):
    made = renderer(name)
    several = conversation("It makes 4.", "5", "So it is.")
    assert parity.differences(made, conversation("It makes 4.")) == []
    found = parity.differences(made, several)
    if name == "qwen3":
        (difference,) = found
        assert "in another form than it has as the last one" in difference
        assert "data.loss_on: last_assistant" in difference
    else:
        assert found == []
    assert parity.differences(renderer(name, loss_on="last_assistant"), several) == []
    assert parity.report(made, [conversation("4"), several]) == {
        "checked": 2,
        "differences": dict.fromkeys(found, 1),
    }


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_serving_agrees_with_training_through_tool_calls(name):
    record = asked_with_tools("Let me look.")
    found = parity.differences(renderer(name), record)
    assert len(found) == (name == "qwen3")  # an empty block that the call has only while it is last


def test_the_last_answer_trains_after_the_prompt_that_switches_thoughts_off():
    record = conversation("It makes 4.", "5")
    asked = tokenizer_of("qwen3").apply_chat_template(
        [turn.message() for turn in record.turns[:-1]],
        add_generation_prompt=True, enable_thinking=False, return_dict=True,
    )["input_ids"]  # fmt: skip
    assert renderer("qwen3").encode(record).input_ids[: len(asked)] == asked


def test_an_answer_that_merges_with_the_prompt_trains_from_its_next_token_and_parity_says_so():
    record = conversation("\nled by a line")
    row = renderer("phi").encode(record)
    assert reference("phi", record).straddles
    ((start, end),) = row.trained
    assert tokenizer_of("phi").decode(row.input_ids[start:end]) == "led by a line<|end|>"
    (difference,) = parity.differences(renderer("phi"), record)
    assert "other tokens than the row it trains in" in difference


# --- any conversation at all

OWN = {text for family in EVERY.values() for text in (*family.specials, family.eos, family.header)}
PIECES = st.sampled_from(
    [
        *sorted(OWN), "<think>", "</think>", "<tool_response>", "</tool_response>", "{{ x }}", "{% if %}",
        "{",
        "}}", "\n", "\n\n", " ", "  ", "\t", "\r\n", "assistant", "user", "model", "4", "###", "👩\u200d👧",
        "e\u0301", "\u0301", "\u200b", "\ufeff", "▁", "<0x41>",
    ]
)  # fmt: skip
WORDS = st.lists(st.one_of(PIECES, st.text(max_size=6)), min_size=1, max_size=5).map("".join)
TRAIN = st.sampled_from([None, None, None, True, False])
EXCHANGES = st.lists(st.tuples(WORDS, WORDS, TRAIN), min_size=1, max_size=4)


def decoded(name: str, ids: list[int]) -> str:
    return tokenizer_of(name).backend_tokenizer.decode(ids, skip_special_tokens=False)


def spelled(name: str, text: str) -> str:
    """The text as the family's tokenizer can write it."""
    if EVERY[name].kind == "nfc bytes":
        return unicodedata.normalize("NFC", text)
    return text.replace("▁", " ") if EVERY[name].kind in ("pieces", "metaspace") else text


def due(record: Record, loss_on: str) -> list[bool]:
    """Which of the answers should train, in the words of the recipe's documentation."""
    answers = [(i, turn) for i, turn in enumerate(record.turns) if turn.role == "assistant"]
    rule = {
        "completions": lambda i: i >= record.prompt_turns,
        "assistant": lambda i: True,
        "last_assistant": lambda i: i == answers[-1][0],
        "all": lambda i: True,
    }[loss_on]
    return [rule(i) if turn.train is None else turn.train for i, turn in answers]


@given(
    name=st.sampled_from(sorted(EVERY)),
    system=st.one_of(st.just(""), WORDS),
    exchanges=EXCHANGES,
    prompt=st.integers(0, 3),
    loss_on=st.sampled_from(["completions", "assistant", "last_assistant", "all"]),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_of_any_conversation_exactly_the_answers_train_or_the_refusal_is_true(
    name, system, exchanges, prompt, loss_on
):
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer, train in exchanges:
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "train": train},
        ]
    begun = bool(system) + 1 + 2 * prompt  # the prompt ends with a question
    try:
        if begun < len(turns):
            both = {"prompt": turns[:begun], "completion": turns[begun:]}
            record = records.parse(both, "prompt_completion")
        else:
            record = records.parse({"messages": turns}, "messages")
    except records.RowError as error:
        blank = any(not turn["content"].strip() for turn in turns)
        silent = all(train is False for *_, train in exchanges)
        assert blank if "empty" in str(error) else silent and "train: false" in str(error)
        return
    made = renderer(name, loss_on=loss_on)
    try:
        row = made.encode(record)
    except DataError as error:
        said = str(error)
        if "refuses the turns ['system'" in said:
            assert system and not EVERY[name].system
        elif "no token of it would train" in said:
            assert not any(due(record, loss_on))
        else:  # the one template that takes words out of an answer
            assert "drops or rewrites the answer" in said and name == "qwen3"
            assert any("</think>" in answer for _, answer, _ in exchanges)
        return
    expected, trains = reference(name, record), due(record, loss_on)
    spans = [span for span, train in zip(expected.spans, trains, strict=True) if train]
    if loss_on == "all":
        out = expected.tokens(
            [s for s, train in zip(expected.spans, trains, strict=True) if not train]
        )
        learned = [False, *(not one for one in out[1:])]
    else:
        learned = expected.tokens(spans)
    assert row.input_ids == expected.ids
    assert [label != IGNORED for label in row.labels] == learned
    if loss_on == "all":
        return
    for (start, end), (first, last) in zip(row.trained, spans, strict=True):
        assert row.input_ids[end - 1] == made.closing
        first = max(first, expected.offsets[start][0])  # a token that it shares does not train
        said, meant = decoded(name, row.input_ids[start:end]), expected.text[first:last]
        assert said == spelled(name, meant)


@given(name=st.sampled_from(sorted(EVERY)), prompt=WORDS, completion=WORDS)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_of_any_plain_pair_exactly_the_completion_trains_or_the_refusal_is_true(
    name, prompt, completion
):
    tok, row = tokenizer_of(name), {"prompt": prompt, "completion": completion}
    try:
        record = records.parse(row, "prompt_completion")
    except records.RowError as error:
        assert "empty" in str(error) and not (prompt.strip() and completion.strip())
        return
    text, at = prompt + completion, len(prompt)
    known = tok(text, return_offsets_mapping=True)
    offsets = known["offset_mapping"]
    shared = [pair for pair in offsets if pair[0] < at < pair[1]]
    made = Renderer(tok, chat=False)
    try:
        encoded = made.encode(record)
    except DataError as error:
        assert "one token of the answer and what stands before it" in str(error)
        assert shared and text[max(end for _, end in shared) :] in ("", tok.eos_token)
        return
    ended = known["input_ids"][-1] == tok.eos_token_id
    assert encoded.input_ids == known["input_ids"] + [tok.eos_token_id] * (not ended)
    learned = [at <= start and end <= len(text) for start, end in offsets] + [True] * (not ended)
    assert [label != IGNORED for label in encoded.labels] == learned
    if not shared:
        asked = made.prompt_ids(record)
        alone = tok(prompt, return_offsets_mapping=True)["offset_mapping"]
        if alone == offsets[: len(alone)]:
            assert encoded.input_ids[: len(asked)] == asked
    ((start, end),) = encoded.trained
    said = text[offsets[start][0] if start < len(offsets) else len(text) :]
    assert decoded(name, encoded.input_ids[start:end]) == spelled(name, said) + tok.eos_token * (
        not ended
    )
