"""Does training go the same way with fused layers as with the libraries' own? Loss curves and scores.

    python scripts/bench_convergence.py [--seeds 42 43] [--runs FOLDER] [overrides]

trains the quickstart with ``train.kernels`` auto and off, with each seed, and compares the curves of
``metrics.jsonl``: with and without kernels for one seed, beside two seeds without kernels. The two ways sum
in different orders, so they part as the training itself carries a rounding error; that must be less than
what another seed does. Exit code 1 where it is more. ``--runs`` keeps the runs, and takes finished ones
from there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

WAYS = ("auto", "off")


def trained(folder: Path, kernels: str, seed: int, overrides: Sequence[str]) -> Path:
    """The finished run of this way and seed in a folder: one that is there, or a new one."""
    name = f"q-{kernels}-{seed}"
    if not (found := sorted(folder.glob(f"{name}/*/result.json"))):
        asked = [
            f"train.kernels={kernels}",
            f"train.seed={seed}",
            f"run.dir={folder}",
            f"run.name={name}",
        ]
        measure.timed([*measure.qlora_command(), "train", "quickstart", *asked, *overrides])
        found = sorted(folder.glob(f"{name}/*/result.json"))
    return found[-1].parent


def curve(run: Path) -> dict[int, float]:
    """Step -> loss of a run's log lines."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}


def apart(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Root mean square of how far two curves' logarithms are apart: a share of the loss.

    >>> round(apart({1: 1.0, 2: 2.0}, {1: 1.1, 2: 2.2}), 4)
    0.0953
    """
    steps = sorted(first.keys() & second.keys())
    return math.sqrt(
        statistics.fmean((math.log(first[s]) - math.log(second[s])) ** 2 for s in steps)
    )


def compared(curves: Mapping[tuple[str, int], Mapping[int, float]]) -> dict[str, list[float]]:
    """How far curves are apart: by kernels for each seed, and by seeds without kernels."""
    seeds = sorted({seed for _, seed in curves})
    return {
        "kernels": [apart(curves["auto", seed], curves["off", seed]) for seed in seeds],
        "seeds": [
            apart(curves["off", a], curves["off", b]) for a, b in itertools.combinations(seeds, 2)
        ],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Loss curves with and without fused layers.")
    made.add_argument("--seeds", type=measure.positive, nargs="+", default=[42, 43])
    made.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs there")
    made.add_argument("overrides", nargs="*", help="section.key=value for every run")
    measure.add_json(made)
    return made


def main() -> None:
    made = parser()
    arguments = made.parse_args()
    if len(set(arguments.seeds)) < 2:
        made.error("--seeds: two seeds at least, or there is nothing to compare with")
    with contextlib.ExitStack() as stack:
        folder = arguments.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = {
            (kernels, seed): trained(folder, kernels, seed, arguments.overrides)
            for seed in arguments.seeds
            for kernels in WAYS
        }
        results = {key: json.loads((run / "result.json").read_text()) for key, run in runs.items()}
        curves = {key: curve(run) for key, run in runs.items()}
    found = compared(curves)
    rows: list[dict[str, Any]] = [
        {
            "kernels": kernels,
            "seed": seed,
            "train_loss": results[kernels, seed]["train_loss"],
            "held_out_loss": results[kernels, seed]["after"]["held_out_loss"],
            "exact_match": results[kernels, seed]["after"].get("exact_match"),
        }
        for kernels, seed in runs
    ]
    holds = max(found["kernels"]) < max(found["seeds"])
    result = {**measure.circumstances(), "runs": rows, "apart": found, "holds": holds}
    measure.report(result, arguments.json)
    table = [[str(row["kernels"]), str(row["seed"])] for row in rows]
    for line, row in zip(table, rows, strict=True):
        line += [f"{row[name]:.4f}" if row[name] is not None else "-" for name in list(row)[2:]]
    print(measure.table(("kernels", "seed", "train loss", "held out", "exact match"), table))
    print(measure.table(("curves apart by", "share of the loss"), [
        (what, ", ".join(f"{share:.3f}" for share in shares)) for what, shares in found.items()
    ]))  # fmt: skip
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
