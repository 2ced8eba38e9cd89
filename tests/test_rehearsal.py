"""A traced step against the real allocator: fake tensors, real tensors and the profiler agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from trl.kernels import chunked_logprob

from qlora import adapter, fused, loader, rehearsal
from qlora.cards import Card
from qlora.kernels import attached
from qlora.recipe import recipe_from
from qlora.shape import Shape
from qlora.step import LOSS_TILE
from qlora.tracing import MemoryTracer

CPU = Card("CPU", "cpu", 2**36, 2**36)
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 4096,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}

# What moves memory: (family, configuration, recipe). The compute dtype decides about autocast.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "plain": ("llama", {}, {}),
    "checkpointed": ("llama", {}, {"train": {"activation_checkpointing": True}}),
    "grouped": ("llama", GROUPED, {}),
    "grouped, checkpointed": ("llama", GROUPED, {"train": {"activation_checkpointing": True}}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "bf16 autocast": ("llama", GROUPED, {"quant": {"compute_dtype": "bfloat16"}}),
    "bf16 autocast, checkpointed": (
        "llama", GROUPED,
        {"quant": {"compute_dtype": "bfloat16"}, "train": {"activation_checkpointing": True}},
    ),
    "fp16 autocast": ("llama", GROUPED, {"quant": {"compute_dtype": "float16"}}),
    "norms of queries and keys": ("qwen3", GROUPED, {}),
    "biases": ("qwen2", GROUPED, {"train": {"activation_checkpointing": True}}),
    "four norms": ("gemma3_text", GROUPED, {}),
    "dropout, two sequences": (
        "llama", {}, {"lora": {"lora_dropout": 0.1}, "train": {"per_device_train_batch_size": 2}},
    ),
    "padded": ("llama", GROUPED, {"data": {"packing": False}}),
    "eager": ("llama", GROUPED, {"model": {"attn_implementation": "eager"}}),
    "16-bit base": ("llama", {}, {"quant": {"quant_type": "none", "compute_dtype": "bfloat16"}}),
}  # fmt: skip


def make(**sections: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "owner/model"},
        "data": {"train": "hub:owner/data", "max_length": 256},
        "lora": {"r": 8},
        "train": {"activation_checkpointing": False, "kernels": "off"},
        "run": {"name": "rehearsal"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return recipe_from(values)


def real_model(family: str, changes: dict[str, Any], recipe: Any, folder: Path) -> Any:
    """The model as a run has it: saved, loaded by the loader, with its adapter."""
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SHAPE | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    named = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name": str(folder)})}
    )
    base = loader.load_base(named, CPU, loader.read_config(named), bars=False)
    model = adapter.attach(base.model, named).train()
    if recipe.train.kernels == "auto":
        shape = Shape.from_config(config.to_dict())
        levels = fused.levels_of(recipe, shape)
        attached.attach(model, CPU, levels=levels, tile=recipe.train.mlp_tile)
    return model


class Unwatched:
    """In the tracer's place where the allocator itself is asked."""

    def phase(self, name: str, category: str = "") -> None: ...


def allocated(model: Any, inputs: dict[str, Any], recipe: Any, folder: Path) -> int:
    """Peak bytes that the CPU allocator hands out in a later micro-batch, by its own events."""

    def micro_batch() -> None:
        rehearsal.forward(model, inputs, recipe, CPU, Unwatched()).backward()

    # oneDNN keeps a scratch pad for each 16-bit product, which no card has.
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        micro_batch()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            micro_batch()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory_events = sorted(
        (event for event in events if event.get("name") == "[memory]"), key=lambda e: e["ts"]
    )
    now = highest = 0
    for event in memory_events:
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    assert len(memory_events) > 500
    return highest


def made_by_the_step(tracer: MemoryTracer) -> int:
    """The peak without what stood before: base, adapters, gradients, optimizer state, batch."""
    step = ("activations", "working_set", "logits")
    return sum(tracer.peak.get(name, 0) for name in step)


def two_rows(recipe: Any) -> dict[str, torch.Tensor]:
    """The worst batch with two rows in each sequence, so that real packing needs its mask too."""
    inputs = rehearsal.batch(recipe, "sdpa")
    if "position_ids" in inputs:
        half = recipe.data.max_length // 2
        inputs["position_ids"] = inputs["position_ids"] % half
    else:
        inputs["attention_mask"][:, -8:] = 0
    return inputs


@pytest.mark.filterwarnings("ignore:.*mixed dtype.*:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_peaks_where_the_allocator_does(name: str, tmp_path: Path) -> None:
    family, changes, sections = CASES[name]
    recipe = make(**sections)
    model = real_model(family, changes, recipe, tmp_path / "model")
    attention = model.config._attn_implementation
    asked = allocated(model, two_rows(recipe), recipe, tmp_path)
    model.zero_grad(set_to_none=True)
    followed = rehearsal.step(model, two_rows(recipe), recipe, CPU)
    imagined = rehearsal.trace(
        recipe, AutoConfig.for_model(family, **(SHAPE | changes)), CPU, attention
    )
    assert made_by_the_step(followed) == pytest.approx(asked, rel=0.01)
    assert made_by_the_step(imagined) == pytest.approx(asked, rel=0.01)
    for category in ("base_nf4", "scales", "unquantized", "adapters", "gradients", "optimizer"):
        assert imagined.peak.get(category, 0) == followed.peak.get(category, 0)


FUSED: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    f"level {n}": ("llama", GROUPED, {"train": {"levels": [3 * (n == m) for m in range(1, 6)]}})
    for n in range(1, 6)
} | {
    "three levels": ("qwen3", GROUPED, {"train": {"levels": [1, 1, 0, 0, 1]}}),
    "tiles": ("llama", {}, {"train": {"activation_checkpointing": True, "mlp_tile": 64}}),
    "four norms": ("gemma3_text", GROUPED, {"train": {"activation_checkpointing": True}}),
    "fused matrices": ("phi3", GROUPED, {}),
    "dropout": ("llama", {}, {"lora": {"lora_dropout": 0.1}}),
    "padded": ("llama", GROUPED, {"data": {"packing": False}}),
    "8-bit head": ("llama", {}, {"quant": {"head": "8bit"}}),
    "16-bit base": ("llama", {}, {"quant": {"quant_type": "none"}}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_fake_tensors_give_the_peak_of_real_ones_with_fused_layers(
    name: str, dtype: str, tmp_path: Path
) -> None:
    # Against the allocator there is nothing to hold them: on a CPU plain torch stands in for the kernels
    # of a card, and what it allocates inside an operator no card does.
    family, changes, sections = FUSED[name]
    sections = sections | {
        "train": {"kernels": "auto", **sections.get("train", {})},
        "quant": {"compute_dtype": dtype, **sections.get("quant", {})},
    }
    recipe = make(**sections)
    model = real_model(family, changes, recipe, tmp_path / "model")
    followed = rehearsal.step(model, two_rows(recipe), recipe, CPU)
    config = AutoConfig.for_model(family, **(SHAPE | changes))
    imagined = rehearsal.trace(recipe, config, CPU, model.config._attn_implementation)
    assert made_by_the_step(imagined) == pytest.approx(made_by_the_step(followed), rel=0.01)
    for category in ("base_nf4", "scales", "unquantized", "adapters", "gradients", "optimizer"):
        assert imagined.peak.get(category, 0) == followed.peak.get(category, 0)


def _peak_of(loss: Any) -> int:
    """The highest point of a forward and backward pass of a loss, beyond what was given to it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 700, 64, generator=generator, requires_grad=True)
    head = torch.randn(40_000, 64, generator=generator)
    tracer = MemoryTracer()
    tracer.own("given", [hidden, head])
    with tracer.watching():
        loss(hidden, head).backward()
    return tracer.peak_bytes - tracer.peak["given"]


def test_the_tiled_loss_allocates_what_trls_does_where_its_kernels_work_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for kernel in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, kernel, lambda *args, **kwargs: None)

    def of_trl(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        rows = hidden[torch.ones(hidden.shape[:2], dtype=torch.bool)]  # the supervised ones
        targets = torch.zeros(len(rows), dtype=torch.long)
        size = LOSS_TILE[1]
        outputs = ("log_probs", "entropy", "is_top1")
        per_token = chunked_logprob.ChunkedLogProbFunction.apply(
            rows, head, None, targets, 1.0, size, None, 1.0, outputs
        )
        return per_token[0].sum()

    ours = _peak_of(lambda hidden, head: rehearsal.TiledLoss.apply(hidden, head, hidden.dtype))
    assert ours == pytest.approx(_peak_of(of_trl), rel=0.01)
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, trl_tile()) == LOSS_TILE


def trl_tile() -> int:
    """Vocabulary entries of trl's tile."""
    from trl.trainer import utils

    return int(utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_what_is_kept_and_what_is_at_work_are_told_apart() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    tracer = MemoryTracer()
    tracer.own("adapters", [weight])
    with tracer.watching():
        out = (torch.ones(8, 64) @ weight).exp()  # matmul keeps its input, exp its output
        assert tracer.live["activations"] == 2 * 8 * 64 * 4
        del out
    assert tracer.live["adapters"] == 64 * 64 * 4
    assert tracer.peak_bytes == sum(tracer.peak.values())


def test_freed_bytes_are_given_back_and_views_cost_nothing() -> None:
    tracer = MemoryTracer()
    with tracer.watching():
        made = torch.zeros(1000)
        view = made[10:20]
        assert tracer.live == {"working_set": 4000}
        del made
        assert tracer.live == {"working_set": 4000}
        del view
    assert tracer.live == {"working_set": 0}
    assert tracer.peak_bytes == 4000


def test_a_trace_needs_no_memory_for_the_model() -> None:
    # 70 billion parameters: their bytes would not fit on any machine that runs this test.
    config = AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=2,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    card = Card("80 GB", "cuda", 80 * 2**30, 80 * 2**30, (8, 0))
    tracer = rehearsal.trace(make(data={"max_length": 4096}), config, card)
    assert tracer.peak["unquantized"] > 4 * 10**9
    assert tracer.at_peak
