"""``qlora train`` beside the plain TRL script: how much longer or shorter, and are the losses the same.

    python scripts/bench_train.py --steps 60 --pairs 4 --threads 2

runs ``bench_plain_trl.py`` and ``qlora train quickstart`` in turns (A B B A), each in its own process with
the same number of threads, on the same rows in the same order: both go through the Trainer's random
sampler with the recipe's seed, over the rows of one file in file order, and neither holds a row out. A
first short pair is thrown away, so that bytecode, the page cache and the plain script's data set cache
are warm for both. Three walls are compared:

    steps      from the first step's log line to the last one's
    training   what the Trainer itself calls train_runtime; ours also reads its checkpoint back
    process    all of it: imports, data, base, training, and our proofs

Only ratios are reported, qlora by plain: below 1 qlora is faster. The losses are those of one
computation summed in two orders: equal to rounding in the first steps, and later as far apart as the
training itself carries a rounding error, which is far where the learning rate is high for the base (two
plain runs with two kernels of AdamW part as much). Exit code 1 where a command fails or the two did not
train on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

from qlora.recipe import load_recipe
from qlora.settings import Recipe

EARLY_STEPS = 10
PLAIN = Path(__file__).resolve().parent / "bench_plain_trl.py"


@dataclass(frozen=True)
class Trained:
    """One training of either side, timed the same way."""

    losses: list[float]
    tokens: int
    steps_seconds: float
    training_seconds: float
    process_seconds: float


def overrides(steps: int, base: Path | None) -> list[str]:
    """What makes the quickstart do the plain script's work and no more."""
    asked = [
        f"train.max_steps={steps}",
        f"train.save_steps={steps}",
        "train.logging_steps=1",
        "eval.generate=0",
        "data.held_out=null",
        "data.held_out_fraction=0",
        "run.name=bench",
        "quant.cache=false",
    ]
    return asked if base is None else [*asked, f"model.name={base.resolve()}"]


def plain_flags(recipe: Recipe, base: Path | None) -> list[str]:
    """The recipe in the plain script's words."""
    values = {
        "steps": recipe.train.max_steps,
        "learning-rate": recipe.train.learning_rate,
        "batch-size": recipe.train.per_device_train_batch_size,
        "gradient-accumulation-steps": recipe.train.gradient_accumulation_steps,
        "r": recipe.lora.r,
        "lora-alpha": recipe.lora.lora_alpha,
        "lora-dropout": recipe.lora.lora_dropout,
        "lr-scheduler-type": recipe.train.lr_scheduler_type,
        "warmup-steps": recipe.train.warmup_steps,
        "weight-decay": recipe.train.weight_decay,
        "max-grad-norm": recipe.train.max_grad_norm,
        "max-length": recipe.data.max_length,
        "seed": recipe.train.seed,
        "optim": recipe.train.optim,
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    return flags if base is None else [*flags, f"--base={base.resolve()}"]


def train_plain(steps: int, base: Path | None, environment: dict[str, str]) -> Trained:
    """The plain script, in its own process."""
    recipe = load_recipe("quickstart", overrides(steps, base))
    done = measure.timed([sys.executable, str(PLAIN), *plain_flags(recipe, base)], environment)
    said = json.loads(done.output.strip().splitlines()[-1])
    times = said["times"]
    return Trained(
        said["losses"], said["tokens"], times[-1] - times[0], said["train_runtime"], done.seconds
    )


def train_qlora(steps: int, base: Path | None, environment: dict[str, str]) -> Trained:
    """The quickstart on the command line, in its own process; read from its ``metrics.jsonl``."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [*overrides(steps, base), f"run.dir={folder}"]
        command = [*measure.qlora_command(), "train", "quickstart", *asked]
        seconds = measure.timed(command, environment).seconds
        (metrics,) = Path(folder).glob("**/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    runtime = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    return Trained(
        [line["loss"] for line in logged],
        logged[-1]["tokens"],
        logged[-1]["time"] - logged[0]["time"],
        runtime,
        seconds,
    )


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between two runs' losses of the same step.

    >>> largest_difference([2.0, 1.0], [2.0, 1.5])
    0.5
    """
    return max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))


def compare(steps: int, pairs: int, threads: int, base: Path | None = None) -> dict[str, Any]:
    """Run the pairs and return the ratios and the differences of the losses."""
    sides: dict[bool, list[Trained]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": cache,
        }
        train = {False: train_plain, True: train_qlora}
        for ours in (False, True):
            train[ours](2, base, environment)
        for order in measure.turns(pairs):
            for ours in order:
                sides[ours].append(train[ours](steps, base, environment))
    theirs, mine = sides[False], sides[True]
    walls = {
        "steps": [[t.steps_seconds for t in side] for side in (mine, theirs)],
        "training": [[t.training_seconds for t in side] for side in (mine, theirs)],
        "process": [[t.process_seconds for t in side] for side in (mine, theirs)],
    }
    return {
        "steps": steps,
        "threads": threads,
        "same_tokens": {t.tokens for t in mine} == {t.tokens for t in theirs},
        "qlora_by_plain": {name: measure.ratios(*pair) for name, pair in walls.items()},
        "early_loss_difference": max(
            largest_difference(a.losses[:EARLY_STEPS], b.losses[:EARLY_STEPS])
            for a, b in zip(mine, theirs, strict=True)
        ),
        "largest_loss_difference": max(
            largest_difference(a.losses, b.losses) for a, b in zip(mine, theirs, strict=True)
        ),
        "losses": {"qlora": mine[0].losses, "plain": theirs[0].losses},
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table of a comparison."""
    listed = [measure.ratio_row(name, values) for name, values in found["qlora_by_plain"].items()]
    early = f"loss, first {EARLY_STEPS} steps"
    listed.append((early, f"{found['early_loss_difference']:.1e}", "difference"))
    listed.append(("loss, any step", f"{found['largest_loss_difference']:.1e}", "difference"))
    return listed


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="qlora beside plain TRL, as ratios.")
    made.add_argument("--steps", type=measure.positive, default=60, help="default: 60")
    made.add_argument("--pairs", type=measure.positive, default=4, help="default: 4")
    made.add_argument(
        "--threads", type=measure.positive, default=os.cpu_count() or 1, help="default: all cores"
    )
    made.add_argument("--base", type=Path, help="a model folder instead of the embedded base")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.steps < 2:
        parser().error("--steps: at least 2, to have a time between two log lines")
    if arguments.base is not None and not (arguments.base / "config.json").is_file():
        parser().error(f"--base: {arguments.base} is not a model folder (no config.json in it)")
    try:
        found = compare(arguments.steps, arguments.pairs, arguments.threads, arguments.base)
    except measure.CommandFailed as error:
        raise SystemExit(str(error)) from None
    told = {name: measure.summary(v) for name, v in found["qlora_by_plain"].items()}
    measure.report({**measure.circumstances(), **found, "summary": told}, arguments.json)
    print(measure.table(("wall, qlora by plain", "median", "range"), rows(found)))
    if not found["same_tokens"]:
        raise SystemExit("The two did not train on the same tokens: the ratios mean nothing.")


if __name__ == "__main__":
    main()
