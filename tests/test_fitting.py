"""What train.fit: auto chooses, how far a recipe reaches, and what a step costs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from shapes import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from qlora import cards, fitting, fused, memory, siblings, speed
from qlora.cards import GIB, Card, named_card
from qlora.errors import CheckpointError, DoesNotFit, ModelError, RecipeError
from qlora.recipe import recipe_from
from qlora.settings import Recipe
from qlora.shape import Shape

LLAMA = Shape.from_config(CONFIGS["meta-llama/Llama-3.1-8B-Instruct"])
TINYLLAMA = Shape.from_config(CONFIGS["TinyLlama/TinyLlama-1.1B-Chat-v1.0"])


def make(length: int = 2048, **train: Any) -> Recipe:
    return recipe_from(
        {
            "model": {"name": "owner/model"},
            "data": {"train": "hub:owner/data", "max_length": length},
            "train": {"fit": "auto", **train},
            "run": {"name": "fitted"},
        }
    )


def rows(recipe: Recipe) -> int:
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps


# Choosing


@pytest.mark.parametrize("card", ["8GB", "12GB", "T4", "24GB"])
@pytest.mark.parametrize("length", [512, 2048, 4096])
@pytest.mark.parametrize("shape", [LLAMA, TINYLLAMA], ids=["8B", "1B"])
@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_what_is_chosen_fits_and_nothing_cheaper_does(
    shape: Shape, length: int, card: str, kernels: str
) -> None:
    where = named_card(card)
    fitted = fitting.fit(make(length, kernels=kernels), shape, where)
    room = where.free_bytes * (1 - fitting.MARGIN)
    if fitted.plan.total_bytes > room:  # nothing keeps the margin
        assert "less than the margin" in fitted.reasons[-1]
        room = where.free_bytes
    assert fitted.plan.total_bytes <= room
    assert rows(fitted.recipe) == 16
    cost = speed.cost_per_token(fitted.recipe, shape)
    # Every micro-batch with every number of recomputed layers, by the hand of this test.
    for size, layers in itertools.product((1, 2, 4, 8, 16), range(shape.layers + 1)):
        other = make(
            length,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            activation_checkpointing=layers if layers < shape.layers else True,
            optim="paged_adamw_8bit",
            kernels=kernels,
        )
        if memory.predict(other, shape, where).total_bytes <= room:
            assert speed.cost_per_token(other, shape) >= cost * (1 - 1e-9)


def test_a_larger_card_is_never_slower() -> None:
    costs = [
        speed.cost_per_token(fitting.fit(make(), LLAMA, named_card(f"{size}GB")).recipe, LLAMA)
        for size in (8, 10, 12, 16, 20, 24, 32, 48, 80)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.3 * costs[-1]


def test_a_card_with_room_recomputes_nothing_and_one_without_recomputes_some_layers() -> None:
    plain = make(kernels="off")
    assert fitting.fit(plain, LLAMA, named_card("24GB")).chosen == {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "activation_checkpointing": False,
        "kernels": "off",
        "levels": None,
        "mlp_tile": None,
        "activation_offload": False,
        "embedding_offload": False,
        "optim": "adamw_8bit",
    }
    some = fitting.fit(plain, LLAMA, named_card("12GB")).chosen["activation_checkpointing"]
    assert some is not True and 0 < some < 32


def test_fused_layers_keep_all_where_there_is_room_and_a_mix_of_two_levels_where_not() -> None:
    roomy = fitting.fit(make(), LLAMA, named_card("24GB"))
    assert roomy.chosen["levels"] == (32, 0, 0, 0, 0)
    for card in ("8GB", "12GB", "T4"):
        counts = fitting.fit(make(4096), LLAMA, named_card(card)).chosen["levels"]
        assert sum(counts) == 32 and 1 <= sum(count > 0 for count in counts) <= 2


def test_every_mix_of_levels_that_fits_costs_more_than_the_chosen_one() -> None:
    card, shape = named_card("12GB"), replace(LLAMA, layers=6, vocab=700_000)
    fitted = fitting.fit(make(8192, per_device_train_batch_size=1), shape, card)
    room = card.free_bytes * (1 - fitting.MARGIN)
    assert len(set(fused.levels_of(fitted.recipe, shape))) == 2  # the card is really full
    cost = speed.cost_per_token(fitted.recipe, shape)
    for counts in itertools.product(range(7), repeat=5):
        if sum(counts) == 6:
            for away in (False, True):
                other = make(
                    8192, levels=counts, optim="paged_adamw_8bit", embedding_offload=away,
                    per_device_train_batch_size=1, gradient_accumulation_steps=16,
                )  # fmt: skip
                if memory.predict(other, shape, card).total_bytes <= room:
                    assert speed.cost_per_token(other, shape) >= cost * (1 - 1e-9)


def test_the_levers_for_small_cards_come_only_where_levels_are_not_enough() -> None:
    for card, length in (("8GB", 16384), ("12GB", 49152)):
        tight = fitting.fit(make(length), LLAMA, named_card(card))
        chosen = tight.chosen
        assert chosen["mlp_tile"] or chosen["activation_offload"]
        room = named_card(card).free_bytes * (1 - fitting.MARGIN)
        assert tight.plan.total_bytes <= room
        freed = {"mlp_tile": None, "activation_offload": False, "optim": "paged_adamw_8bit"}
        train = tight.recipe.train.model_copy(update=freed)
        without = tight.recipe.model_copy(update={"train": train})
        assert memory.predict(without, LLAMA, named_card(card)).total_bytes > room


def test_a_card_that_triton_does_not_know_gets_the_libraries_layers() -> None:
    fitted = fitting.fit(make(512), TINYLLAMA, named_card("P100"))
    assert fitted.recipe.train.kernels == "off" and fitted.chosen["levels"] is None


def test_levels_must_add_up_to_the_layers() -> None:
    written = make(levels=[1, 2, 3, 4, 5], fit="as_written")
    with pytest.raises(RecipeError, match=r"names 15 layers .* but the model has 32"):
        fitting.fit(written, LLAMA, named_card("24GB"))


def test_inputs_go_to_the_host_only_where_recomputing_every_layer_is_not_enough() -> None:
    card = named_card("7GB")
    tight = fitting.fit(make(kernels="off"), LLAMA, card)
    assert tight.chosen["activation_checkpointing"] is True
    assert tight.chosen["activation_offload"] is True
    without = tight.recipe.model_copy(
        update={"train": tight.recipe.train.model_copy(update={"activation_offload": False})}
    )
    room = card.free_bytes * (1 - fitting.MARGIN)
    assert memory.predict(without, LLAMA, card).total_bytes > room


def test_paging_keeps_the_arithmetic_of_the_optimizer() -> None:
    # 8-bit and 32-bit AdamW learn differently: one is never chosen for the other.
    for optim, kinds in (
        ("auto", {"adamw_8bit", "paged_adamw_8bit"}),
        ("adamw_torch", {"adamw_torch", "paged_adamw_32bit"}),
        ("paged_lion_8bit", {"lion_8bit", "paged_lion_8bit"}),
        ("sgd", {"sgd"}),
        ("paged_ademamix_32bit", {"ademamix", "paged_ademamix_32bit"}),
        ("adamw_bnb_8bit", {"adamw_bnb_8bit", "paged_adamw_8bit"}),
    ):
        found = {
            fitting.fit(make(optim=optim), LLAMA, named_card(card)).chosen["optim"]
            for card in ("9GB", "12GB", "24GB")
        }
        assert found <= kinds


def test_every_name_of_an_optimizer_stays_one_that_transformers_knows() -> None:
    from transformers.training_args import OptimizerNames

    known = {name.value for name in OptimizerNames}
    for name in known:
        assert {fitting._paged(name, True), fitting._paged(name, False)} <= known
    assert set(fitting._FROM_PAGED) | set(fitting._TO_PAGED) <= known


def test_a_recipe_as_it_is_written_is_not_touched() -> None:
    written = make(fit="as_written")
    fitted = fitting.fit(written, LLAMA, named_card("24GB"))
    assert fitted.recipe == written and fitted.reasons == ()


def test_the_reasons_give_figures_for_what_was_chosen() -> None:
    said = " | ".join(fitting.fit(make(kernels="off"), LLAMA, named_card("12GB")).reasons)
    assert "1 x 2,048 tokens a pass, at most 16 a step: 16 rows, as written" in said
    assert "train.activation_checkpointing True -> 19, embedding_offload False -> True" in said
    assert "the embedding table stays with the host" in said
    assert "of 32 layers are computed again, for" in said
    assert "all of them would cost 44%" in said
    assert "adamw_8bit: the same update, its state kept on the card" in said
    assert "as margin" in said


def test_what_cannot_fit_is_refused_at_its_most_frugal_settings() -> None:
    with pytest.raises(DoesNotFit) as caught:
        fitting.fit(make(), LLAMA, named_card("4GB"))
    assert "train.per_device_train_batch_size" not in str(caught.value)  # it is 1 already
    assert "data.max_length" in str(caught.value)


def test_a_resumed_run_keeps_what_its_first_start_chose() -> None:
    first = fitting.fit(make(), LLAMA, named_card("12GB"))
    stored = json.loads(json.dumps(first.to_json()))
    later = fitting.again(make(), LLAMA, named_card("24GB"), stored)
    assert later.recipe == first.recipe
    with pytest.raises(CheckpointError, match=r"does not say which settings train\.fit: auto"):
        fitting.again(make(), LLAMA, named_card("24GB"), {})
    with pytest.raises(DoesNotFit, match=r"8 GB card .* has 7\.8 GiB free"):
        fitting.again(make(), LLAMA, named_card("8GB"), stored)


def test_a_plan_in_json_says_what_was_chosen_and_why() -> None:
    data = fitting.fit(make(), TINYLLAMA, named_card("8GB")).to_json()
    assert set(data["chosen"]) == set(fitting.CHOSEN)
    assert data["reasons"] and data["predicted"] is True


# Reaching


def test_the_longest_sequence_fits_and_the_next_does_not() -> None:
    card, recipe = named_card("12GB"), make(fit="as_written")
    longest = fitting.longest(recipe, LLAMA, card)
    assert memory.predict(make(longest), LLAMA, card).fits
    assert not memory.predict(make(longest + 64), LLAMA, card).fits


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    card = named_card("12GB")
    most = fitting.largest_micro_batch(make(), LLAMA, card)
    assert memory.predict(make(per_device_train_batch_size=most), LLAMA, card).fits
    assert not memory.predict(make(per_device_train_batch_size=most + 1), LLAMA, card).fits


def test_nothing_reaches_where_the_base_alone_is_too_large() -> None:
    small = Card("RTX 3050", "cuda", 4 * GIB, 4 * GIB, (8, 6))
    assert fitting.longest(make(), LLAMA, small) == 0
    assert fitting.largest_micro_batch(make(), LLAMA, small) == 0


# Siblings


@pytest.mark.parametrize(
    ("name", "card"), [("meta-llama/Llama-3.1-70B", "8GB"), ("Qwen/Qwen3-14B", "6GB")]
)
def test_the_sibling_named_is_the_largest_of_its_family_that_fits(name: str, card: str) -> None:
    published, where, recipe = siblings.published(), named_card(card), make()
    asked = published[name]
    found = siblings.largest_that_fits(recipe, asked, where)
    assert found is not None
    family = [
        (other.parameters, key)
        for key, other in published.items()
        if other.model_type == asked.model_type and other.parameters < asked.parameters
    ]
    fitting_ones = []
    for size, key in family:
        try:
            fitting.fit(recipe, published[key], where)
        except DoesNotFit:
            continue
        fitting_ones.append((size, key))
    assert found == max(fitting_ones)[1]
    assert len(fitting_ones) < len(family)


def test_where_a_family_has_none_any_familys_is_named_and_at_last_none() -> None:
    mistral = siblings.published()["mistralai/Mistral-7B-v0.3"]
    found = siblings.largest_that_fits(make(), mistral, named_card("4GB"))
    assert found is not None and not found.startswith("mistralai")
    tiny = Card("a stamp", "cuda", GIB // 2, GIB // 2, (8, 6))
    assert siblings.largest_that_fits(make(), LLAMA, tiny) is None


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-3.2-1B", 1.24), ("meta-llama/Llama-3.2-3B", 3.21),
        ("meta-llama/Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B", 70.55),
        ("Qwen/Qwen2.5-0.5B", 0.494), ("Qwen/Qwen2.5-7B", 7.62), ("Qwen/Qwen2.5-32B", 32.76),
        ("Qwen/Qwen3-0.6B", 0.596), ("Qwen/Qwen3-4B", 4.02), ("Qwen/Qwen3-14B", 14.77),
        ("google/gemma-3-1b-pt", 1.0), ("google/gemma-3-4b-pt", 4.30),
        ("mistralai/Mistral-Nemo-Base-2407", 12.25),
        ("microsoft/phi-4", 14.66), ("HuggingFaceTB/SmolLM3-3B", 3.08),
        ("meta-llama/Llama-2-13b-hf", 13.02), ("HuggingFaceTB/SmolLM2-135M", 0.1345),
    ],
)  # fmt: skip
def test_a_sibling_has_its_published_parameters(name: str, billions: float) -> None:
    found = siblings.published()[name].parameters / 1e9
    assert found == pytest.approx(billions, rel=0.006)


# Cost


def _counted(recipe: Recipe, config: Any) -> float:
    """Operations a token of a small model's training step, as torch counts them."""
    from transformers import AutoModelForCausalLM

    from qlora import adapter

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = adapter.attach(base.requires_grad_(False), recipe).train()
    ids = torch.zeros((1, recipe.data.max_length), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / recipe.data.max_length


@pytest.mark.parametrize("layers", [False, True, 2])
def test_operations_a_token_are_those_that_torch_counts(layers: bool | int) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    recipe = make(256, activation_checkpointing=layers, fit="as_written", kernels="off")
    shape = Shape.from_config(config.to_dict())
    # Eager attention computes all scores, causal or not, and goes backwards in twice its forward pass;
    # the head of this loss is projected once; the first layer's inputs need no gradient.
    scores = 2 * 256 * 4 * 32 * shape.layers
    again = speed.checkpointed_layers(recipe, shape) / shape.layers
    expected = speed.flops_per_token(recipe, shape)
    expected += scores * (2 * (3 + again) - (3.5 + again)) - 2 * shape.vocab * shape.hidden
    first = 2 * sum(
        a * b for n, (a, b) in shape.linears.items() if n in ("q_proj", "k_proj", "v_proj")
    )
    first += 2 * recipe.lora.r * 3 * shape.hidden
    if (
        again
    ):  # an input that is computed again gets its gradient; down_proj's B is not needed again
        first = 2 * recipe.lora.r * shape.hidden * again * shape.layers
    assert _counted(recipe, config) == pytest.approx(expected - first, rel=0.001)


@pytest.mark.parametrize(
    ("length", "recomputed", "gflop"),
    [(512, True, 46.0), (2048, True, 47.8), (8192, True, 55.0), (2048, False, 33.1)],
)
def test_an_8b_costs_what_a_traced_step_of_trl_costs(
    length: int, recomputed: bool, gflop: float
) -> None:
    recipe = make(length, activation_checkpointing=recomputed, kernels="off")
    assert speed.flops_per_token(recipe, LLAMA) / 1e9 == pytest.approx(gflop, rel=0.004)


def test_a_larger_micro_batch_shares_the_unpacking() -> None:
    one, four = make(512), make(512, per_device_train_batch_size=4)
    assert speed.cost_per_token(four, LLAMA) < speed.cost_per_token(one, LLAMA)
    assert speed.flops_per_token(four, LLAMA) == speed.flops_per_token(one, LLAMA)


def test_a_measured_card_predicts_other_models_and_an_unmeasured_one_nothing() -> None:
    card, other = named_card("T4"), named_card("12GB")
    recipe = make()
    assert speed.recall(card, "float16") is None
    speed.remember(card, "float16", recipe, TINYLLAMA, 1000.0, "2026-01-01")
    measured = speed.recall(card, "float16")
    assert measured is not None and measured.date == "2026-01-01"
    assert speed.tokens_per_second(recipe, TINYLLAMA, measured) == pytest.approx(1000.0)
    slower = speed.tokens_per_second(recipe, LLAMA, measured)
    ratio = speed.cost_per_token(recipe, TINYLLAMA) / speed.cost_per_token(recipe, LLAMA)
    assert slower == pytest.approx(1000.0 * ratio)
    assert speed.recall(other, "bfloat16") is None and speed.recall(card, "float32") is None


@pytest.mark.parametrize("rate", [0, -1.0, None, "1e9", float("inf")])
def test_a_speed_that_is_none_is_not_believed(rate: Any) -> None:
    from qlora import places

    places.cache().mkdir(parents=True)
    entry = {"flops_per_second": rate, "tokens_per_second": 1.0, "model": "m", "date": "d"}
    (places.cache() / "speeds.json").write_text(json.dumps({"t4, float16": entry}))
    assert speed.recall(named_card("T4"), "float16") is None


def test_a_torn_file_of_speeds_is_as_good_as_none() -> None:
    from qlora import places

    places.cache().mkdir(parents=True)
    (places.cache() / "speeds.json").write_text("{")
    assert speed.recall(named_card("T4"), "float16") is None
    speed.remember(named_card("T4"), "float16", make(), TINYLLAMA, 10.0, "2026-01-01")
    assert speed.recall(named_card("T4"), "float16") is not None


def test_every_card_in_the_table_of_models_is_known() -> None:
    from qlora import plansheet

    assert [cards.named_card(name).kind for name in plansheet.CARDS] == ["cuda"] * 4
    lines = plansheet.table()
    assert len(lines) == 3 + len(siblings.TABLED)


# What a model has no use for


@pytest.mark.parametrize(
    ("section", "values"),
    [("train", {"embedding_offload": True}), ("quant", {"head": "8bit"})],
)
def test_a_head_that_is_the_embedding_cannot_be_spared(
    section: str, values: dict[str, Any]
) -> None:
    recipe = make()
    changed = getattr(recipe, section).model_copy(update=values)
    with pytest.raises(
        ModelError, match=r"in this one it is the embedding\. Leave that setting out"
    ):
        fitting.fit(
            recipe.model_copy(update={section: changed}),
            replace(LLAMA, tied=True),
            named_card("24GB"),
        )


@pytest.mark.parametrize("values", [{"levels": (32, 0, 0, 0, 0)}, {"mlp_tile": 512}])
@pytest.mark.parametrize("fit", ["auto", "as_written"])
def test_what_only_fused_layers_have_is_refused_for_other_families(
    fit: str, values: dict[str, Any]
) -> None:
    (name,) = values
    with pytest.raises(
        RecipeError, match=f"train.{name} is about qlora.kernels, which do not know"
    ):
        fitting.fit(
            make(fit=fit, **values), replace(LLAMA, model_type="mixtral"), named_card("24GB")
        )


def test_a_recipe_that_does_not_fit_as_written_is_told_of_auto_where_that_would() -> None:
    with pytest.raises(
        DoesNotFit, match=r"Or write train\.fit: auto, which finds settings that fit"
    ):
        fitting.fit(make(8192, fit="as_written"), LLAMA, named_card("8GB"))
    with pytest.raises(DoesNotFit) as refused:
        fitting.fit(make(8192, fit="as_written"), LLAMA, named_card("4GB"))
    assert "train.fit" not in str(refused.value)


@pytest.mark.parametrize(
    "levels", [5, [1, 2], [4, 0, 0, 0, 0, 0], [4, 0, 0, 0, -1], ["4", 0, 0, 0, 0]]
)
def test_levels_that_are_no_five_counts_are_refused_in_a_sentence(levels: Any) -> None:
    with pytest.raises(RecipeError, match="must be five counts, one a level, that add up"):
        make(levels=levels)
