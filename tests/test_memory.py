"""Predicted bytes against independent references: published counts, autograd, and traced peaks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from shapes import CONFIGS, OTHERS

from qlora import cards, memory
from qlora.cards import GIB, Card, named_card
from qlora.errors import DoesNotFit, HardwareError, ModelError
from qlora.layer import Layer
from qlora.memory import Change, Plan, plan, require_fit
from qlora.recipe import recipe_from
from qlora.settings import Recipe
from qlora.shape import Shape, adapter_parameters, nf4_bytes

LLAMA = Shape.from_config(CONFIGS["meta-llama/Llama-3.1-8B-Instruct"])
CPU = Card("a laptop", "cpu", 8 * GIB, 6 * GIB)

# Total parameters as each model's page on the hub states them.
PUBLISHED = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "google/gemma-3-4b-it": 4_300_079_472,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "huggyllama/llama-7b": 6_738_415_616,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "google/gemma-2-9b": 9_241_705_984,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}


def make(**sections: dict[str, Any]) -> Recipe:
    """A recipe with the given sections over the least there must be."""
    values: dict[str, Any] = {
        "model": {"name": "owner/model"},
        "data": {"train": "hub:owner/data"},
        "run": {"name": "test"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return recipe_from(values)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qlora.memory; print({'torch', 'transformers'} & set(sys.modules) or 'none')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "none"


# Shapes


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_a_config_counts_to_the_published_total(name: str, total: int) -> None:
    assert Shape.from_config({**CONFIGS, **OTHERS}[name]).parameters == total


def test_every_configuration_here_has_a_published_total() -> None:
    assert PUBLISHED.keys() == {**CONFIGS, **OTHERS}.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_the_model_that_transformers_builds(name: str) -> None:
    config = transformers.AutoConfig.for_model(**{**CONFIGS, **OTHERS}[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    shape = Shape.from_config(config.to_dict())  # what a run sees: every default filled in
    assert shape == Shape.from_config({**CONFIGS, **OTHERS}[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.linear_parameters == sum(m.weight.numel() for m in linears)
    assert shape.tied == (head.weight is model.get_input_embeddings().weight)


def test_tied_embeddings_are_counted_once() -> None:
    smol = Shape.from_config(CONFIGS["HuggingFaceTB/SmolLM3-3B"])
    assert smol.tied
    assert smol.embedding_parameters == 128256 * 2048
    assert LLAMA.embedding_parameters == 2 * 128256 * 4096


def test_fused_projections_hold_the_weights_of_the_separate_ones() -> None:
    phi = dict(CONFIGS["microsoft/Phi-4-mini-instruct"])
    fused, split = Shape.from_config(phi), Shape.from_config({**phi, "model_type": "llama"})
    assert set(fused.linears) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert fused.linear_per_layer == split.linear_per_layer
    assert adapter_parameters(fused, 16, ["all-linear"]) < adapter_parameters(
        split, 16, ["all-linear"]
    )


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_config_without_a_needed_key_is_refused_by_its_name(key: str) -> None:
    config = {k: v for k, v in CONFIGS["Qwen/Qwen3-8B"].items() if k != key}
    with pytest.raises(ModelError, match=f"'{key}' must be a positive whole number; found None"):
        Shape.from_config(config)


@pytest.mark.parametrize("value", [True, "4096", 0, -1, 2.5])
def test_a_config_value_that_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        Shape.from_config({**CONFIGS["Qwen/Qwen3-8B"], "hidden_size": value})


def test_experts_a_tower_and_an_unknown_layout_are_marked() -> None:
    experts = Shape.from_config(OTHERS["Qwen/Qwen3-30B-A3B"])
    assert experts.unquantized_parameters > 0.9 * experts.parameters
    assert "mixture of experts" in " ".join(experts.notes)
    assert "vision tower" in " ".join(Shape.from_config(CONFIGS["google/gemma-3-4b-it"]).notes)
    unknown = Shape.from_config({**CONFIGS["Qwen/Qwen3-8B"], "model_type": "novel"})
    assert "'novel' is counted as if laid out like Llama" in unknown.notes
    assert LLAMA.notes == ()


# Bytes


def test_double_quantization_brings_a_weight_from_4_5_to_4_127_bits() -> None:
    weights = 4096 * 14336
    assert 8 * nf4_bytes(weights, double_quant=False) / weights == 4.5
    assert 8 * nf4_bytes(weights) / weights == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_bytes_are_those_that_bitsandbytes_allocates(double_quant: bool) -> None:
    weight = torch.randn(512, 384)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double_quant
    )
    held = [packed, state.absmax, *([state.state2.absmax] if double_quant else [])]
    assert nf4_bytes(weight.numel(), double_quant=double_quant) == sum(
        tensor.nbytes for tensor in held
    )


def test_an_adapter_has_r_rows_and_columns_for_every_matrix() -> None:
    assert adapter_parameters(LLAMA, 16, ["all-linear"]) == 41_943_040
    q_and_v = adapter_parameters(LLAMA, 8, ["q_proj", "v_proj"])
    assert q_and_v == 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert adapter_parameters(LLAMA, 8, ["self_attn.q_proj", "v_proj"]) == q_and_v


def test_a_module_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(ModelError, match=r"qkv_proj matches nothing.*q_proj, k_proj"):
        adapter_parameters(LLAMA, 8, ["qkv_proj"])


def _layer(shape: Shape, tokens: int, *, masked: bool) -> Layer:
    targets = frozenset(shape.linears)
    return Layer(shape, 2, tokens, tokens**2, 16, targets, masked=masked)


def test_kept_activations_equal_the_bytes_measured_with_peft_at_the_8b_shape() -> None:
    # Measured with a bf16 adapter, which autocast does not copy, and with the cosines and sines of the
    # rotary embedding (128 each, in bf16) counted in each layer, though all layers share them.
    layer = _layer(LLAMA, 1, masked=False)
    assert layer.kept - 2 * layer.adapter_weights + 2 * 2 * 128 == 185_192


def _saved_by_autograd(model_type: str, layers: int, tokens: int) -> tuple[int, Shape]:
    """Bytes of distinct storages that a forward pass keeps for backward, parameters left out."""
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, vocab_size=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).requires_grad_(False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    model = get_peft_model(base, lora).to(torch.bfloat16)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.model(input_ids=torch.ones((1, tokens), dtype=torch.long), use_cache=False)
    return sum(size for size, _ in kept.values()), Shape.from_config(config.to_dict())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_kept_activations_are_what_autograd_really_saves(model_type: str) -> None:
    few, _ = _saved_by_autograd(model_type, 2, 64)
    many, shape = _saved_by_autograd(model_type, 4, 64)
    layer = _layer(shape, 64, masked=False)
    kept = layer.kept - 2 * layer.adapter_weights
    assert kept == pytest.approx((many - few) / 2, rel=0.05)


# Peaks of a whole step of TRL 1.16 with PEFT, Llama-3.1-8B shape, r 16, one row, bf16, traced tensor
# by tensor: GiB without the CUDA context. In that trace TRL had cast the adapter to bf16, so weights
# (2 bytes) and AdamW state (4) take 6 bytes a trainable parameter, and the first micro-batch of a step
# has no gradients yet; the adapter here stays in fp32, so those terms are put in by hand.
TRACED = {
    True: {512: 5.90, 2048: 6.61, 8192: 9.74},
    False: {512: 8.69, 2048: 18.01, 8192: 58.26},
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
def test_the_predicted_peak_is_within_seven_percent_of_the_traced_one(
    checkpointing: bool, tokens: int
) -> None:
    recipe = make(
        data={"max_length": tokens},
        train={"activation_checkpointing": checkpointing, "kernels": "off"},
    )
    predicted = plan(recipe, LLAMA, named_card("A100-80GB"))
    terms = predicted.terms
    parts = ("base_nf4", "unquantized", "activations", "working_set", "logits")
    peak = sum(terms[part] for part in parts) + 6 * predicted.trainable_parameters
    assert peak / GIB == pytest.approx(TRACED[checkpointing][tokens], rel=0.07)


# Cards and dtypes


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("12GB", "12 GB", 11.64), ("12 gb", "12 GB", 11.64), ("24g", "24 GB", 23.28),
        ("12 GiB", "12 GiB", 12.0), ("rtx3060", "RTX 3060", 11.64), ("T4", "T4", 14.6),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 23.28), ("a10g", "A10G", 22.0),
        ("rtx4060ti-16gb", "RTX 4060 Ti 16GB", 15.52),
    ],
)  # fmt: skip
def test_a_card_is_known_by_size_and_by_name(text: str, name: str, gib: float) -> None:
    card = named_card(text)
    assert card.name.startswith(name)
    assert card.free_bytes == card.total_bytes
    assert card.free_bytes / GIB == pytest.approx(gib, abs=0.01)


def test_a_bare_size_says_what_it_assumes() -> None:
    card = named_card("8GB")
    assert card.capability == (8, 6)
    assert "8.6 assumed" in card.name


@pytest.mark.parametrize("text", ["rtx4091", "0GB", "banana", ""])
def test_an_unknown_card_is_refused(text: str) -> None:
    with pytest.raises(HardwareError, match="not a card known here"):
        named_card(text)


def test_an_unknown_card_gets_the_nearest_names() -> None:
    with pytest.raises(HardwareError, match=r"Did you mean .*RTX 4090"):
        named_card("rtx4091")


def test_a_t4_computes_in_fp16_a_newer_card_in_bf16_and_a_cpu_in_fp32() -> None:
    recipe = make()
    assert cards.compute_dtype(recipe, named_card("t4")) == "float16"
    assert cards.compute_dtype(recipe, named_card("a10g")) == "bfloat16"
    assert cards.compute_dtype(recipe, CPU) == "float32"


def test_an_explicit_dtype_is_kept_where_the_card_has_it() -> None:
    asked = make(quant={"compute_dtype": "bfloat16"})
    assert cards.compute_dtype(asked, named_card("rtx3060")) == "bfloat16"
    assert cards.compute_dtype(asked, CPU) == "bfloat16"
    with pytest.raises(HardwareError, match=r"T4 does not compute in.*Write auto or float16"):
        cards.compute_dtype(asked, named_card("t4"))


def test_the_optimizer_is_paged_and_8_bit_on_cuda_only() -> None:
    assert cards.optimizer(make(), named_card("t4")) == "paged_adamw_8bit"
    assert cards.optimizer(make(), CPU) == "adamw_torch"
    assert cards.optimizer(make(train={"optim": "lion_8bit"}), CPU) == "lion_8bit"


# Plans

_TERMS = (
    "base_nf4", "unquantized", "adapters", "gradients", "optimizer", "activations", "working_set",
    "logits", "evaluation", "optimizer_step", "overhead",
)  # fmt: skip

TIGHT: dict[str, dict[str, Any]] = {
    "data": {"max_length": 2048},
    "train": {"per_device_train_batch_size": 4, "optim": "adamw_torch"},
}


@pytest.mark.parametrize(
    ("section", "key", "value", "term"),
    [
        ("quant", "double_quant", False, "base_nf4"),
        ("quant", "compute_dtype", "float32", "unquantized"),
        ("lora", "r", 64, "adapters"),
        ("lora", "r", 64, "gradients"),
        ("train", "optim", "adamw_torch", "optimizer"),
        ("train", "activation_checkpointing", False, "activations"),
        ("train", "per_device_train_batch_size", 2, "activations"),
        ("data", "max_length", 2048, "working_set"),
        ("model", "attn_implementation", "eager", "working_set"),
        ("eval", "generate", 64, "evaluation"),
    ],
)
def test_each_setting_that_costs_memory_moves_its_term(
    section: str, key: str, value: object, term: str
) -> None:
    card = named_card("24GB")
    before, after = plan(make(), LLAMA, card), plan(make(**{section: {key: value}}), LLAMA, card)
    assert after.terms[term] > before.terms[term]


def test_rows_answered_on_the_way_need_what_those_at_the_end_do() -> None:
    card = named_card("24GB")
    end = plan(make(eval={"generate": 64}), LLAMA, card)
    way = plan(make(eval={"samples": 64}, train={"eval_steps": 5}), LLAMA, card)
    assert way.terms["evaluation"] == end.terms["evaluation"] > 0


def test_terms_sum_to_the_total_and_a_plan_fits_when_they_are_free() -> None:
    found = plan(make(), LLAMA, named_card("12GB"))
    assert sum(found.terms.values()) == found.total_bytes
    exactly = Card("exact", "cuda", found.total_bytes, found.total_bytes, (8, 6))
    short = Card("short", "cuda", found.total_bytes, found.total_bytes - 1, (8, 6))
    assert plan(make(), LLAMA, exactly).fits
    assert not plan(make(), LLAMA, short).fits


def test_a_plain_lora_base_takes_two_bytes_a_weight() -> None:
    found = plan(make(quant={"quant_type": "none"}), LLAMA, named_card("24GB"))
    assert "base_nf4" not in found.terms
    assert found.terms["base"] == 2 * LLAMA.linear_parameters


def test_a_cpu_has_no_context_and_is_refused_only_beyond_its_free_memory() -> None:
    tiny = Shape.from_config(CONFIGS["TinyLlama/TinyLlama-1.1B-Chat-v1.0"])
    found = plan(make(data={"max_length": 128}), tiny, CPU)
    assert "overhead" not in found.terms
    assert found.fits
    require_fit(found)
    with pytest.raises(DoesNotFit, match=r"this machine has 6\.0 GiB free"):
        require_fit(plan(make(), LLAMA, CPU))


def test_a_plan_in_json_is_marked_as_predicted_and_survives_a_round_trip() -> None:
    found = plan(make(**TIGHT), LLAMA, named_card("8GB"))
    data = found.to_json()
    assert data["predicted"] is True
    assert data["total_bytes"] == sum(data["terms"].values())
    assert json.loads(json.dumps(data)) == data
    assert {change["key"] for change in data["changes"]} >= {"data.max_length", "train.optim"}


def _changed(recipe: Recipe, change: memory.Change) -> Recipe:
    section, key = change.key.split(".")
    values = recipe.model_dump()
    values[section][key] = change.new
    return recipe_from(values)


def test_each_change_saves_what_it_says() -> None:
    recipe, card = make(**TIGHT), named_card("12GB")
    found = plan(recipe, LLAMA, card)
    assert len(found.changes) >= 3
    for change in found.changes:
        assert found.total_bytes - plan(_changed(recipe, change), LLAMA, card).total_bytes == (
            change.saves_bytes
        )


def test_a_change_stops_at_the_gentlest_value_that_fits() -> None:
    recipe = make(data={"max_length": 2048}, train={"per_device_train_batch_size": 8})
    found = plan(recipe, LLAMA, named_card("12GB"))
    assert not found.fits
    batch = next(c for c in found.changes if c.key == "train.per_device_train_batch_size")
    assert batch.new == 4
    assert plan(_changed(recipe, batch), LLAMA, named_card("12GB")).fits


def _gib(size: float) -> int:
    return int(size * GIB)


def test_a_recipe_that_does_not_fit_is_refused_in_three_parts() -> None:
    sizes = (5.2, 2.4, 0.3, 0.2, 0.2, 1.1, 2.0, 1.7, 0.0, 0.0, 0.8)
    terms = {term: _gib(size) for term, size in zip(_TERMS, sizes, strict=True)}
    changes = (
        Change("train.per_device_train_batch_size", 4, 2, _gib(2.41), "raise accumulation"),
        Change("data.max_length", 2048, 1536, _gib(1.2), "drops the rows that are longer"),
    )
    card = named_card("rtx3060")
    found = Plan(card, "bfloat16", "paged_adamw_8bit", 8192, 1, terms, (), changes, _gib(10.6))
    with pytest.raises(DoesNotFit) as caught:
        require_fit(found)
    assert str(caught.value) == (
        "This recipe needs 13.9 GiB (predicted); the RTX 3060 has 11.6 GiB free.\n"
        "  base 5.2 | unquantized 2.4 | adapters+grads+optimizer 0.7 | activations 3.1 | "
        "logits 1.7 | overhead 0.8\n"
        "Cheapest ways down:\n"
        "  train.per_device_train_batch_size        4 -> 2  saves 2.4 GiB; enough (raise accumulation)\n"
        "  data.max_length                    2048 -> 1536  "
        "saves 1.2 GiB (drops the rows that are longer)"
    )


def test_changes_that_only_together_suffice_are_said_to() -> None:
    with pytest.raises(DoesNotFit, match=r"None is enough alone; all together need \d\.\d GiB"):
        require_fit(plan(make(**TIGHT), LLAMA, named_card("6.8GiB")))


def test_a_recipe_beyond_every_change_is_told_to_take_another_model_or_card() -> None:
    small = Card("RTX 3050", "cuda", 4 * GIB, 4 * GIB, (8, 6))
    with pytest.raises(DoesNotFit, match="choose a smaller base model or a card with more memory"):
        require_fit(plan(make(), LLAMA, small))


def test_a_plan_without_any_way_down_says_only_what_is_left_to_do() -> None:
    small = Card("RTX 3050", "cuda", GIB, GIB, (8, 6))
    bare = Plan(small, "bfloat16", "adamw_torch", 1, 1, dict.fromkeys(_TERMS, GIB))
    with pytest.raises(DoesNotFit) as caught:
        require_fit(bare)
    assert "Cheapest" not in str(caught.value)


def test_terms_come_in_the_order_of_the_story() -> None:
    assert tuple(plan(make(), LLAMA, named_card("t4")).terms) == _TERMS


def test_eager_attention_holds_its_scores_three_times_in_fp32() -> None:
    # Probabilities, their gradient and its product, for each of 32 heads: what tests/test_rehearsal.py
    # sees in a traced step.
    usual = plan(make(data={"max_length": 4096}), LLAMA, named_card("24GB"))
    eager = make(data={"max_length": 4096}, model={"attn_implementation": "eager"})
    found = plan(eager, LLAMA, named_card("24GB"))
    assert found.terms["working_set"] > 4096**2 * 32 * 12 > usual.terms["working_set"]
