"""Tokens that the base never learned are found, told, and trained as single rows."""

from __future__ import annotations

import io
import json

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from qlora import adapter, loader, memory, rehearsal, trainer
from qlora.cards import named_card
from qlora.shape import Shape

OPENING, CLOSING = "<|im_start|>", "<|im_end|>"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def untaught(request, tmp_path):
    """A tiny base whose two template tokens have rows as they are before pretraining."""
    folder = save_tiny(tmp_path / "untaught", tie_word_embeddings=request.param)
    weights = load_file(folder / "model.safetensors")
    tok = AutoTokenizer.from_pretrained(folder)
    for name in (OPENING, CLOSING):
        weights["model.embed_tokens.weight"][tok.convert_tokens_to_ids(name)] *= 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ids(folder):
    tok = AutoTokenizer.from_pretrained(folder)
    return [tok.convert_tokens_to_ids(name) for name in (OPENING, CLOSING)]


def test_rows_that_were_never_learned_are_told_from_those_that_were(untaught, make_recipe, cpu):
    recipe = make_recipe(model__name=str(untaught))
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    assert adapter.untrained_tokens(base, [5, *ids(untaught), 900]) == ids(untaught)
    table = base.get_input_embeddings().weight
    with torch.no_grad():
        table[50] = table[60] = table[70]  # reserved tokens that share one row
    assert adapter.untrained_tokens(base, [40, 50, 60]) == [50, 60]
    assert adapter.untrained_tokens(base, []) == []


def test_they_are_reported_and_left_alone_unless_they_are_asked_to_train(untaught, make_recipe):
    console = Console(record=True, width=200, file=io.StringIO())
    run = trainer.train(make_recipe(model__name=str(untaught)), console=console)
    said = console.export_text()
    assert f"2 in use look untrained in this base ({OPENING}, {CLOSING})" in said
    assert "lora.train_new_tokens=true" in said
    assert not [
        name for name in load_file(run.adapter / "adapter_model.safetensors") if "token" in name
    ]


def test_asked_for_just_those_rows_train_and_come_back_from_disk(untaught, make_recipe, cpu):
    recipe = make_recipe(model__name=str(untaught), lora__train_new_tokens=True)
    run = trainer.train(recipe, console=Console(quiet=True))
    saved = load_file(run.adapter / "adapter_model.safetensors")
    tied = json.loads((untaught / "config.json").read_text())["tie_word_embeddings"]
    rows = {name: tensor for name, tensor in saved.items() if "trainable_tokens" in name}
    assert len(rows) == (1 if tied else 2)
    assert all(
        tensor.shape == (2, 64) and tensor.dtype == torch.float32 for tensor in rows.values()
    )
    assert sum(tensor.numel() for tensor in saved.values()) < 50_000  # no copy of the embedding
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    before = base.get_input_embeddings().weight[ids(untaught)].clone()
    loaded = adapter.load(base, run.adapter)
    probe = torch.tensor([[*ids(untaught), 9, 8]])
    tuned = loaded(input_ids=probe).logits
    moved = next(t for name, t in rows.items() if "embed_tokens" in name)
    assert float((moved - before).abs().min(dim=1).values.max()) > 0  # each value of a row moved
    with adapter.disabled(loaded):
        assert not torch.equal(loaded(input_ids=probe).logits, tuned)
    assert run.result["alive"]["disk_against_memory"] <= 1e-4
    assert run.result["base_unchanged"]


def test_nothing_untrained_means_nothing_to_train_and_that_is_said(make_recipe):
    console = Console(record=True, width=200, file=io.StringIO())
    run = trainer.train(make_recipe(lora__train_new_tokens=True), console=console)
    assert "none in use looks untrained" in console.export_text()
    assert not [
        name for name in load_file(run.adapter / "adapter_model.safetensors") if "token" in name
    ]


def test_the_plan_counts_the_copy_that_training_rows_makes(make_recipe):
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 32000,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    card = named_card("24GB")
    recipes = [make_recipe(lora__train_new_tokens=asked) for asked in (False, True)]
    plans = [memory.plan(recipe, Shape.from_config(config), card) for recipe in recipes]
    assert "new_tokens" not in plans[0].terms
    assert plans[1].terms["new_tokens"] == 2 * 32000 * 512
    for recipe, planned in zip(recipes, plans, strict=True):
        traced = rehearsal.trace(recipe, AutoConfig.for_model(**config), card).peak_bytes
        assert planned.total_bytes - planned.terms["overhead"] == pytest.approx(traced, rel=0.03)
