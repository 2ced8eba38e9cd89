"""Which decoder layers the fused layer can stand in for, and what it reads of them.

A family is known by the class of its layers, whose arithmetic was compared with the fused layer's in a
test. Anything else, and anything that the arithmetic here does not have (an attention dropout, a DoRA),
is left to the libraries, with the reason in words.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora import adapter, nf4
from qlora.kernels import ops
from qlora.kernels.attention import Kernel, Scores
from qlora.kernels.parts import Norm, Parts
from qlora.kernels.projection import Projection

FAMILIES = {
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
    "Gemma2DecoderLayer", "Gemma3DecoderLayer", "Phi3DecoderLayer", "SmolLM3DecoderLayer",
}  # fmt: skip
ACTIVATIONS = {
    "silu": ops.SILU, "swish": ops.SILU,
    "gelu_pytorch_tanh": ops.GELU_TANH, "gelu_new": ops.GELU_TANH,
}  # fmt: skip


class NotFused(Exception):
    """Why a layer is left to the libraries, in words."""


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The decoder layers of a language model, first to last; a vision tower's are not among them."""
    return [module for module in base.modules() if type(module).__name__ in FAMILIES]


def last_norm(base: nn.Module) -> Any:
    """The norm after the last decoder layer."""
    name = next(name for name, m in base.named_modules() if type(m).__name__ in FAMILIES)
    return base.get_submodule(name.rpartition(".layers.")[0]).norm


def require_known(base: Any) -> list[nn.Module]:
    """The decoder layers, if they are of a known family.

    Raises:
        NotFused: They are not.
    """
    found = decoder_layers(base)
    if len(found) != base.config.get_text_config().num_hidden_layers:
        raise NotFused(f"{type(base).__name__} is of no family that the kernels were tested with")
    return found


def parts_of(layer: Any, attention: Kernel, level: int = 1, tile: int | None = None) -> Parts:
    """What the fused layer needs of a decoder layer with an adapter on it.

    Raises:
        NotFused: It has something that the fused layer does not.
    """
    attn, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
    if attn.attention_dropout:
        raise NotFused(f"attention_dropout is {attn.attention_dropout}")
    if getattr(config, "resid_pdrop", 0):
        raise NotFused(f"resid_pdrop is {config.resid_pdrop}")
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in ACTIVATIONS:
        raise NotFused(f"its activation is {name!r}")
    gemma = hasattr(layer, "pre_feedforward_layernorm")
    second = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
    post = (layer.post_attention_layernorm, layer.post_feedforward_layernorm) if gemma else None
    heads = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else None
    fused_qkv, fused_mlp = hasattr(attn, "qkv_proj"), hasattr(mlp, "gate_up_proj")
    reading = (attn.qkv_proj,) if fused_qkv else (attn.q_proj, attn.k_proj, attn.v_proj)
    widening = (mlp.gate_up_proj,) if fused_mlp else (mlp.gate_proj, mlp.up_proj)
    window = getattr(attn, "sliding_window", getattr(config, "sliding_window", None))
    return Parts(
        reading=tuple(map(projection, reading)),
        o=projection(attn.o_proj),
        widening=tuple(map(projection, widening)),
        down=projection(mlp.down_proj),
        norms=(norm(layer.input_layernorm), norm(second)),
        post_norms=None if post is None else (norm(post[0]), norm(post[1])),
        head_norms=None if heads is None else (norm(heads[0]), norm(heads[1])),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attn.head_dim,
        rotates=bool(getattr(attn, "use_rope", True)),
        activation=ACTIVATIONS[name],
        attention=attention,
        scores=Scores(attn.scaling, window),
        level=level,
        tile=tile,
    )


def norm(module: Any) -> Norm:
    """An RMSNorm's weight and epsilon; Gemma stores weights less one."""
    eps = getattr(module, "variance_epsilon", None)
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    return Norm(module.weight.detach(), float(module.eps if eps is None else eps), offset)


def projection(module: nn.Module) -> Projection:
    """A linear with or without an adapter.

    Raises:
        NotFused: The adapter is no plain LoRA, or the linear is of another kind.
    """
    base, wrapper, name, why = adapter.plain_lora(module)
    if why:
        raise NotFused(why)
    if not isinstance(base, nn.Linear):
        raise NotFused(f"one of its linears is a {type(base).__name__}")
    if not nf4.is_plain(base):
        raise NotFused("its weights are packed in another way than NF4 with blocks")
    return Projection(base, wrapper, name)
