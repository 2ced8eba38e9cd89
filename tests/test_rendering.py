"""What trains is the answer and the token that ends it, through any template or none."""

from __future__ import annotations

import pytest
from conftest import BASE
from transformers import AutoTokenizer

from qlora import records, tokenizer
from qlora.errors import DataError
from qlora.records import Record, Turn
from qlora.rendering import IGNORED, Renderer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE = Record((Turn("user", "What is two plus two?"), Turn("assistant", "It makes 4.")))
TWO = Record((*ONE.turns, Turn("user", "And one more?"), Turn("assistant", "Then it is 5, not 4.")))


@pytest.fixture
def tok():
    return AutoTokenizer.from_pretrained(BASE)


def renderer(tok, template: str = CHATML, **settings) -> Renderer:
    tok.chat_template = template
    return Renderer(tok, chat=True, **settings)


def spoken(tok, row) -> list[str]:
    """The trained stretches of a row, decoded."""
    stretches, current = [], []
    for token, label in zip([*row.input_ids, 0], [*row.labels, IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            current.append(token)
        elif current:
            stretches.append(tok.decode(current))
            current = []
    return stretches


def test_the_tokens_are_exactly_those_of_the_template(tok):
    made = renderer(tok)
    for record in (ONE, TWO):
        messages = [{"role": t.role, "content": t.content} for t in record.turns]
        expected = tok.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert made.encode(record).input_ids == expected


def test_labels_equal_the_mask_of_a_template_with_generation_markers():
    """The independent reference: transformers' own assistant mask, where the template has markers."""
    tok = AutoTokenizer.from_pretrained(BASE)
    made = Renderer(tok, chat=True)
    for record in (ONE, TWO):
        reference = tok.apply_chat_template(
            [{"role": t.role, "content": t.content} for t in record.turns],
            tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        row = made.encode(record)
        assert row.input_ids == reference["input_ids"]
        assert [int(label != IGNORED) for label in row.labels] == reference["assistant_masks"]


def test_with_loss_on_all_everything_trains_but_the_first_token(tok):
    """No token comes before it, so none could predict it."""
    row = renderer(tok, loss_on="all").encode(ONE)
    assert row.labels == [IGNORED, *row.input_ids[1:]]
    assert row.supervised == len(row.input_ids) - 1


def test_a_space_that_the_template_puts_before_the_end_of_turn_trains_with_it(tok):
    """As in Llama 2's."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
    )
    said = spoken(tok, renderer(tok, template).encode(TWO))
    assert said == [" It makes 4. <|im_end|>", " Then it is 5, not 4. <|im_end|>"]


# Ends only the last answer with a token; others end with a line.
SPARING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_answer_that_trains_without_an_end_of_turn_is_refused(tok):
    with pytest.raises(
        DataError, match="answer in turn 2 ends, so the model would not learn to stop"
    ):
        renderer(tok, SPARING).encode(TWO)
    twice = Record((*ONE.turns, ONE.turns[0], Turn("user", "It makes 4."), ONE.turns[1]))
    with pytest.raises(
        DataError, match="answer in turn 2 ends, so the model would not learn to stop"
    ):
        renderer(tok, SPARING).encode(twice)


def test_an_answer_that_does_not_train_needs_no_end_of_turn(tok):
    row = renderer(tok, SPARING, loss_on="last_assistant").encode(TWO)
    (said,) = spoken(tok, row)
    assert said.strip() == "Then it is 5, not 4.<|im_end|>"


def test_no_byte_of_a_letter_trains_that_ends_an_answer_that_must_not(tok):
    answer = Turn("assistant", "Yes \U0001f600", train=False)
    record = Record((ONE.turns[0], answer, *TWO.turns[2:]))
    row = renderer(tok, SPARING, loss_on="all").encode(record)
    assert len(tok("\U0001f600")["input_ids"]) > 1
    first, second = spoken(tok, row)
    assert first.endswith("assistant: ") and second.startswith("\nuser: And one more?")


def test_a_turn_that_the_template_hides_is_refused(tok):
    hiding = "{% for m in messages if m.role != 'system' %}" + CHATML.partition("%}")[2]
    with pytest.raises(DataError, match=r"does not show turn 1 \(system\) to the model"):
        renderer(tok, hiding).encode(Record((Turn("system", "Be brief."), *ONE.turns)))


def test_an_answer_that_the_template_rewrites_is_refused(tok):
    rewriting = CHATML.replace("m.content", "m.content | replace('makes', 'is')")
    with pytest.raises(DataError, match="drops or rewrites the answer in turn 2"):
        renderer(tok, rewriting).encode(ONE)


def test_a_template_that_ends_turns_with_no_special_token_is_refused(tok):
    with pytest.raises(DataError, match=r"no special token.*never learn to stop"):
        renderer(tok, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_a_template_that_rewrites_earlier_turns_is_refused(tok):
    rewriting = "({{ messages | length }})" + CHATML
    with pytest.raises(DataError, match="renders the turns before turn 2 differently"):
        renderer(tok, rewriting).encode(ONE)


def test_a_template_that_refuses_a_role_says_so(tok):
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    made = renderer(tok, refusing + CHATML)
    with pytest.raises(DataError, match=r"refuses the turns \['system'.*no system here"):
        made.encode(Record((Turn("system", "Be brief."), *ONE.turns)))


def test_the_end_of_turn_is_the_templates_not_the_tokenizers(tok):
    tok.chat_template = CHATML
    tok.eos_token = "<|endoftext|>"
    closing = tok.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.end_of_turn(tok) == closing
    assert set(tokenizer.stop_ids(tok)) == {tok.eos_token_id, closing}
    assert spoken(tok, renderer(tok).encode(ONE)) == ["It makes 4.<|im_end|>"]


def test_plain_pairs_train_on_the_completion_and_an_end_of_text(tok):
    made = Renderer(tok, chat=False)
    record = records.parse({"prompt": "2+2=", "completion": " 4"}, "prompt_completion")
    row = made.encode(record)
    assert spoken(tok, row) == [" 4" + tok.eos_token]
    assert tok.decode(row.input_ids) == "2+2= 4" + tok.eos_token
    assert row.input_ids[: len(made.prompt_ids(record))] == made.prompt_ids(record)


def test_a_plain_completion_that_ends_itself_gets_no_second_end(tok):
    row = Renderer(tok, chat=False).encode(
        records.parse({"prompt": "a", "completion": f"b{tok.eos_token}"}, "prompt_completion")
    )
    assert row.input_ids.count(tok.eos_token_id) == 1 and row.labels[-1] == tok.eos_token_id


def test_a_plain_completion_that_is_one_token_with_its_prompt_is_refused(tok):
    merged = next(text for text in ("at", "in", "er", "the") if len(tok(text)["input_ids"]) == 1)
    row = {"prompt": f"{merged[0]}", "completion": merged[1:]}
    with pytest.raises(DataError, match="makes one token of the answer and what stands before it"):
        Renderer(tok, chat=False).encode(records.parse(row, "prompt_completion"))


def test_a_plain_alpaca_row_keeps_the_answer_on_a_line_of_its_own(tok):
    row = {"instruction": "Name a colour.", "input": "A sky.", "output": "Blue."}
    encoded = Renderer(tok, chat=False).encode(records.parse(row, "alpaca"))
    assert spoken(tok, encoded) == ["Blue." + tok.eos_token]
    assert "A sky.\n\n### Response:\nBlue." in tok.decode(encoded.input_ids)


def test_a_text_trains_as_a_whole(tok):
    row = Renderer(tok, chat=False).encode(Record((), "Once upon a time."))
    assert tok.decode(row.input_ids) == "Once upon a time." + tok.eos_token
    assert row.labels == [IGNORED, *row.input_ids[1:]]  # nothing stands before the first
