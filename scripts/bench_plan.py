"""The quick plan beside the traced one, over a grid of models, lengths, ranks and vocabularies.

    python scripts/bench_plan.py [--json FILE] [--only FAMILY ...]

Every cell is a whole training step on fake tensors (:mod:`qlora.rehearsal`), of two layers and of four; the
traced peak of all layers lies on a line through the two, and one cell of each family is traced in full to
show that it does. The quick plan is arithmetic on the same ``config.json``. No card is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from measure import ROOT

# Per family and size: (hidden, intermediate, layers, heads, key and value heads, head_dim), after
# published models of about 1, 3 and 8 billion parameters.
SIZES: dict[str, tuple[tuple[int, int, int, int, int, int], ...]] = {
    "llama": ((2048, 8192, 16, 32, 8, 64), (3072, 8192, 28, 24, 8, 128), (4096, 14336, 32, 32, 8, 128)),
    "mistral": ((2560, 6912, 24, 32, 8, 80), (3072, 9216, 26, 24, 8, 128), (4096, 14336, 32, 32, 8, 128)),
    "qwen2": ((1536, 8960, 28, 12, 2, 128), (2048, 11008, 36, 16, 2, 128), (3584, 18944, 28, 28, 4, 128)),
    "qwen3": ((2048, 6144, 28, 16, 8, 128), (2560, 9728, 36, 32, 8, 128), (4096, 12288, 36, 32, 8, 128)),
    "gemma3_text": ((1152, 6912, 26, 4, 1, 256), (2560, 10240, 34, 8, 4, 256), (3840, 15360, 48, 16, 8, 256)),  # noqa: E501
    "phi3": ((2048, 8192, 24, 32, 8, 64), (3072, 8192, 32, 24, 8, 128), (5120, 17920, 40, 40, 10, 128)),
    "smollm3": ((1024, 4096, 24, 16, 4, 64), (2048, 11008, 36, 16, 4, 128), (4096, 14336, 32, 32, 8, 128)),
}  # fmt: skip
# Recomputed by the libraries or not, and fused layers at three levels.
WAYS = ((True, 0), (False, 0), (False, 1), (True, 2), (True, 5))
LENGTHS, RANKS, VOCABULARIES = (512, 2048, 8192), (16, 64), (32_000, 151_936)
# What the grid leaves as it is by default, tried one by one on the middle Llama.
VARIATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "q and v only": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "down only": {"lora": {"target_modules": ["down_proj"]}},
    "eager attention": {"model": {"attn_implementation": "eager"}},
    "flash attention": {"model": {"attn_implementation": "flash_attention_2"}},
    "16-bit base": {"quant": {"quant_type": "none"}},
    "single quantization": {"quant": {"double_quant": False}},
    "four sequences": {"train": {"per_device_train_batch_size": 4}},
    "one pass a step": {"train": {"gradient_accumulation_steps": 1}, "lora": {"r": 128}},
    "padded": {"data": {"packing": False}},
    "new tokens": {"lora": {"train_new_tokens": True}},
    "offload": {"train": {"activation_offload": True}},
}
# And what only fused layers have.
FUSED_VARIATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "tiles": {"train": {"mlp_tile": 256}},
    "8-bit head": {"quant": {"head": "8bit"}},
    "embedding offload": {"train": {"embedding_offload": True}},
    "all offloads, tiles": {
        "train": {"activation_offload": True, "embedding_offload": True, "mlp_tile": 256},
    },
}
OFFLOADS = ("offload", "all offloads, tiles")
CARD, LLAMA = "A100-80GB", "meta-llama/Llama-3.1-8B-Instruct"


def recipe_of(
    length: int,
    r: int,
    checkpointing: bool | int,
    more: dict[str, dict[str, Any]] | None = None,
    *,
    level: int = 0,
    layers: int = 0,
) -> Any:
    """A recipe with everything that moves memory in this grid, and what else is given.

    With a level it is of so many fused layers at that level, else of the libraries' own.
    """
    from qlora.recipe import recipe_from

    values: dict[str, dict[str, Any]] = {
        "model": {"name": "owner/model"},
        "data": {"train": "hub:owner/data", "max_length": length},
        "lora": {"r": r},
        "train": {"activation_checkpointing": checkpointing, "kernels": "auto" if level else "off"},
        "run": {"name": "grid"},
    }
    if level:
        values["train"]["levels"] = [layers * (level == n) for n in range(1, 6)]
    for section, settings in (more or {}).items():
        values[section] = {**values.get(section, {}), **settings}
    return recipe_from(values)


def config_of(family: str, size: tuple[int, ...], vocabulary: int, layers: int) -> dict[str, Any]:
    """A config.json of that family and size; embedding and head are one matrix in the small ones."""
    hidden, intermediate, _, heads, kv, head_dim = size
    config = {
        "model_type": family, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": vocabulary, "max_position_embeddings": 32768, "pad_token_id": None,
        "tie_word_embeddings": hidden <= 2048, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return config if family == "phi3" else config | {"head_dim": head_dim}


def traced(config: dict[str, Any], recipe: Any) -> dict[str, dict[str, int]]:
    """Bytes by category at the highest point of each phase of a traced step."""
    from transformers import AutoConfig

    from qlora import cards, rehearsal

    return rehearsal.trace(recipe, AutoConfig.for_model(**config), cards.named_card(CARD)).peaks


def highest(two: Any, four: Any, layers: int) -> dict[str, int]:
    """The peak of all layers: that of the phase whose line reaches highest."""
    return max(
        (on_line(two[phase], four[phase], layers) for phase in two), key=lambda p: sum(p.values())
    )


def on_line(two: dict[str, int], four: dict[str, int], layers: int) -> dict[str, int]:
    """The bytes of all layers, from those of two and of four.

    >>> on_line({"a": 10, "b": 4}, {"a": 14, "b": 4}, 32)
    {'a': 70, 'b': 4}
    """
    names = [*two, *(name for name in four if name not in two)]
    return {
        name: two.get(name, 0) + (four.get(name, 0) - two.get(name, 0)) // 2 * (layers - 2)
        for name in names
    }


def cell(
    family: str,
    size: tuple[int, ...],
    length: int,
    r: int,
    vocabulary: int,
    checkpointing: bool,
    level: int = 0,
) -> dict[str, Any]:
    """One cell of the grid: both plans, and the quick one by the traced one."""
    two, four = (
        traced(
            config_of(family, size, vocabulary, layers),
            recipe_of(length, r, checkpointing, level=level, layers=layers),
        )
        for layers in (2, 4)
    )
    found = {
        "family": family, "hidden": size[0], "layers": size[2], "length": length, "r": r,
        "vocabulary": vocabulary, "checkpointing": checkpointing, "level": level,
        "traced_bytes": sum(highest(two, four, size[2]).values()),
    }  # fmt: skip
    return judged(found)


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """A cell with today's quick plan and the ratio of the two."""
    from qlora import cards, memory
    from qlora.shape import Shape

    family, hidden = found["family"], found["hidden"]
    size = next(size for size in SIZES[family] if size[0] == hidden)
    shape = Shape.from_config(config_of(family, size, found["vocabulary"], size[2]))
    recipe = recipe_of(
        found["length"], found["r"], found["checkpointing"], level=found["level"], layers=size[2]
    )
    plan = memory.plan(recipe, shape, cards.named_card(CARD))
    quick = sum(size for name, size in plan.terms.items() if name != "overhead")
    return found | {"quick_by_traced": round(quick / found["traced_bytes"], 4)}


def variation(
    name: str,
    length: int,
    checkpointing: bool | int,
    layers: int = 6,
    family: str = "llama",
    level: int = 0,
) -> float:
    """The quick plan by the traced one, of a model with few layers and one setting changed."""
    from transformers import AutoConfig

    from qlora import cards, memory, rehearsal
    from qlora.shape import Shape

    config = config_of(family, SIZES["llama"][1], VOCABULARIES[0], layers)
    more = VARIATIONS.get(name, {}) | FUSED_VARIATIONS.get(name, {})
    recipe = recipe_of(length, 16, checkpointing, more, level=level, layers=layers)
    attention = recipe.model.attn_implementation
    if family == "gemma2":
        attention = "eager"
    card = cards.named_card(CARD)
    tracer = rehearsal.trace(
        recipe, AutoConfig.for_model(**config), card, "sdpa" if attention == "auto" else attention
    )
    plan = memory.predict(recipe, Shape.from_config(config), card)
    needed = plan.total_bytes - plan.terms["overhead"]
    return round(needed / tracer.peak_bytes, 4)


def fused_variations() -> dict[str, list[float]]:
    """As :func:`variations`, over lengths and levels of fused layers."""
    found = {}
    for name in (*VARIATIONS, *FUSED_VARIATIONS):
        levels = (5,) if name in OFFLOADS else (2, 5) if name == "tiles" else (1, 2, 5)
        ratios = [
            variation(name, length, True, level=level) for length in LENGTHS for level in levels
        ]
        found[f"fused, {name}"] = [min(ratios), max(ratios)]
    ratios = [
        variation("", length, True, family="gemma2", level=level)
        for length in LENGTHS
        for level in (1, 3, 5)
    ]
    return found | {"fused, gemma2": [min(ratios), max(ratios)]}


def variations() -> dict[str, list[float]]:
    """Lowest and highest ratio of each setting, over lengths and recomputed layers."""
    found = {}
    for name in VARIATIONS:
        ratios = [
            variation(name, length, again)
            for length in LENGTHS
            for again in ((True,) if name == "offload" else (True, 3, False))
        ]
        found[name] = [min(ratios), max(ratios)]
    ratios = [
        variation("", length, again, family="gemma2")
        for length in LENGTHS
        for again in (True, 3, False)
    ]
    return found | {"gemma2": [min(ratios), max(ratios)]}


def straight(family: str) -> dict[str, Any]:
    """One model of a family traced in full, by the line through two and four layers."""
    size = SIZES[family][1]
    ratios = {}
    for checkpointing in (True, False):
        recipe = recipe_of(2048, 16, checkpointing)
        two, four, whole = (
            traced(config_of(family, size, VOCABULARIES[0], layers), recipe)
            for layers in (2, 4, size[2])
        )
        full = max(sum(peak.values()) for peak in whole.values())
        line = sum(highest(two, four, size[2]).values())
        ratios["recomputed" if checkpointing else "kept"] = round(line / full, 5)
    return {"family": family, "line_by_full": ratios}


def processes() -> dict[str, Any]:
    """Whole processes on the configuration of Llama-3.1-8B: seconds of both plans, RSS of the exact one."""
    sys.path.append(str(ROOT / "tests"))
    from shapes import CONFIGS

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIGS[LLAMA]), encoding="utf-8")
        asked = [
            "plan", "quickstart", f"model.name={model}", "data.max_length=2048", "--card=24GB",
            "train.activation_checkpointing=true", "train.per_device_train_batch_size=1",
            "eval.generate=0",
        ]  # fmt: skip
        command = [*measure.qlora_command(), *asked]
        quick = [measure.timed(command).seconds for _ in range(5)]
        exact = measure.timed([*command, "--exact"]).seconds
        highest_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "quick_seconds": round(sorted(quick)[2], 2),
        "exact_seconds": round(exact, 1),
        "exact_rss_gib": round(highest_kib / 2**20, 2),
    }


def _every_cell(families: list[str]) -> list[dict[str, Any]]:
    cells, began = [], time.monotonic()
    asked = [
        (family, *rest)
        for family in families
        for rest in itertools.product(SIZES[family], LENGTHS, RANKS, VOCABULARIES, WAYS)
    ]
    for done, values in enumerate(asked, start=1):
        cells.append(cell(*values[:-1], *values[-1]))
        left = (time.monotonic() - began) / done * (len(asked) - done)
        print(f"\r{done}/{len(asked)}  {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return cells


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="The quick plan beside the traced one.")
    made.add_argument("--only", nargs="+", metavar="FAMILY", choices=SIZES, help="these alone")
    made.add_argument("--again", type=Path, metavar="FILE", help="judge an earlier grid's traces")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.again:
        earlier = json.loads(arguments.again.read_text(encoding="utf-8"))
        cells = [judged(c) for c in earlier["cells"]]
        more = {key: earlier[key] for key in ("processes", "lines") if key in earlier}
    else:
        families = arguments.only or list(SIZES)
        more = {"processes": processes(), "lines": [straight(family) for family in families]}
        cells = _every_cell(families)
    more["variations"] = variations() | fused_variations()
    rows = []
    for family, fused in dict.fromkeys((c["family"], c["level"] > 0) for c in cells):
        ratios = [
            c["quick_by_traced"]
            for c in cells
            if c["family"] == family and (c["level"] > 0) == fused
        ]
        far = sum(abs(ratio - 1) > 0.03 for ratio in ratios)
        name = f"{family}, fused" if fused else family
        rows.append((name, str(len(ratios)), f"{min(ratios):.3f}", f"{max(ratios):.3f}", str(far)))
    result = {**measure.circumstances(), "card": CARD, **more, "cells": cells}
    measure.report(result, arguments.json or ROOT / "tests" / "measurements" / "plan-grid.json")
    print(measure.table(("family", "cells", "lowest", "highest", "off by over 3 %"), rows))
    if more:
        print(more["processes"], [line["line_by_full"] for line in more["lines"]])
        settings = more.get("variations", {}).items()
        print(
            measure.table(
                ("setting", "lowest", "highest"), [(n, *map(str, r)) for n, r in settings]
            )
        )


if __name__ == "__main__":
    main()
