"""Dimensions of published models, from the config.json of each on the Hugging Face hub.

Only what :class:`qlora.Shape` reads is kept. What a config leaves out is left out here too:
Gemma 3 names no heads and no vocabulary and relies on the defaults of transformers.
"""

from __future__ import annotations

from typing import Any


def _config(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocab: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        **more,
    }


_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": _config(
        "qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128, attention_bias=False, **_UNTIED
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _config(
        "llama", 4096, 14336, 32, 32, 8, 128256, attention_bias=False, mlp_bias=False, **_UNTIED
    ),
    "mistralai/Mistral-7B-v0.3": _config("mistral", 4096, 14336, 32, 32, 8, 32768, **_UNTIED),
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "microsoft/Phi-4-mini-instruct": _config(
        "phi3", 3072, 8192, 32, 24, 8, 200064, attention_bias=False, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM3-3B": _config("smollm3", 2048, 11008, 36, 16, 4, 128256),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _config(
        "llama", 2048, 5632, 22, 32, 4, 32000, attention_bias=False, **_UNTIED
    ),
    "huggyllama/llama-7b": _config("llama", 4096, 11008, 32, 32, 32, 32000, **_UNTIED),
}

# Not in a recipe: they hold the counting of the other layouts to the published totals.
OTHERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-7B": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, **_UNTIED),
    "google/gemma-2-9b": _config("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256),
    "Qwen/Qwen3-30B-A3B": _config(
        "qwen3_moe", 2048, 6144, 48, 32, 4, 151936,
        head_dim=128, num_experts=128, moe_intermediate_size=768, **_UNTIED,
    ),
}  # fmt: skip
