"""A model's shape, from its config.json alone, and the bytes and weights that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """What memory needs to know of a model. Sizes are elements, counts of one layer unless total."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    biases: int = 0
    experts: int = 0
    tower_linear: int = 0
    tower_other: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """The shape in a transformers ``config.json``; a multimodal one's ``text_config`` counts.

        The vision tower of Gemma 3 is counted too: AutoModelForCausalLM loads it (transformers 5.23).

        Raises:
            ModelError: A needed key is missing or is not a positive whole number.
        """
        text = config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
        kind = str(text.get("model_type", config.get("model_type", "")))

        def size(key: str, fallback: int | None = None) -> int:
            value = text.get(key)
            if value is None:
                value = _OMITTED.get(kind, {}).get(key, fallback)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(
                    f"config.json: {key!r} must be a positive whole number; found {value!r}. "
                    "Is this the config.json of a causal language model?"
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        head_dim = size("head_dim", hidden // heads)
        counts = [key for key in ("num_experts", "num_local_experts") if text.get(key)]
        experts = size(counts[0]) if counts else 0
        wide = "moe_intermediate_size" if text.get("moe_intermediate_size") else "intermediate_size"
        intermediate = size(wide)
        q, kv, biases = heads * head_dim, kv_heads * head_dim, 0
        if text.get("attention_bias") or kind.startswith("qwen2"):  # Qwen2 has no bias on o_proj
            biases += q + 2 * kv + (0 if kind.startswith("qwen2") else hidden)
        if text.get("mlp_bias"):
            biases += 2 * intermediate + hidden
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        tied = kind.startswith(_TIED) if tied is None else bool(tied)
        tower = vision_tower(config.get("vision_config"), hidden)
        return cls(
            kind, hidden, intermediate, size("num_hidden_layers"), heads, kv_heads, head_dim,
            size("vocab_size"), tied, biases, experts, *tower,
        )  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """One layer's quantized matrices: name -> (in_features, out_features)."""
        h, i = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.model_type.startswith("phi3"):
            return {
                "qkv_proj": (h, q + 2 * kv), "o_proj": (q, h),
                "gate_up_proj": (h, 2 * i), "down_proj": (i, h),
            }  # fmt: skip
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        if self.experts:  # stacked parameters, not linears: transformers 5 does not quantize them
            return attention
        return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def linear_per_layer(self) -> int:
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of every quantized matrix, a vision tower's included."""
        return self.layers * self.linear_per_layer + self.tower_linear

    @property
    def embedding_parameters(self) -> int:
        """Embedding and head; one matrix when they are tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def table_parameters(self) -> int:
        """The embedding, or the head, where they are two matrices; else 0: neither can be spared alone."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def known(self) -> bool:
        """Whether this family's layout was checked; another one is counted as if it were Llama's."""
        return self.model_type.startswith(_LAYOUTS)

    @property
    def norms(self) -> int:
        """Norms of a layer over the hidden state."""
        return 4 if self.model_type.startswith(("gemma2", "gemma3")) else 2

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return self.model_type.startswith(("qwen3", "gemma3"))

    @property
    def norm_parameters(self) -> int:
        """All norms: two (Gemma: four) a layer, those of queries and keys, and the last one."""
        per_layer = self.norms * self.hidden + (2 * self.head_dim if self.has_qk_norm else 0)
        return self.layers * per_layer + self.hidden

    @property
    def unquantized_parameters(self) -> int:
        """Everything bitsandbytes leaves alone: embeddings, norms, biases, experts with their router."""
        expert = self.experts * (3 * self.hidden * self.intermediate + self.hidden)
        inner = self.layers * (self.biases + expert)
        return self.embedding_parameters + self.norm_parameters + inner + self.tower_other

    @property
    def parameters(self) -> int:
        """The published parameter count, a vision tower included."""
        return self.linear_parameters + self.unquantized_parameters

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a plan should know of how this model was counted."""
        facts = {
            "mixture of experts: its experts are counted in 16 bits, as they load": self.experts,
            f"{self.model_type!r} is counted as if laid out like Llama": not self.known,
            "the vision tower is loaded, so it is counted; it is not trained": self.tower_linear,
        }
        return tuple(note for note, holds in facts.items() if holds)


# Families whose embedding and head are one matrix unless their config says otherwise, and the keys
# that published Gemma 3 configs leave to transformers' defaults (Gemma3TextConfig, 5.23).
_TIED = ("gemma", "smollm3")
_OMITTED: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
    },
}  # fmt: skip
_LAYOUTS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")


def vision_tower(vision: object, hidden: int) -> tuple[int, int]:
    """(linear weights, other parameters) of a SigLIP tower with Gemma 3's projector; else (0, 0)."""
    if not isinstance(vision, Mapping) or vision.get("model_type") != "siglip_vision_model":
        return 0, 0
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    h, i, n, image, size = (int(vision.get(key) or 0) for key in keys)
    side, patch = image // max(size, 1), size**2
    other = n * (9 * h + i) + 3 * patch * h + h + side**2 * h + 2 * h + h * hidden + h
    return n * (4 * h * h + 2 * h * i), other


def nf4_bytes(weights: int, *, double_quant: bool = True) -> int:
    """Bytes a linear's weights occupy once bitsandbytes has packed them as NF4.

    Each weight takes 4 bits. Each block of 64 also keeps one scale (absmax): fp32 alone, or 8-bit
    codes whose own fp32 scale is shared by 256 blocks when the scales are quantized again (QLoRA,
    section 3, arXiv:2305.14314). Code tables, 1 KiB a matrix, are left out.

    Args:
        weights: Elements in the unpacked matrix, ``out_features * in_features``. Not
            ``Params4bit.numel()``, which counts packed bytes, half as many.
        double_quant: Whether the scales are quantized too.

    >>> nf4_bytes(4096 * 4096, double_quant=False) / 2**20
    9.0
    """
    blocks = math.ceil(weights / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) if double_quant else 4 * blocks
    return math.ceil(weights / 2) + scales


def target_names(shape: Shape, target_modules: Sequence[str]) -> list[str]:
    """The linears of a layer that these names mean, in the layer's order.

    Raises:
        ModelError: A name matches no linear of a family whose layout is known.
    """
    # A longer name, such as self_attn.q_proj or one layer's, counts as its last part in every layer.
    wanted = {name.rpartition(".")[2] for name in target_modules}
    unknown = wanted - {"all-linear"} - shape.linears.keys()
    if unknown and not shape.known:
        wanted = {"all-linear"}  # another layout has other names: count the most there can be
        unknown = set()
    if unknown:
        raise ModelError(
            f"lora.target_modules: {', '.join(sorted(unknown))} matches nothing in this model, "
            f"whose linears are {', '.join(shape.linears)}. Write all-linear for all of them."
        )
    return [name for name in shape.linears if name in wanted or "all-linear" in wanted]


def adapter_parameters(shape: Shape, r: int, target_modules: Sequence[str]) -> int:
    """Trainable weights of LoRA on those modules: ``r * (in + out)`` for each matrix of each layer.

    Raises:
        ModelError: As :func:`target_names`.
    """
    names = target_names(shape, target_modules)
    return shape.layers * r * sum(sum(shape.linears[name]) for name in names)
