"""The yardstick: QLoRA on the embedded base with TRL, PEFT and bitsandbytes, and nothing of ours.

    python scripts/bench_plain_trl.py --steps 60

is what a competent user writes from the libraries' documentation to do what ``qlora train quickstart``
does. The defaults are the quickstart's values (a test compares them), so that ``bench_train.py`` can
put the two side by side. The last line it prints is one JSON object: the loss of each step, the time of
each log line, the wall seconds of ``trainer.train()`` and the tokens that were trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).resolve().parent.parent / "qlora" / "embedded"


def parser() -> argparse.ArgumentParser:
    """The arguments; every default is the quickstart's."""
    made = argparse.ArgumentParser(description="Plain TRL + PEFT + bitsandbytes, as a yardstick.")
    made.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    made.add_argument("--base", type=Path, default=EMBEDDED / "base", help="a model folder")
    made.add_argument("--data", type=Path, default=EMBEDDED / "tickets" / "train.jsonl")
    made.add_argument("--learning-rate", type=float, default=1.5e-3)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--gradient-accumulation-steps", type=int, default=1)
    made.add_argument("--r", type=int, default=16)
    made.add_argument("--lora-alpha", type=float, default=32.0)
    made.add_argument("--lora-dropout", type=float, default=0.0)
    made.add_argument("--lr-scheduler-type", default="cosine")
    made.add_argument("--warmup-steps", type=float, default=0.03, help="below 1, a share of all")
    made.add_argument("--weight-decay", type=float, default=0.0)
    made.add_argument("--max-grad-norm", type=float, default=1.0)
    made.add_argument("--max-length", type=int, default=192)
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--optim", default="auto", help="auto: 8-bit and paged on CUDA, else torch's")
    return made


def checked(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, or None."""
    if not (arguments.base / "config.json").is_file():
        return f"--base: {arguments.base} is not a model folder (no config.json in it)"
    if not arguments.data.is_file():
        return f"--data: {arguments.data} is not a file"
    with arguments.data.open(encoding="utf-8") as lines:
        try:
            first = json.loads(next(lines, ""))
        except ValueError:
            first = None
    if not isinstance(first, dict) or "messages" not in first:
        return f"--data: {arguments.data} must hold one JSON object with messages a line"
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "r", "max_length"):
        if getattr(arguments, name) < 1:
            return f"--{name.replace('_', '-')}: must be at least 1"
    for name in ("learning_rate", "lora_alpha", "max_grad_norm"):
        if not getattr(arguments, name) > 0:
            return f"--{name.replace('_', '-')}: must be more than 0"
    return None


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what the last line prints."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        arguments.base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        device_map={"": 0} if cuda else {"": "cpu"},
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = load_dataset("json", data_files=str(arguments.data), split="train")

    logged: list[dict[str, float]] = []

    class Record(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "loss" in logs:
                tokens = logs.get("num_tokens", 0)
                logged.append({"loss": logs["loss"], "tokens": tokens, "time": time.time()})

    optim = arguments.optim
    if optim == "auto":
        optim = "paged_adamw_8bit" if cuda else "adamw_torch"
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                gradient_accumulation_steps=arguments.gradient_accumulation_steps,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type=arguments.lr_scheduler_type,
                warmup_steps=arguments.warmup_steps,
                weight_decay=arguments.weight_decay,
                max_grad_norm=arguments.max_grad_norm,
                train_sampling_strategy="group_by_length",
                optim=optim,
                seed=arguments.seed,
                bf16=bf16,
                fp16=cuda and not bf16,
                use_cpu=not cuda,
                activation_checkpointing=False,
                max_length=arguments.max_length,
                assistant_only_loss=True,
                logging_steps=1,
                save_steps=arguments.steps,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=cuda,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=arguments.r,
                lora_alpha=arguments.lora_alpha,
                lora_dropout=arguments.lora_dropout,
                target_modules="all-linear",
            ),
            callbacks=[Record()],
        )
        trainer.remove_callback(PrinterCallback)
        # TRL 1.16 casts the adapter of a quantized model to bf16 in its constructor. In bf16 most small
        # updates round away (at a rate of 2e-5 only one element in eight ever moves), and a T4 has no
        # bf16. The optimizer does not exist yet, so this is the place to undo it.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        began = time.perf_counter()
        outcome = trainer.train()
        seconds = time.perf_counter() - began
    return {
        "losses": [line["loss"] for line in logged],
        "times": [line["time"] for line in logged],
        "tokens": int(logged[-1]["tokens"]),
        "train_seconds": seconds,
        "train_runtime": outcome.metrics["train_runtime"],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
    }


def main() -> None:
    arguments = parser().parse_args()
    problem = checked(arguments)
    if problem:
        parser().error(problem)
    print(json.dumps(train(arguments)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
