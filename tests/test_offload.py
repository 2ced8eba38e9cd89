"""Recomputing some layers, and keeping inputs on the host: other bytes, the same gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora import adapter, fitting, offload, rehearsal, sft
from qlora.cards import Card
from qlora.errors import RecipeError
from qlora.kernels.attached import attach, head_of
from qlora.offload import InputsOnHost
from qlora.recipe import recipe_from

CPU = Card("CPU", "cpu", 2**36, 2**36)
LAYERS = 4


def make(**train: Any) -> Any:
    return recipe_from(
        {
            "model": {"name": "owner/model"},
            "data": {"train": "hub:owner/data", "max_length": 512},
            "lora": {"r": 4},
            "train": train,
            "run": {"name": "offload"},
        }
    )


@pytest.fixture
def model_of() -> Any:
    def model_of(recipe: Any, kind: str = "llama") -> Any:
        config = AutoConfig.for_model(
            kind, hidden_size=640, intermediate_size=1024, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, vocab_size=512, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        model = adapter.attach(base, recipe).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        return model

    return model_of


def gradients(
    model: Any, recipe: Any, head: Any = None, forward: Any = None
) -> dict[str, torch.Tensor]:
    inputs = rehearsal.batch(recipe, "sdpa")
    generator = torch.Generator().manual_seed(2)
    inputs["input_ids"] = torch.randint(0, 512, (1, 512), generator=generator)
    inputs["labels"] = inputs["input_ids"].clone()
    with forward or nullcontext():
        loss = sft.loss_of(model, inputs, 512, materialize=head is None, head=head)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": loss.detach()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def recomputing(model: Any) -> list[bool]:
    return [
        module.gradient_checkpointing
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (True, [True] * 4), (False, [False] * 4), (0, [False] * 4),
        (1, [True, False, False, False]), (3, [True, True, True, False]), (9, [True] * 4),
    ],
)  # fmt: skip
def test_the_first_so_many_layers_are_computed_again(
    asked: bool | int, found: list[bool], model_of: Any
) -> None:
    assert recomputing(model_of(make(activation_checkpointing=asked))) == found


@pytest.mark.parametrize("asked", [True, 2])
def test_recomputing_changes_no_bit_of_a_gradient(asked: bool | int, model_of: Any) -> None:
    plain, other = make(activation_checkpointing=False), make(activation_checkpointing=asked)
    assert same(gradients(model_of(plain), plain), gradients(model_of(other), other))


def test_inputs_that_wait_on_the_host_change_no_bit_of_a_gradient(model_of: Any) -> None:
    recipe = make(activation_checkpointing=True)
    model, moved = model_of(recipe), []
    expected = gradients(model, recipe)
    model.zero_grad(set_to_none=True)
    with InputsOnHost(moved.append):
        found = gradients(model, recipe)
    assert same(expected, found)
    # One for each layer but the first, whose input needs no gradient; then what the last norm keeps.
    assert {tuple(tensor.shape) for tensor in moved} == {(1, 512, 640)}
    assert LAYERS <= len(moved) <= LAYERS + 2
    assert {tensor.device.type for tensor in moved} == {"cpu"}


@pytest.mark.parametrize(("kind", "tile"), [("llama", None), ("gemma2", 100)])
def test_fused_layers_at_level_5_are_offloaded_without_changing_a_bit(
    tile: int | None, kind: str, model_of: Any
) -> None:
    recipe = make(activation_checkpointing=True)
    model, moved = model_of(recipe, kind), []
    attach(model, CPU, levels=[5] * LAYERS, tile=tile)
    head = head_of(model)
    expected = gradients(model, recipe, head)
    model.zero_grad(set_to_none=True)
    found = gradients(model, recipe, head, InputsOnHost(moved.append))
    assert same(expected, found) and len(found) == 1 + LAYERS * 7 * 2
    # The inputs of all layers and of the last norm, and nothing else.
    assert [tuple(tensor.shape) for tensor in moved] == [(1, 512, 640)] * (LAYERS + 1)


def test_small_tensors_weights_and_masks_stay_where_they_are() -> None:
    moved: list[torch.Tensor] = []
    weight = torch.nn.Parameter(torch.randn(1, 640, 640))
    with InputsOnHost(moved.append):
        (torch.randn(1, 8, 640) * weight[:, :8]).exp().sum()
        torch.bmm(weight, weight).sum().backward()
        (torch.ones(1, 640, 640) * torch.randn(1, 640, 1, requires_grad=True)).sum().backward()
    assert moved == []
    assert offload.MIN_BYTES == 2**20


@pytest.mark.parametrize("value", [False, 2])
def test_offloading_without_recomputing_every_layer_is_refused(value: bool | int) -> None:
    with pytest.raises(
        RecipeError,
        match=r"checkpointing is (False|2)\. Write train\.act",
    ):
        make(activation_checkpointing=value, activation_offload=True)


def test_the_trainer_offloads_in_training_and_not_in_evaluation(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from rich.console import Console

    from qlora import trainer

    entered: list[bool] = []
    enter = InputsOnHost.__enter__

    def spy(self: Any) -> None:
        entered.append(torch.is_grad_enabled())
        enter(self)

    monkeypatch.setattr(InputsOnHost, "__enter__", spy)
    changes = {"train__activation_checkpointing": True, "train__max_steps": 2}
    console = Console(quiet=True)
    plain = trainer.train(make_recipe(**changes), console=console)
    assert entered == []
    run = trainer.train(make_recipe(**changes, train__activation_offload=True), console=console)
    assert entered == [True] * len(entered) and len(entered) >= 2
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()


@pytest.mark.parametrize("value", [True, False, 1, 3])
def test_a_traced_step_with_some_layers_recomputed_is_what_is_planned(value: bool | int) -> None:
    from qlora import memory
    from qlora.shape import Shape

    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    card = Card("80 GB", "cuda", 80 * 2**30, 80 * 2**30, (8, 0))
    for offloads in (False, True) if value is True else (False,):
        recipe = make(activation_checkpointing=value, activation_offload=offloads)
        planned = memory.predict(recipe, Shape.from_config(config.to_dict()), card)
        needed = planned.total_bytes - planned.terms["overhead"]
        assert rehearsal.trace(recipe, config, card).peak_bytes == pytest.approx(needed, rel=0.03)


def test_every_setting_that_may_be_chosen_is_one_of_train() -> None:
    assert set(fitting.CHOSEN) <= set(type(make().train).model_fields)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("fuses", [False, True])
def test_on_a_card_the_gradients_are_the_same_bits_and_the_peak_falls(
    fuses: bool, model_of: Any
) -> None:
    card = Card("this card", "cuda", 2**36, 2**36, torch.cuda.get_device_capability())
    recipe = make(activation_checkpointing=True)
    model = model_of(recipe).cuda()
    if fuses:
        attach(model, card, levels=[5] * LAYERS)
    ids = torch.randint(0, 512, (8, 512), generator=torch.Generator().manual_seed(2)).cuda()

    def step() -> tuple[dict[str, torch.Tensor], int]:
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return found, torch.cuda.max_memory_allocated() - before

    step()
    expected, plain = step()
    with InputsOnHost():
        found, away = step()
    assert same(expected, found)
    width = 8 * 512 * 640 * 4
    assert plain - away >= width  # of four inputs two or three wait with the host at the peak
