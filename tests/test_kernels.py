"""The fused layers against what PEFT, transformers and bitsandbytes compute without them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from fused_models import (
    CPU,
    FAMILIES,
    GATED,
    IN_ONE,
    LAYERS,
    MIXED,
    SHAPE,
    TOKENS,
    WINDOW,
    apart,
    apart_in_all,
    family,
    fused,
    gradients,
    in_double,
    is_bare,
    loss_of,
    make,
    packed_batch,
    padded_batch,
    tokens,
)

from qlora.fused import LEVELS
from qlora.kernels.attached import attach, detach
from qlora.kernels.attention import CpuFlash
from qlora.kernels.family import FAMILIES as KNOWN
from qlora.kernels.family import decoder_layers, parts_of
from qlora.kernels.parts import Parts
from qlora.kernels.projection import Projection

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-5  # of a tensor's norm, in fp32


# --- families and levels


def test_every_known_family_is_tried_and_every_kind_of_layer() -> None:
    layers = {kind: decoder_layers(family(kind).get_base_model()) for kind in FAMILIES}
    assert {type(layer).__name__ for found in layers.values() for layer in found} == set(KNOWN)
    assert len(layers) == len(KNOWN) == 8 and {len(found) for found in layers.values()} == {LAYERS}
    kinds = {kind: [parts_of(x, CpuFlash()) for x in found] for kind, found in layers.items()}
    assert [p.scores.window for p in kinds["gemma3_text"]] == [WINDOW, None]
    assert [p.rotates for p in kinds["smollm3"]] == [True, False]
    assert all(p.base.bias is not None for p in kinds["llama"][0].projections)
    biased = [p.base.bias is not None for p in kinds["qwen2"][0].projections]
    assert biased == [True, True, True, False, False, False, False]
    assert TOKENS > WINDOW and family("gemma3_text").config.layer_types == MIXED


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_level_gives_pefts_logits_and_gradients(kind: str) -> None:
    model, batch = family(kind), packed_batch()
    reference = gradients(model, batch)
    adapters = len(IN_ONE if kind == "phi3" else GATED)
    assert len(reference) == 1 + LAYERS * 2 * adapters
    assert all(bool(value.any()) for value in reference.values())
    found = []
    for level in LEVELS:
        with fused(model, level):
            found.append(gradients(model, batch))
        assert apart(found[-1], reference) <= EXACT
        assert apart(found[-1], found[0]) <= 1e-6
    assert len(found) == 5 and is_bare(model)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_each_layer_can_have_a_level_of_its_own(kind: str) -> None:
    model, batch = family(kind), packed_batch()
    reference = gradients(model, batch)
    attached = attach(model, CPU, levels=[5, 2])
    found = gradients(model, batch)
    detach(attached)
    assert apart(found, reference) <= EXACT
    with pytest.raises(ValueError, match="zip"):
        attach(model, CPU, levels=[1])
    assert is_bare(model)


@pytest.mark.parametrize("level", LEVELS)
def test_an_attention_that_writes_its_scores_out_is_differentiated_as_it_is(level: int) -> None:
    model = family("qwen2")
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        reference = gradients(model, packed_batch())
        with fused(model, level):
            assert apart(gradients(model, packed_batch()), reference) <= EXACT
    finally:
        model.set_attn_implementation(was)


@pytest.mark.parametrize("level", LEVELS)
def test_inputs_that_want_a_gradient_get_it(level: int) -> None:
    model = family("gemma3_text")

    def of_inputs() -> torch.Tensor:
        embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
        out = model(inputs_embeds=embedded, use_cache=False).logits
        (found,) = torch.autograd.grad(out.float().square().mean(), [embedded])
        return found

    reference = of_inputs()
    with fused(model, level):
        assert float((of_inputs() - reference).norm() / reference.norm()) <= EXACT


# --- what is kept


def kept_bytes(model: Any) -> int:
    """Bytes that autograd keeps for the backward pass beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = loss_of(model, packed_batch())
    found = sum(seen.values())
    del loss
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_level_keeps_fewer_bytes_than_the_one_before(kind: str) -> None:
    model = family(kind)
    kept = [kept_bytes(model)]
    for level in LEVELS:
        with fused(model, level):
            kept.append(kept_bytes(model))
    assert len(kept) == 6 and kept == sorted(set(kept), reverse=True)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2", "gemma3_text"])
def test_what_falls_from_level_to_level_is_what_the_levels_say(kind: str) -> None:
    model, kept = family(kind), []
    for level in LEVELS:
        with fused(model, level):
            kept.append(kept_bytes(model))
    token = 4 * 2 * TOKENS * LAYERS  # bytes of a number for each token in each layer
    hidden, width = SHAPE["hidden_size"], hidden_per_head(kind)
    queries, keys = 4 * width, 2 * width
    log_sum_exp = 0 if kind == "gemma2" else 4  # its capped scores are differentiated as they are
    down = hidden if kind.startswith("gemma") else 0  # a norm needs it
    assert [a - b for a, b in pairwise(kept)] == [
        token * 2 * SHAPE["intermediate_size"],
        token * (queries + 2 * keys),
        token * hidden,
        token * (queries + log_sum_exp + down),
    ]


def hidden_per_head(kind: str) -> int:
    return int(decoder_layers(family(kind).get_base_model())[0].self_attn.head_dim)


# --- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_sixteen_bits_round_no_more_than_peft_does(kind: str, dtype: torch.dtype) -> None:
    model, batch = family(kind, dtype), packed_batch()
    reference = gradients(in_double(model), batch)
    allowed = 1.05 * apart_in_all(gradients(model, batch, dtype), reference)
    assert 1e-4 < allowed < 0.1
    for level, tile in ((1, None), (5, None), (5, 8)):
        with fused(model, level, tile):
            found = gradients(model, batch, dtype)
        assert apart_in_all(found, reference) <= allowed
        assert found["logits"].dtype == dtype


# --- layouts, adapters, bases


LAYOUTS: dict[str, dict[str, torch.Tensor]] = {
    "padded": padded_batch([0, 17]),
    "padded on the left": padded_batch([9, 1], left=True),
    "one row": {"input_ids": tokens(1)},
    "two rows": {"input_ids": tokens(2)},
    "shorter than a window": {"input_ids": tokens(2, WINDOW - 3)},
    "one packed sequence": packed_batch(1, 37),
    "one token": {"input_ids": tokens(2, 1)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_every_layout_gives_pefts_gradients(kind: str, layout: str) -> None:
    model, batch = family(kind), LAYOUTS[layout]
    if layout == "one token":  # nothing is supervised then: logits alone
        with fused(model):
            fused_logits = loss_of(model, batch)[1]
        assert torch.allclose(fused_logits, loss_of(model, batch)[1], atol=1e-5)
        return
    reference = gradients(model, batch)
    for level in (1, 5):
        with fused(model, level):
            found = gradients(model, batch)
        assert all(bool(torch.isfinite(value).all()) for value in found.values())
        assert apart(found, reference) <= EXACT


ADAPTERS: dict[str, dict[str, Any]] = {
    "rank-stabilized": {"use_rslora": True, "r": 16},
    "rank 1": {"r": 1, "lora_alpha": 5},
    "ranks and alphas by pattern": {
        "rank_pattern": {"q_proj": 2, "down_proj": 3}, "alpha_pattern": {"up_proj": 50},
    },
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "down alone": {"target_modules": ["down_proj"]},
    "output alone": {"target_modules": ["o_proj"]},
    "gate and up": {"target_modules": ["gate_proj", "up_proj"]},
    "the second layer": {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_lora_gets_pefts_gradients(name: str, kind: str) -> None:
    model, batch = make(kind, **ADAPTERS[name]), packed_batch()
    reference = gradients(model, batch)
    for level, tile in ((1, None), (3, 40), (5, None)):
        with fused(model, level, tile):
            assert apart(gradients(model, batch), reference) <= EXACT


BASES: dict[str, dict[str, Any]] = {
    "not packed": {"packed": False},
    "scales not nested": {"nested": False},
    # half of each of its matrices is whole blocks of nested scales, 64 * 256 weights
    "wide": {"changes": {"hidden_size": 256, "intermediate_size": 512}},
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_every_kind_of_base_gives_pefts_gradients(name: str, kind: str) -> None:
    model, batch = make(kind, **BASES[name]), packed_batch()
    down = decoder_layers(model.get_base_model())[0].mlp.down_proj.get_base_layer()
    assert len(Projection(down)._cuts(2)) == 2
    reference = gradients(model, batch)
    for level in LEVELS:
        with fused(model, level):
            assert apart(gradients(model, batch), reference) <= EXACT


def test_an_unpacked_base_in_bf16_rounds_no_more_than_peft_does() -> None:
    model, batch = make("llama", dtype=torch.bfloat16, packed=False), packed_batch()
    reference = gradients(in_double(model), batch)
    allowed = 1.05 * apart_in_all(gradients(model, batch, torch.bfloat16), reference)
    with fused(model, 2):
        assert apart_in_all(gradients(model, batch, torch.bfloat16), reference) <= allowed


# --- tiles


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("level", [1, 2, 4, 5])
def test_a_tile_of_any_size_changes_nothing(kind: str, level: int) -> None:
    model, batch = family(kind), packed_batch()
    with fused(model, level):
        whole = gradients(model, batch)
    rows = 2 * TOKENS
    for tile in (1, 7, 32, rows - 1, rows, rows + 1):
        with fused(model, level, tile):
            assert apart(gradients(model, batch), whole) <= EXACT


def test_parts_list_a_and_b_of_each_adapter_in_order() -> None:
    layer = decoder_layers(family("llama").get_base_model())[0]
    parts: Parts = parts_of(layer, CpuFlash())
    shapes = [tuple(p.shape) for p in parts.parameters]
    assert len(shapes) == 14 and shapes[0] == (8, 64) and shapes[1] == (128, 8)
    assert shapes[-2:] == [(8, 192), (64, 8)]
