"""Every check and benchmark that needs a card, in one command; a table last, JSON beside it.

    python scripts/gpu_suite.py [--out DIR] [--only NAME ...] [--models DIR]

Names are those of ``--list``. Models of real shapes are random weights written on the spot: memory and
speed depend on shapes, not on what the weights know. They take 16 GB of disk for the 8B; ``--models``
keeps them between two commands. The exit code is 1 where a check fails.

**What has not been run on CUDA yet: all of it.** It was written without a card at hand and rehearsed on
a CPU (``--rehearse``: tiny models, and the checks that only a card can answer are passed over). Every
figure it writes is measured when it runs; nothing in it is a recorded result.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_longest
import gpu_operators
import gpu_plan
import gpu_recovery
import gpu_step
import gpu_weights
import measure
from gpu_plan import free_memory
from measure import ROOT

if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

GIB = 2**30
BASE = "embedded:base"
TICKETS = "embedded:tickets/heldout.jsonl"
# Overrides of the quickstart for a run of a few steps, with a small held-out loss before and after.
SHORT = (
    f"data.train={TICKETS}", "data.held_out=null", "data.held_out_fraction=0.05",
    "eval.generate=0", "train.logging_steps=1", "train.per_device_train_batch_size=4",
)  # fmt: skip
LLAMA_1B, LLAMA_8B = "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "meta-llama/Llama-3.1-8B-Instruct"

# Shipped recipes that are held to the card in their name, each with the emulated size of that card.
HELD_TO_CARD = (
    "tinyllama-1.1b-8gb", "tinyllama-1.1b-t4",
    "llama-3.1-8b-8gb", "llama-3.1-8b-t4", "llama-3.1-8b-12gb", "llama-3.1-8b-24gb",
)  # fmt: skip


class CheckFailed(AssertionError):
    """A promise that the card did not keep; the text says what was found, ``measured`` all figures."""

    def __init__(self, text: str, measured: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.measured = measured


class CannotCheck(Exception):
    """This machine is too small for a check; nothing was found out."""


@dataclass(frozen=True)
class Site:
    """Where the checks work.

    Attributes:
        work: A folder that is removed afterwards.
        models: Where models of real shapes are made, or found again.
        small: Two-layer models instead of real shapes, for a rehearsal.
        unsloth: An interpreter to look for Unsloth in.
    """

    work: Path
    models: Path
    small: bool = False
    unsloth: str | None = None


@dataclass(frozen=True)
class Check:
    """One check: ``run`` returns what was measured, or raises :class:`CheckFailed`."""

    name: str
    run: Callable[[Site], dict[str, Any]]
    needs_card: bool

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`CheckFailed` unless it holds."""
    if not holds:
        raise CheckFailed(otherwise)


# --- models of real shapes


def llama_config(name: str, small: bool = False) -> Any:
    """The configuration of a published Llama, from ``tests/shapes.py``; ``small`` keeps its family only."""
    from shapes import CONFIGS
    from transformers import LlamaConfig

    values = {k: v for k, v in CONFIGS[name].items() if k != "model_type"}
    if small:
        values |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 2048}
    return LlamaConfig(**values, max_position_embeddings=8192, eos_token_id=2, pad_token_id=3)


def random_model(site: Site, name: str) -> Path:
    """A folder with random bf16 weights of a published shape and the embedded tokenizer.

    Written layer by layer, one safetensors file each, so that the host never holds the whole model.
    A folder whose index is there is used as it is: the index is written last.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.recipe import local_path

    folder = site.models / name.rpartition("/")[2]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(name, site.small)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {
            key: tuple(value.shape)
            for key, value in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise CannotCheck(f"{name} takes {size / GIB:.1f} GiB of disk, {free / GIB:.1f} are free")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)
    where: dict[str, str] = {}
    for number, group in enumerate(layers(list(shapes)), start=1):
        tensors = {}
        for key in group:
            weight = torch.empty(shapes[key], dtype=torch.bfloat16, device=device)
            if weight.ndim == 1:  # the norms
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
            tensors[key] = weight.cpu()
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(local_path(BASE)).save_pretrained(folder)
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    return folder


def layers(names: list[str]) -> list[list[str]]:
    """Parameter names by layer; what belongs to no layer is a group of its own.

    >>> layers(["model.embed.weight", "model.layers.0.q.weight", "model.layers.0.k.weight"])
    [['model.embed.weight'], ['model.layers.0.q.weight', 'model.layers.0.k.weight']]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        inside = "layers" in parts
        key = ".".join(parts[: parts.index("layers") + 2]) if inside else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def full_rows(site: Site, tokens: int, rows: int) -> Path:
    """A file of plain texts, each as long as ``data.max_length`` allows: the batch a plan is about."""
    from transformers import AutoTokenizer

    from qlora.recipe import local_path

    tok = AutoTokenizer.from_pretrained(local_path(BASE))
    word = " kettle"
    text = "kettle" + word * (tokens // len(tok(word)["input_ids"]) + 1)
    while len(tok(text)["input_ids"]) + 1 > tokens:  # one for the end of text
        text = text.removesuffix(word)
    path = site.work / f"full-{tokens}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text}"}) + "\n" for _ in range(rows)))
    return path


# --- what the checks stand on


def quickstart(site: Site, name: str, *overrides: str) -> Any:
    """The quickstart's recipe, with runs in the work folder."""
    from qlora.recipe import load_recipe

    return load_recipe("quickstart", [f"run.dir={site.work}", f"run.name={name}", *overrides])


def attached(recipe: Any) -> tuple[Any, Any]:
    """(model with its adapter, tokenizer) of a recipe on this machine; B is random, not zero."""
    import torch

    from qlora import adapter, hardware, loader, tokenizer

    card, config = hardware.card(), loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe, config.commit)
    base = loader.load_base(recipe, card, config, bars=False)
    model = adapter.attach(base.model, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # a zero B would leave A without any gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return model, tok


def ticket_batch(tok: Any, device: Any, rows: int = 8) -> dict[str, Any]:
    """The first tickets as one padded batch, every token of them trained."""
    import torch

    from qlora import records, sources, tokenizer
    from qlora.recipe import local_path

    ids = []
    for row in sources.read(local_path(TICKETS))[:rows]:
        record = records.parse(row.value, "messages")
        ids.append(torch.tensor(tok(tokenizer.render(tok, record.turns))["input_ids"]))
    padded = torch.nn.utils.rnn.pad_sequence(ids, True, tok.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True, 0)
    labels = padded.masked_fill(mask == 0, -100)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def train(recipe: Any, resume: Path | None = None) -> Any:
    """A whole run, without its screen."""
    from rich.console import Console

    from qlora import trainer

    return trainer.train(recipe, resume=resume, console=Console(file=io.StringIO()))


@contextmanager
def watched_optimizer() -> Iterator[list[dict[str, Any]]]:
    """What the trainer optimized with: a fact of each optimizer, filled in when the block ends."""
    from qlora import sft

    facts: list[dict[str, Any]] = []
    made: list[Any] = []
    create = sft.RowTrainer.create_optimizer

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)
        made.append((self, optimizer, _optimized(optimizer)))
        return optimizer

    with mock.patch.object(sft.RowTrainer, "create_optimizer", spy):
        yield facts
    for trainer, optimizer, at_start in made:
        # accelerate wraps it; the bitsandbytes object is inside.
        inner = getattr(optimizer, "optimizer", optimizer)
        trained = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
        facts.append(
            {
                "class": f"{type(inner).__module__}.{type(inner).__name__}",
                "paged": bool(getattr(inner, "is_paged", False)),
                "bits": getattr(getattr(inner, "args", None), "optim_bits", 32),
                "dtypes_at_start": at_start,
                "dtypes_at_end": sorted(trained),
                "state_dtypes": sorted(
                    {
                        str(value.dtype)
                        for state in inner.state.values()
                        for value in state.values()
                        if hasattr(value, "dtype") and value.numel() >= 4096
                    }
                ),
            }
        )


def _optimized(optimizer: Any) -> list[str]:
    return sorted({str(p.dtype) for group in optimizer.param_groups for p in group["params"]})


def losses(run: Any) -> list[float]:
    """The logged training losses of a run."""
    return [line["loss"] for line in run.metrics() if "loss" in line]


# --- checks


def nf4_kernel(site: Site) -> dict[str, Any]:
    """A round trip through NF4 loses 0.0085 of the variance at every width in use."""
    from qlora import hardware, nf4

    device = hardware.device(hardware.card())
    found = {str(n): nf4.error(n, device) for n in (64, 256, 704, 2048, 4096, 5632, 14336)}
    worst = max(found.values())
    require(worst <= nf4.MAX_ERROR, f"{worst:.4f} of the variance is lost")
    return {"variance_lost": found}


def nf4_load(site: Site) -> dict[str, Any]:
    """Models of real shapes load as NF4, and weigh what the plan says."""
    import torch

    from qlora import hardware, loader
    from qlora.recipe import load_recipe
    from qlora.shape import Shape, nf4_bytes

    found = {}
    for name in (LLAMA_1B, LLAMA_8B):
        folder = random_model(site, name)
        recipe = load_recipe("quickstart", [f"model.name={folder}", "quant.cache=false"])
        config, card = loader.read_config(recipe), hardware.card()
        free_memory()
        already = torch.cuda.memory_allocated() if card.kind == "cuda" else 0
        began = time.perf_counter()
        base = loader.load_base(recipe, card, config, bars=False)
        seconds = time.perf_counter() - began
        shape = Shape.from_config(config.values)
        element = torch.finfo(base.model.dtype).bits // 8
        predicted = nf4_bytes(shape.linear_parameters) + element * shape.unquantized_parameters
        held = base.facts["footprint_bytes"]
        if card.kind == "cuda":
            held = torch.cuda.memory_allocated() - already
        linears = 7 * config.config.num_hidden_layers
        found[name] = {
            "linears": base.facts["quantized_linears"],
            "load_seconds": round(seconds, 1),
            "held_bytes": held,
            "predicted_by_held": round(predicted / held, 4),
        }
        require(base.facts["quantized_linears"] == linears, f"{name}: a linear is not 4-bit")
        require(
            not any(p.requires_grad for p in base.model.parameters()), f"{name}: not all is frozen"
        )
        if not site.small:
            require(
                0.9 < predicted / held < 1.1, f"{name}: {predicted / held:.3f} of what it holds"
            )
        del base
    return found


def evaluation_between(site: Site) -> dict[str, Any]:
    """An evaluation between two backward passes leaves every gradient bit-equal."""
    import torch

    # Eager attention: the backward pass of the fused kernels may add in any order.
    model, tok = attached(quickstart(site, "gradients", "model.attn_implementation=eager"))
    batch = ticket_batch(tok, model.device)

    def gradients() -> dict[str, Any]:
        model.train()
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    first, again = gradients(), gradients()
    model.eval()
    with torch.no_grad():
        model(**batch)
        model.generate(batch["input_ids"][:, :16], max_new_tokens=8, do_sample=False)
    after = gradients()
    repeatable = all(torch.equal(first[n], again[n]) for n in first)
    equal = all(torch.equal(first[n], after[n]) for n in first)
    largest = max(float((first[n] - after[n]).abs().max()) for n in first)
    nonzero = sum(bool(grad.abs().max() > 0) for grad in first.values())
    require(nonzero == len(first), f"{len(first) - nonzero} gradients are zero")
    require(repeatable, "two passes without an evaluation differ already: not deterministic here")
    require(equal, f"gradients differ by up to {largest:.3g} after an evaluation")
    return {"tensors": len(first), "bit_equal": equal, "largest_difference": largest}


def base_unchanged(site: Site) -> dict[str, Any]:
    """Training and generating change the adapter and not one byte of the base."""
    import torch

    from qlora import adapter

    model, tok = attached(quickstart(site, "digest"))
    batch = ticket_batch(tok, model.device)
    before = adapter.base_digest(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model.generate(batch["input_ids"][:, :16], max_new_tokens=8, do_sample=False)
    moved = sum(not torch.equal(start[n], p) for n, p in trained.items())
    require(moved == len(trained), f"only {moved} of {len(trained)} adapter tensors moved")
    require(adapter.base_digest(model) == before, "the base is not what it was")
    return {"adapter_tensors_moved": moved, "sha256": before}


def census(site: Site) -> dict[str, Any]:
    """Only the adapter trains, in fp32; every linear is packed; nothing frozen was upcast."""
    from qlora import adapter

    model, _ = attached(quickstart(site, "census"))
    adapter.assert_census(model)
    found = adapter.census(model)
    require(set(found["trainable"]) == {"float32"}, f"the adapter is {found['trainable']}")
    require(set(found["packed"]) == {"uint8"}, f"the packed weights are {found['packed']}")
    wanted = str(model.base_model.model.dtype).removeprefix("torch.")
    require(set(found["frozen"]) == {wanted}, f"the rest is {found['frozen']}, not {wanted}")
    return found


def adapter_stays_fp32(site: Site) -> dict[str, Any]:
    """The adapter is fp32 after TRL's constructor, after a resume, and at the end of both runs."""
    recipe = quickstart(site, "resumed", *SHORT, "train.max_steps=4", "train.save_steps=2")
    with watched_optimizer() as optimizers:
        run = train(recipe)
        whole = losses(run)
        # As a crash after step 2 leaves it.
        (run.dir / "result.json").unlink()
        shutil.rmtree(run.adapter)
        shutil.rmtree(run.checkpoints / "checkpoint-4")
        (run.dir / "metrics.jsonl").unlink()
        resumed = losses(train(recipe, resume=run.dir))
    dtypes = {d for o in optimizers for d in (*o["dtypes_at_start"], *o["dtypes_at_end"])}
    require(len(optimizers) == 2, f"{len(optimizers)} optimizers were made, not 2")
    require(dtypes == {"torch.float32"}, f"the adapter was {sorted(dtypes)}")
    require(len(resumed) == 2, f"the resumed run logged {len(resumed)} steps, not 2")
    differences = [abs(a - b) for a, b in zip(whole[2:], resumed, strict=True)]
    return {"optimizers": optimizers, "resumed_loss_difference": max(differences)}


def paged_optimizer(site: Site) -> dict[str, Any]:
    """The optimizer that trains is bitsandbytes' paged 8-bit AdamW, and its state is 8-bit."""
    with watched_optimizer() as optimizers:
        train(quickstart(site, "paged", *SHORT, "train.max_steps=3", "train.save_steps=3"))
    (found,) = optimizers
    require(found["class"].startswith("bitsandbytes."), f"the optimizer is {found['class']}")
    require(found["paged"], f"{found['class']} is not paged")
    require("torch.uint8" in found["state_dtypes"], f"its state is {found['state_dtypes']}")
    return dict(found)


def paged_resume(site: Site) -> dict[str, Any]:
    """A resumed run's optimizer state is paged again: bitsandbytes loads it into the card's own memory."""
    # Matrices of less than 100,000 weights are not paged: a rank that makes them larger.
    asked = ("lora.r=1024", "lora.lora_alpha=1024", "train.optim=paged_adamw_8bit")
    recipe = quickstart(site, "pages", *SHORT, *asked, "train.max_steps=4", "train.save_steps=2")
    found = gpu_recovery.resumed_with_pages(recipe, train)
    first, second = found["paged"]
    require(first > 0, "nothing was paged in the first place")
    require(first == second, f"{first} states were paged before the resume and {second} after it")
    return found


def relief(site: Site) -> dict[str, Any]:
    """A step that finds no memory is taken again in smaller passes, to the same loss."""
    import torch

    recipes = [quickstart(site, name, *SHORT, "train.max_steps=5") for name in ("fed", "hungry")]
    found = gpu_recovery.relieved(*recipes, train)
    require(found["oom_retries"] == 1, f"memory ran out {found['oom_retries']} times, not once")
    tolerance = 2e-2 if torch.cuda.is_available() else 1e-4  # 16-bit products, summed otherwise
    difference = found["largest_loss_difference"]
    require(difference <= tolerance, f"the losses differ by {difference:.1e}")
    return found | {"summary": f"losses differ by {difference:.1e} after: {found['error']}"}


def fp16(site: Site) -> dict[str, Any]:
    """The T4's path: fp16 compute with a gradient scaler trains, and its loss falls."""
    asked = ["quant.compute_dtype=float16", "train.max_steps=40", "train.logging_steps=1"]
    run = train(quickstart(site, "fp16", *asked, "eval.generate=0"))
    logged = losses(run)
    require(all(math.isfinite(loss) for loss in logged), "a loss is not finite")
    first, last = sum(logged[:5]) / 5, sum(logged[-5:]) / 5
    require(last < first, f"the loss went from {first:.3f} to {last:.3f}")
    return {"first_losses": first, "last_losses": last, "held_out": run.result["after"]}


def whole_quickstart(site: Site) -> dict[str, Any]:
    """The quickstart on this card: it learns the tickets."""
    short = ["train.max_steps=8", "eval.generate=4"] if site.small else []
    began = time.perf_counter()
    run = train(quickstart(site, "quickstart", *short))
    result = run.result
    if not site.small:
        before, after = (result[when]["exact_match"] for when in ("before", "after"))
        require(after > before, f"exact match {before:.1%} before and {after:.1%} after")
    keys = ("steps", "before", "after", "alive", "tokens", "train_seconds", "peak_memory_bytes")
    return {key: result[key] for key in keys} | {"seconds": round(time.perf_counter() - began, 1)}


def recipe_on_card(site: Site, name: str) -> dict[str, Any]:
    """A shipped recipe at its real shape and full batches, in a process limited to its card's size.

    ``allocated`` is what torch's allocator handed out at the peak, ``device`` what the process took of the
    card, its context included. Paged optimizer state (matrices of 100,000 elements and more) is managed
    memory, which neither sees in full.
    """
    import torch

    from qlora import memory
    from qlora.cards import named_card
    from qlora.errors import QLoRAError
    from qlora.recipe import load_recipe
    from qlora.shape import Shape

    shipped = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    card = named_card(name.rpartition("-")[2])
    folder = random_model(site, shipped.model.name)
    length = 64 if site.small else shipped.data.max_length
    rows = shipped.train.per_device_train_batch_size
    accumulate = 2  # the peak is reached in the second pass, when gradients are there
    steps = 3
    # An emulated T4 still has the units of the card under it: its fp16 path is asked for by name.
    asked_dtype = "auto" if card.supports_bf16 else "float16"
    data = full_rows(site, length, rows * accumulate * steps)
    overrides = [
        f"model.name={folder}", "model.revision=main", f"data.train={data}", "data.columns={}",
        "data.revision=main", "data.split=train", "data.format=text", "data.rendering=plain",
        f"data.max_length={length}", "data.held_out=null", "data.held_out_fraction=0",
        "eval.generate=0", f"train.max_steps={steps}", "train.save_steps=1000",
        f"train.gradient_accumulation_steps={accumulate}", "train.logging_steps=1",
        "train.eval_steps=null", f"quant.compute_dtype={asked_dtype}",
        "quant.cache=false", f"run.dir={site.work}", f"run.name={name}",
    ]  # fmt: skip
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"), overrides)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan = memory.plan(recipe, Shape.from_config(config), card)
    cuda = torch.cuda.is_available()
    free_memory()
    before = 0
    if cuda:
        _, total = torch.cuda.mem_get_info(0)
        if total < 0.98 * card.total_bytes:
            raise CannotCheck(f"this card has {total / GIB:.1f} GiB, less than the {card.name}")
        before = torch.cuda.memory_allocated(0)
    measured: dict[str, Any] = {}
    try:
        with gpu_plan.limited_to(card):
            run = train(recipe)
        result = run.result
        measured = {
            "fitted": True,
            "allocated_bytes": result["peak_memory_bytes"],
            "predicted_by_allocated": _predicted(plan) / result["peak_memory_bytes"],
            "tokens_per_second": [
                line["tokens_per_second"] for line in run.metrics() if "loss" in line
            ][-1],
            "losses": losses(run),
        }
        if cuda:
            free, total = torch.cuda.mem_get_info(0)
            measured["device_bytes"] = total - free
            measured["predicted_by_device"] = plan.total_bytes / (total - free)
    except (torch.OutOfMemoryError, QLoRAError) as error:
        if not ran_out(error):
            raise
        measured = {"fitted": False, "said": str(error).splitlines()[0]}
    found = {
        "card": card.name,
        "card_bytes": card.free_bytes,
        "left_over_bytes": before,
        "planned_bytes": plan.total_bytes,
        "planned_to_fit": plan.fits,
        "batch": [rows, length],
        **measured,
    }
    verdict = "fits" if plan.fits else "does not fit"
    if not site.small:
        require(
            found["fitted"] == plan.fits,
            f"{name}: planned {plan.total_bytes / GIB:.2f} GiB, which {verdict} the {card.name}; "
            f"it was otherwise. {measured.get('said', '')}",
        )
    return found


def ran_out(error: BaseException | None) -> bool:
    """Whether an error is the card's memory running out, or was raised because of that."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _predicted(plan: Any) -> int:
    """The planned bytes that torch's allocator hands out: all but the overhead.

    Paged state counts: bitsandbytes 0.50 pages tensors of 100,000 elements and more, and most LoRA
    matrices are smaller.
    """
    return sum(size for term, size in plan.terms.items() if term != "overhead")


def plan_by_measured(site: Site) -> dict[str, Any]:
    """Planned bytes are the allocated within 3 % and the reserved within 8 %, for 1B, 3B, 8B and 14B."""
    found = gpu_plan.plan_by_measured(site.small)
    if found["off"]:  # what was measured is kept, better or worse than hoped
        raise CheckFailed("; ".join(found["off"]), found)
    return found


def plan_verdicts(site: Site) -> dict[str, Any]:
    """In the memory of 8, 12, 16 and 24 GB what is planned to fit runs, and nothing else does."""
    found = gpu_plan.verdicts(site.small)
    if found["off"]:  # what was measured is kept, better or worse than hoped
        raise CheckFailed("; ".join(found["off"]), found)
    return found


def beside_plain(site: Site) -> dict[str, Any]:
    """Wall time and losses beside plain TRL, on the embedded base and at a real shape."""
    import bench_train

    threads = os.cpu_count() or 1
    if site.small:
        return {"embedded": bench_train.compare(steps=2, pairs=1, threads=threads)}
    found = {
        "embedded": bench_train.compare(steps=60, pairs=2, threads=threads),
        "1.1B": bench_train.compare(20, 2, threads, random_model(site, LLAMA_1B)),
    }
    for name, result in found.items():
        require(result["same_tokens"], f"{name}: the two did not train on the same tokens")
    return found


def kernels_on_card(site: Site) -> dict[str, Any]:
    """The tests that need a card pass on it: operators in Triton, attention kernels, fused layers."""
    marked = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8") and path.name != "test_cuda.py"
    ]
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    summary = said[-1] if said else "pytest said nothing"
    found = {"files": [path.name for path in marked], "summary": summary, "failed": failed}
    if done.returncode:
        raise CheckFailed(f"{summary}: {'; '.join(failed[:3])}", found)
    return found


def step_beside(site: Site, model: str) -> dict[str, Any]:
    """A training step side by side; each ratio beside the one that is wanted."""
    if site.small:
        few = ("ours, level 1", gpu_step.PLAIN, *gpu_step.TUNED)
        found = gpu_step.compare(gpu_weights.TINY, 64, rounds=1, warm=1, timed=1, only=few)
    else:
        found = gpu_step.compare(model, 2048, unsloth=site.unsloth)
    found["verdicts"] = gpu_step.verdicts(found)
    print(gpu_step.table_of(found))
    print(measure.table(("beside", "wanted", "found", "verdict"), found["verdicts"]))
    if found["wrong"]:
        raise CheckFailed("; ".join(found["wrong"]), found)
    missed = [
        f"{side}: {ratio} of {wanted}"
        for side, wanted, ratio, word in found["verdicts"]
        if word == "MISSED"
    ]
    if missed and not site.small:  # what was measured is kept, better or worse than hoped
        raise CheckFailed("; ".join(missed), found)
    return found


def operators(site: Site) -> dict[str, Any]:
    """Each operator of the fused layers beside bitsandbytes', torch's, Liger's and TRL's, in turns."""
    if site.small:
        found = gpu_operators.operators(gpu_weights.TINY, 64, rounds=1, calls=1)
    else:
        found = gpu_operators.operators("8b", 2048)
    print(gpu_operators.told_operators(found))
    return found


def packed_attention(site: Site) -> dict[str, Any]:
    """Packed rows: FlashAttention and the efficient kernel by bounds, SDPA by a mask of T x T."""
    if site.small:
        found = gpu_operators.attention(gpu_weights.TINY, (64,), rounds=1, calls=1)
    else:
        found = gpu_operators.attention("8b", (2048, 8192))
    print(gpu_operators.told_operators(found))
    return found


def longest_sequences(site: Site) -> dict[str, Any]:
    """The longest row of an 8B at r 32 in 8, 12, 16 and 24 GB, beside the plan's and a published one."""
    sizes = gpu_plan.CARDS[:1] if site.small else gpu_plan.CARDS
    found = gpu_longest.longest("8b", sizes, small=site.small)
    headings = ("card", "planned", "ran", "Unsloth published")
    rows = [
        (c["card"], f"{c['planned_tokens']:,}", f"{c['tokens']:,}", f"{c['published_tokens']:,}")
        for c in found["cells"]
    ]
    print(measure.table(headings, rows))
    shorter = [c["card"] for c in found["cells"] if c["tokens"] < c["published_tokens"]]
    if shorter and not site.small:
        raise CheckFailed(f"shorter than published on {', '.join(shorter)}", found)
    return found


def large_on_small(site: Site) -> dict[str, Any]:
    """A 14B trains on rows of 4,096 tokens in the memory of 12 GB."""
    found = gpu_longest.fits_on("14b", "12GB", 4096, small=site.small)
    if not found["ran"]:
        raise CheckFailed(f"it ran out of memory; the planner chose {found['chosen']}", found)
    return found


def _step(model: str) -> Check:
    def run(site: Site) -> dict[str, Any]:
        return step_beside(site, model)

    run.__doc__ = (
        f"A step of a {model.upper()} at 2,048 tokens beside plain and tuned TRL and Unsloth."
    )
    return Check(f"step:{model}", run, needs_card=False)


def _on_card(name: str) -> Check:
    def run(site: Site) -> dict[str, Any]:
        return recipe_on_card(site, name)

    run.__doc__ = f"The recipe {name} at full batches, in the memory of its card; plan by measured."
    return Check(f"card:{name}", run, needs_card=True)


CHECKS: tuple[Check, ...] = (
    Check("nf4-kernel", nf4_kernel, needs_card=False),
    Check("census", census, needs_card=False),
    Check("evaluation-between", evaluation_between, needs_card=False),
    Check("base-unchanged", base_unchanged, needs_card=False),
    Check("adapter-fp32", adapter_stays_fp32, needs_card=False),
    Check("paged-optimizer", paged_optimizer, needs_card=True),
    Check("paged-resume", paged_resume, needs_card=True),
    Check("relief", relief, needs_card=False),
    Check("fp16", fp16, needs_card=True),
    Check("quickstart", whole_quickstart, needs_card=False),
    Check("nf4-load", nf4_load, needs_card=False),
    Check("plan-by-measured", plan_by_measured, needs_card=False),
    Check("plan-verdicts", plan_verdicts, needs_card=False),
    *(_on_card(name) for name in HELD_TO_CARD),
    Check("beside-plain", beside_plain, needs_card=False),
    Check("kernels", kernels_on_card, needs_card=False),
    Check("operators", operators, needs_card=False),
    Check("attention", packed_attention, needs_card=False),
    *(_step(model) for model in ("1b", "3b", "8b")),
    Check("longest:8b", longest_sequences, needs_card=False),
    Check("14b-in-12gb", large_on_small, needs_card=False),
)


def perform(check: Check, site: Site) -> dict[str, Any]:
    """Run one check: its status, seconds, and what it measured or why it failed."""
    began = time.perf_counter()
    try:
        free_memory()
        found = {"status": "ok", "measured": check.run(site)}
    except CannotCheck as reason:
        found = {"status": "skipped", "why": str(reason)}
    except CheckFailed as failure:
        found = {"status": "FAILED", "why": str(failure)}
        if failure.measured is not None:
            found["measured"] = failure.measured
    except Exception as error:  # noqa: BLE001 - one broken check must not cost the others
        found = {"status": "BROKEN", "why": f"{type(error).__name__}: {error}"}
    return {"name": check.name, **found, "seconds": round(time.perf_counter() - began, 1)}


def row(found: dict[str, Any]) -> tuple[str, str, str, str]:
    """One line of the last table: name, status, seconds, and the figure that matters.

    >>> row({"name": "census", "status": "FAILED", "why": "the adapter is bf16", "seconds": 1.0})
    ('census', 'FAILED', '1.0', 'the adapter is bf16')
    """
    return found["name"], found["status"], f"{found['seconds']:.1f}", _telling(found)


def _telling(found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return str(found["why"]).splitlines()[0][:90]
    measured = found["measured"]
    if "allocated_bytes" in measured:
        peak = measured["allocated_bytes"] / GIB
        ratio, speed = measured["predicted_by_allocated"], measured["tokens_per_second"]
        return f"{peak:.2f} GiB allocated, predicted by that {ratio:.3f}, {speed:,.0f} tokens/s"
    if measured.get("fitted") is False:
        return "ran out of memory, as planned"
    if "cells" in measured and "r" in measured:
        return ", ".join(f"{c['card']}: {c['tokens']:,} tokens" for c in measured["cells"])
    if "cells" in measured:
        ratios = [
            c["planned_by_allocated"] for c in measured["cells"] if "planned_by_allocated" in c
        ]
        span = f", planned by allocated {min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""
        return f"{len(measured['cells'])} steps{span}"
    if "verdicts" in measured:
        return ", ".join(f"{side}: {ratio}" for side, _, ratio, _ in measured["verdicts"])
    if "operators" in measured:
        return f"{len(measured['operators'])} beside the libraries' ways"
    if "summary" in measured:
        return str(measured["summary"])
    if "embedded" in measured:
        shown = {n: measure.summary(m["qlora_by_plain"]["steps"]) for n, m in measured.items()}
        return ", ".join(f"{n}: {s['median']:.3f} of plain's steps" for n, s in shown.items())
    if "after" in measured:
        score = measured["after"].get("exact_match")
        return f"exact match {score:.1%} after" if score is not None else ""
    if "resumed_loss_difference" in measured:
        return f"resumed losses differ by {measured['resumed_loss_difference']:.1e}"
    return ""


def about_card() -> dict[str, Any]:
    """The card and its driver side, or the CPU of a rehearsal."""
    import torch

    from qlora import hardware

    card = dataclasses.asdict(hardware.card())
    return {"card": card, "cuda": torch.version.cuda, "cudnn": _cudnn()}


def _cudnn() -> int | None:
    import torch

    return torch.backends.cudnn.version() if torch.cuda.is_available() else None


def chosen(names: list[str] | None) -> list[Check]:
    """The checks of these names, in their own order; all without names.

    Raises:
        ValueError: A name is not a check.
    """
    known = {check.name for check in CHECKS}
    unknown = sorted(set(names or ()) - known)
    if unknown:
        raise ValueError(f"no check is called {', '.join(unknown)}; --list shows them")
    return [check for check in CHECKS if not names or check.name in names]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="All checks and benchmarks that need a card.")
    made.add_argument("--out", type=Path, default=ROOT / "tests" / "measurements", metavar="DIR")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    made.add_argument("--models", type=Path, metavar="DIR", help="keep the made models there")
    made.add_argument("--unsloth", metavar="PYTHON", help="an interpreter that has Unsloth")
    made.add_argument("--commit", help="what to record as the commit, outside of git")
    made.add_argument("--list", action="store_true", help="name the checks and stop")
    made.add_argument(
        "--rehearse", action="store_true", help="tiny models on a CPU, to try the suite itself"
    )
    return made


def main() -> None:
    arguments = parser().parse_args()
    try:
        checks = chosen(arguments.only)
    except ValueError as error:
        parser().error(str(error))
    if arguments.list:
        print(measure.table(("check", "what it shows"), [(c.name, c.about) for c in checks]))
        return

    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not arguments.rehearse:
        raise SystemExit("There is no CUDA card here. --rehearse tries the suite itself on a CPU.")
    if not cuda:
        checks = [check for check in checks if not check.needs_card]
    done = []
    with tempfile.TemporaryDirectory() as folder:
        site = Site(
            Path(folder) / "work",
            arguments.models or Path(folder) / "models",
            arguments.rehearse,
            arguments.unsloth,
        )
        site.work.mkdir()
        for check in checks:
            print(f"{check.name}: {check.about}", flush=True)
            done.append(perform(check, site))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    measure.report(
        {
            "rehearsal": arguments.rehearse,
            **about_card(),
            **measure.circumstances(arguments.commit),
            "checks": done,
        },
        arguments.out / f"{'rehearsal' if arguments.rehearse else 'gpu'}-{stamp}.json",
    )
    print(measure.table(("check", "status", "seconds", "found"), [row(found) for found in done]))
    raise SystemExit(0 if all(found["status"] in ("ok", "skipped") for found in done) else 1)


if __name__ == "__main__":
    main()
