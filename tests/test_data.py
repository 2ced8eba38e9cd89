"""Every row is accounted for: read, held out by content, dropped with a reason, or trained."""

from __future__ import annotations

import json
import os
import random
import re
import time

import pytest
from conftest import BASE, ROWS
from transformers import AutoTokenizer

from qlora import data, records, table
from qlora.errors import DataError, ModelError, RecipeError
from qlora.ledger import Ledger
from qlora.preparation import vocabulary_digest
from qlora.rendering import IGNORED


@pytest.fixture
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
    assert ledger.rows_read == 40 == ledger.train.rows + ledger.held_out.rows
    assert ledger.sources[0].format == "prompt_completion" and ledger.rendering == "chat"
    assert ledger.train.tokens == sum(len(row["input_ids"]) for row in prepared.train)
    supervised = sum(sum(label != IGNORED for label in row["labels"]) for row in prepared.train)
    assert ledger.train.supervised_tokens == supervised > 0
    assert sum(row["supervised"] for row in prepared.train) == supervised
    written = json.loads(json.dumps(ledger.to_json()))
    assert written["duplicates"]["count"] == 0 and written["rows_read"] == 40
    assert Ledger.from_json(written) == ledger


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
    duplicates = prepared.ledger.duplicates
    assert duplicates.count == 40 and "d.jsonl:41 equals d.jsonl:1" in duplicates.first
    assert any("40 rows are duplicates; they are kept" in note for note in prepared.ledger.notes)
    trained = {tuple(row["input_ids"]) for row in prepared.train}
    assert not trained & {tuple(row["input_ids"]) for row in prepared.held_out}


def test_a_row_of_the_held_out_file_that_is_also_trained_is_refused_or_skipped(
    make_recipe, tok, tmp_path
):
    held_out = write(tmp_path / "held.jsonl", ROWS[:5])
    with pytest.raises(
        DataError, match=r"5 of 45 rows.*\n  rows.jsonl:1: is also held out \(held.js"
    ):
        prepare(make_recipe(data__held_out=held_out), tok)
    prepared = prepare(make_recipe(data__held_out=held_out, data__on_bad_row="skip"), tok)
    ledger = prepared.ledger
    assert (ledger.leaked.count, ledger.train.rows, ledger.held_out.rows) == (5, 35, 5)
    assert ledger.leaked.first[0] == "rows.jsonl:1 is held out as held.jsonl:1"
    trained = {tuple(row["input_ids"]) for row in prepared.train}
    assert not trained & {tuple(row["input_ids"]) for row in prepared.held_out}


def test_no_held_out_rows_when_none_are_wanted(make_recipe, tok):
    assert prepare(make_recipe(data__held_out_fraction=0.0), tok).held_out is None


def test_rows_that_cost_too_much_are_refused_with_the_length_that_keeps_them(make_recipe, tok):
    with pytest.raises(
        DataError,
        match=r"(?s)data.max_length is 12.*100.0% of the supervised.*data.max_length=\d+ keeps",
    ) as error:
        prepare(make_recipe(data__max_length=12), tok)
    length, share = re.search(r"data.max_length=(\d+) keeps ([\d.]+)%", str(error.value)).groups()
    length = int(length)
    over = prepare(make_recipe(data__max_length=length), tok).ledger.over_length
    assert over.share_lost <= 0.01 and f"{1 - over.share_lost:.1%}" == f"{share}%"
    with pytest.raises(DataError):
        prepare(make_recipe(data__max_length=length - 1), tok)


LONG = {"prompt": "Why? " * 80, "completion": "Because."}


def test_a_few_long_rows_are_dropped_and_listed_with_what_they_cost(make_recipe, tok, tmp_path):
    recipe = make_recipe(
        data__train=write(tmp_path / "l.jsonl", [*ROWS, LONG]), data__held_out_fraction=0.0,
        data__max_lost_fraction=0.1,
    )  # fmt: skip
    prepared = prepare(recipe, tok)
    over = prepared.ledger.over_length
    whole = prepared.renderer.encode(records.parse(LONG, "prompt_completion"))
    assert over.dropped.first == [f"l.jsonl:41: {len(whole.input_ids)} tokens"]
    assert (over.tokens_lost, over.supervised_lost) == (len(whole.input_ids), whole.supervised)
    kept = prepared.ledger.train.supervised_tokens
    assert over.share_lost == whole.supervised / (whole.supervised + kept)
    assert len(prepared.train) == 40 == len(prepared.addresses)
    assert prepared.addresses[39] == "l.jsonl:40"


def test_how_much_may_be_lost_is_a_setting(make_recipe, tok, tmp_path):
    path = write(tmp_path / "r.jsonl", [*ROWS[:9], LONG])
    with pytest.raises(DataError, match=r"1 row is longer \(first: r.jsonl:10: \d+ tokens\)"):
        prepare(make_recipe(data__train=path, data__held_out_fraction=0.0), tok)
    recipe = make_recipe(data__train=path, data__held_out_fraction=0.0, data__max_lost_fraction=0.2)
    assert prepare(recipe, tok).ledger.train.rows == 9


@pytest.mark.parametrize("policy", ["error", "drop", "truncate", "split"])
def test_each_policy_for_long_rows_does_what_it_says(make_recipe, tok, tmp_path, policy):
    talk = prepare(
        make_recipe(
            data__train=write(tmp_path / "r.jsonl", [*ROWS, LONG]), data__held_out_fraction=0.0,
            data__over_length="drop", data__max_lost_fraction=1,
        ), tok,
    )  # fmt: skip
    recipe = make_recipe(
        data__train=str(tmp_path / "r.jsonl"), data__held_out_fraction=0.0,
        data__over_length=policy, data__max_lost_fraction=1,
    )  # fmt: skip
    if policy == "error":
        with pytest.raises(
            DataError, match=r"over_length is error and 1 row is.*\n  r.jsonl:41: \d+ tok"
        ):
            prepare(recipe, tok)
        return
    prepared = prepare(recipe, tok)
    over = prepared.ledger.over_length
    counts = (over.dropped.count, over.shortened.count, over.split.count)
    assert counts == ((0, 1, 0) if policy == "truncate" else (1, 0, 0))  # split is for texts
    if policy == "split":
        assert over.dropped.first[0].endswith("tokens (only plain texts are split)")
    assert over.policy == policy and len(prepared.train) == 40 + (policy == "truncate")
    assert prepared.train[:40]["input_ids"] == talk.train["input_ids"][:40]
    if policy == "truncate":
        row = prepared.train[40]
        assert len(row["input_ids"]) <= 128 and over.supervised_lost == 0
        trained = [
            t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == t
        ]
        assert tok.decode(trained) == "Because.<|im_end|>"


def test_an_answer_that_is_itself_too_long_is_dropped_and_that_is_said(make_recipe, tok, tmp_path):
    rows = [*ROWS, {"prompt": "Why?", "completion": "Because. " * 80}]
    recipe = make_recipe(
        data__train=write(tmp_path / "r.jsonl", rows), data__held_out_fraction=0.0,
        data__over_length="truncate", data__max_lost_fraction=1,
    )  # fmt: skip
    (said,) = prepare(recipe, tok).ledger.over_length.dropped.first
    assert said.startswith("r.jsonl:41: ") and said.endswith("leaves no room to shorten)")


def test_a_long_text_is_split_into_rows_without_losing_a_token(make_recipe, tok, tmp_path):
    texts = [{"text": "Once upon a time there was a fox. " * n} for n in (1, 60, 3)]
    path = write(tmp_path / "t.jsonl", texts)
    whole = prepare(make_recipe(data__train=path, data__max_length=512, data__held_out_fraction=0.0,
                                data__over_length="split", data__max_lost_fraction=1), tok)  # fmt: skip
    parts = prepare(make_recipe(data__train=path, data__max_length=64, data__held_out_fraction=0.0,
                                data__over_length="split"), tok)  # fmt: skip
    flat = [[t for ids in prepared.train["input_ids"] for t in ids] for prepared in (whole, parts)]
    assert flat[0] == flat[1]
    assert max(parts.train["length"]) <= 64 and parts.ledger.over_length.split.count == 1
    assert parts.ledger.over_length.tokens_lost == 0
    assert set(parts.addresses) == {"t.jsonl:1", "t.jsonl:2", "t.jsonl:3"}


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
    plain = prepare(make_recipe(), tok).train
    assert mapped.train["input_ids"] == plain["input_ids"]
    assert mapped.train["labels"] == plain["labels"]
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
    assert [source.format for source in ledger.sources] == ["prompt_completion", "alpaca"]
    assert ledger.train.rows == 41


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


def test_what_the_loss_is_on_is_a_setting_that_changes_the_labels(make_recipe, tok, tmp_path):
    turns = [("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d.")]
    rows = [{"messages": [{"role": r, "content": c + f" {n}"} for r, c in turns]} for n in range(4)]
    split = [{"prompt": row["messages"][:3], "completion": row["messages"][3:]} for row in rows]
    found = {}
    for name, given in (("talk", rows), ("split", split)):
        path = write(tmp_path / f"{name}.jsonl", given)
        for loss_on in ("completions", "assistant", "last_assistant", "all"):
            recipe = make_recipe(
                data__train=path, data__held_out_fraction=0.0, data__loss_on=loss_on
            )
            row = prepare(recipe, tok).train[0]
            labels = [t for t in row["labels"] if t != IGNORED]
            found[name, loss_on] = tok.decode(labels)
            if loss_on == "all":
                assert row["labels"][1:] == row["input_ids"][1:] and row["labels"][0] == IGNORED
    both, last = "b. 0<|im_end|>d. 0<|im_end|>", "d. 0<|im_end|>"
    assert found["talk", "completions"] == found["talk", "assistant"] == both
    assert found["split", "completions"] == found["split", "last_assistant"] == last
    assert found["talk", "last_assistant"] == last and found["split", "assistant"] == both


def test_a_turn_that_says_it_does_not_train_does_not(make_recipe, tok, tmp_path):
    turns = [
        ("user", "a?", None),
        ("assistant", "b.", False),
        ("user", "c?", None),
        ("assistant", "d.", None),
    ]
    rows = [
        {
            "messages": [
                {"role": r, "content": c} | ({} if t is None else {"train": t}) for r, c, t in turns
            ]
        }
    ] * 3
    path = write(tmp_path / "m.jsonl", rows)
    prepared = prepare(make_recipe(data__train=path, data__held_out_fraction=0.0), tok)
    labels = [t for t in prepared.train[0]["labels"] if t != IGNORED]
    assert tok.decode(labels) == "d.<|im_end|>"
    counted = prepared.ledger.turns
    assert counted["1"][0] == 3 and counted["1"][2] == 0 and counted["2"][1] == counted["2"][2] > 0


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
    assert ledger.rows_read == 1319 == ledger.train.rows + ledger.held_out.rows


def test_real_tool_calls_are_refused_row_by_row_where_the_template_would_drop_them(
    make_recipe, tok, real_data
):
    path = real_data / "llamafactory_demo" / "glaive_toolcall_en_demo.json"
    with pytest.raises(DataError) as error:
        prepare(make_recipe(data__train=str(path), data__max_length=1024), tok)
    text = str(error.value)
    calling = sum("function_call" in json.dumps(row) for row in json.loads(path.read_text()))
    assert f"{calling} of 300 rows cannot be used" in text and "... and" in text
    assert "glaive_toolcall_en_demo.json:1: the chat template drops the tool call in turn 4" in text


def test_a_hub_data_set_is_asked_for_with_its_split_and_revision(make_recipe, tok, monkeypatch):
    asked = []

    def load(name, **settings):
        asked.append((name, settings))
        return [dict(row) for row in ROWS]

    monkeypatch.setattr(table, "load_dataset", load)
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
        assert prepare(recipe, tok).ledger.sources[0].format == form


BAD_LINES = {
    2: "{not json}", 3: "[1, 2]", 4: "7", 5: '{"prompt": "a", "completion": null}',
    6: '{"prompt": "a", "completion": " "}', 7: '{"prompt": 3, "completion": "b"}',
    8: '{"prompt": "a", "completion": NaN}', 9: '{"text": "another format"}',
    11: '{"prompt": "cut off, "comple',
}  # fmt: skip
WHY = {
    2: "not valid JSON", 3: "a JSON list", 4: "a JSON number", 5: "is missing", 6: "is empty",
    7: "must be text", 8: "NaN", 9: "one format a file", 11: "cut short",
}  # fmt: skip


def bad_file(path):
    good = json.dumps(ROWS[0])
    lines = [BAD_LINES.get(n, good if n == 1 else json.dumps(ROWS[n])) for n in range(1, 12)]
    path.write_text("\n".join(lines))
    return str(path)


def test_one_pass_finds_the_bad_rows_of_every_file_and_stage(make_recipe, tok, tmp_path):
    first, second = bad_file(tmp_path / "a.jsonl"), bad_file(tmp_path / "b.jsonl")
    recipe = make_recipe(data__train=[first, second])
    with pytest.raises(DataError) as error:
        prepare(recipe, tok)
    text = str(error.value)
    assert text.startswith(
        "18 of 22 rows cannot be used (a.jsonl read as prompt_completion, b.jsonl"
    )
    for name in ("a.jsonl", "b.jsonl"):
        for line, why in WHY.items():
            (said,) = [one for one in text.splitlines() if one.startswith(f"  {name}:{line}: ")]
            assert why in said
    assert "data.on_bad_row: skip" in text and "another format" not in text


def test_bad_rows_can_be_skipped_and_are_written_aside(make_recipe, tok, tmp_path):
    path = bad_file(tmp_path / "a.jsonl")
    recipe = make_recipe(data__train=path, data__on_bad_row="skip", data__held_out_fraction=0.0)
    prepared = prepare(recipe, tok)
    assert prepared.ledger.train.rows == 2 and prepared.ledger.sources[0].rejected == 9
    assert prepared.ledger.rejected.count == 9 and prepared.ledger.rows_read == 11
    written = [json.loads(line) for line in prepared.rejected.read_text().splitlines()]
    assert [line["row"] for line in written] == [f"a.jsonl:{n}" for n in BAD_LINES]
    assert all(WHY[n] in line["reason"] for n, line in zip(BAD_LINES, written, strict=True))
    assert written[0]["value"] == "{not json}"
    assert prepare(make_recipe(), tok).rejected is None


def test_rows_the_template_refuses_are_reported_with_the_others(make_recipe, tok, tmp_path):
    tok.chat_template = tok.chat_template.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{{ raise_exception('no system here') }}{%- endif %}", 1,
    )  # fmt: skip
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk}, {"messages": [{"role": "system", "content": "s"}, *talk]},
            {"messages": talk[:1]}]  # fmt: skip
    with pytest.raises(DataError) as error:
        prepare(make_recipe(data__train=write(tmp_path / "m.jsonl", rows)), tok)
    assert "2 of 3 rows" in str(error.value)
    assert "m.jsonl:2: the chat template refuses the turns" in str(error.value)
    assert "m.jsonl:3: " in str(error.value)


def test_one_gigantic_row_is_named_and_a_long_text_may_be_split(make_recipe, tok, tmp_path):
    huge = "word " * 400_000
    talk = write(tmp_path / "t.jsonl", [*ROWS, {"prompt": huge, "completion": "b"}])
    with pytest.raises(DataError, match=r"t.jsonl:41: one row of 2,000,001 characters"):
        prepare(make_recipe(data__train=talk), tok)
    text = write(tmp_path / "x.jsonl", [{"text": huge}])
    with pytest.raises(DataError, match="over_length: split"):
        prepare(make_recipe(data__train=text, data__held_out_fraction=0.0), tok)
    recipe = make_recipe(data__train=text, data__held_out_fraction=0.0, data__over_length="split")
    assert prepare(recipe, tok).ledger.train.rows > 3000


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What does <|im_end|> mean?", "completion": "The end."},
        {"text": "One tale.<|im_end|>Another."},
        {"messages": [
            {"role": "user", "content": "Find it."},
            {"role": "assistant", "content": "", "tool_calls": [
                {"name": "find", "arguments": {"what": "<|im_end|>"}}]},
            {"role": "tool", "content": "Found."}, {"role": "assistant", "content": "There."},
        ]},
    ],
    ids=["question", "text", "tool call"],
)  # fmt: skip
def test_a_tokenizers_own_token_typed_by_somebody_is_counted(make_recipe, tok, tmp_path, row):
    if "messages" in row:  # the embedded base's template shows no calls
        tok.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls or '' }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    recipe = make_recipe(
        data__train=write(tmp_path / "c.jsonl", [row]), data__held_out_fraction=0.0
    )
    ledger = prepare(recipe, tok).ledger
    assert ledger.control_text.first == ["c.jsonl:1"]
    assert any("1 row holds one of the tokenizer's own tokens" in note for note in ledger.notes)


def test_a_template_that_rows_bring_is_not_read_and_that_is_said(make_recipe, tok, tmp_path):
    brought = {"chat_template_kwargs": {"chat_template": "{{ 'mine' }}"}}
    rows = [row | (brought if number < 3 else {}) for number, row in enumerate(ROWS)]
    prepared = prepare(make_recipe(data__train=write(tmp_path / "rows.jsonl", rows)), tok)
    assert prepared.train["input_ids"] == prepare(make_recipe(), tok).train["input_ids"]
    (note,) = [note for note in prepared.ledger.notes if "chat_template_kwargs" in note]
    assert note.startswith("3 rows bring 'chat_template_kwargs', which is not read")


def test_a_vocabulary_is_told_by_its_tokens_and_their_ids(make_recipe, tok, tmp_path):
    kept = prepare(make_recipe(), tok).ledger.vocabulary
    again = AutoTokenizer.from_pretrained(BASE)
    again.chat_template = again.pad_token = None  # of no concern to what the ids mean
    assert vocabulary_digest(again) == kept and len(kept) == 64
    again.add_tokens(["<|new|>"])
    assert vocabulary_digest(again) != kept


def test_held_out_texts_are_split_and_held_out_answers_are_never_shortened(
    make_recipe, tok, tmp_path
):
    texts = write(
        tmp_path / "t.jsonl", [{"text": f"{n} " + "Once upon a time. " * 60} for n in range(3)]
    )
    for name in ("train.jsonl", "held.jsonl"):
        write(tmp_path / name, [{"text": f"{name} " + "Once upon a time. " * 60}])
    recipe = make_recipe(
        data__train=texts, data__held_out=str(tmp_path / "held.jsonl"), data__max_length=64,
        data__over_length="split",
    )  # fmt: skip
    prepared = prepare(recipe, tok)
    assert len(prepared.held_out) > 3 and max(prepared.held_out["length"]) <= 64
    assert prepared.ledger.over_length.held_out.count == 0
    asked = write(tmp_path / "long.jsonl", [LONG, ROWS[0] | {"prompt": "Another?"}])
    recipe = make_recipe(data__held_out=asked, data__over_length="truncate")
    over = prepare(recipe, tok).ledger.over_length
    assert over.held_out.count == 1 and over.held_out.first[0].startswith("long.jsonl:1: ")


# --- several sources


def test_weights_are_shares_of_the_supervised_tokens(make_recipe, tok, tmp_path):
    short = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(400)]
    long = [
        {"prompt": f"{n}?", "completion": f"{n} and so on, for a while. " * 4} for n in range(400)
    ]
    sources = [
        {"name": write(tmp_path / "short.jsonl", short), "weight": 1},
        {"name": write(tmp_path / "long.jsonl", long), "weight": 3},
    ]
    prepared = prepare(make_recipe(data__train=sources, data__held_out_fraction=0.0), tok)
    one, three = prepared.ledger.sources
    assert three.supervised_tokens / one.supervised_tokens == pytest.approx(3, rel=0.03)
    assert one.not_drawn == 0 and three.not_drawn == 400 - three.trained > 0
    drawn = [row["row"] for row in prepared.train]
    assert len(set(drawn)) == len(drawn) == prepared.ledger.train.rows
    for row in prepared.train:  # addresses are those of the whole table
        number = int(prepared.addresses[row["row"]].split(":")[1]) - 1
        assert tok.decode(row["input_ids"]).startswith(f"<|im_start|>user\n{number}?")
    again = prepare(make_recipe(data__train=sources, data__held_out_fraction=0.0), tok)
    assert again.train["row"] == prepared.train["row"]
    other = make_recipe(data__train=sources, data__held_out_fraction=0.0, train__seed=7)
    assert prepare(other, tok).train["row"] != prepared.train["row"]


def test_weights_are_given_to_all_sources_or_to_none(make_recipe, rows_file, tmp_path):
    more = write(tmp_path / "more.jsonl", ROWS[:3])
    with pytest.raises(RecipeError, match=r"gives some sources a weight and '.*more.jsonl' none"):
        make_recipe(data__train=[{"name": str(rows_file), "weight": 1}, more])


def test_a_source_may_have_its_own_format_and_columns(make_recipe, tok, tmp_path, rows_file):
    other = write(tmp_path / "q.jsonl", [{"q": "a?", "a": "b.", "text": "x"}] * 2)
    source = {
        "name": other,
        "format": "prompt_completion",
        "columns": {"prompt": "q", "completion": "a"},
    }
    ledger = prepare(make_recipe(data__train=[str(rows_file), source]), tok).ledger
    assert [(s.name, s.format, s.detected) for s in ledger.sources] == [
        ("rows.jsonl", "prompt_completion", True), ("q.jsonl", "prompt_completion", False),
    ]  # fmt: skip


def test_a_pattern_reads_every_file_it_matches_as_one_source(make_recipe, tok, tmp_path):
    (tmp_path / "parts").mkdir()
    for n in range(3):
        write(tmp_path / "parts" / f"{n}.jsonl", ROWS[n * 10 : n * 10 + 10])
    recipe = make_recipe(
        data__train=str(tmp_path / "parts" / "*.jsonl"), data__held_out_fraction=0.0
    )
    prepared = prepare(recipe, tok)
    assert prepared.ledger.sources[0].rows == 30 and len(prepared.ledger.sources) == 1
    assert prepared.addresses[29] == "2.jsonl:10"
    with pytest.raises(RecipeError, match=r"data.train: the pattern '.*none-.*' matches no file"):
        make_recipe(data__train=str(tmp_path / "none-*.jsonl"))


def test_files_of_one_name_are_told_apart_by_their_folders(make_recipe, tok, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "rows.jsonl", ROWS[:2] if folder == "one" else ROWS[2:4])
    names = [str(tmp_path / folder / "rows.jsonl") for folder in ("one", "two")]
    prepared = prepare(make_recipe(data__train=names, data__held_out_fraction=0.0), tok)
    assert list(prepared.addresses) == [
        f"{f}/rows.jsonl:{n}" for f in ("one", "two") for n in (1, 2)
    ]


# --- the cache


def test_the_second_start_reads_the_cache_and_gives_the_same(make_recipe, tok, monkeypatch):
    first = prepare(make_recipe(), tok)
    monkeypatch.setattr(data.Preparation, "run", lambda *_: pytest.fail("prepared again"))
    second = prepare(make_recipe(), tok)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.train.to_dict() == first.train.to_dict()
    assert second.held_out.to_dict() == first.held_out.to_dict()
    assert second.ledger == first.ledger
    assert second.held_out_examples == first.held_out_examples


def test_what_changes_the_tokens_is_another_entry_of_the_cache(make_recipe, tok, rows_file):
    changes = [
        {}, {"data__loss_on": "all"}, {"data__max_length": 96}, {"data__rendering": "plain"},
        {"data__over_length": "truncate"}, {"data__held_out_fraction": 0.2},
        {"data__on_bad_row": "skip"}, {"data__format": "prompt_completion"},
    ]  # fmt: skip
    for change in changes:
        assert not prepare(make_recipe(**change), tok).from_cache
        assert prepare(make_recipe(**change), tok).from_cache
    rows_file.write_text(rows_file.read_text().replace("What", "What then"))
    assert not prepare(make_recipe(), tok).from_cache
    other = AutoTokenizer.from_pretrained(BASE)
    other.chat_template = "{# another #}" + other.chat_template
    assert not prepare(make_recipe(), other).from_cache
    # What is decided afterwards is not.
    assert prepare(make_recipe(train__seed=3, data__packing=False), tok).from_cache


def test_the_cache_can_be_switched_off(make_recipe, tok, tmp_path):
    for _ in range(2):
        assert not prepare(make_recipe(data__cache=False), tok).from_cache
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_preparation_leaves_nothing_that_looks_whole(
    make_recipe, tok, tmp_path, monkeypatch
):
    original = table.Writer.add

    def interrupted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(table.Writer, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(make_recipe(), tok)
    assert list((tmp_path / "cache" / "data").iterdir()) == []
    assert not prepare(make_recipe(), tok).from_cache


def test_what_a_killed_process_left_is_cleared_after_a_day_and_not_before(
    make_recipe, tok, tmp_path
):
    folder = tmp_path / "cache" / "data"
    for name, age in ((".old.1.part", 25), (".new.2.part", 1)):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.arrow").write_bytes(b"half")
        then = time.time() - age * 3600
        os.utime(folder / name, (then, then))
    prepare(make_recipe(), tok)
    assert [path.name for path in folder.glob(".*")] == [".new.2.part"]


def test_the_cache_keeps_the_entries_used_last(make_recipe, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "KEPT", 2)
    for length in (100, 101, 100, 102):
        prepare(make_recipe(data__max_length=length), tok)
        time.sleep(0.01)  # the file system's clock is coarse
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 2
    assert prepare(make_recipe(data__max_length=100), tok).from_cache
    assert not prepare(make_recipe(data__max_length=101), tok).from_cache


def test_a_cache_that_cannot_be_written_says_how_to_move_it(
    make_recipe, tok, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be kept in .*QLORA_CACHE.*data.cache: false"):
        prepare(make_recipe(), tok)


# --- what is said about it


def test_lengths_turns_and_special_tokens_are_counted(make_recipe, tok):
    prepared = prepare(make_recipe(data__held_out_fraction=0.0), tok)
    ledger = prepared.ledger
    assert sum(ledger.lengths.values()) == 40
    rows, tokens, supervised = ledger.turns["1"]
    assert rows == 40 and tokens == supervised == ledger.train.supervised_tokens
    flat = [t for row in prepared.train["input_ids"] for t in row]
    for name in ("<|im_start|>", "<|im_end|>"):
        token = tok.convert_tokens_to_ids(name)
        assert ledger.special_tokens[str(token)] == flat.count(token) == 80


def test_packing_is_measured_beside_padding(make_recipe, tok):
    facts = prepare(make_recipe(data__held_out_fraction=0.0), tok).ledger.packing
    assert facts["packed"]["rows"] == facts["padded"]["rows"] == 4
    assert facts["packed"]["passes"] <= facts["padded"]["passes"] == 1
    assert 0 < facts["padded"]["fill"] < facts["packed"]["fill"] <= 1


def test_training_and_serving_are_compared_and_a_difference_is_noted(make_recipe, tok, tmp_path):
    ledger = prepare(make_recipe(), tok).ledger
    assert ledger.parity == {"checked": 16, "differences": {}} and ledger.notes == []
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = AutoTokenizer.from_pretrained(BASE)
    other.chat_template = thinking
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in talk]}] * 3
    recipe = make_recipe(data__train=write(tmp_path / "m.jsonl", rows), data__held_out_fraction=0.0)
    (note,) = [n for n in prepare(recipe, other).ledger.notes if "serving" in n]
    assert "3 of 3 rows tried" in note and "data.loss_on: last_assistant" in note


def test_progress_is_told_of_every_row_and_of_their_number(make_recipe, tok):
    told = []

    def progress(rows, label, total):
        rows = list(rows)
        told.append((len(rows), label, total))
        return rows

    data.prepare(make_recipe(), tok, 2048, progress)
    assert told == [(40, "reading", 40)]


@pytest.mark.parametrize("harm", ["flip", "truncate", "no manifest"])
def test_damaged_rows_in_the_cache_are_told_and_made_again(make_recipe, tiny, harm):
    from qlora import places, tokenizer

    recipe = make_recipe()
    tok, _ = tokenizer.load(recipe)
    whole = data.prepare(recipe, tok, 2048)
    (folder,) = (places.cache() / "data").iterdir()
    file, damaged = folder / "train.arrow", folder / "damaged"
    content = file.read_bytes()
    if harm == "flip":
        damaged.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    elif harm == "truncate":
        damaged.write_bytes(content[: len(content) // 2])
    if harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        damaged.replace(file)  # the first rows are still mapped
    again = data.prepare(recipe, tok, 2048)
    assert again.cache_defect and not again.from_cache
    assert again.train[:]["input_ids"] == whole.train[:]["input_ids"]
    last = data.prepare(recipe, tok, 2048)
    assert last.from_cache and last.cache_defect is None
