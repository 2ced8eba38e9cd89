"""The planner against a card: planned bytes by measured ones, and verdicts in the memory of small cards.

Not a command: ``gpu_suite.py`` runs these checks. The models have real shapes and random weights that are
made on the card, packed already, so that nothing has to be quantized or read: memory and speed do not
depend on what the weights know. Without a card the same code runs on small shapes on a CPU, where the
tracer stands in for CUDA's counters.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30
# (hub id, the cards of section 2): the largest of each size that people train on small cards.
MODELS = (
    "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B",
    "Qwen/Qwen2.5-14B",
)  # fmt: skip
LENGTHS = (512, 2048, 8192)
CARDS = ("8GB", "12GB", "16GB", "24GB")
WITHIN_ALLOCATED, WITHIN_RESERVED = 0.03, 0.08


def config_of(name: str, *, small: bool = False) -> Any:
    """A transformers configuration of a published shape; ``small`` keeps its family only."""
    from transformers import AutoConfig

    from qlora.siblings import published

    shape = published()[name]
    values: dict[str, Any] = {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    if small:
        values |= {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
        values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
        values |= {"vocab_size": 2048}
    ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(shape.model_type, **values, **ends, max_position_embeddings=131072)


def recipe_of(length: int, **train: Any) -> Any:
    """A recipe with full sequences of a length."""
    from qlora.recipe import recipe_from

    return recipe_from(
        {
            "model": {"name": "owner/model"},
            "data": {"train": "hub:owner/data", "max_length": length},
            "train": train,
            "run": {"name": "planned"},
        }
    )


def made_on(device: Any) -> Callable[[Any], Any]:
    """Random tensors on a device, for :func:`qlora.phantom.build`."""
    import torch

    def make(tensor: Any) -> Any:
        if tensor.dtype == torch.uint8:
            return torch.randint(0, 256, tensor.shape, dtype=torch.uint8, device=device)
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(0.02)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return make


def run_step(config: Any, recipe: Any, card: Any) -> dict[str, Any]:
    """Two optimizer steps by the product's own loss, of up to two full micro-batches, and their peak.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    import torch

    from qlora import cards, hardware, phantom, rehearsal, sft
    from qlora.attention import sdpa_on
    from qlora.offload import InputsOnHost

    device = hardware.device(hardware.card())
    dtype = getattr(torch, cards.compute_dtype(recipe, card))
    cuda = device.type == "cuda"
    attention = sdpa_on(card)
    model = phantom.build(config, recipe, dtype, attention, made_on(device), as_on_card=False)
    sft.fuse_head(model.get_base_model())
    inputs = {k: v.to(device) for k, v in rehearsal.batch(recipe, attention).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(cards.optimizer(recipe, card), trained)

    def micro_batch() -> None:
        away = recipe.train.activation_offload
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if away:
                with InputsOnHost():
                    loss = sft.loss_of(model, inputs, 1, materialize=not cuda)
            else:
                loss = sft.loss_of(model, inputs, 1, materialize=not cuda)
        loss.backward()

    passes = min(2, recipe.train.gradient_accumulation_steps)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(passes):
            micro_batch()
        optimizer.step()

    step()
    if not cuda:
        tracer = rehearsal.step(model, inputs, recipe, card)
        return {"allocated_bytes": tracer.peak_bytes, "reserved_bytes": tracer.peak_bytes}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(0)
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    tokens = passes * recipe.train.per_device_train_batch_size * recipe.data.max_length
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(0),
        "reserved_bytes": torch.cuda.max_memory_reserved(0),
        "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
    }


def _optimizer(name: str, trained: list[Any]) -> Any:
    import torch

    from qlora.bnb import bnb

    if "8bit" not in name:
        return torch.optim.AdamW(trained, lr=1e-5)
    made = bnb.optim.PagedAdamW8bit if name.startswith("paged") else bnb.optim.AdamW8bit
    return made(trained, lr=1e-5)


def plan_by_measured(small: bool) -> dict[str, Any]:
    """Planned bytes within 3 % of the allocated and 8 % of the reserved, four models, three lengths."""
    from qlora import hardware, memory
    from qlora.shape import Shape

    card, found, off = hardware.card(), [], []
    for name in MODELS:
        config = config_of(name, small=small)
        shape = Shape.from_config(config.to_dict())
        for length in (64,) if small else LENGTHS:
            for again in (True, shape.layers // 2, False):
                recipe = recipe_of(length, activation_checkpointing=again)
                plan = memory.plan(recipe, shape, card)
                if not plan.fits:
                    continue
                planned = sum(size for term, size in plan.terms.items() if term != "overhead")
                free_memory()
                measured = run_step(config, recipe, card)
                ratios = {
                    "planned_by_allocated": round(planned / measured["allocated_bytes"], 4),
                    "planned_by_reserved": round(planned / measured["reserved_bytes"], 4),
                }
                row = {"model": name, "length": length, "recomputed": again, "planned": planned}
                found.append(row | measured | ratios)
                far = abs(ratios["planned_by_allocated"] - 1) > WITHIN_ALLOCATED
                far |= abs(ratios["planned_by_reserved"] - 1) > WITHIN_RESERVED
                if far and not small:
                    off.append(f"{name} at {length}: {ratios}")
    return {"cells": found, "off": off}


def verdicts(small: bool) -> dict[str, Any]:
    """What the planner calls fitting runs in the memory of 8 to 24 GB, and what it refuses does not."""
    import torch

    from qlora import fitting, hardware, memory
    from qlora.cards import named_card
    from qlora.errors import DoesNotFit
    from qlora.shape import Shape

    found, wrong, device = [], [], hardware.card()
    for text in CARDS:
        card = named_card(text)
        if device.kind == "cuda":
            if device.total_bytes < card.total_bytes:
                continue  # a smaller card cannot stand for a larger one
            card = dataclasses.replace(card, capability=device.capability)
        for name in MODELS:
            config = config_of(name, small=small)
            shape = Shape.from_config(config.to_dict())
            for length in (64,) if small else LENGTHS:
                recipe = recipe_of(length, fit="auto")
                try:
                    recipe, fits = fitting.fit(recipe, shape, card).recipe, True
                except DoesNotFit:
                    recipe, fits = fitting.most_frugal(recipe, shape, card), False
                free_memory()
                with limited_to(card):
                    try:
                        measured: dict[str, Any] = run_step(config, recipe, card)
                        ran = True
                    except torch.OutOfMemoryError:
                        measured, ran = {}, False
                chosen = {name: getattr(recipe.train, name) for name in fitting.CHOSEN}
                planned = memory.predict(recipe, shape, card).total_bytes
                row = {
                    "card": card.name, "model": name, "length": length, "planned_bytes": planned,
                    "planned_to_fit": fits, "ran": ran, "chosen": chosen,
                }  # fmt: skip
                found.append(row | measured)
                if ran != fits and not small:
                    wrong.append(f"{name} at {length} on {card.name}: planned {fits}, ran {ran}")
    return {"cells": found, "off": wrong}


@contextmanager
def limited_to(card: Any) -> Iterator[None]:
    """As much memory as a card of that size leaves to tensors; everything where there is no card."""
    import torch

    from qlora import memory

    if not torch.cuda.is_available():
        yield
        return
    _, total = torch.cuda.mem_get_info(0)
    allowed = (card.free_bytes - memory.CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed), 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def free_memory() -> None:
    """Give back what was left in torch's cache, and forget its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(0)


def measured_files(folder: Path) -> list[dict[str, Any]]:
    """The suite's results of real cards that lie in a folder, with their planner checks."""
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        checks = {check["name"]: check for check in data["checks"]}
        if "plan-by-measured" in checks:
            found.append({"file": path.name, "card": data["card"], "checks": checks})
    return found
