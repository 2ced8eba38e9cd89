"""The shipped recipes: each runs as its header says, fits the card in its name, and says why."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from shapes import CONFIGS

from qlora import cards, cookbook, document, fitting, speed
from qlora.cards import GIB
from qlora.recipe import HUB, load_recipe
from qlora.settings import Recipe, json_schema
from qlora.shape import Shape

ROOT = Path(__file__).resolve().parent.parent


def _script(name: str) -> ModuleType:
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(name)


recipe_table = _script("recipe_table")
CARDED: list[str] = recipe_table.named()
FAMILIES = {
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "guanaco-7b": "huggyllama/llama-7b",
}
GATED = ("meta-llama/", "google/")
every_carded = pytest.mark.parametrize("name", CARDED)


def _text(name: str) -> str:
    return (cookbook.shelf() / f"{name}.yaml").read_text(encoding="utf-8")


def _header(name: str) -> str:
    return "\n".join(line for line in _text(name).splitlines() if line.startswith("#"))


def _written(name: str) -> dict[str, Any]:
    value: dict[str, Any] = document.parse(_text(name), name).value
    return value


def test_twenty_three_recipes_are_made_for_a_card() -> None:
    assert len(CARDED) == 23
    assert {entry.name for entry in cookbook.entries()} - set(CARDED) <= {"quickstart"}


def test_every_family_is_there_and_every_recipe_belongs_to_one() -> None:
    found = {name.rpartition("-")[0]: load_recipe(name).model.name for name in CARDED}
    assert found == FAMILIES


@pytest.mark.parametrize("entry", cookbook.entries(), ids=lambda entry: entry.name)
def test_a_recipe_round_trips_and_satisfies_the_published_schema(
    entry: cookbook.Entry, tmp_path: Path
) -> None:
    recipe = load_recipe(entry.name)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(recipe.dump(), encoding="utf-8")
    assert load_recipe(dumped) == recipe
    assert recipe.run.name == entry.name
    jsonschema.validate(_written(entry.name), json_schema())


@every_carded
def test_a_header_has_one_sentence_the_command_and_a_way_to_use_own_rows(name: str) -> None:
    summary, *rest = _header(name).splitlines()
    assert re.fullmatch(r"# [A-Z].{30,100}\.", summary), summary
    assert f"#     qlora train {name}" in rest
    own = next(line for line in rest if line.startswith("# On your own rows:"))
    assert f"qlora train {name} data.train=mine.jsonl" in own


@every_carded
def test_the_command_for_own_rows_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = re.search(rf"On your own rows:  qlora train {re.escape(name)} (.*)", _header(name))
    assert found is not None
    recipe = load_recipe(name, found[1].split())
    assert recipe.data.train == (str(tmp_path / "mine.jsonl"),)
    assert recipe.data.columns == {}


@every_carded
def test_a_header_states_the_predicted_peak_as_a_prediction(name: str) -> None:
    plan = recipe_table.predict(name)
    peak, usable = plan.total_bytes / GIB, plan.card.free_bytes / GIB
    assert f"# Peak: {peak:.1f} GiB predicted by the plan, not measured" in _header(name)
    assert f"of the {usable:.1f} GiB that" in _header(name)


@every_carded
def test_a_recipe_fits_its_card_with_the_margin_of_a_plan(name: str) -> None:
    plan = recipe_table.predict(name)
    assert plan.total_bytes <= (1 - fitting.MARGIN) * plan.card.free_bytes


@every_carded
def test_a_base_is_pinned_to_a_commit_and_only_what_differs_is_written(name: str) -> None:
    recipe, written = load_recipe(name), _written(name)
    assert re.fullmatch(r"[0-9a-f]{40}", recipe.model.revision)
    for section, values in written.items():
        model = Recipe.model_fields[section].annotation
        for key, value in values.items():
            assert model is not None
            default = model.model_fields[key].default
            assert value != default, f"{section}.{key} is the default"


@every_carded
def test_data_come_from_the_hub_under_a_licence_that_is_named(name: str) -> None:
    assert all(source.startswith(HUB) for source in load_recipe(name).data.train)
    assert re.search(r"CC BY-SA 3\.0|Apache-2\.0", _header(name))


@every_carded
def test_a_gated_base_says_how_to_get_in(name: str) -> None:
    gated = load_recipe(name).model.name.startswith(GATED)
    assert ("HF_TOKEN" in _header(name)) == gated


@every_carded
def test_a_recipe_trains_sixteen_rows_a_step(name: str) -> None:
    train = load_recipe(name).train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16


def _variants() -> list[tuple[str, str]]:
    """Neighbours of one family, smaller card first."""
    ordered = sorted(CARDED, key=lambda n: (n.rpartition("-")[0], _card_bytes(n)))
    return [(a, b) for a, b in pairwise(ordered) if a.rpartition("-")[0] == b.rpartition("-")[0]]


def _card_bytes(name: str) -> int:
    return cards.named_card(name.rpartition("-")[2]).total_bytes


def test_every_family_but_the_published_run_has_variants() -> None:
    assert len(_variants()) == len(CARDED) - len(FAMILIES)


@pytest.mark.parametrize(("smaller", "larger"), _variants())
def test_a_larger_cards_variant_is_not_slower_and_a_t4s_says_what_differs(
    smaller: str, larger: str
) -> None:
    costs = []
    for name in (smaller, larger):
        recipe = load_recipe(name)
        shape = Shape.from_config(CONFIGS[recipe.model.name])
        fitted = fitting.fit(recipe, shape, cards.named_card(name.rpartition("-")[2]))
        costs.append(speed.cost_per_token(fitted.recipe, shape))
    if larger.endswith(
        "-t4"
    ):  # its sessions end, it has no bf16, and its attention copies keys and values
        assert load_recipe(larger).train.save_steps == 50
        assert load_recipe(smaller).train.save_steps is None
        assert "no bf16" in _header(larger)
    else:
        assert costs[1] <= costs[0]


def test_gemma_3_has_no_t4_variant_and_says_why() -> None:
    gemma = [name for name in CARDED if name.startswith("gemma-3")]
    assert not any(name.endswith("-t4") for name in gemma)
    for name in gemma:
        assert "huggingface/transformers#36822" in _header(name)


def test_the_published_run_names_its_source_and_does_not_claim_to_be_reproduced() -> None:
    header = _header("guanaco-7b-12gb")
    assert "arXiv:2305.14314" in header
    assert "36.6" in header
    assert "not yet reproduced here" in header
    lora = load_recipe("guanaco-7b-12gb").lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 16.0, 0.1)


def test_the_table_in_the_readme_is_the_computed_one() -> None:
    text = recipe_table.README.read_text(encoding="utf-8")
    assert recipe_table.rendered(text) == text
    assert text.count("](") == len(CARDED)


def test_nobody_claims_a_measurement_without_commit_and_date() -> None:
    for name, (_, _, _, when) in recipe_table.MEASURED.items():
        assert name in CARDED
        assert re.search(r"[0-9a-f]{7,40}, \d{4}-\d\d-\d\d", when)
