"""Published base models by family and size: what to name when a larger one does not fit.

Dimensions are those of each model's ``config.json`` on the Hugging Face hub.
"""

from __future__ import annotations

from qlora import fitting, memory
from qlora.cards import Card
from qlora.settings import Recipe
from qlora.shape import Shape, vision_tower

# (hub id, hidden, intermediate, layers, heads, key and value heads, head_dim, vocabulary, tied,
# positions: the longest sequence it knows)
_Row = tuple[str, int, int, int, int, int, int, int, bool, int]
_FAMILIES: dict[str, tuple[_Row, ...]] = {
    "llama": (
        ("HuggingFaceTB/SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, True, 8192),
        ("HuggingFaceTB/SmolLM2-360M", 960, 2560, 32, 15, 5, 64, 49152, True, 8192),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2048, 5632, 22, 32, 4, 64, 32000, False, 2048),
        ("meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, True, 131072),
        ("meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128256, True, 131072),
        ("meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, False, 131072),
        ("meta-llama/Llama-2-13b-hf", 5120, 13824, 40, 40, 40, 128, 32000, False, 4096),
        ("meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, False, 131072),
    ),
    "qwen2": (
        ("Qwen/Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64, 151936, True, 32768),
        ("Qwen/Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 128, 151936, True, 131072),
        ("Qwen/Qwen2.5-3B", 2048, 11008, 36, 16, 2, 128, 151936, True, 32768),
        ("Qwen/Qwen2.5-7B", 3584, 18944, 28, 28, 4, 128, 152064, False, 131072),
        ("Qwen/Qwen2.5-14B", 5120, 13824, 48, 40, 8, 128, 152064, False, 131072),
        ("Qwen/Qwen2.5-32B", 5120, 27648, 64, 40, 8, 128, 152064, False, 131072),
    ),
    "qwen3": (
        ("Qwen/Qwen3-0.6B", 1024, 3072, 28, 16, 8, 128, 151936, True, 40960),
        ("Qwen/Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, True, 40960),
        ("Qwen/Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151936, True, 40960),
        ("Qwen/Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, False, 40960),
        ("Qwen/Qwen3-14B", 5120, 17408, 40, 40, 8, 128, 151936, False, 40960),
        ("Qwen/Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
    ),
    "gemma3": (
        ("google/gemma-3-1b-pt", 1152, 6912, 26, 4, 1, 256, 262144, True, 32768),
        ("google/gemma-3-4b-pt", 2560, 10240, 34, 8, 4, 256, 262208, True, 131072),
        ("google/gemma-3-12b-pt", 3840, 15360, 48, 16, 8, 256, 262208, True, 131072),
    ),
    "mistral": (
        ("mistralai/Mistral-7B-v0.3", 4096, 14336, 32, 32, 8, 128, 32768, False, 32768),
        ("mistralai/Mistral-Nemo-Base-2407", 5120, 14336, 40, 32, 8, 128, 131072, False, 131072),
    ),
    "phi3": (
        ("microsoft/Phi-4-mini-instruct", 3072, 8192, 32, 24, 8, 128, 200064, True, 131072),
        ("microsoft/phi-4", 5120, 17920, 40, 40, 10, 128, 100352, False, 16384),
    ),
    "smollm3": (("HuggingFaceTB/SmolLM3-3B", 2048, 11008, 36, 16, 4, 128, 128256, True, 65536),),
}  # fmt: skip

_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "image_size": 896, "patch_size": 14,
}  # fmt: skip

# A smaller model of another maker, where a family has none that fits.
_ANY = ("llama", "qwen2", "qwen3")
TABLED = (
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-3.2-3B", "Qwen/Qwen3-4B",
    "mistralai/Mistral-7B-v0.3", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B",
    "meta-llama/Llama-2-13b-hf", "Qwen/Qwen2.5-14B", "Qwen/Qwen3-14B",
)  # fmt: skip


def positions(name: str) -> int:
    """The longest sequence that a published model knows."""
    return next(row[-1] for rows in _FAMILIES.values() for row in rows if row[0] == name)


def known(name: str) -> tuple[str, Shape] | None:
    """A published model or the one that it is an instruction-tuned twin of, with its shape; or None."""
    base = name.removesuffix("-Instruct").removesuffix("-it").removesuffix("-Base")
    shapes = published()
    return next(((n, shapes[n]) for n in (name, base, f"{base}-pt") if n in shapes), None)


def published() -> dict[str, Shape]:
    """Every model here, by its hub id."""
    return {row[0]: _shape(kind, row) for kind, rows in _FAMILIES.items() for row in rows}


def instead(recipe: Recipe, shape: Shape, card: Card) -> str | None:
    """The sibling to name where no change of a setting makes a base fit; None where one does.

    As far as a setting may go: the most frugal ones, rows of 128 tokens, rank 8, the base in NF4.
    """
    frugal = fitting.most_frugal(recipe, shape, card)
    data = frugal.data.model_copy(update={"max_length": min(128, frugal.data.max_length)})
    lora = frugal.lora.model_copy(update={"r": min(8, frugal.lora.r)})
    quant = frugal.quant.model_copy(update={"quant_type": "nf4", "double_quant": True})
    least = frugal.model_copy(update={"data": data, "lora": lora, "quant": quant})
    if memory.predict(least, shape, card).fits:
        return None
    return largest_that_fits(recipe, shape, card)


def largest_that_fits(recipe: Recipe, shape: Shape, card: Card) -> str | None:
    """The largest published sibling of a base that would fit, at the most frugal settings; else None.

    A sibling is of the same family and smaller. Where a family has none that fits, any family's model.
    """
    family = next((kind for kind in _FAMILIES if shape.model_type.startswith(kind)), None)
    for kinds in ((family,) if family else (), _ANY):
        smaller = [
            (other.parameters, name)
            for kind in kinds
            for name, other in ((row[0], _shape(kind, row)) for row in _FAMILIES[kind])
            if other.parameters < shape.parameters
            and recipe.data.max_length <= positions(name)
            and _fits(recipe, other, card)
        ]
        if smaller:
            return max(smaller)[1]
    return None


def _fits(recipe: Recipe, shape: Shape, card: Card) -> bool:
    plain = recipe.model_copy(
        update={"lora": recipe.lora.model_copy(update={"target_modules": ("all-linear",)})}
    )
    return memory.predict(fitting.most_frugal(plain, shape, card), shape, card).fits


def _shape(kind: str, row: _Row) -> Shape:
    _, hidden, intermediate, layers, heads, kv, head_dim, vocab, tied, _ = row
    biases = heads * head_dim + 2 * kv * head_dim if kind == "qwen2" else 0
    # The larger ones of Gemma 3 come with a vision tower, which is loaded with them.
    tower = vision_tower(_SIGLIP, hidden) if kind == "gemma3" and hidden > 2000 else (0, 0)
    return Shape(
        kind, hidden, intermediate, layers, heads, kv, head_dim, vocab, tied, biases, 0, *tower
    )  # fmt: skip
