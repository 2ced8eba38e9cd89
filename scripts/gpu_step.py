"""The sides of ``bench_step.py``, and what else ``gpu_suite.py`` measures of the fused layers on a card.

Not a command. Models have published shapes and random weights, quantized once by bitsandbytes and
shared by every side; each side trains in its own trainer's own loop, from the same adapter, on the same
rows in the same order. A turn builds a side, trains a few steps and lets it go, so that peaks are its
own. Without a card the same code runs on small shapes on a CPU, where a tracer stands in for CUDA's
counters.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_plan
import measure
from gpu_weights import (
    ADAPTER,
    GIB,
    LONGEST_ROW,
    RANK,
    RATE,
    ROWS,
    Weights,
    config_of,
    dtype_on,
    quiet,
    rows_of,
    tokenizer,
    useful,
)

WARM, TIMED, TRIED = 3, 8, 3  # steps of a turn before the clock, on it, and of the trial
# How far the losses of one batch may be apart, by dtype, and their gradients' norms, relatively. A side
# that left a layer out would be off by 0.03 and more: the spread of a mean over 2,048 random logits.
AGREE = {"float32": (1e-4, 1e-3), "bfloat16": (0.01, 0.05), "float16": (0.01, 0.05)}
PLANNED, PLAIN, UNSLOTH = "ours, as planned", "plain TRL", "Unsloth"
DOES_NOT_FIT, NOT_INSTALLED, THE_SLOWER = "does not fit", "not installed", "the other one is faster"
TUNED = ("tuned TRL, recomputed", "tuned TRL, kept")
# Ours by theirs, in tokens a second, at 2,048 packed tokens.
WANTED = {PLAIN: 2.0, "tuned TRL": 1.35, UNSLOTH: 1.10}


# --- sides


@dataclass(frozen=True)
class Turn:
    """One side's few steps: tokens a second of the timed ones, and the peak of all."""

    tokens_per_second: float
    allocated: int
    reserved: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What every side of a comparison trains on.

    Attributes:
        weights: Shared.
        card: Where it is, or which one is emulated.
        tokens: Of a step.
        rows: Of the longest turn.
        folder: For what trainers write.
    """

    weights: Weights
    card: Any
    tokens: int
    rows: list[list[int]]
    folder: Path

    @property
    def cuda(self) -> bool:
        return bool(self.weights.device.type == "cuda")


Build = Callable[[Work, int, list[Any], int], Any]  # (work, steps, callbacks, logging) -> a trainer


def sides(work: Work) -> dict[str, Build]:
    """Each side's name and what builds its trainer; the planner's choice first."""
    made: dict[str, Build] = {PLANNED: lambda *a: ours(_planned(work), *a)}
    layers = work.weights.config.num_hidden_layers
    for level in (1, 2, 3, 4, 5):
        counts = [layers if n == level else 0 for n in (1, 2, 3, 4, 5)]
        recipe = recipe_of(work, levels=counts)
        made[f"ours, level {level}"] = lambda *a, recipe=recipe: ours(recipe, *a)
    made[PLAIN] = plain
    for name in TUNED:
        made[name] = lambda *a, name=name: tuned(name == TUNED[0], *a)
    return made


def recipe_of(work: Work, *, r: int = RANK, rows: int = ROWS, **train: Any) -> Any:
    """Our recipe for the work: a step's rows packed into one sequence."""
    from qlora.recipe import recipe_from

    settings = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": rows,
        "activation_checkpointing": False, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "save_steps": 10**6, "logging_steps": 10**6,
        "sft_config": {"train_sampling_strategy": "sequential"},
    }  # fmt: skip
    return recipe_from(
        {
            "model": {"name": "owner/model"},
            "data": {"train": "hub:owner/data", "max_length": work.tokens},
            "lora": ADAPTER | {"r": r},
            "train": settings | train,
            "run": {"name": "step"},
        }
    )


def _planned(work: Work) -> Any:
    """The recipe with what ``train.fit: auto`` chooses for a step that is one sequence.

    Raises:
        DoesNotFit: Nothing does.
    """
    from qlora import fitting
    from qlora.shape import Shape

    shape = Shape.from_config(work.weights.config.to_dict())
    chosen = fitting.fit(recipe_of(work, rows=1, fit="auto"), shape, work.card).recipe
    packed = {"gradient_accumulation_steps": ROWS}  # of rows: together they are that sequence
    return chosen.model_copy(update={"train": chosen.train.model_copy(update=packed)})


def ours(recipe: Any, work: Work, steps: int, callbacks: list[Any], logging: int) -> Any:
    """The product's trainer, its fused layers proven on this machine first.

    Raises:
        NotFused: They do not pass here.
    """
    import numpy as np
    from datasets import Dataset

    from qlora import adapter, fused, loader, packing, sft
    from qlora.kernels import attached
    from qlora.packing import Layout
    from qlora.shape import Shape

    weights = work.weights
    train = recipe.train.model_copy(update={"max_steps": steps, "logging_steps": logging})
    recipe = recipe.model_copy(update={"train": train})
    values = weights.config.to_dict()
    attention = loader.attention_on(
        work.card, recipe, SimpleNamespace(config=weights.config, values=values)
    )
    model = adapter.attach(weights.base(recipe, attention), recipe)
    asked = packing.sample(work.rows[:3], attention, weights.device)
    levels = fused.levels_of(recipe, Shape.from_config(values))
    found = attached.fuse(
        model, work.card, levels, recipe.train.mlp_tile, tokens=min(work.tokens, 8192), asked=asked
    )
    ids = [np.asarray(row) for row in work.rows]
    data = {"row": list(range(len(ids))), "input_ids": ids, "labels": ids}
    prepared: Any = SimpleNamespace(
        train=Dataset.from_dict(data).with_format("numpy"), held_out=None
    )
    layout = Layout(work.tokens, 1, packed=True, flat=attention in packing.FLAT)
    run: Any = SimpleNamespace(checkpoints=work.folder / "ours")
    return sft.build(
        recipe, run, work.card, model, tokenizer(), prepared, layout,
        observers=[], callbacks=callbacks, head=found.head,
    )  # fmt: skip


def plain(work: Work, steps: int, callbacks: list[Any], logging: int) -> Any:
    """TRL as its documentation has it: padded, fp32 around packed linears, every layer recomputed."""
    longest = max(LONGEST_ROW, *map(len, work.rows))
    return _trl(
        work, steps, callbacks, logging, attention="sdpa", wide=True, again=True, max_length=longest
    )


def tuned(again: bool, work: Work, steps: int, callbacks: list[Any], logging: int) -> Any:
    """TRL by somebody who knows it: 16 bits, no padding, the best attention, Liger where it is."""
    from qlora import hardware

    flash = hardware.has_flash_attention(hardware.card())
    more: dict[str, Any] = {"padding_free": True, "max_length": None}
    if work.cuda and importlib.util.find_spec("liger_kernel"):
        more["use_liger_kernel"] = True
    attention = "flash_attention_2" if flash else "sdpa"
    return _trl(
        work, steps, callbacks, logging, attention=attention, wide=False, again=again, **more
    )


def _trl(
    work: Work,
    steps: int,
    callbacks: list[Any],
    logging: int,
    *,
    attention: str,
    wide: bool,
    again: bool,
    **more: Any,
) -> Any:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from qlora import adapter

    recipe = recipe_of(work, kernels="off")
    model = adapter.attach(work.weights.base(recipe, attention, wide=wide), recipe)
    dtype = str(work.weights.dtype)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work.folder / "trl"), max_steps=steps, per_device_train_batch_size=ROWS,
            learning_rate=RATE, lr_scheduler_type="constant", logging_steps=logging,
            train_sampling_strategy="sequential", save_strategy="no", report_to=[], disable_tqdm=True,
            bf16=dtype == "torch.bfloat16", fp16=dtype == "torch.float16", use_cpu=not work.cuda,
            dataloader_pin_memory=work.cuda, activation_checkpointing=again, **more,
        ),
        train_dataset=Dataset.from_dict({"input_ids": work.rows, "labels": work.rows}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip
    if not work.cuda or dtype == "torch.float16":
        # TRL 1.16 makes the adapter bf16, which neither fp16's scaler nor a CPU in fp32 works with.
        adapter.restore_dtype(model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def turn(build: Build, work: Work, warm: int, timed: int, *, logging: int = 10) -> Turn:
    """Build a side, train it, and let it go.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    import torch
    from transformers import TrainerCallback

    said: list[dict[str, float]] = []
    moments: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm:
                self.stamp(warm)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == warm + timed:
                self.stamp(warm + timed)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            said.append(logs)

        def stamp(self, step: int) -> None:
            if work.cuda:
                torch.cuda.synchronize()
            moments[step] = time.perf_counter()

    gpu_plan.free_memory()
    trainer = build(work, warm + timed, [Clock()], logging)
    tracer = None if work.cuda else _tracer(trainer.model)
    try:
        if work.cuda:
            torch.cuda.reset_peak_memory_stats(0)
        with tracer if tracer and logging == 1 else nullcontext():
            trainer.train()
        taken = moments[warm + timed] - moments[warm]
        return Turn(
            timed * work.tokens / taken,
            torch.cuda.max_memory_allocated(0) if tracer is None else tracer.peak_bytes,
            torch.cuda.max_memory_reserved(0) if tracer is None else tracer.peak_bytes,
            [logs["loss"] for logs in said if "loss" in logs],
            [float(logs["grad_norm"]) for logs in said if "grad_norm" in logs],
        )
    finally:
        trainer.accelerator.free_memory()
        del trainer, tracer
        gc.collect()


def _tracer(model: Any) -> Any:
    """What follows a CPU's bytes: the base and the adapter stand already."""
    from qlora import phantom
    from qlora.tracing import MemoryTracer

    found = MemoryTracer()
    for category, tensor in phantom.frozen(model):
        found.own(category, [tensor])
    found.own("adapters", [p for p in model.parameters() if p.requires_grad])
    return found


# --- Unsloth, in an interpreter of its own


def unsloth_turn(
    python: str, work: Work, folder: Path, warm: int, timed: int, logging: int
) -> Turn:
    """The same by Unsloth's documentation, in another interpreter.

    Raises:
        CommandFailed: It ended badly.
    """
    job = {
        "folder": str(folder), "rows": work.rows, "tokens": work.tokens, "warm": warm, "timed": timed,
        "logging": logging, "rate": RATE, "batch": ROWS, "out": str(work.folder / "unsloth"),
        "r": RANK, **ADAPTER, "fraction": memory_fraction(work.card),
    }  # fmt: skip
    path = work.folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).resolve().parent / "bench_step.py"
    done = measure.timed([python, str(script), "--as-unsloth", str(path)])
    return Turn(**json.loads(done.output.strip().splitlines()[-1]))


def as_unsloth(job: dict[str, Any]) -> dict[str, Any]:
    """What that interpreter runs: Unsloth's model and patches, TRL's trainer, rows without padding."""
    from unsloth import FastLanguageModel  # isort: skip - it patches what is imported after it

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if job["fraction"] is not None:
        torch.cuda.set_per_process_memory_fraction(job["fraction"], 0)
    model, tok = FastLanguageModel.from_pretrained(
        job["folder"], max_seq_length=job["tokens"], load_in_4bit=True, dtype=None
    )
    model = FastLanguageModel.get_peft_model(
        model, r=job["r"], lora_alpha=job["lora_alpha"], lora_dropout=0, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth", random_state=42,
    )  # fmt: skip
    asked = {
        "output_dir": job["out"], "max_steps": job["warm"] + job["timed"], "bf16": True,
        "per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1,
        "learning_rate": job["rate"], "lr_scheduler_type": "constant", "logging_steps": job["logging"],
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "padding_free": True, "max_length": None, "optim": "adamw_8bit",
    }  # fmt: skip
    known = {item.name for item in dataclasses.fields(SFTConfig)}
    dropped = sorted(set(asked) - known)
    said: list[dict[str, float]] = []
    moments: dict[int, float] = {}

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stamp(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stamp(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            said.append(logs)

        def stamp(self, step: int) -> None:
            if step in (job["warm"], job["warm"] + job["timed"]):
                torch.cuda.synchronize()
                moments[step] = time.perf_counter()

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{key: value for key, value in asked.items() if key in known}),
        train_dataset=Dataset.from_dict({"input_ids": job["rows"], "labels": job["rows"]}),
        processing_class=tok,
        callbacks=[Clock()],
    )
    torch.cuda.reset_peak_memory_stats(0)
    trainer.train()
    if dropped:
        print(f"this SFTConfig has no {', '.join(dropped)}", file=sys.stderr)
    taken = moments[job["warm"] + job["timed"]] - moments[job["warm"]]
    return {
        "tokens_per_second": job["timed"] * job["tokens"] / taken,
        "allocated": torch.cuda.max_memory_allocated(0),
        "reserved": torch.cuda.max_memory_reserved(0),
        "losses": [logs["loss"] for logs in said if "loss" in logs],
        "norms": [float(logs["grad_norm"]) for logs in said if "grad_norm" in logs],
    }


def has_unsloth(python: str | None) -> bool:
    """Whether that interpreter can import Unsloth; finding it is enough, importing takes a card."""
    if python is None:
        return False
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('unsloth') is None)"
    try:
        return subprocess.run([python, "-c", asked], capture_output=True).returncode == 0
    except OSError:
        return False


def memory_fraction(card: Any) -> float | None:
    """Of this card's memory, what :func:`gpu_plan.limited_to` leaves; None without a limit."""
    import torch

    from qlora import memory

    if not torch.cuda.is_available():
        return None
    total = torch.cuda.mem_get_info(0)[1]
    return min(1.0, (card.free_bytes - memory.CONTEXT_BYTES) / total)


# --- the comparison


def compare(
    model: str,
    tokens: int = 2048,
    *,
    rounds: int = 4,
    warm: int = WARM,
    timed: int = TIMED,
    card_gb: float | None = None,
    unsloth: str | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All sides, first tried one by one, then timed in turns.

    Args:
        model: A key of ``MODELS``, or tiny.
        tokens: Of a step, in eight rows.
        rounds: Turns of each side; every second round goes backwards.
        warm: Steps of a turn before the clock.
        timed: Steps on it.
        card_gb: Emulate a card with so much memory.
        unsloth: An interpreter to look for Unsloth in.
        only: These sides, and the planned one.
    """
    import datasets

    from qlora import cards, hardware

    datasets.disable_progress_bars()
    real = hardware.card()
    device = hardware.device(real)
    card = real
    if card_gb is not None:
        card = cards.named_card(f"{card_gb:g}GB")
        if real.kind == "cuda":
            card = dataclasses.replace(card, capability=real.capability)
        else:
            card = dataclasses.replace(real, free_bytes=card.free_bytes)
    dtype = dtype_on(real)
    config = config_of(model)
    found: dict[str, Any] = {
        "model": model, "tokens": tokens, "rows": ROWS, "card": card.name, "device": real.name,
        "dtype": str(dtype).removeprefix("torch."), "r": RANK,
        "also": {name: version_of(name) for name in ("triton", "liger_kernel", "flash_attn")},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, gpu_plan.limited_to(card), quiet():
        rows = rows_of(tokens, max(TRIED, warm + timed), config.vocab_size)
        work = Work(Weights(config, device, dtype), card, tokens, rows, Path(folder))
        found["useful_if_padded"] = round(useful(rows), 4)
        runs: dict[str, Callable[[int, int, int], Turn]] = {
            name: lambda a, b, c, build=build: turn(build, work, a, b, logging=c)
            for name, build in sides(work).items()
            if only is None or name in (PLANNED, *only)
        }
        if has_unsloth(unsloth):
            assert unsloth is not None
            saved = Path(folder) / "base"
            saved.mkdir()
            work.weights.save(saved)
            runs[UNSLOTH] = lambda a, b, c: unsloth_turn(unsloth, work, saved, a, b, c)
        tried: dict[str, Turn] = {}
        refused = {} if UNSLOTH in runs else {UNSLOTH: NOT_INSTALLED}
        for name in list(runs):
            try:
                tried[name] = runs[name](1, TRIED - 1, 1)
            except Exception as error:  # noqa: BLE001 - one side that fails must not cost the others
                refused[name] = _why(error)
                del runs[name]
                error.__traceback__ = None  # it holds the model
        slower = _slower_of(tried)
        if slower in runs:
            del runs[slower]
            refused[slower] = THE_SLOWER
        times: dict[str, list[float]] = {name: [] for name in runs}
        peaks = {name: [tried[name]] for name in runs}
        for number in range(rounds):
            for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
                done = runs[name](warm, timed, 10)
                times[name].append(done.tokens_per_second)
                peaks[name].append(done)
    found["sides"] = {
        name: told(times[name], times.get(PLANNED), peaks[name]) for name in times
    } | {name: {"why": why} for name, why in refused.items()}
    for name, first in tried.items():
        found["sides"][name] |= {"losses": first.losses, "norms": first.norms}
    fine = (DOES_NOT_FIT, NOT_INSTALLED, THE_SLOWER)
    broken = [f"{name}: {why}" for name, why in refused.items() if why not in fine]
    found["wrong"] = broken + disagreements(tried, found["dtype"])
    return found


def version_of(package: str) -> str:
    """Of a package that a side uses where it is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _slower_of(tried: dict[str, Turn]) -> str:
    both = [name for name in TUNED if name in tried]
    return min(both, key=lambda name: tried[name].tokens_per_second) if len(both) == 2 else ""


def _why(error: BaseException) -> str:
    import torch

    from qlora.errors import DoesNotFit

    if isinstance(error, torch.OutOfMemoryError | DoesNotFit):
        return DOES_NOT_FIT
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def told(times: list[float], mine: list[float] | None, turns: list[Turn]) -> dict[str, Any]:
    """A side's figures: median and quartiles, ours by theirs turn by turn, and peaks."""
    first, middle, third = quartiles(times)
    ratios = measure.ratios(mine, times) if mine else []
    return {
        "tokens_per_second": round(middle, 1),
        "quartiles": [round(first, 1), round(third, 1)],
        "ours_by_theirs": round(statistics.median(ratios), 4) if ratios else None,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "allocated_bytes": max(turn.allocated for turn in turns),
        "reserved_bytes": max(turn.reserved for turn in turns),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles; of one value that value.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 3.0, 4.0)
    >>> quartiles([7.0])
    (7.0, 7.0, 7.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def disagreements(tried: dict[str, Turn], dtype: str) -> list[str]:
    """Sides whose losses, or norms of gradients, are not those of our level 1 in the same steps.

    Unsloth draws another adapter, whose first loss alone is the same.

    >>> a, b = Turn(1.0, 0, 0, [2.0, 1.9], [1.0, 1.0]), Turn(1.0, 0, 0, [2.1, 1.9], [1.0, 1.0])
    >>> disagreements({"ours, level 1": a, "plain TRL": b}, "float32")
    ['plain TRL: losses differ by 0.1']
    """
    loss_within, norm_within = AGREE[dtype]
    if not tried:
        return []
    known = tried.get("ours, level 1") or next(iter(tried.values()))
    found = []
    for name, other in tried.items():
        count = 1 if name == UNSLOTH else len(known.losses)
        far = max(
            abs(a - b) for a, b in zip(known.losses[:count], other.losses[:count], strict=True)
        )
        if not far <= loss_within:
            found.append(f"{name}: losses differ by {far:.2g}")
        if name == UNSLOTH:
            continue
        far = max(abs(a - b) / a for a, b in zip(known.norms, other.norms, strict=True))
        if not far <= norm_within:
            found.append(f"{name}: norms of gradients differ by {far:.2g}")
    return found


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Each ratio that is wanted, what was found, and a word.

    >>> verdicts({"sides": {"plain TRL": {"ours_by_theirs": 1.9}, "Unsloth": {"why": "not installed"}}})
    [('plain TRL', '2.00', '1.90', 'MISSED'), ('Unsloth', '1.10', 'not installed', '-')]
    """
    rows = []
    for name, wanted in WANTED.items():
        for side, figures in found["sides"].items():
            if not side.startswith(name) or figures.get("why") == THE_SLOWER:
                continue
            ratio = figures.get("ours_by_theirs")
            if ratio is None:
                rows.append((side, f"{wanted:.2f}", figures.get("why", "-"), "-"))
            else:
                word = "kept" if ratio >= wanted else "MISSED"
                rows.append((side, f"{wanted:.2f}", f"{ratio:.2f}", word))
    return rows


def table_of(found: dict[str, Any]) -> str:
    """The comparison as text."""
    rows = []
    for name, side in found["sides"].items():
        if "tokens_per_second" not in side:
            rows.append((name, side["why"], "", "", "", ""))
            continue
        first, third = side["quartiles"]
        ratio = side["ours_by_theirs"]
        rows.append(
            (
                name,
                f"{side['tokens_per_second']:,.0f}",
                f"{first:,.0f} - {third:,.0f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{side['allocated_bytes'] / GIB:.2f}",
                f"{side['reserved_bytes'] / GIB:.2f}",
            )
        )
    headings = (
        "side", "tokens/s", "quartiles", "ours by theirs", "allocated GiB", "reserved GiB",
    )  # fmt: skip
    padded = f"{found['useful_if_padded']:.0%} of a padded batch is no padding"
    agree = "; ".join(found["wrong"]) or "losses and gradients agree"
    return (
        f"{found['model']}, {found['tokens']} tokens in {found['rows']} rows a step, {found['dtype']}, "
        f"{found['device']} as {found['card']}; {padded}; {agree}\n" + measure.table(headings, rows)
    )
