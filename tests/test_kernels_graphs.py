"""Fused layers with dropout, and in graphs: micro-batches, second passes, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_models import (
    GATED,
    IN_ONE,
    TOKENS,
    apart,
    apart_in_all,
    family,
    fused,
    gradients,
    in_double,
    loss_of,
    make,
    packed_batch,
    trainable,
)
from torch import nn

from qlora import hardware
from qlora.fused import LEVELS
from qlora.kernels import ops
from qlora.kernels.family import decoder_layers

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-5  # of a tensor's norm, in fp32


# --- dropout


class Masked(nn.Module):
    """In the place of PEFT's dropout: a mask that is known."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.view(x.shape)


RATE = 0.25


@pytest.fixture(scope="module")
def dropping() -> Iterator[Callable[[str], Any]]:
    models: dict[str, Any] = {}
    yield lambda kind: models.setdefault(kind, make(kind, lora_dropout=RATE))


def seeded_gradients(model: Any, seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return gradients(model, packed_batch())


@pytest.mark.parametrize("tile", [None, 40])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
def test_dropout_gives_the_gradients_that_peft_gives_with_the_same_masks(
    kind: str, tile: int | None, dropping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, names = dropping(kind), IN_ONE if kind == "phi3" else GATED
    found = []
    for level in (2, 5) if tile else (1, 2, 5):  # a layer that keeps gate and up has no blocks
        with fused(model, level, tile):
            found.append(seeded_gradients(model))
    torch.manual_seed(7)  # a seed is drawn for each layer, and a number for each adapter follows
    for layer in decoder_layers(model.get_base_model()):
        seed = torch.randint(2**62, (1,))
        for number, name in enumerate(names):
            wrapper = next(m for n, m in layer.named_modules() if n.endswith(f".{name}"))
            in_mlp = names.index(name) > names.index("o_proj")
            size = tile if in_mlp and tile else 2 * TOKENS
            ones = torch.ones(2 * TOKENS, wrapper.in_features).split(size)
            masks = [
                ops.dropout(part, RATE, seed + number + len(names) * block)
                for block, part in enumerate(ones)
            ]
            monkeypatch.setitem(wrapper.lora_dropout._modules, "default", Masked(torch.cat(masks)))
    reference = gradients(model, packed_batch())
    for values in found:
        assert apart(values, reference) <= EXACT
        assert apart(values, found[0]) <= 1e-6


def test_each_pass_draws_masks_of_its_own_and_a_seed_repeats_them(dropping: Any) -> None:
    model = dropping("llama")
    with fused(model, 5):
        first, again = seeded_gradients(model), gradients(model, packed_batch())
        repeated = seeded_gradients(model)
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert apart(again, first) > 0.05


def test_the_mean_over_masks_is_the_gradient_without_dropout(dropping: Any) -> None:
    model, batch = dropping("llama"), packed_batch()
    plain = gradients(family("llama"), batch)
    with fused(model):
        drawn = [gradients(model, batch) for _ in range(24)]
    one, mean = (
        {name: sum(d[name] for d in draws) / len(draws) for name in plain}
        for draws in (drawn[:1], drawn)
    )
    # Of 24 independent draws a fifth of the scatter is left, and what is no scatter.
    assert apart_in_all(mean, plain) < 0.35 * apart_in_all(one, plain)  # type: ignore[arg-type]


# --- graphs


def test_micro_batches_add_up_as_pefts_do() -> None:
    model, batches = family("qwen3"), (packed_batch(), packed_batch(1, 31))

    def summed() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            loss_of(model, batch)[0].backward()
        found = [p.grad.clone() for p in trainable(model)]
        model.zero_grad(set_to_none=True)
        return found

    reference = summed()
    with fused(model, 2):
        for mine, own in zip(summed(), reference, strict=True):
            assert float((mine - own).norm() / own.norm()) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_graph_that_is_retained_gives_the_same_gradients_twice(kind: str, level: int) -> None:
    model = family(kind)
    with fused(model, level):
        loss, _ = loss_of(model, packed_batch())
        first = torch.autograd.grad(loss, trainable(model), retain_graph=True)
        second = torch.autograd.grad(loss, trainable(model))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_second_pass_through_a_layer_that_used_up_gate_and_up_is_refused(
    kind: str, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel writes past autograd's eyes, as one on a card does."""
    real = torch.ops.qlora.gated_backward_

    def unseen(*args: Any) -> None:
        with torch.autograd._unsafe_preserve_version_counter(args[:3]):  # type: ignore[attr-defined]
            real(*args)

    if not seen:
        monkeypatch.setattr(torch.ops.qlora, "gated_backward_", unseen)
    model = family(kind)
    with fused(model, 1):
        loss, _ = loss_of(model, packed_batch())
        torch.autograd.grad(loss, trainable(model), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, trainable(model))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_of_a_gradient_is_refused(kind: str, level: int) -> None:
    model = family(kind)
    with fused(model, level):
        loss, _ = loss_of(model, packed_batch())
        first = torch.autograd.grad(loss, trainable(model), create_graph=True)
        total = sum(value.square().sum() for value in first)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            total.backward()


def test_a_layer_under_activation_checkpointing_draws_the_same_masks_again(dropping: Any) -> None:
    model = dropping("llama")
    with fused(model, 2):
        reference = seeded_gradients(model)
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        try:
            assert apart(seeded_gradients(model), reference) <= 1e-6
        finally:
            model.get_base_model().activation_checkpointing_disable()


# --- on a card


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: torch.cuda.is_available() is False"
)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "phi3", "smollm3"])
def test_a_card_rounds_no_more_than_peft_does_there_and_refuses_a_second_pass(kind: str) -> None:
    card = hardware.card()
    dtype = torch.bfloat16 if card.supports_bf16 else torch.float16
    model = make(kind, dtype=dtype).cuda()
    batch = {name: value.cuda() for name, value in packed_batch().items()}
    reference = gradients(in_double(model), batch)
    allowed = 1.1 * apart_in_all(gradients(model, batch, dtype), reference)
    for level in LEVELS:
        with fused(model, level, card=card):
            assert apart_in_all(gradients(model, batch, dtype), reference) <= allowed
    with fused(model, card=card), torch.autocast("cuda", dtype):
        loss, _ = loss_of(model, batch)
        torch.autograd.grad(loss, trainable(model), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, trainable(model))
