"""The adapter: attached without a trace, counted honestly, in fp32, and proven alive from disk."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import REPOSITORY, save_tiny
from safetensors.torch import load_file, save_file

from qlora import adapter, alive, loader, nf4
from qlora.errors import CheckpointError, RecipeError

TOKENS = torch.arange(5, 37).view(1, -1)


@pytest.fixture
def build(make_recipe, cpu):
    def build(**changes):
        recipe = make_recipe(**changes)
        base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False)
        return adapter.attach(base.model, recipe)

    return build


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def stir(model, std: float = 0.05) -> None:
    """Give B values, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std


def test_attaching_an_adapter_does_not_change_the_logits(make_recipe, cpu):
    recipe = make_recipe()
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    before = logits(base)
    assert torch.equal(logits(adapter.attach(base, recipe)), before)


def test_only_the_adapter_trains_and_it_is_fp32_even_on_a_bf16_base(build):
    model = build(quant__compute_dtype="bfloat16")
    adapter.assert_census(model)
    assert adapter.census(model) == {
        "trainable": {"float32": 28}, "packed": {"uint8": 14}, "frozen": {"bfloat16": 7},
    }  # fmt: skip


def test_parameters_are_counted_as_what_they_stand_for_not_as_packed_bytes(build, tiny):
    total = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    # r 4 on q 64x64, k and v 64x32, o 64x64, gate and up 64x128, down 128x64, in two layers
    trainable = 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert adapter.count(build()) == adapter.Counts(trainable, total + trainable)


def test_tied_embeddings_count_once(build, tmp_path):
    untied = adapter.count(build()).total
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert adapter.count(build(model__name=str(folder))).total == untied - 2048 * 64


def test_the_seed_decides_the_adapter(build):
    def a_of(model):
        return next(p for n, p in model.named_parameters() if "lora_A" in n).detach()

    assert torch.equal(a_of(build()), a_of(build()))
    assert not torch.equal(a_of(build()), a_of(build(train__seed=7)))


def test_named_targets_get_adapters_and_others_do_not(build):
    model = build(lora__target_modules=["q_proj", "down_proj"])
    hit = {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad}
    assert hit == {"q_proj", "down_proj"}


def test_a_target_that_matches_nothing_is_refused_with_the_names_that_would(build):
    with pytest.raises(
        RecipeError, match=r"'qq_proj', which matches no linear.*q_proj, up_proj, v_proj"
    ):
        build(lora__target_modules=["q_proj", "qq_proj"])


def test_the_head_is_refused_because_the_fused_loss_would_not_train_it(build):
    with pytest.raises(RecipeError, match=r"'lm_head', the output head"):
        build(lora__target_modules=["lm_head"])


def test_a_vision_tower_gets_no_adapter(make_recipe):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64)})
            self.layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 64)})

    import re

    pattern = adapter._towers(Tower())
    assert re.fullmatch(pattern, "vision_tower.q_proj") and not re.fullmatch(
        pattern, "layer.q_proj"
    )
    assert adapter._towers(torch.nn.Sequential(torch.nn.Linear(4, 4))) is None


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"lora__lora_alpha": 8.0}, 8 / 4),
        ({"lora__lora_alpha": 16.0}, 16 / 4),
        ({"lora__lora_alpha": 8.0, "lora__use_rslora": True}, 8 / 2),
    ],
)
def test_the_update_is_scaled_by_alpha_and_rank_as_the_papers_say(build, settings, scaling):
    model = build(**settings)
    stir(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer(x) + scaling * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_and_not_in_evaluation(build):
    model = build(lora__lora_dropout=0.5)
    stir(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


def test_checkpointed_activations_give_the_same_gradients_and_keep_less(build):
    grads, kept = {}, {}
    for checkpointing in (False, True):
        model = build(train__activation_checkpointing=checkpointing)
        stir(model)
        model.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t
        ):
            layers = (
                model.base_model.model.model
            )  # without the head, whose logits outweigh two layers
            loss = layers(TOKENS, use_cache=False).last_hidden_state.square().mean()
        kept[checkpointing] = sum(sizes)
        loss.backward()
        grads[checkpointing] = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(grads[False], grads[True], strict=True))
    assert kept[True] < 0.5 * kept[False]


def test_a_lost_dtype_is_restored_and_counted(build):
    model = build()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(AssertionError, match="bfloat16"):
        adapter.assert_census(model)
    assert adapter.restore_dtype(model) == 28
    adapter.assert_census(model)
    assert adapter.restore_dtype(model) == 0


def test_the_digest_of_the_base_sees_one_flipped_bit_and_ignores_the_adapter(build):
    model = build()
    before = adapter.base_digest(model)
    stir(model)
    assert adapter.base_digest(model) == before
    weight = next(m.weight for _, m in nf4.linears(model))
    weight.data.view(-1)[7] ^= 1
    assert adapter.base_digest(model) != before


def test_a_saved_adapter_reads_back_alive_and_leaves_the_model_as_it_was(build, tmp_path):
    model = build(lora__lora_dropout=0.1)
    stir(model)
    adapter.save(model, tmp_path, "base")
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    model.train()
    random = torch.get_rng_state()
    report = alive.verify(model, tmp_path, TOKENS)
    assert report["disk_against_memory"] == 0.0
    assert report["tuned_against_base"] > 0.01 and report["largest_b"] > 0.0
    assert model.training and torch.equal(random, torch.get_rng_state())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (trains, value) in before.items():
        assert after[name].requires_grad == trains and torch.equal(after[name], value), name


def test_an_adapter_whose_b_is_zero_is_called_dead(build, tmp_path):
    model = build()
    adapter.save(model, tmp_path, "base")
    with pytest.raises(CheckpointError, match=r"dead: B is still zero.*learning rate"):
        alive.verify(model, tmp_path, TOKENS)


def test_a_file_that_differs_from_memory_is_refused_by_name(build, tmp_path):
    model = build()
    stir(model)
    adapter.save(model, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    victim = next(name for name in tensors if "lora_A" in name)
    tensors[victim][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lora_A\.default\.weight on disk is not what is in memory"
    ):
        alive.verify(model, tmp_path, TOKENS)
    assert list(model.peft_config) == ["default"]  # the probe is gone even then


def test_a_loaded_adapter_computes_what_the_saved_one_did_and_can_be_switched_off(
    build, make_recipe, cpu, tmp_path
):
    model = build()
    stir(model)
    tuned = logits(model)
    adapter.save(model, tmp_path, "base")
    recipe = make_recipe()
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    untouched = logits(base)
    again = adapter.load(base, tmp_path)
    assert torch.equal(logits(again), tuned)
    with adapter.disabled(again):
        assert torch.equal(logits(again), untouched)
    assert not torch.equal(tuned, untouched)


def test_a_folder_without_an_adapter_is_refused(build, tmp_path):
    with pytest.raises(CheckpointError, match=r"not an adapter: adapter_config.json is missing"):
        adapter.load(build(), tmp_path)


def test_an_adapter_of_another_model_is_refused(build, make_recipe, cpu, tmp_path):
    wide = save_tiny(tmp_path / "wide", intermediate_size=256)
    model = build(model__name=str(wide))
    stir(model)
    adapter.save(model, tmp_path / "saved", "embedded:base")
    recipe = make_recipe()
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    with pytest.raises(CheckpointError, match="does not fit this base"):
        adapter.load(base, tmp_path / "saved")


def test_saved_adapters_hold_no_pickle(build, tmp_path):
    model = build()
    adapter.save(model, tmp_path / "saved", "embedded:base")
    saved = {p.name for p in (tmp_path / "saved").iterdir()}
    assert saved == {"adapter_model.safetensors", "adapter_config.json"}


def test_the_saved_configuration_names_the_base_as_the_recipe_does(build, tmp_path):
    model = build(model__name="embedded:base")
    adapter.save(model, tmp_path / "saved", "embedded:base")
    text = (tmp_path / "saved" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "embedded:base"
    assert str(REPOSITORY) not in text
