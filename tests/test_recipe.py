"""A recipe is complete, strict and immutable, and says all that is wrong with it at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from qlora import cookbook, document
from qlora.errors import RecipeError
from qlora.recipe import is_local, load_recipe, local_path, recipe_from
from qlora.settings import SFT_CONFIG_OWNED, Recipe, json_schema

# Adding a field is a deliberate act: it is also added here.
FIELDS = [
    "model.name",
    "model.revision",
    "model.attn_implementation",
    "quant.quant_type",
    "quant.double_quant",
    "quant.compute_dtype",
    "quant.cache",
    "quant.head",
    "lora.r",
    "lora.lora_alpha",
    "lora.lora_dropout",
    "lora.target_modules",
    "lora.use_rslora",
    "lora.train_new_tokens",
    "data.train",
    "data.split",
    "data.revision",
    "data.held_out",
    "data.held_out_fraction",
    "data.format",
    "data.columns",
    "data.on_bad_row",
    "data.rendering",
    "data.chat_template",
    "data.loss_on",
    "data.max_length",
    "data.over_length",
    "data.max_lost_fraction",
    "data.packing",
    "data.cache",
    "train.num_train_epochs",
    "train.max_steps",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.warmup_steps",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.optim",
    "train.activation_checkpointing",
    "train.kernels",
    "train.levels",
    "train.activation_offload",
    "train.mlp_tile",
    "train.embedding_offload",
    "train.fit",
    "train.rehearse",
    "train.seed",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.spike_factor",
    "train.after_bad_steps",
    "train.oom_retries",
    "train.sft_config",
    "run.dir",
    "run.name",
    "run.save_every",
    "run.mirror",
    "run.report_to",
    "run.project",
    "eval.generate",
    "eval.exact_match",
    "eval.max_new_tokens",
    "eval.batch_size",
    "eval.samples",
]

SMALL = "model:\n  name: embedded:base\ndata:\n  train: rows.jsonl\n"
MORE = """\
model: {name: embedded:base, attn_implementation: eager}
quant: {quant_type: none, compute_dtype: float32}
lora: {r: 64, lora_alpha: 16, target_modules: [q_proj, v_proj], use_rslora: true}
data:
  train: [rows.jsonl, "a b.jsonl", hub:owner/name]
  held_out: rows.jsonl
  columns: {prompt: "on", completion: "2e-4"}
  max_lost_fraction: 0
train:
  learning_rate: 1e-5
  max_steps: 3
  warmup_steps: 10
  sft_config: {neftune_noise_alpha: 5, adam_beta2: 0.95, loss_type: nll, group_by_length: true}
run: {name: "012", report_to: wandb, project: "no"}
eval: {generate: 4, exact_match: [queue]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with two data files and a folder elsewhere."""
    (tmp_path / "here" / "elsewhere").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("rows.jsonl", "a b.jsonl", "elsewhere/other.jsonl", "elsewhere/rows.jsonl"):
        Path(name).write_text('{"prompt": "a", "completion": "b"}\n')
    return Path.cwd()


@pytest.fixture
def load(folder: Path) -> Callable[..., Recipe]:
    def load(text: str = SMALL, *overrides: str, name: str = "mine.yaml") -> Recipe:
        (folder / name).write_text(text)
        return load_recipe(folder / name, overrides)

    return load


@pytest.fixture
def refusal(load: Callable[..., Recipe]) -> Callable[..., str]:
    def refusal(text: str = SMALL, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return refusal


def value_at(recipe: Recipe, address: str) -> Any:
    section, _, key = address.partition(".")
    return getattr(getattr(recipe, section), key)


# --- what may be set


def test_the_list_of_fields_is_the_one_agreed_on() -> None:
    found = [
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    assert found == FIELDS
    assert len(found) == 68


def test_every_field_says_what_it_means() -> None:
    for section, field in Recipe.model_fields.items():
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            said = inner.description or ""
            assert said.endswith(".") and len(said) > 10, f"{section}.{key}"


def test_only_the_model_and_the_training_data_must_be_given(load: Callable[..., Recipe]) -> None:
    recipe = load()
    assert recipe.model.name == "embedded:base"
    assert recipe.lora.target_modules == ("all-linear",)
    assert recipe.data.loss_on == "completions" and recipe.quant.double_quant
    required = {
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key, inner in field.annotation.model_fields.items()  # type: ignore[union-attr]
        if inner.is_required()
    }
    assert required == {"model.name", "data.train"}


def test_a_recipe_is_named_after_its_file_unless_it_names_itself(
    load: Callable[..., Recipe],
) -> None:
    assert load(name="gentle.yaml").run.name == "gentle"
    assert load(SMALL + "run: {name: other}\n", name="gentle.yaml").run.name == "other"
    assert load(SMALL, "run.name=third", name="gentle.yaml").run.name == "third"


@pytest.mark.parametrize("name", ["my recipe (1).yaml", "déjà-vu.yaml", "a+b.yaml", "..yaml"])
def test_a_recipe_in_a_file_of_any_name_can_be_dumped_and_read_again(
    name: str, load: Callable[..., Recipe]
) -> None:
    recipe = load(name=name)
    assert load(recipe.dump(), name="again.yaml") == recipe


@pytest.mark.parametrize("section", list(Recipe.model_fields))
def test_a_recipe_cannot_be_changed(section: str, load: Callable[..., Recipe]) -> None:
    recipe = load()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(recipe, section, None)
    inner = getattr(recipe, section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(inner, next(iter(type(inner).model_fields)), None)


# --- unknown keys


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("lora: {rank: 8}", "unknown key 'lora.rank' - did you mean 'r'?"),
        ("lora: {lora_r: 8}", "did you mean 'r'?"),
        ("lora: {alpha: 8}", "did you mean 'lora_alpha'?"),
        ("lora: {lora_alhpa: 8}", "did you mean 'lora_alpha'?"),
        ("train: {lr: 1e-4}", "unknown key 'train.lr' - did you mean 'learning_rate'?"),
        ("train: {learning-rate: 1e-4}", "did you mean 'learning_rate'?"),
        ("train: {epochs: 1}", "did you mean 'num_train_epochs'?"),
        ("train: {micro_batch_size: 1}", "did you mean 'per_device_train_batch_size'?"),
        ("train: {gradient_checkpointing: 1}", "did you mean 'activation_checkpointing'?"),
        ("train: {max_length: 64}", "did you mean 'data.max_length'?"),
        ("train: {max_seq_length: 64}", "did you mean 'data.max_length'?"),
        ("train: {output_dir: x}", "did you mean 'run.dir'?"),
        ("train: {lora_dropout: 0.1}", "did you mean 'lora.lora_dropout'?"),
        ("train: {neftune_noise_alpha: 5}", "write train.sft_config.neftune_noise_alpha"),
        ("quant: {load_in_4bit: true}", "Keys of 'quant' are quant_type, double_quant"),
        ("eval: {zebra: 1}", "Keys of 'eval' are generate, exact_match"),
        ("lors: {r: 8}", "unknown key 'lors' - did you mean 'lora'?"),
        ("learning_rate: 1e-4", "did you mean 'train.learning_rate'?"),
        ("lr: 1e-4", "did you mean 'train.learning_rate'?"),
        ("zebra: 1", "Sections are model, quant, lora, data, train, run, eval"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    line: str, hint: str, refusal: Callable[..., str]
) -> None:
    message = refusal(SMALL + line + "\n")
    assert message.startswith("mine.yaml:5: unknown key")
    assert hint in message


def test_an_unknown_key_on_the_command_line_is_placed_there(refusal: Callable[..., str]) -> None:
    assert refusal(SMALL, "lora.rank=8") == (
        "command line: unknown key 'lora.rank' - did you mean 'r'?"
    )


# --- wrong values


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_steps=four", ["must be a whole number", "the text 'four'"]),
        ("train.max_steps=true", ["must be a whole number", "found True"]),
        ("lora.r=8.0", ["must be a whole number", "found 8.0"]),
        ("lora.r='8'", ["must be a whole number", "the text '8'"]),
        ("train.learning_rate=true", ["must be a number", "found True"]),
        ("train.learning_rate='2e-4'", ["must be a number", "the text '2e-4'"]),
        ("train.learning_rate=[1]", ["must be a number", "found [1]"]),
        (
            "train.activation_checkpointing=yes",
            ["must be true, false or a number of layers", "the text 'yes'"],
        ),
        ("train.activation_checkpointing=-1", ["greater than or equal to 0", "found -1"]),
        ("train.activation_checkpointing=1.5", ["a number of layers; found 1.5"]),
        ("quant.double_quant=1", ["must be true or false", "found 1"]),
        ("model.revision=5", ["must be text", "found 5"]),
        ("run.project=null", ["must be text", "found None"]),
        ("data.columns=[a]", ["must be a mapping", "found ['a']"]),
        ("data.train=5", ["must be a list", "found 5"]),
        ("quant.quant_type=fp4", ["'nf4' or 'none'", "the text 'fp4'"]),
        ("quant.quant_type=no", ["'nf4' or 'none'", "the text 'no'"]),
        ("run.report_to=mlflow", ["'none', 'wandb' or 'tensorboard'"]),
        ("run.save_every=10", ["must be text", "found 10"]),
        ("train.spike_factor=1", ["greater than 1"]),
        ("train.oom_retries=-1", ["greater than or equal to 0"]),
        ("lora.r=0", ["greater than or equal to 1", "found 0"]),
        ("lora.r=1025", ["less than or equal to 1024", "found 1025"]),
        ("lora.lora_alpha=0", ["greater than 0"]),
        ("lora.lora_dropout=1", ["less than 1"]),
        ("lora.target_modules=[]", ["at least 1 item"]),
        ("data.train=[]", ["at least 1 item"]),
        ("data.max_length=-5", ["greater than or equal to 8", "found -5"]),
        ("data.held_out_fraction=1", ["less than 1"]),
        ("data.max_lost_fraction=1.1", ["less than or equal to 1"]),
        ("train.learning_rate=2", ["less than 1", "found 2"]),
        ("train.learning_rate=0", ["greater than 0"]),
        ("train.learning_rate=.nan", ["found nan"]),
        ("train.num_train_epochs=0", ["greater than 0"]),
        ("train.per_device_train_batch_size=0", ["greater than or equal to 1"]),
        ("train.gradient_accumulation_steps=0", ["greater than or equal to 1"]),
        ("train.max_steps=0", ["greater than or equal to 1"]),
        ("train.save_total_limit=0", ["greater than or equal to 1"]),
        ("train.max_grad_norm=0", ["greater than 0"]),
        ("train.seed=-1", ["greater than or equal to 0"]),
        ("eval.generate=-1", ["greater than or equal to 0"]),
        ("run.name='a/b'", ["the text 'a/b'"]),
        ("model.name=''", ["at least 1 character"]),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused(
    override: str, parts: list[str], refusal: Callable[..., str]
) -> None:
    message = refusal(SMALL, override)
    assert message.startswith(f"command line: '{override.partition('=')[0]}' must ")
    assert [part for part in parts if part not in message] == []
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    "key",
    ["lora.lora_alpha", "train.num_train_epochs", "train.weight_decay", "train.warmup_steps"],
)
def test_infinity_is_refused(key: str, refusal: Callable[..., str]) -> None:
    """JSON cannot carry it, and no run can follow it."""
    assert f"'{key}' must " in refusal(SMALL, f"{key}=.inf")


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_run_name_never_leaves_its_folder(name: str, refusal: Callable[..., str]) -> None:
    assert "run.name" in refusal(SMALL, f"run.name='{name}'")


@pytest.mark.parametrize(
    ("written", "read"),
    [("2e-4", 2e-4), ("2E-4", 2e-4), ("0.0002", 2e-4), (".5", 0.5), ("1e-05", 1e-5)],
)
def test_a_learning_rate_may_be_written_with_an_exponent(
    written: str, read: float, load: Callable[..., Recipe]
) -> None:
    in_file = load(SMALL + f"train: {{learning_rate: {written}}}\n")
    overridden = load(SMALL, f"train.learning_rate={written}")
    assert in_file.train.learning_rate == overridden.train.learning_rate == read


def test_a_whole_number_will_do_where_a_number_belongs(load: Callable[..., Recipe]) -> None:
    alpha = load(SMALL, "lora.lora_alpha=32").lora.lora_alpha
    assert alpha == 32.0 and isinstance(alpha, float)


def test_one_text_stands_for_a_list_of_one(load: Callable[..., Recipe]) -> None:
    recipe = load(SMALL + "lora: {target_modules: q_proj}\neval: {exact_match: queue}\n")
    assert recipe.lora.target_modules == ("q_proj",)
    assert recipe.eval.exact_match == ("queue",)


def test_a_problem_in_a_list_names_its_item_and_its_line(refusal: Callable[..., str]) -> None:
    message = refusal(SMALL + "lora:\n  target_modules: [q_proj, 1]\n")
    assert message.startswith("mine.yaml:6: 'lora.target_modules.1' must be text; found 1")


def test_a_problem_inside_an_overridden_list_is_not_blamed_on_the_file(
    refusal: Callable[..., str],
) -> None:
    message = refusal(SMALL + "lora: {target_modules: [q_proj]}\n", "lora.target_modules=[v, 1]")
    assert message == "command line: 'lora.target_modules.1' must be text; found 1."


def test_every_problem_is_listed_at_once_each_with_its_line(refusal: Callable[..., str]) -> None:
    text = (
        "model: {}\n"
        "data:\n  train: rows.jsonl\n  max_length: 4\n"
        "lora:\n  rank: 8\n  lora_dropout: often\n"
        "train: {learning_rate: 2e-4}\n"
        "speed: fast\n"
    )
    lines = refusal(text, "train.max_steps=0").splitlines()
    assert [line.partition(": ")[0] for line in sorted(lines)] == [
        "command line",
        "mine.yaml:1",
        "mine.yaml:4",
        "mine.yaml:6",
        "mine.yaml:7",
        "mine.yaml:9",
    ]
    whole = "\n".join(lines)
    for part in ("'model.name' is missing", "'data.max_length'", "'r'?", "'often'", "'speed'"):
        assert part in whole


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_missing_section_is_named(section: str, refusal: Callable[..., str]) -> None:
    kept = {"model": "data: {train: rows.jsonl}\n", "data": "model: {name: embedded:base}\n"}
    assert refusal(kept[section]).startswith(f"mine.yaml: '{section}' is missing")


def test_a_missing_key_says_what_belongs_there(refusal: Callable[..., str]) -> None:
    message = refusal("model: {name: embedded:base}\ndata: {split: a}\n")
    assert "mine.yaml:2: 'data.train' is missing. Files (.jsonl .json" in message


@pytest.mark.parametrize("written", ["lora: 8", "lora: [r]"])
def test_a_section_that_is_no_mapping_is_refused(written: str, refusal: Callable[..., str]) -> None:
    assert "mine.yaml:5: 'lora' must be a section of keys" in refusal(SMALL + written + "\n")


@pytest.mark.parametrize("line", ["3: 4", "true: 4", "train: {3: 4}"])
def test_a_key_that_is_no_word_is_refused_with_its_line(
    line: str, refusal: Callable[..., str]
) -> None:
    assert refusal(SMALL + line + "\n").startswith("mine.yaml:5: ")


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_recipe_says_how_to_begin(text: str, refusal: Callable[..., str]) -> None:
    assert "qlora recipes copy quickstart" in refusal(text)


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    (folder / "mine.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot be read"):
        load_recipe(folder / "mine.yaml")


def test_a_byte_order_mark_changes_nothing(folder: Path, load: Callable[..., Recipe]) -> None:
    plain = load()
    (folder / "mine.yaml").write_text(SMALL, encoding="utf-8-sig")
    assert load_recipe("mine.yaml") == plain


# --- overrides


@pytest.mark.parametrize(
    ("override", "address", "value"),
    [
        ("lora.r=32", "lora.r", 32),
        (" lora.r = 32", "lora.r", 32),
        ("train.max_steps=null", "train.max_steps", None),
        ("train.max_steps=", "train.max_steps", None),
        ("train.activation_checkpointing=false", "train.activation_checkpointing", False),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ("q_proj", "v_proj")),
        ("lora.target_modules=q_proj", "lora.target_modules", ("q_proj",)),
        ("data.columns={prompt: q}", "data.columns", {"prompt": "q"}),
        ("data.columns.prompt=q", "data.columns", {"prompt": "q", "completion": "a"}),
        ("train.sft_config.adam_beta2=0.95", "train.sft_config", {"adam_beta2": 0.95}),
        ("run.project=a=b", "run.project", "a=b"),
        ("run.project=no", "run.project", "no"),
        ("eval.exact_match=[]", "eval.exact_match", ()),
    ],
)
def test_an_override_replaces_one_value_and_leaves_the_rest(
    override: str, address: str, value: object, load: Callable[..., Recipe]
) -> None:
    text = SMALL + "  columns: {prompt: x, completion: a}\ntrain: {max_steps: 5}\n"
    plain, changed = load(text), load(text, override)
    assert value_at(changed, address) == value
    for other in FIELDS:
        if other != address:
            assert value_at(changed, other) == value_at(plain, other)


def test_the_last_of_two_overrides_holds(load: Callable[..., Recipe]) -> None:
    assert load(SMALL, "lora.r=8", "lora.r=4").lora.r == 4


@pytest.mark.parametrize("override", ["lora.r", "r=8", "=8", "lora.=8", ".r=8", "lora..r=8", ""])
def test_a_malformed_override_is_shown_with_a_good_one(
    override: str, refusal: Callable[..., str]
) -> None:
    message = refusal(SMALL, override)
    assert repr(override) in message and "such as lora.r=32" in message


def test_an_override_below_a_plain_value_is_refused(refusal: Callable[..., str]) -> None:
    message = refusal(SMALL, "model.name.x=1")
    assert "'model.name.x=1'" in message and "'name' is a value, not a section" in message


# --- names of files


def test_names_in_a_recipe_are_seen_from_its_folder_and_overrides_from_here(
    folder: Path,
) -> None:
    (folder / "elsewhere" / "mine.yaml").write_text(
        SMALL.replace("rows.jsonl", "[other.jsonl, ../rows.jsonl]")
    )
    recipe = load_recipe("elsewhere/mine.yaml", ["data.held_out=a b.jsonl"])
    assert recipe.data.train == (
        str(folder / "elsewhere" / "other.jsonl"),
        str(folder / "rows.jsonl"),
    )
    assert recipe.data.held_out == str(folder / "a b.jsonl")
    overridden = load_recipe("elsewhere/mine.yaml", ["data.train=[rows.jsonl]"])
    assert overridden.data.train == (str(folder / "rows.jsonl"),)


def test_a_model_folder_is_seen_from_the_recipes_folder(folder: Path) -> None:
    (folder / "elsewhere" / "base").mkdir()
    path = folder / "elsewhere" / "mine.yaml"
    for name in ("base", "./base", "../elsewhere/base"):
        path.write_text(SMALL.replace("embedded:base", name))
        assert load_recipe(path).model.name == str(folder / "elsewhere" / "base")


def test_hub_and_embedded_names_are_left_alone(load: Callable[..., Recipe]) -> None:
    recipe = load(
        "model: {name: Qwen/Qwen3-8B}\n"
        "data: {train: [hub:owner/name, embedded:tickets/train.jsonl]}\n"
    )
    assert recipe.model.name == "Qwen/Qwen3-8B"
    assert recipe.data.train == ("hub:owner/name", "embedded:tickets/train.jsonl")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train=row.jsonl", ["data.train", "row.jsonl'", "Did you mean 'rows.jsonl'?"]),
        ("data.held_out=rows.json", ["data.held_out", "Did you mean 'rows.jsonl'?"]),
        ("data.chat_template=none.jinja", ["data.chat_template", "none.jinja", "not there"]),
        ("data.train=[rows.jsonl, nowhere/x.jsonl]", ["nowhere", "does not exist either"]),
        ("data.train=embedded:tickets/trian.jsonl", ["Did you mean 'train.jsonl'?"]),
        ("model.name=./bass", ["model.name", "bass", "not there"]),
        ("model.name=embedded:bass", ["model.name", "embedded:bass", "not there"]),
    ],
)
def test_a_file_that_is_not_there_is_refused_with_the_nearest_name(
    override: str, parts: list[str], refusal: Callable[..., str]
) -> None:
    message = refusal(SMALL, override)
    assert [part for part in parts if part not in message] == []


def test_all_missing_files_are_named_at_once(refusal: Callable[..., str]) -> None:
    message = refusal(SMALL, "data.train=[x.jsonl, y.jsonl]", "data.held_out=z.jsonl")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("key", ["data.train", "data.held_out", "data.chat_template"])
def test_an_empty_file_name_is_refused(key: str, refusal: Callable[..., str]) -> None:
    """It must not come to mean the recipe's own folder."""
    assert key in refusal(SMALL, f"{key}=''")


@pytest.mark.parametrize("place", ["source", "data.train", "data.held_out", "model.name"])
def test_the_home_of_nobody_is_refused_in_words(
    place: str, load: Callable[..., Recipe], folder: Path
) -> None:
    load()
    name = "~no-such-user-here/x"
    source, overrides = (name, []) if place == "source" else ("mine.yaml", [f"{place}={name}"])
    with pytest.raises(RecipeError, match="no-such-user-here"):
        load_recipe(source, overrides)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("./x", True),
        ("../x", True),
        ("/x", True),
        ("~/x", True),
        ("embedded:base", True),
        ("elsewhere", True),
        ("Qwen/Qwen3-8B", False),
        ("gpt2", False),
    ],
)
def test_a_name_is_local_if_it_looks_like_a_path_or_is_there(name: str, local: bool) -> None:
    assert is_local(name) is local


def test_the_embedded_files_are_there() -> None:
    assert (local_path("embedded:base") / "config.json").is_file()
    assert local_path("embedded:tickets/train.jsonl").is_file()


def test_an_unknown_recipe_name_gives_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'quickstart'\?.*qlora recipes list"):
        load_recipe("quickstrat")


def test_a_folder_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match="elsewhere: a folder"):
        load_recipe("elsewhere")


def test_a_shipped_recipe_is_copied_once_and_still_runs(folder: Path) -> None:
    path = cookbook.copy("quickstart", "sub/mine.yaml")
    copied, shipped = load_recipe(path), load_recipe("quickstart")
    assert copied.run.name == "mine"
    assert copied.model_copy(update={"run": shipped.run}) == shipped
    with pytest.raises(RecipeError, match="exists already"):
        cookbook.copy("quickstart", path)
    assert cookbook.copy("quickstart", folder) == folder / "quickstart.yaml"
    with pytest.raises(RecipeError, match="cannot be written"):
        cookbook.copy("quickstart", folder / "rows.jsonl" / "x.yaml")


# --- what must not be in a recipe

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    "line",
    [
        f"run: {{project: {TOKEN}}}",
        f"train: {{sft_config: {{hub_model_id: {TOKEN}}}}}",
        f"train: {{sft_config: {{tags: [{TOKEN}]}}}}",
        f"train: {{sft_config: {{inner: {{deep: [{{key: {TOKEN}}}]}}}}}}",
        "run: {project: " + "0123456789abcdef" * 2 + "01234567}",
        "run: {project: sk-proj-abcdefghijklmnop}",
    ],
)
def test_a_secret_is_refused_and_not_repeated(line: str, refusal: Callable[..., str]) -> None:
    message = refusal(SMALL + line + "\n")
    assert "looks like a secret" in message and "HF_TOKEN" in message
    assert line.split()[1].split(":")[0].strip("{") in message
    for secret in (TOKEN, "0123456789abcdef", "abcdefghijklmnop"):
        assert secret not in message


@pytest.mark.parametrize(
    "override",
    [
        "run.name=hf_finetuned",
        "run.project=sk-learn",
        "model.revision='" + "0123456789abcdef" * 2 + "01234567'",
    ],
)
def test_what_only_resembles_a_secret_is_let_through(
    override: str, load: Callable[..., Recipe]
) -> None:
    address, _, value = override.partition("=")
    assert value_at(load(SMALL, override), address) == value.strip("'")


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("bf16", "quant.compute_dtype"),
        ("learning_rate", "train.learning_rate"),
        ("max_length", "data.max_length"),
        ("output_dir", "run.dir"),
        ("gradient_checkpointing", "train.activation_checkpointing"),
        ("assistant_only_loss", "data.loss_on"),
        ("trust_remote_code", "remote code is never run"),
        ("hub_token", "HF_TOKEN"),
        ("packing", "data.packing"),
        ("dataloader_num_workers", "a thread prepares the next step's rows"),
        ("dataloader_pin_memory", "the hardware found"),
        ("accelerator_config", "there is one device"),
    ],
)
def test_an_sft_config_key_that_has_an_owner_is_refused(
    key: str, owner: str, refusal: Callable[..., str]
) -> None:
    message = refusal(SMALL, f"train.sft_config.{key}=1")
    assert f"train.sft_config.{key} is decided by" in message and owner in message


def test_a_duration_is_written_as_people_write_one(refusal: Callable[..., str]) -> None:
    for wrong in ("soon", "10", "0m", "1m30", "-5m"):
        said = refusal(SMALL, f"run.save_every='{wrong}'")
        assert f"run.save_every is {wrong!r}" in said and "90s, 10m or 1h30m" in said


def test_every_training_field_owns_its_name_in_sft_config(refusal: Callable[..., str]) -> None:
    for address in FIELDS:
        section, key = address.split(".")
        if section == "train" and key != "sft_config":
            assert SFT_CONFIG_OWNED[key] == address
    owners = {owner for owner in SFT_CONFIG_OWNED.values() if "." in owner.split(":")[0]}
    assert {o for o in owners if " " not in o} <= set(FIELDS)


# --- dumping


@pytest.mark.parametrize("text", [SMALL, MORE], ids=["small", "more"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["lora.lora_alpha=0.1", "train.learning_rate=1e-12", "train.weight_decay=1e20"],
        ["run.project='2e-4'", "model.revision='null'", "data.split='a: b #c'"],
        ["data.columns={text: 'naïve: 漢字'}", "train.optim='[x]'", "run.dir='12'"],
        ["train.sft_config={a: [1, 2.5, {b: null}], c: 'true', d: ''}", "train.eval_steps=7"],
    ],
)
def test_what_is_dumped_is_loaded_as_equal(
    text: str, overrides: list[str], load: Callable[..., Recipe]
) -> None:
    recipe = load(text, *overrides)
    dumped = recipe.dump()
    assert load(dumped, name="dumped.yaml") == recipe
    assert load(dumped, name="dumped.yaml").dump() == dumped


@pytest.mark.parametrize("entry", cookbook.entries(), ids=lambda entry: str(entry.name))
def test_every_shipped_recipe_survives_a_dump(
    entry: cookbook.Entry, load: Callable[..., Recipe]
) -> None:
    recipe = load_recipe(entry.name)
    assert load(recipe.dump(), name="dumped.yaml") == recipe


def test_a_dump_writes_every_field_out(load: Callable[..., Recipe]) -> None:
    written = document.parse(load().dump(), "dump").value
    assert [f"{section}.{key}" for section in written for key in written[section]] == FIELDS


# --- from a notebook


def test_a_recipe_from_dictionaries_is_the_one_from_a_file(load: Callable[..., Recipe]) -> None:
    values = {
        "model": {"name": "embedded:base"},
        "data": {"train": ["rows.jsonl"]},
        "run": {"name": "mine"},
    }
    before = copy.deepcopy(values)
    assert recipe_from(values) == load()
    assert values == before  # what the caller holds is not changed


def test_a_recipe_from_a_recipe_is_equal(load: Callable[..., Recipe]) -> None:
    recipe = load(MORE)
    assert recipe_from(recipe.model_dump()) == recipe


@pytest.mark.parametrize("train", ["rows.jsonl", ["rows.jsonl"], ("rows.jsonl",)])
def test_a_recipe_from_dictionaries_has_absolute_paths(train: object, folder: Path) -> None:
    values = {
        "model": {"name": "embedded:base"},
        "data": {"train": train},
        "run": {"name": "mine"},
    }
    assert recipe_from(values).data.train == (str(folder / "rows.jsonl"),)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"run": {}}, ["run.name is not set", "such as 'mine'"]),
        ({"lora": {"rank": 8}}, ["recipe: unknown key 'lora.rank' - did you mean 'r'?"]),
        ({"lora": 8}, ["'lora' must be a section of keys; found 8"]),
        ({"data": {"train": "row.jsonl"}}, ["row.jsonl", "Did you mean 'rows.jsonl'?"]),
        ({"model": None}, ["'model' must be a section of keys"]),
    ],
)
def test_dictionaries_are_checked_as_a_file_is(change: dict[str, Any], parts: list[str]) -> None:
    values: dict[str, Any] = {
        "model": {"name": "embedded:base"},
        "data": {"train": "rows.jsonl"},
        "run": {"name": "mine"},
    }
    with pytest.raises(RecipeError) as caught:
        recipe_from(values | change)
    assert [part for part in parts if part not in str(caught.value)] == []


# --- the JSON schema


def check(text: str) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document.parse(text, "demo").value, schema)


def test_the_schema_is_json_and_knows_every_field() -> None:
    schema = json.loads(json.dumps(json_schema()))
    sections = {
        name: schema["$defs"][(inner.get("$ref") or inner["allOf"][0]["$ref"]).rpartition("/")[2]]
        for name, inner in schema["properties"].items()
    }
    assert [f"{s}.{key}" for s in sections for key in sections[s]["properties"]] == FIELDS


@pytest.mark.parametrize("entry", cookbook.entries(), ids=lambda entry: str(entry.name))
def test_the_schema_accepts_every_shipped_recipe(entry: cookbook.Entry) -> None:
    check(entry.path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", [SMALL, MORE], ids=["small", "more"])
def test_the_schema_accepts_what_loads_and_its_dump(text: str, load: Callable[..., Recipe]) -> None:
    check(text)
    check(load(text).dump())


@pytest.mark.parametrize(
    "line",
    [
        "lora: {rank: 8}",
        "speed: 1",
        "lora: {r: true}",
        "lora: {r: 0}",
        "train: {learning_rate: fast}",
        "quant: {quant_type: fp4}",
        "lora: {target_modules: 3}",
        "lora: {target_modules: [3]}",
        "train: {max_steps: 0}",
    ],
)
def test_the_schema_refuses_what_does_not_load(line: str, refusal: Callable[..., str]) -> None:
    assert refusal(SMALL + line + "\n")
    with pytest.raises(jsonschema.ValidationError):
        check(SMALL + line + "\n")


def test_a_data_file_in_the_place_of_a_recipe_is_told_from_one(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"rows.jsonl: a data file, not a recipe. `qlora init rows"
    ):
        load_recipe("rows.jsonl")
