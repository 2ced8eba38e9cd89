"""What a run directory says of its run: what was asked, planned, installed and fed, and what came out."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import shutil
import time
from typing import Any

import torch

import qlora
from qlora import cards, hardware, identity, redact, rundir, sft, table, verdict
from qlora.cards import Card
from qlora.data import Prepared
from qlora.fitting import Fitted
from qlora.resuming import Claimed
from qlora.rundir import Run
from qlora.settings import Recipe

RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets",
    "tokenizers", "safetensors",
)  # fmt: skip


def write_recipe(run: Run, recipe: Recipe) -> None:
    """Write the recipe that a run's newest checkpoint is of."""
    rundir.write_text(run.recipe_file, recipe.dump())


def record(run: Run, fitted: Fitted, card: Card, prepared: Prepared, facts: dict[str, Any]) -> None:
    """Write plan, ledger and environment of a start.

    Args:
        run: Where.
        fitted: What runs, as planned.
        card: Where it runs.
        prepared: Its rows.
        facts: Of the loaded base.
    """
    rundir.write_json(run.dir / "plan.json", fitted.to_json())
    rundir.write_json(run.dir / "data.json", prepared.ledger.to_json())
    if prepared.rejected is not None:
        shutil.copy(prepared.rejected, run.dir / "rejected.jsonl")
    rundir.write_json(
        run.dir / "environment.json",
        redact.cleaned(
            {
                "qlora": qlora.__version__,
                "packages": _packages(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "card": dataclasses.asdict(card),
                "cuda": torch.version.cuda,
                "threads": torch.get_num_threads(),
                "base": facts,
            }
        ),
    )


def identity_of(
    written: Recipe, recipe: Recipe, card: Card, prepared: Prepared, tok: Any
) -> dict[str, Any]:
    """All of :mod:`qlora.identity` but the base, which is not loaded yet.

    Args:
        written: The recipe as it is written.
        recipe: With what ``train.fit: auto`` chose.
        card: Where it runs.
        prepared: Its rows.
        tok: The tokenizer.
    """
    return {
        "recipe": identity.fields_of(written),
        "rows": table.digest(prepared.train),
        "tokenizer": _sha256(tok.backend_tokenizer.to_str()),
        "template": _sha256(str(tok.chat_template or "")),
        "rows_per_step": sft.rows_per_step(recipe),
        # Where its state lies, in pages or not, changes no number of it.
        "optimizer": cards.optimizer(recipe, card).removeprefix("paged_"),
        "compute_dtype": cards.compute_dtype(recipe, card),
        "packages": {"qlora": qlora.__version__} | _packages(),
        "python": platform.python_version(),
        "card": card.name,
        "threads": torch.get_num_threads(),
    }


def allowed_so_far(claimed: Claimed, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Every allowed change of a run's life, so that its record does not lie."""
    new = [
        {"step": claimed.step, "field": one.field, "was": one.was, "now": one.now}
        for one in claimed.require_same(now)
        if one.decides
    ]
    return [*claimed.identity.get("allowed", []), *new]


def result(
    ready: Any, steps: int, before: verdict.Measured, after: verdict.Measured
) -> dict[str, Any]:
    """``result.json``: the figures of a whole run, its sessions before a resume included."""
    progress, guard = ready.progress, ready.guard
    peak = max(hardware.memory_in_use(ready.card)[1], progress.timeline.peak_bytes)
    return {
        "recipe": ready.recipe.run.name,
        "steps": steps,
        "train_loss": progress.total.mean_loss,
        "before": verdict.figures(before),
        "after": verdict.figures(after),
        "alive": ready.alive,
        "base_unchanged": True,
        "trainable_parameters": ready.counts.trainable,
        "total_parameters": ready.counts.total,
        "tokens": progress.total.tokens,
        "train_seconds": round(progress.total.train_seconds, 2),
        "data_wait": progress.data_wait,
        "total_seconds": round(progress.seconds, 2),
        "skipped_steps": guard.skipped,
        "roll_backs": guard.roll_backs,
        "learning_rate_factor": guard.rate,
        "oom_retries": ready.relief.times,
        "peak_memory_bytes": peak,
        "peak_step": progress.timeline.peak_step,
        "peak_tokens": progress.timeline.peak_tokens,
        "predicted_memory_bytes": ready.plan.total_bytes,
        "rehearsed_memory_bytes": ready.stage.found and ready.stage.found.measured_bytes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
