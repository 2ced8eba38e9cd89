"""Small models of every family that the fused layers know, and gradients of them to compare.

A model is packed here by bitsandbytes and gets its adapter from PEFT. What these two compute together,
with none of :mod:`qlora.kernels` in it, is the reference of the tests.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.bnb import bnb
from qlora.cards import Card
from qlora.kernels.attached import attach, detach

CPU = Card("CPU", "cpu", 2**34, 2**34)
# Two query heads share a key head, and all heads together are wider than the residual.
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
WINDOW = 16
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": MIXED}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IN_ONE = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")  # Phi-3's
LAYERS = SHAPE["num_hidden_layers"]
TOKENS = 48  # of a row: three windows


def bare(kind: str, **changes: Any) -> Any:
    """A random base in fp32, norms and biases too, nothing packed; it tells its tokens apart."""
    values = SHAPE | FAMILIES.get(kind, {}) | changes
    if kind == "phi3":
        del values["head_dim"]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    with torch.no_grad():
        for name, value in base.named_parameters():
            if "norm" in name or "bias" in name:
                value.add_(torch.randn_like(value) * 0.1)
            elif any(f"{part}_proj" in name for part in ("q", "k", "qkv")):
                value.mul_(8)
            elif "embed" in name:
                value.mul_(25)
    return base


def pack(base: nn.Module, *, nested: bool = True) -> None:
    """Let bitsandbytes pack every linear but the head."""
    for parent in list(base.modules()):
        for name, old in list(parent.named_children()):
            if not isinstance(old, nn.Linear) or name == "lm_head":
                continue
            dtype = old.weight.dtype
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4",
                compute_dtype=dtype, compress_statistics=nested,
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested
            )
            new.bias = old.bias
            new.support_avx512bf16_for_cpu = False
            new.compute_type_is_set = True
            setattr(parent, name, new.to("cpu"))
            assert new.weight.quant_state.nested == nested


def make(
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    nested: bool = True,
    changes: Mapping[str, Any] | None = None,
    **lora: Any,
) -> Any:
    """A model of a family with an adapter whose B is not zero; keywords are PEFT's."""
    base = bare(kind, **(changes or {})).to(dtype)
    if packed:
        pack(base, nested=nested)
    base.requires_grad_(False)
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"} | lora
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.05)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return model.train()


@cache
def family(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that tests share: they leave it as it was."""
    return make(kind, dtype=dtype)


def in_double(model: Any) -> Any:
    """The same model in fp64, its frozen weights as bitsandbytes unpacks them."""
    found = copy.deepcopy(model)
    for parent in list(found.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, bnb.nn.Linear4bit):
                new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
                weight = bnb.functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
                new.weight = nn.Parameter(weight, requires_grad=False)
                new.bias = old.bias
                setattr(parent, name, new)
    return found.double()


def tokens(rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=generator)


def packed_batch(rows: int = 2, length: int = TOKENS) -> dict[str, torch.Tensor]:
    """Sequences in which two rows lie packed, at different places."""
    positions = torch.arange(length).repeat(rows, 1)
    for i in range(rows):
        positions[i, 20 + 3 * i :] -= 20 + 3 * i
    return {"input_ids": tokens(rows, length), "position_ids": positions}


def padded_batch(pads: list[int], *, left: bool = False) -> dict[str, torch.Tensor]:
    mask = torch.ones(len(pads), TOKENS, dtype=torch.long)
    for row, pad in zip(mask, pads, strict=True):
        row[: pad if left else 0] = 0
        row[TOKENS - (0 if left else pad) :] = 0
    return {"input_ids": tokens(len(pads)), "attention_mask": mask}


def loss_of(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over real tokens, and the logits."""
    logits = model(**batch, use_cache=False).logits
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels = functional.pad(labels, (0, 1), value=-100)[:, 1:]  # a row may be one token long
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / max(int((labels >= 0).sum()), 1), logits


def gradients(
    model: Any, batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The gradients of all that trains, and the logits of real tokens among them."""
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with nullcontext() if dtype is None else torch.autocast(device, dtype):
        loss, logits = loss_of(model, batch)
    loss.backward()
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"] == 1]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach(), **found}


def trainable(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def fused(
    model: Any, level: int = 1, tile: int | None = None, *, card: Card = CPU
) -> Iterator[list[Any]]:
    """The model with fused layers on it."""
    attached = attach(model, card, levels=[level] * LAYERS, tile=tile)
    try:
        yield attached
    finally:
        detach(attached)


def is_bare(model: Any) -> bool:
    """Whether no module of a model has a forward of its own."""
    return not any("forward" in module.__dict__ for module in model.modules())


def apart(found: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor among those of the same names."""
    assert found.keys() == reference.keys() and len(found) > 1
    return max(
        float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in reference.items()
    )


def apart_in_all(found: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> float:
    """The relative error of all gradients taken as one vector."""
    assert found.keys() == reference.keys()
    names = [name for name in reference if name != "logits"]
    wrong, whole = (
        torch.cat([values[name].double().flatten() for name in names])
        for values in (found, reference)
    )
    return float((wrong - whole).norm() / whole.norm())
