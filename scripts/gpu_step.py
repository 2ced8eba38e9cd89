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
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_plan
import measure

GIB = 2**30
MODELS = {
    "1b": "meta-llama/Llama-3.2-1B", "3b": "meta-llama/Llama-3.2-3B", "8b": "meta-llama/Llama-3.1-8B",
    "14b": "Qwen/Qwen2.5-14B",
}  # fmt: skip
TINY = "tiny"  # the 8B's family, two layers
ROWS = 8  # of an optimizer step: TRL's default batch
LONGEST_ROW = 1024  # what TRL's default max_length would not cut
WARM, TIMED, TRIED = 3, 8, 3  # steps of a turn before the clock, on it, and of the trial
RANK = 16
ADAPTER = {"lora_alpha": 16.0, "lora_dropout": 0.0}
RATE = 1e-4
# How far the losses of one batch may be apart, by dtype, and their gradients' norms, relatively. A side
# that left a layer out would be off by 0.03 and more: the spread of a mean over 2,048 random logits.
AGREE = {"float32": (1e-4, 1e-3), "bfloat16": (0.01, 0.05), "float16": (0.01, 0.05)}
PLANNED, PLAIN, UNSLOTH = "ours, as planned", "plain TRL", "Unsloth"
DOES_NOT_FIT, NOT_INSTALLED, THE_SLOWER = "does not fit", "not installed", "the other one is faster"
TUNED = ("tuned TRL, recomputed", "tuned TRL, kept")
# Ours by theirs, in tokens a second, at 2,048 packed tokens.
WANTED = {PLAIN: 2.0, "tuned TRL": 1.35, UNSLOTH: 1.10}
# Tokens of the longest sequence of a Llama-3.1-8B at rank 32 that Unsloth has published, by card.
PUBLISHED = {"8GB": 2_972, "12GB": 21_848, "16GB": 40_724, "24GB": 78_475}


def config_of(model: str) -> Any:
    """The configuration of one of the models."""
    if model == TINY:
        return gpu_plan.config_of(MODELS["8b"], small=True)
    return gpu_plan.config_of(MODELS[model])


class Weights:
    """Random weights of a shape: linears quantized once, on the device; the rest with the host.

    Args:
        config: A transformers configuration.
        device: Where models of them compute.
        dtype: Of what is not quantized, and of the 4-bit products.
    """

    def __init__(self, config: Any, device: Any, dtype: Any) -> None:
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        from qlora.bnb import bnb

        self.config, self.device, self.dtype = config, device, dtype
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = shapes.get_output_embeddings()
        linears = {
            f"{name}.weight"
            for name, module in shapes.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.packed: dict[str, Any] = {}
        self.dense: dict[str, Any] = {}
        self.shapes = {name: tuple(p.shape) for name, p in shapes.named_parameters()}
        for name in self.shapes:
            if name in linears:
                self.packed[name] = bnb.functional.quantize_4bit(
                    self.made(name), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
            else:
                self.dense[name] = self.made(name).cpu()

    def made(self, name: str) -> Any:
        """A tensor before it is quantized: the same one whenever it is asked for."""
        import torch

        shape = self.shapes[name]
        found = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return found.fill_(float("norm" in name))  # norms are one, biases zero
        generator = torch.Generator(device=self.device).manual_seed(zlib.crc32(name.encode()))
        return found.normal_(0.0, 0.02, generator=generator)

    def base(self, recipe: Any, attention: str, *, wide: bool = False) -> Any:
        """A base as the loader would leave it.

        Args:
            recipe: Its head's bits and the place of its embedding are obeyed.
            attention: An implementation that transformers knows.
            wide: What is not quantized in fp32: what a model that is given by name gets.
        """
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        from qlora import loader
        from qlora.bnb import bnb

        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, attn_implementation=attention
            )
            replace_with_bnb_linear(base, get_keys_to_not_convert(base), asked)
        for name, (packed, state) in self.packed.items():
            module = base.get_submodule(name.rpartition(".")[0])
            module.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True,
                compress_statistics=True, quant_type="nf4", module=module,
            )  # fmt: skip
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = self.dtype, True
        dtype = torch.float32 if wide else self.dtype
        for name, tensor in self.dense.items():
            parent, _, leaf = name.rpartition(".")
            there = nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
            setattr(base.get_submodule(parent), leaf, there)
        base.tie_weights()
        for module in base.modules():
            if hasattr(module, "inv_freq"):  # its buffers follow from the configuration
                for name, buffer in type(module)(self.config).named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
        base.is_loaded_in_4bit = True  # what peft and trl look for
        base.requires_grad_(False)
        loader.spare_tables(base, recipe)
        return base

    def save(self, folder: Path) -> None:
        """The weights before they were quantized, as transformers reads them, a file a layer."""
        from safetensors.torch import save_file

        where: dict[str, str] = {}
        groups: dict[str, list[str]] = {}
        for name in self.shapes:
            groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
        for number, names in enumerate(groups.values()):
            file = f"model-{number:05d}.safetensors"
            tensors = {name: self.made(name).cpu().contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
        self.config.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def rows_of(tokens: int, steps: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Token ids of the rows of some steps: of lengths like real ones, together ``tokens`` long a step.

    >>> rows = rows_of(2048, 2, 1000)
    >>> len(rows), sum(map(len, rows[:ROWS])), sum(map(len, rows[ROWS:]))
    (16, 2048, 2048)
    """
    import numpy as np

    drawn = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        while True:  # log-normal lengths, as those of instructions are
            shares = drawn.lognormal(0.0, 0.6, ROWS)
            lengths = np.maximum((shares / shares.sum() * tokens).astype(int), 2)
            lengths[lengths.argmax()] += tokens - lengths.sum()
            if lengths.max() <= max(LONGEST_ROW, tokens // 2):
                break
        rows += [drawn.integers(4, vocab, length).tolist() for length in lengths]
    return rows


def useful(rows: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are no padding when each step's rows are padded to its longest."""
    steps = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    computed = sum(len(step) * max(map(len, step)) for step in steps)
    return sum(map(len, rows)) / computed


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
        recipe, run, work.card, model, _tokenizer(), prepared, layout,
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
        processing_class=_tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip
    if not work.cuda or dtype == "torch.float16":
        # TRL 1.16 makes the adapter bf16, which neither fp16's scaler nor a CPU in fp32 works with.
        adapter.restore_dtype(model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from qlora.recipe import local_path

    return AutoTokenizer.from_pretrained(local_path("embedded:base"))


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
    with tempfile.TemporaryDirectory() as folder, gpu_plan.limited_to(card), _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries print of every trainer."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


# --- operator by operator


Way = Callable[[], Any]


def side_by_side(ways: dict[str, Way], device: Any, *, rounds: int, calls: int) -> dict[str, Any]:
    """Milliseconds of each way, taken in turns, and by those of the first way, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one compiles and warms up
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            taken = milliseconds(ways[name], device, calls)
            if number:
                times[name].append(taken)
    mine = next(iter(times.values()))
    return {
        name: {
            "milliseconds": round(statistics.median(taken), 4),
            "by_first": round(statistics.median(measure.ratios(taken, mine)), 3),
        }
        for name, taken in times.items()
    }


def milliseconds(work: Way, device: Any, calls: int) -> float:
    """Of one call, on the device's own clock where it has one."""
    import torch

    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) / calls * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / calls


def operators(model: str, tokens: int, *, rounds: int = 7, calls: int = 20) -> dict[str, Any]:
    """Each operator, forward and backward, beside the libraries' way to do the same.

    Args:
        model: Whose widths.
        tokens: Rows.
        rounds: Turns of each way.
        calls: Of a turn.
    """
    from qlora import hardware

    card = hardware.card()
    place = _Place(config_of(model), tokens, hardware.device(card), dtype_on(card))
    found = {
        name: side_by_side(ways(place), place.device, rounds=rounds, calls=calls)
        for name, ways in OPERATORS.items()
    }
    return {"model": model, "tokens": tokens, "dtype": str(place.dtype), "operators": found}


@dataclass(frozen=True)
class _Place:
    """Whose widths, how many rows, where and in which dtype operators are tried."""

    config: Any
    tokens: int
    device: Any
    dtype: Any

    def random(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def passes(self, forward: Callable[..., Any], upstream: Any, *leaves: Any) -> Way:
        """A function through autograd, forward and backward."""
        import torch

        own = [x.detach().clone().requires_grad_() for x in leaves]
        return lambda: torch.autograd.grad(forward(*own), own, upstream)


def _unpack(at: _Place) -> dict[str, Way]:
    from qlora.bnb import bnb
    from qlora.kernels import ops

    matrix = at.random(at.config.intermediate_size, at.config.hidden_size)
    packed, state = bnb.functional.quantize_4bit(
        matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return {
        "ours": lambda: ops.unpack(packed, state, at.dtype),
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(packed, state),
    }


def _rms_norm(at: _Place) -> dict[str, Way]:
    import torch
    from torch.nn import functional
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from qlora.kernels import ops

    h, eps = at.config.hidden_size, 1e-5
    x, dy = at.random(at.tokens, h), at.random(at.tokens, h)
    weight = torch.ones(h, dtype=at.dtype, device=at.device)
    module = LlamaRMSNorm(h, eps).to(at.device, at.dtype).requires_grad_(False)

    def ours() -> Any:
        _, rstd = ops.rms_norm(x, weight, eps)
        return ops.rms_norm_backward(dy, x, weight, rstd)

    ways = {
        "ours": ours,
        "torch": at.passes(lambda x: functional.rms_norm(x, (h,), weight, eps), dy, x),
        "transformers": at.passes(module, dy, x),
    }
    if (liger := _liger()) is not None:
        ways["Liger"] = at.passes(lambda x: liger.rms_norm(x, weight, eps), dy, x)
    return ways


def _gated(at: _Place) -> dict[str, Way]:
    from torch.nn import functional

    from qlora.kernels import ops

    gate, up, dy = (at.random(at.tokens, at.config.intermediate_size) for _ in range(3))

    def ours() -> Any:  # in place: what it reads is not needed again
        ops.gated(gate, up, ops.SILU)
        ops.gated_backward_(dy, gate, up, ops.SILU)

    upstream = dy.clone()
    ways = {
        "ours": ours,
        "torch": at.passes(lambda gate, up: functional.silu(gate) * up, upstream, gate, up),
    }
    if (liger := _liger()) is not None:
        ways["Liger"] = at.passes(liger.gated, upstream, gate, up)
    return ways


def _rotary(at: _Place) -> dict[str, Way]:
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from qlora.kernels import ops

    config = at.config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k = at.random(at.tokens, heads, width), at.random(at.tokens, kv, width)
    half = torch.rand(at.tokens, width // 2, device=at.device).mul(6.28)
    cos, sin = (f(torch.cat([half, half], 1)).to(at.dtype) for f in (torch.cos, torch.sin))

    def ours() -> Any:
        ops.rotary_(q, k, cos, sin)
        ops.rotary_(q, k, cos, sin, inverse=True)

    def theirs(q: Any, k: Any) -> Any:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        return apply_rotary_pos_emb(*heads_first, cos[None], sin[None])

    upstream = at.random(1, heads, at.tokens, width), at.random(1, kv, at.tokens, width)
    return {"ours": ours, "transformers": at.passes(theirs, upstream, q, k)}


def _loss(at: _Place) -> dict[str, Way]:
    import torch
    from torch.nn import functional
    from trl.kernels import ChunkedLogProbFunction

    from qlora.kernels.loss import Dense, linear_cross_entropy

    vocab, x = at.config.vocab_size, at.random(at.tokens, at.config.hidden_size)
    head = at.random(vocab, at.config.hidden_size).mul_(0.02)
    labels = torch.randint(0, vocab, (at.tokens,), device=at.device)

    def trl(x: Any) -> Any:  # with what its SFTTrainer asks for
        asked = ("log_probs", "entropy", "is_top1")
        scored = ChunkedLogProbFunction.apply(x, head, None, labels, 1.0, 32768, None, 1.0, asked)
        return -scored[0].sum()

    def materialized(x: Any) -> Any:
        return functional.cross_entropy((x @ head.T).float(), labels, reduction="sum")

    one = torch.ones((), device=at.device)
    return {
        "ours": at.passes(lambda x: linear_cross_entropy(x, labels, Dense(head)), one, x),
        "TRL": at.passes(trl, one, x),
        "materialized": at.passes(materialized, one, x),
    }


def _one_layer(at: _Place) -> tuple[Any, Any, Any]:
    """(a decoder layer with adapters and the fused layer on it, hidden states, cos and sin)."""
    import torch

    from qlora import adapter, hardware
    from qlora.kernels import attached

    config = type(at.config)(**(at.config.to_dict() | {"num_hidden_layers": 1}))
    work = Work(Weights(config, at.device, at.dtype), hardware.card(), at.tokens, [], Path())
    recipe = recipe_of(work)
    model = adapter.attach(work.weights.base(recipe, "sdpa"), recipe).train()
    attached.attach(model, work.card, levels=[1])
    base = model.get_base_model()
    x = at.random(1, at.tokens, config.hidden_size)
    rotary = base.model.rotary_emb(x, torch.arange(at.tokens, device=at.device)[None])
    return base.model.layers[0], x, rotary


def _trains(at: _Place, forward: Callable[[Any], Any], x: Any, module: Any) -> Way:
    """Forward and backward of a module with adapters, under autocast as training has it."""
    import torch

    leaves = [x.clone().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]

    def both() -> Any:
        with torch.autocast(at.device.type, at.dtype, enabled=at.dtype != torch.float32):
            y = forward(leaves[0])
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def _linear(at: _Place) -> dict[str, Way]:
    import torch

    from qlora.kernels.projection import Pair

    layer, x, _ = _one_layer(at)
    wrapper = layer.mlp.gate_proj
    (mine,) = (p for p in layer.forward.parts.projections if p.wrapper is wrapper)

    def ours() -> Any:
        pair = Pair(*(p.detach().to(at.dtype) for p in mine.parameters))
        y, inner = mine.forward(x[0], pair, None)
        dy = torch.ones_like(y)
        _, dinner = mine.input_gradient(dy, pair, None)
        return mine.weight_gradients(x[0], dy, inner, dinner, None)

    return {"ours": ours, "peft": _trains(at, wrapper, x, wrapper)}


def _layer(at: _Place) -> dict[str, Way]:
    layer, x, rotary = _one_layer(at)

    def theirs(x: Any) -> Any:
        return type(layer).forward(layer, x, position_embeddings=rotary)

    return {
        "ours": _trains(at, lambda x: layer(x, position_embeddings=rotary), x, layer),
        "transformers and peft": _trains(at, theirs, x, layer),
    }


OPERATORS: dict[str, Callable[[_Place], dict[str, Way]]] = {
    "unpack": _unpack, "rms_norm": _rms_norm, "gated": _gated, "rotary": _rotary, "loss": _loss,
    "linear with its adapter": _linear, "decoder layer, level 1": _layer,
}  # fmt: skip


def dtype_on(card: Any) -> Any:
    """What is multiplied in on a card."""
    import torch

    if card.kind == "cpu":
        return torch.float32
    return torch.bfloat16 if card.supports_bf16 else torch.float16


def _liger() -> Any:
    """Liger's functions for a norm and a gate, or None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return SimpleNamespace(
        rms_norm=lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps),
        gated=lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
    )


def attention(
    model: str, lengths: Sequence[int], *, rounds: int = 7, calls: int = 5
) -> dict[str, Any]:
    """Packed rows through each kernel, forward and backward: by their bounds, and by a mask of T x T."""
    import torch
    from torch.nn import functional

    from qlora import hardware
    from qlora.kernels.attention import Bounds, CpuFlash, Efficient, Flash, Scores, attend_with

    card = hardware.card()
    device, config = hardware.device(card), config_of(model)
    cuda = card.kind == "cuda"
    dtype = dtype_on(card)
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found = {}
    for length in lengths:
        rows = [len(row) for row in rows_of(min(length, 4096), -(-length // 4096), 100)]
        offsets = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
        row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(device)
        at = torch.arange(length, device=device)
        mask = ((row[:, None] == row[None]) & (at[:, None] >= at[None]))[None, None]
        leaves = [
            torch.randn(1, length, n, width, dtype=dtype, device=device).requires_grad_()
            for n in (heads, kv, kv)
        ]
        upstream = torch.randn(1, length, heads, width, dtype=dtype, device=device)

        def by(kernel: Any, scores: Any, leaves: Any = leaves, upstream: Any = upstream) -> Way:
            return lambda: torch.autograd.grad(
                attend_with(kernel, *leaves, scores), leaves, upstream
            )

        def sdpa(leaves: Any = leaves, mask: Any = mask, upstream: Any = upstream) -> Any:
            q, k, v = (x.transpose(1, 2) for x in leaves)
            k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out, leaves, upstream.transpose(1, 2))

        scale, bounds = width**-0.5, Bounds(offsets, max(rows))
        ways: dict[str, Way] = {}
        if cuda and (card.capability or (0, 0)) >= (8, 0):
            ways["flash by bounds"] = by(Flash(), Scores(scale, bounds=bounds))
        if cuda:
            ways["efficient by bounds"] = by(Efficient(), Scores(scale, bounds=bounds))
        else:
            ways["flash of the CPU by a mask"] = by(CpuFlash(), Scores(scale, mask=mask))
        ways["SDPA by a mask"] = sdpa
        found[f"{length:,} tokens, {len(rows)} rows"] = side_by_side(
            ways, device, rounds=rounds, calls=calls
        )
    return {"model": model, "dtype": str(dtype), "operators": found}


def told_operators(found: dict[str, Any]) -> str:
    """A table of operators: each way's milliseconds and how many times the first one's."""
    rows = [
        (name, way, f"{told['milliseconds']:.3f}", f"{told['by_first']:.2f}")
        for name, ways in found["operators"].items()
        for way, told in ways.items()
    ]
    return measure.table(("operator", "way", "ms", "by the first"), rows)


# --- the longest sequence


def longest_that_runs(
    runs: Callable[[int], bool], start: int, *, step: int = 64, within: float = 0.02
) -> int:
    """The longest length that runs, within 2 %; 0 if not even one step does.

    >>> longest_that_runs(lambda n: n <= 5000, 4096), longest_that_runs(lambda n: n <= 100, 4096)
    (4992, 64)
    >>> longest_that_runs(lambda n: False, 4096)
    0
    """
    runs_at, fails_at, tried = 0, 0, max(step, start // step * step)
    while True:
        if runs(tried):
            runs_at = tried
        else:
            fails_at = tried
        if not fails_at:
            tried = int(tried * 1.1) // step * step + step
        elif not runs_at:
            if tried <= step:
                return 0
            tried = max(step, int(tried * 0.7) // step * step)
        elif fails_at - runs_at <= max(step, within * runs_at):
            return runs_at
        else:
            tried = (runs_at + fails_at) // 2 // step * step
            if tried in (runs_at, fails_at):
                return runs_at


def longest(
    model: str, sizes: Sequence[str], *, r: int = 32, small: bool = False
) -> dict[str, Any]:
    """The longest sequence that trains in the memory of each card, planned and tried, one row a step.

    Without a card nothing runs out of memory: one short length is tried on each.
    """
    from qlora import fitting, hardware
    from qlora.cards import named_card
    from qlora.shape import Shape

    real = hardware.card()
    config = config_of(TINY if small else model)
    shape = Shape.from_config(config.to_dict())
    with tempfile.TemporaryDirectory() as folder, _quiet():
        weights = _weights_on(real, config)
        cells = []
        for size in sizes:
            card = named_card(size)
            if real.kind == "cuda":
                card = dataclasses.replace(card, capability=real.capability)
            one = recipe_of(Work(weights, card, 64, [], Path(folder)), r=r, rows=1, fit="auto")
            planned = fitting.longest(one, shape, card, anew=True)
            tries: dict[int, bool] = {}

            def runs(
                length: int, card: Any = card, one: Any = one, tries: dict[int, bool] = tries
            ) -> bool:
                data = one.data.model_copy(update={"max_length": length})
                here = real if real.kind == "cpu" else card
                least = fitting.most_frugal(one.model_copy(update={"data": data}), shape, here)
                tries[length] = runs_at(weights, card, least, Path(folder))
                return tries[length]

            found = longest_that_runs(runs, planned) if real.kind == "cuda" else 64 * runs(64)
            cells.append(
                {
                    "card": size, "planned_tokens": planned, "tokens": found, "tries": tries,
                    "published_tokens": PUBLISHED.get(size),
                }
            )  # fmt: skip
    return {"model": model, "r": r, "cells": cells}


def runs_at(weights: Weights, card: Any, recipe: Any, folder: Path) -> bool:
    """Whether two steps of one full row run in the memory of a card, as a recipe has it."""
    import torch

    from qlora import hardware

    length = recipe.data.max_length
    rows = _one_row(length, weights.config.vocab_size) * 2
    here = hardware.card() if weights.device.type == "cpu" else card
    written = recipe.train.model_copy(update={"fit": "as_written"})
    recipe = recipe.model_copy(update={"train": written})
    try:
        with gpu_plan.limited_to(card):
            work = Work(weights, here, length, rows, folder)
            turn(lambda *a: ours(recipe, *a), work, 1, 1, logging=10**6)
    except torch.OutOfMemoryError:
        return False
    return True


def _one_row(length: int, vocab: int) -> list[list[int]]:
    import numpy as np

    return [np.random.default_rng(length).integers(4, vocab, length).tolist()]


def _weights_on(card: Any, config: Any) -> Weights:
    from qlora import hardware

    return Weights(config, hardware.device(card), dtype_on(card))


def fits_on(model: str, size: str, length: int, *, small: bool = False) -> dict[str, Any]:
    """Whether a model trains on rows of a length in a card's memory, by what the planner chooses."""
    from qlora import fitting, hardware
    from qlora.cards import named_card
    from qlora.errors import DoesNotFit
    from qlora.shape import Shape

    real, card = hardware.card(), named_card(size)
    if real.kind == "cuda":
        card = dataclasses.replace(card, capability=real.capability)
    config = config_of(TINY if small else model)
    length = 64 if small else length
    with tempfile.TemporaryDirectory() as folder, _quiet():
        weights = _weights_on(real, config)
        work = Work(weights, card, length, [], Path(folder))
        recipe, here = recipe_of(work, rows=1, fit="auto"), real if real.kind == "cpu" else card
        shape = Shape.from_config(config.to_dict())
        try:
            planned = fitting.fit(recipe, shape, here)
            recipe = planned.recipe
            chosen: dict[str, Any] = {"planned_bytes": planned.plan.total_bytes, **planned.chosen}
        except DoesNotFit as error:  # it is tried all the same, with what needs least
            recipe = fitting.most_frugal(recipe, shape, here)
            chosen = {"refused": str(error).splitlines()[0]}
        ran = runs_at(weights, card, recipe, Path(folder))
    return {"model": model, "card": card.name, "length": length, "ran": ran, "chosen": chosen}
