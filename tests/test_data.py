"""Every row is accounted for: read, held out by content, dropped with a reason, or trained."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import BASE, ROWS
from transformers import AutoTokenizer

from qlora import data
from qlora.errors import DataError, ModelError
from qlora.rendering import IGNORED


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(BASE)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(recipe, tok):
    return data.prepare(recipe, tok, 2048)


def test_rows_are_read_masked_and_counted(make_recipe, tok):
    prepared = prepare(make_recipe(), tok)
    ledger = prepared.ledger
    assert ledger.rows_read == 40 == ledger.train["rows"] + ledger.held_out["rows"]
    assert ledger.sources[0]["format"] == "prompt_completion" and ledger.rendering == "chat"
    assert ledger.train["tokens"] == sum(len(row["input_ids"]) for row in prepared.train)
    supervised = sum(sum(label != IGNORED for label in row["labels"]) for row in prepared.train)
    assert ledger.train["supervised_tokens"] == supervised > 0
    assert json.loads(json.dumps(ledger.to_json()))["duplicates"] == 0


def test_the_split_depends_on_content_and_not_on_order(make_recipe, tok, tmp_path):
    shuffled = random.Random(3).sample(ROWS, len(ROWS))
    sides = []
    for name, rows in (("a.jsonl", ROWS), ("b.jsonl", shuffled)):
        recipe = make_recipe(data__train=write(tmp_path / name, rows), data__held_out_fraction=0.3)
        held = prepare(recipe, tok).held_out_examples
        sides.append({e.record.turns[0].content for e in held})
    assert sides[0] == sides[1] and 3 <= len(sides[0]) <= 25


def test_equal_rows_never_stand_on_both_sides(make_recipe, tok, tmp_path):
    recipe = make_recipe(
        data__train=write(tmp_path / "d.jsonl", ROWS * 2), data__held_out_fraction=0.3
    )
    prepared = prepare(recipe, tok)
    assert prepared.ledger.duplicates == 40
    trained = {tuple(row["input_ids"]) for row in prepared.train}
    assert not trained & {tuple(row["input_ids"]) for row in prepared.held_out}


def test_a_held_out_row_that_is_also_in_the_training_file_is_not_trained(
    make_recipe, tok, tmp_path
):
    recipe = make_recipe(data__held_out=write(tmp_path / "held.jsonl", ROWS[:5]))
    ledger = prepare(recipe, tok).ledger
    assert (ledger.leaked, ledger.train["rows"], ledger.held_out["rows"]) == (5, 35, 5)


def test_no_held_out_rows_when_none_are_wanted(make_recipe, tok):
    assert prepare(make_recipe(data__held_out_fraction=0.0), tok).held_out is None


def test_too_many_long_rows_are_refused_with_the_length_that_keeps_them(make_recipe, tok):
    with pytest.raises(
        DataError, match=r"(?s)data.max_length is 12.*data.max_length=\d+ keeps 99 %"
    ) as error:
        prepare(make_recipe(data__max_length=12), tok)
    length = int(str(error.value).split("data.max_length=")[1].split()[0])
    kept = prepare(make_recipe(data__max_length=length), tok).ledger
    assert len(kept.too_long) <= 0.01 * kept.rows_read + 1


def test_a_few_long_rows_are_dropped_and_listed_by_address(make_recipe, tok, tmp_path):
    long = {"prompt": "Why? " * 80, "completion": "Because."}
    recipe = make_recipe(
        data__train=write(tmp_path / "l.jsonl", [*ROWS, long]), data__held_out_fraction=0.0
    )
    prepared = prepare(recipe, tok)
    assert prepared.ledger.too_long == ["l.jsonl:41"]
    assert len(prepared.train) == 40 == len(prepared.addresses)
    assert prepared.addresses[-1] == "l.jsonl:40"


def test_a_row_without_an_answer_is_named_by_line(make_recipe, tok, tmp_path):
    rows = [*ROWS[:3], {"prompt": "And?", "completion": ""}, {"prompt": "So?"}]
    with pytest.raises(DataError) as error:
        prepare(make_recipe(data__train=write(tmp_path / "r.jsonl", rows)), tok)
    text = str(error.value)
    assert "r.jsonl:4: completion is empty" in text
    assert "r.jsonl:5: column 'completion' is missing" in text
    assert "And?" not in text  # rows may be private


def test_columns_of_other_names_are_mapped(make_recipe, tok, tmp_path):
    rows = [{"question": r["prompt"], "answer": r["completion"], "id": 1} for r in ROWS]
    mapping = {"prompt": "question", "completion": "answer"}
    path = write(tmp_path / "q.jsonl", rows)
    mapped = prepare(make_recipe(data__train=path, data__columns=mapping), tok)
    assert mapped.train.to_dict() == prepare(make_recipe(), tok).train.to_dict()
    with pytest.raises(
        DataError, match=r"names 'frage', but q.jsonl has the columns question, answer"
    ):
        prepare(make_recipe(data__train=path, data__columns={"prompt": "frage"}), tok)
    with pytest.raises(DataError, match="maps 'question', which is not one of our columns"):
        prepare(make_recipe(data__train=path, data__columns={"question": "prompt"}), tok)


def test_several_files_are_read_as_one(make_recipe, tok, tmp_path, rows_file):
    more = write(tmp_path / "more.jsonl", [{"instruction": "Say hi.", "output": "Hi."}])
    recipe = make_recipe(data__train=[str(rows_file), more], data__held_out_fraction=0.0)
    ledger = prepare(recipe, tok).ledger
    assert [source["format"] for source in ledger.sources] == ["prompt_completion", "alpaca"]
    assert ledger.train["rows"] == 41


def test_conversations_need_a_template_and_pairs_do_not(make_recipe, tmp_path):
    bare = AutoTokenizer.from_pretrained(BASE)
    bare.chat_template = None
    assert prepare(make_recipe(), bare).ledger.rendering == "plain"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    recipe = make_recipe(data__train=write(tmp_path / "m.jsonl", rows), data__held_out_fraction=0.0)
    with pytest.raises(
        ModelError, match=r"m.jsonl:1 holds a conversation.*no chat template.*data.chat_template"
    ):
        prepare(recipe, bare)
    with pytest.raises(ModelError, match=r"data.rendering is chat"):
        prepare(make_recipe(data__rendering="chat"), bare)


def test_plain_rendering_can_be_asked_for(make_recipe, tok, tmp_path):
    plain = prepare(make_recipe(data__rendering="plain"), tok)
    assert plain.ledger.rendering == "plain"
    assert plain.train.to_dict() != prepare(make_recipe(), tok).train.to_dict()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(DataError, match=r"rendering is plain, but m.jsonl:1 holds a conversation"):
        prepare(make_recipe(data__train=path, data__rendering="plain"), tok)


def test_a_chat_template_from_a_file_is_used(make_recipe, tmp_path):
    from qlora import tokenizer

    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}<|im_end|>{% endfor %}"
                    "{% if add_generation_prompt %}assistant> {% endif %}")  # fmt: skip
    recipe = make_recipe(data__chat_template=str(file))
    mine, _ = tokenizer.load(recipe)
    first = prepare(recipe, mine).train[0]["input_ids"]
    assert mine.decode(first).startswith("user> What is")


def test_a_tokenizer_of_another_model_is_refused_before_the_weights(make_recipe, tok):
    with pytest.raises(DataError, match=r"embedding has 300 rows.*another model"):
        data.prepare(make_recipe(), tok, 300)


def test_completion_only_loss_is_a_setting_that_changes_the_labels(make_recipe, tok):
    everything = prepare(make_recipe(data__completion_only_loss=False), tok)
    assert everything.ledger.train["supervised_tokens"] == everything.ledger.train["tokens"]


def test_a_batch_is_padded_on_the_right_and_keeps_its_row_numbers():
    batch = data.Collator(9, multiple=4)(
        [
            {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "row": 7},
            {"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED] * 4 + [8], "row": 2},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [4, 5, 6, 7, 8, 9, 9, 9]]
    assert batch["labels"][0].tolist() == [IGNORED, 2, 3] + [IGNORED] * 5
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([3, 5]))
    assert batch["rows"] == [7, 2] and batch["tokens"] == 8


def test_a_hub_data_set_out_of_reach_is_named(make_recipe, tok):
    recipe = make_recipe(data__train="hub:nobody/nothing")
    with pytest.raises(DataError, match=r"'hub:nobody/nothing' \(split 'train'\).*HF_HUB_OFFLINE"):
        prepare(recipe, tok)


def test_real_grade_school_questions_are_read_with_mapped_columns(make_recipe, tok, real_data):
    recipe = make_recipe(
        data__train=str(real_data / "gsm8k" / "test.jsonl"), data__max_length=1024,
        data__columns={"prompt": "question", "completion": "answer"},
    )  # fmt: skip
    ledger = prepare(recipe, tok).ledger
    assert ledger.rows_read == 1319 and ledger.train["rows"] + ledger.held_out["rows"] == 1319


def test_real_sharegpt_rows_with_tools_are_refused_by_role_not_dropped(make_recipe, tok, real_data):
    path = real_data / "llamafactory_demo" / "glaive_toolcall_en_demo.json"
    with pytest.raises(DataError, match="the role 'function_call' is unknown"):
        prepare(make_recipe(data__train=str(path)), tok)


def test_a_hub_data_set_is_asked_for_with_its_split_and_revision(make_recipe, tok, monkeypatch):
    asked = []

    def load(name, **settings):
        asked.append((name, settings))
        return [dict(row) for row in ROWS]

    monkeypatch.setattr(data, "load_dataset", load)
    recipe = make_recipe(data__train="hub:own/set", data__split="train_sft", data__revision="v2")
    assert prepare(recipe, tok).ledger.rows_read == 40
    assert asked == [("own/set", {"split": "train_sft", "revision": "v2"})]


def test_rows_that_fit_two_formats_are_read_as_the_recipe_says(make_recipe, tok, tmp_path):
    rows = [{"instruction": "Say a.", "output": "a", "text": "Say a. a"}] * 3
    path = write(tmp_path / "both.jsonl", rows)
    with pytest.raises(DataError, match=r"fit several formats: alpaca, text.*\n.*data.format"):
        prepare(make_recipe(data__train=path, data__held_out_fraction=0.0), tok)
    for form in ("alpaca", "text"):
        recipe = make_recipe(data__train=path, data__held_out_fraction=0.0, data__format=form)
        assert prepare(recipe, tok).ledger.sources[0]["format"] == form


def test_how_many_rows_may_be_dropped_is_a_setting(make_recipe, tok, tmp_path):
    rows = [*ROWS[:9], {"prompt": "Why? " * 80, "completion": "Because."}]
    path = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 10 rows are longer.*first: r.jsonl:10"):
        prepare(make_recipe(data__train=path, data__held_out_fraction=0.0), tok)
    recipe = make_recipe(data__train=path, data__held_out_fraction=0.0, data__max_drop_fraction=0.1)
    assert prepare(recipe, tok).ledger.train["rows"] == 9
