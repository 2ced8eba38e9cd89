"""A first recipe for somebody's data: it loads, it means their columns, and it says what was seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora import draft, memory, records, sources
from qlora.cards import named_card
from qlora.errors import DataError, DoesNotFit, RecipeError
from qlora.recipe import load_recipe
from qlora.shape import Shape

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LARGE = SMALL | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
SECRET = "diagnosis"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int = 20, chars: int = 600) -> list[dict[str, str]]:
    return [{"prompt": f"{n} " + "q" * chars, "completion": "a" * 40} for n in range(count)]


def write(
    path: Path, model: str = "embedded:base", out: str | Path = "mine.yaml", **known: Any
) -> tuple[Path, draft.Seen, memory.Plan | None]:
    """The recipe that was written, what was seen, and the plan."""
    return Path(out), *draft.write(path, model, Path(out), **known)


def comments(path: Path) -> str:
    return "\n".join(re.findall(r"#.*", path.read_text()))


# --- columns


@pytest.mark.parametrize("alias", draft.ALIASES, ids=lambda alias: "+".join(alias.values()))
def test_columns_of_known_data_sets_are_mapped_and_the_recipe_reads_them(
    alias: dict[str, str],
) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    values = {theirs: turns if ours == "messages" else "Words." for ours, theirs in alias.items()}
    path = data([{"id": 1, **values}] * 3)
    written, seen, plan = write(path)
    recipe = load_recipe(written)
    assert plan is None
    assert recipe.data.columns == {k: v for k, v in alias.items() if k != v}
    assert recipe.data.format == seen.form
    for row in sources.read(Path(recipe.data.train[0])):
        renamed = records.renamed(row.value, recipe.data.columns)
        assert records.parse(renamed, recipe.data.format)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "a", "completion": "b", "question": "c", "answer": "d"}, "prompt_completion"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"text": "a", "content": "b"}, "text"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         "sharegpt"),
    ],
)  # fmt: skip
def test_our_own_names_need_no_mapping(row: dict[str, Any], form: str) -> None:
    written, seen, _ = write(data([row]))
    assert (seen.form, seen.columns) == (form, {})
    assert load_recipe(written).data.columns == {}
    assert "columns:" not in written.read_text()


def test_a_column_of_context_is_not_left_out_in_silence() -> None:
    """Dolly's rows: without the context, many of its questions cannot be answered."""
    row = {
        "instruction": "Who is it?",
        "context": "It is Ann.",
        "response": "Ann.",
        "category": "qa",
    }
    seen = draft.look(data([row]))
    record = records.parse(records.renamed(row, seen.columns), seen.form)
    assert any("It is Ann." in turn.content for turn in record.turns)


def test_unknown_columns_are_refused_with_a_mapping_to_write() -> None:
    with pytest.raises(
        DataError, match=r"(?s)data\.jsonl: the columns \(a, b\).*data\.columns"
    ) as caught:
        write(data([{"a": SECRET, "b": SECRET}]))
    assert SECRET not in str(caught.value)
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": SECRET},
        {"prompt": SECRET, "completion": ""},
        {"prompt": SECRET, "completion": None},
    ],
)
def test_rows_without_an_answer_are_refused_with_their_lines(bad: dict[str, Any]) -> None:
    rows = [*pairs(3), bad, *pairs(2), bad]
    with pytest.raises(DataError) as caught:
        write(data(rows))
    message = str(caught.value)
    assert "read as prompt_completion; 2 rows cannot be used" in message
    assert "data.jsonl:4: " in message and "data.jsonl:7: " in message and "completion" in message
    assert SECRET not in message
    assert not Path("mine.yaml").exists()


# --- the file


@pytest.mark.parametrize("out", ["mine.yaml", "sub/mine.yaml"])
def test_nothing_is_overwritten(out: str) -> None:
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_text("mine")
    with pytest.raises(RecipeError, match=r"mine\.yaml: exists already.*--out"):
        write(data(pairs()), "embedded:base", out)
    assert Path(out).read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("data.jsonl", "mine.yaml"),
        ("data.jsonl", "recipes/mine.yaml"),
        ("sub/data.jsonl", "recipes/mine.yaml"),
        ("sub/data.jsonl", "sub/mine.yaml"),
    ],
)
def test_the_data_is_named_as_seen_from_the_recipe(source: str, out: str, folder: Path) -> None:
    path = data(pairs(), source)
    Path(out).parent.mkdir(exist_ok=True)
    written, _, _ = write(path, "embedded:base", out)
    assert load_recipe(written).data.train == (str(folder / source),)
    if Path(source).resolve().is_relative_to(Path(out).resolve().parent):
        assert str(folder) not in written.read_text()  # both can move together


def test_a_local_model_is_named_as_seen_from_the_recipe(folder: Path) -> None:
    Path("base").mkdir()
    for model in ("base", "./base", str(folder / "base")):
        out = Path("recipes", "mine.yaml")
        written, _, _ = write(data(pairs()), model, out)
        assert load_recipe(written).model.name == str(folder / "base")
        written.unlink()


@pytest.mark.parametrize("model", ["embedded:base", "Qwen/Qwen3-8B"])
def test_other_models_are_named_as_given(model: str) -> None:
    written, _, _ = write(data(pairs()), model, Path("mine.yaml"))
    assert load_recipe(written).model.name == model


@pytest.mark.parametrize("name", ["my data", "a #1", "a: b", "[x]", "it's", "naïve – 漢字", "{x}"])
@pytest.mark.parametrize("planned", [False, True])
def test_files_of_any_name_give_a_recipe_that_loads(name: str, planned: bool, folder: Path) -> None:
    path = data(pairs(), f"{name}.jsonl")
    known = {"card": named_card("12GB"), "config": SMALL} if planned else {}
    written, _, _ = write(path, "embedded:base", Path(f"{name}.yaml"), **known)  # type: ignore[arg-type]
    assert load_recipe(written).data.train == (str(folder / f"{name}.jsonl"),)


def test_a_place_that_cannot_be_written_is_refused_in_words() -> None:
    path = data(pairs())
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot be written: "):
        write(path, "embedded:base", path / "mine.yaml")


# --- the advice


def test_the_comments_say_what_was_seen() -> None:
    written, seen, _ = write(data(pairs(1234, chars=600)))
    said = comments(written)
    assert (seen.rows, len(seen.lengths), seen.counted) == (1234, 1234, False)
    assert "data.jsonl (1,234 rows)" in said
    assert "qlora train mine.yaml" in said
    assert f"99 % at most {seen.keeping(0.99):,}" in said and "estimated from characters" in said
    assert "checks that it fits your card" in said


def test_lengths_are_counted_where_there_is_a_tokenizer() -> None:
    def words(record: records.Record) -> tuple[int, int]:
        return sum(len(turn.content.split()) for turn in record.turns), 1

    rows = [{"prompt": "word " * n, "completion": "yes"} for n in range(1, 101)]
    written, seen, _ = write(data(rows), count=words)
    assert seen.lengths == tuple(range(2, 102)) and seen.counted
    assert "at most 51, 99 % at most 100, the longest 101" in comments(written)
    assert "estimated" not in comments(written)
    assert load_recipe(written).data.max_length == 128  # the next multiple of 64


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 99, 100, 101])
def test_a_share_of_the_rows_is_kept_by_the_smallest_length_that_will_do(
    share: float, count: int
) -> None:
    lengths = tuple(range(10, 10 + count))
    seen = draft.Seen(count, "text", {}, lengths, lengths, True)
    enough = [n for n in lengths if sum(row <= n for row in lengths) >= share * count]
    assert seen.keeping(share) == enough[0]
    assert seen.longer_than(seen.keeping(share)) <= 1 - share + 1e-9


@pytest.mark.parametrize("kind", ["pairs", "text", "messages"])
def test_the_length_is_that_of_nearly_all_rows_and_not_of_the_longest(kind: str) -> None:
    contents = ["word " * 120] * 999 + ["word " * 12_000]
    shapes: dict[str, Any] = {
        "pairs": lambda text: {"prompt": text, "completion": "yes"},
        "text": lambda text: {"text": text},
        "messages": lambda text: {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        },
    }
    written, seen, _ = write(data([shapes[kind](text) for text in contents]))
    assert seen.lengths[-1] > 12_000
    length = load_recipe(written).data.max_length
    assert 120 < length < 600  # a token is two to four characters
    assert length % 64 == 0


def test_the_length_never_passes_what_the_model_can_read() -> None:
    known = SMALL | {"max_position_embeddings": 512}
    path = data([*pairs(90, chars=600), *pairs(10, chars=60_000)])
    written, seen, _ = write(path, config=known)
    recipe = load_recipe(written)
    assert recipe.data.max_length == 512
    assert seen.longer_than(512) == 0.1
    assert seen.lost_beyond(512) <= recipe.data.max_lost_fraction <= 1
    assert "10% of the rows are longer" in comments(written)


def test_rows_that_are_nearly_all_too_long_are_not_hidden_by_an_allowance() -> None:
    known = SMALL | {"max_position_embeddings": 512}
    with pytest.raises((DataError, RecipeError), match="512"):
        write(data(pairs(chars=60_000)), config=known)


def test_a_multimodal_models_limit_is_that_of_its_text_part() -> None:
    known = {"model_type": "gemma3", "text_config": SMALL | {"max_position_embeddings": 256}}
    written, _, _ = write(data(pairs(99) + pairs(1, chars=3000)), config=known)
    assert load_recipe(written).data.max_length == 256


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (SMALL | {"hidden_size": 256, "num_hidden_layers": 2}, 4e-3),
        (SMALL, 2e-4),
        (LARGE, 1e-4),
        (None, 2e-4),
    ],
)
def test_the_learning_rate_suits_the_size_of_the_model(
    config: dict[str, Any] | None, rate: float
) -> None:
    written, _, _ = write(data(pairs()), config=config)
    assert load_recipe(written).train.learning_rate == rate


@pytest.mark.parametrize("chars", [5, 600, 6000])
@pytest.mark.parametrize("card", ["T4", "8GB", "24GB"])
def test_a_planned_recipe_fits_its_card_and_says_by_how_much(card: str, chars: int) -> None:
    written, _, plan = write(data(pairs(chars=chars)), card=named_card(card), config=SMALL)
    recipe = load_recipe(written)
    again = memory.plan(recipe, Shape.from_config(SMALL), named_card(card))
    assert plan is not None and plan.fits
    assert again.total_bytes == plan.total_bytes  # the file means what was planned
    rows = recipe.train.per_device_train_batch_size
    assert rows * recipe.train.gradient_accumulation_steps == 16
    assert f"# Predicted peak on {plan.card.name}: {plan.total_bytes / 2**30:.1f} of" in comments(
        written
    )
    if rows < 16:
        doubled = {"per_device_train_batch_size": rows * 2}
        larger = recipe.model_copy(update={"train": recipe.train.model_copy(update=doubled)})
        assert not memory.plan(larger, Shape.from_config(SMALL), named_card(card)).fits


def test_rows_are_shortened_only_where_one_at_a_time_does_not_fit() -> None:
    path = data([*pairs(90, chars=600), *pairs(10, chars=90_000)])
    config = SMALL | {"max_position_embeddings": 32768}
    written, _, plan = write(path, card=named_card("4GB"), config=config)
    recipe = load_recipe(written)
    assert plan is not None and plan.fits
    assert recipe.train.per_device_train_batch_size == 1
    assert 600 / 3 < recipe.data.max_length < 30_000
    assert 0.1 <= recipe.data.max_lost_fraction <= 1


def test_a_model_that_never_fits_is_refused_with_numbers_and_nothing_is_written() -> None:
    with pytest.raises(DoesNotFit, match=r"GiB.*\n"):
        write(data(pairs()), card=named_card("8GB"), config=LARGE)
    assert not Path("mine.yaml").exists()


def test_a_card_without_a_config_is_named_as_not_planned() -> None:
    written, _, plan = write(data(pairs()), "owner/model", "mine.yaml", card=named_card("T4"))
    assert plan is None
    assert "Not planned for T4" in comments(written)
    assert load_recipe(written).model.name == "owner/model"


def test_unreadable_and_unusable_rows_are_listed_together() -> None:
    path = data([*pairs(3), {"prompt": "a", "completion": ""}])
    path.write_text(path.read_text() + "{cut")
    with pytest.raises(DataError) as caught:
        write(path)
    text = str(caught.value)
    assert "2 rows cannot be used" in text and "data.on_bad_row: skip" in text
    assert ":4: completion is empty" in text and ":5: not valid JSON" in text
