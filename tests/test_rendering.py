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
# The shapes of the field's templates, with this tokenizer's special tokens in their places.
TEMPLATES = {
    "chatml": CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|pad|>\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|pad|>\n\n{% endif %}",
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "llama 2": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}",
    "gemma": "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "empty thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
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


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_its_end_of_turn_train_and_nothing_else(tok, name):
    row = renderer(tok, TEMPLATES[name]).encode(ONE)
    (said,) = spoken(tok, row)
    assert said.endswith("<|im_end|>")
    answer = said.removesuffix("<|im_end|>").replace("<think>\n\n</think>", "").strip()
    assert answer == "It makes 4."


@pytest.mark.parametrize("name", ["chatml", "llama 3", "mistral", "llama 2", "gemma"])
def test_every_assistant_turn_trains(tok, name):
    row = renderer(tok, TEMPLATES[name]).encode(TWO)
    said = [piece.removesuffix("<|im_end|>").strip() for piece in spoken(tok, row)]
    assert said == ["It makes 4.", "Then it is 5, not 4."]


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


def test_the_prompt_of_a_question_is_the_beginning_of_its_training_row(tok):
    for template in TEMPLATES.values():
        made = renderer(tok, template)
        for record in (ONE, TWO):
            prompt = made.prompt_ids(record)
            assert made.encode(record).input_ids[: len(prompt)] == prompt


def test_a_beginning_of_text_that_the_template_writes_is_not_doubled(tok):
    tok.bos_token = "<|endoftext|>"
    tok.add_bos_token = True
    row = renderer(tok, TEMPLATES["llama 3"]).encode(ONE)
    assert row.input_ids.count(tok.bos_token_id) == 1


def test_without_completion_only_everything_trains(tok):
    row = renderer(tok, completion_only=False).encode(ONE)
    assert row.labels == row.input_ids


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


def test_a_plain_alpaca_row_keeps_the_answer_on_a_line_of_its_own(tok):
    row = {"instruction": "Name a colour.", "input": "A sky.", "output": "Blue."}
    encoded = Renderer(tok, chat=False).encode(records.parse(row, "alpaca"))
    assert spoken(tok, encoded) == ["Blue." + tok.eos_token]
    assert "A sky.\n\n### Response:\nBlue." in tok.decode(encoded.input_ids)


def test_a_text_trains_as_a_whole(tok):
    row = Renderer(tok, chat=False).encode(Record((), "Once upon a time."))
    assert spoken(tok, row) == ["Once upon a time." + tok.eos_token]
