"""The fused layers on a model and off it again: when they work and when they stand aside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import (
    CPU,
    LAYERS,
    apart,
    bare,
    family,
    fused,
    gradients,
    is_bare,
    loss_of,
    make,
    packed_batch,
    tokens,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora import adapter
from qlora.bnb import bnb
from qlora.kernels import ops
from qlora.kernels.attached import attach, detach
from qlora.kernels.family import NotFused, decoder_layers

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what is left to the libraries


def small(kind: str = "llama", *, changes: dict[str, Any] | None = None, **lora: Any) -> Any:
    return make(kind, packed=False, changes=changes, **lora)


def granite() -> Any:
    config = AutoConfig.for_model(
        "granite", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return wrapped(AutoModelForCausalLM.from_config(config), target_modules="all-linear")


def wrapped(base: Any, **lora: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))


def two_adapters() -> Any:
    model = small()
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    model.base_model.set_adapter(["default", "second"])
    return model


def other_packing() -> Any:
    base = bare("llama")
    old = base.model.layers[-1].mlp.down_proj
    new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="fp4")
    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="fp4")
    base.model.layers[-1].mlp.down_proj = new.to("cpu")
    return wrapped(base, target_modules=["q_proj"])


def one_layer_drops_attention() -> Any:
    model = small()
    decoder_layers(model.get_base_model())[-1].self_attn.attention_dropout = 0.5
    return model


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown family": (granite, "GraniteForCausalLM is of no family"),
    "attention dropout": (
        lambda: small(changes={"attention_dropout": 0.1}), "attention_dropout is 0.1"
    ),
    "in the last layer alone": (one_layer_drops_attention, "attention_dropout is 0.5"),
    "residual dropout": (lambda: small("phi3", changes={"resid_pdrop": 0.2}), "resid_pdrop is 0.2"),
    "DoRA": (lambda: small(use_dora=True), "its adapter is a Dora"),
    "a bias on B": (lambda: small(lora_bias=True), "its adapter has a bias"),
    "two adapters": (two_adapters, "2 adapters are on at once"),
    "unknown activation": (lambda: small(changes={"hidden_act": "relu"}), "its activation is 'relu'"),
    "the exact GELU": (lambda: small(changes={"hidden_act": "gelu"}), "its activation is 'gelu'"),
    "FP4": (other_packing, "packed in another way than NF4"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_the_layers_do_not_know_is_left_to_the_libraries_in_words(name: str) -> None:
    build, words = LEFT[name]
    model = build()
    with pytest.raises(NotFused, match=words):
        attach(model, CPU, levels=[1] * LAYERS)
    assert is_bare(model)


# --- when they stand aside


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    """A model that can be merged exactly, with a second adapter that is off."""
    model = small("llama")
    second = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2)
    model.add_adapter("second", second)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B.second" in name:
                value.normal_(0, 0.05)
    model.set_adapter("default")
    yield model.train()
    assert is_bare(model)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits.detach()  # type: ignore[no-any-return]


def evaluated(model: Any) -> torch.Tensor:
    model.eval()
    found = logits(model)
    model.train()
    return found


def without_gradients(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits(model)


def inferred(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return logits(model).clone()


def generated(model: Any) -> torch.Tensor:
    model.eval()
    found = model.generate(
        input_ids=tokens(2, 9), max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=True,
        attention_mask=torch.ones(2, 9, dtype=torch.long),
    )  # fmt: skip
    model.train()
    return found  # type: ignore[no-any-return]


def cached(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=True).logits.detach()  # type: ignore[no-any-return]


def switched_off(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def merged(model: Any) -> torch.Tensor:
    weights = [p.detach().clone() for p in model.parameters()]
    model.merge_adapter()
    found = logits(model)
    model.unmerge_adapter()
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)
    return found


WAYS = {
    "evaluation": evaluated, "no gradients": without_gradients, "inference": inferred,
    "generation": generated, "a cache": cached, "adapter off": switched_off, "merged": merged,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_outside_training_the_results_are_the_librarys_own_bit_for_bit(
    way: str, plain: Any
) -> None:
    reference = WAYS[way](plain)
    with fused(plain, 2):
        assert torch.equal(WAYS[way](plain), reference)
    assert not torch.equal(switched_off(plain), logits(plain))


def test_in_training_it_is_the_fused_layer_that_works_and_elsewhere_it_is_not(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("gated", "rms_norm"):
        real = getattr(ops, name)
        spy = partial(lambda real, name, *a, **k: calls.append(name) or real(*a, **k), real, name)
        monkeypatch.setattr(ops, name, spy)
    with fused(plain):
        logits(plain)
        assert calls.count("gated") == LAYERS
        assert calls.count("rms_norm") == 2 * LAYERS + 1
        for way in WAYS.values():
            calls.clear()
            way(plain)
            # A cache in training is nothing to the norm after the layers.
            assert calls == (["rms_norm"] if way is cached else [])
    calls.clear()
    logits(plain)
    assert not calls


def test_an_adapter_that_was_exchanged_trains_by_the_layers_own_code(plain: Any) -> None:
    plain.set_adapter("second")
    reference = gradients(plain, packed_batch())
    assert len(reference) == 1 + LAYERS * 2 * 2 and all("default" not in n for n in reference)
    plain.set_adapter("default")
    with fused(plain):
        plain.set_adapter("second")
        found = gradients(plain, packed_batch())
        plain.set_adapter("default")
    assert apart(found, reference) <= 1e-6  # the norm after the layers is still the fused one


# --- on and off


def test_taken_off_again_a_model_is_what_it_was() -> None:
    model, batch = family("qwen3"), packed_batch()
    before, state = gradients(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    with fused(model, 3) as attached:
        assert len(attached) == LAYERS + 1 and not is_bare(model)
        assert list(model.state_dict()) == list(state)
        gradients(model, batch)
    assert is_bare(model)
    detach(attached)  # once more does no harm
    after = gradients(model, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_attached_twice_they_are_attached_once() -> None:
    model, batch = family("llama"), packed_batch()
    reference = gradients(model, batch)
    attach(model, CPU, levels=[1] * LAYERS)
    with fused(model, 5):
        assert apart(gradients(model, batch), reference) <= 1e-5
    assert is_bare(model)


def test_the_adapter_is_saved_as_it_would_be_without_them(tmp_path: Path) -> None:
    model = family("llama")
    adapter.save(model, tmp_path / "own", "owner/base")
    with fused(model):
        adapter.save(model, tmp_path / "fused", "owner/base")
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    assert "adapter_model.safetensors" in names
    for name in names:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()


def test_no_other_model_of_the_family_is_touched() -> None:
    other = small("llama")
    own = {type(m): type(m).forward for m in other.modules()}
    with fused(family("llama")):
        assert is_bare(other)
        assert all(cls.forward is function for cls, function in own.items())


# --- the norm after the last layer


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_last_norm_keeps_its_input_and_a_number_a_row(kind: str) -> None:
    model = family(kind)
    with fused(model, 5) as attached:
        norm = attached[-1]
        x = torch.randn(2, 5, 64, requires_grad=True)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = norm(x)
        assert sorted(t.numel() for t in kept) == [10, x.numel()]
        (found,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    own = norm(x)
    (reference,) = torch.autograd.grad(own, [x], torch.ones_like(own))
    assert torch.allclose(y, own, atol=1e-6) and torch.allclose(found, reference, atol=1e-6)


def test_a_gradient_of_the_last_norms_gradient_is_refused() -> None:
    with fused(family("llama")) as attached:
        x = torch.randn(2, 5, 64, requires_grad=True)
        (first,) = torch.autograd.grad(attached[-1](x).square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_the_loss_of_a_step_is_the_same_number_fused_or_not() -> None:
    model = family("gemma2")
    own = float(loss_of(model, packed_batch())[0].detach())
    with fused(model, 4):
        assert float(loss_of(model, packed_batch())[0].detach()) == pytest.approx(own, rel=1e-6)
