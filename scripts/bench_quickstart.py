"""The quickstart as a newcomer runs it: wall time, peak memory and score, against what we promise.

    python scripts/bench_quickstart.py [--threads 2]

runs ``qlora train quickstart`` once in a fresh process and a temporary folder. Exit code 1 where a limit
is passed or the run fails. The limits are meant for two idle CPU cores; seconds on a busy machine say
little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

GIB = 2**30
MAX_SECONDS, MAX_GIB = 150.0, 2.5


def peak_child_bytes() -> int:
    """The most memory that any finished child of this process held at once."""
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def run(threads: int | None, overrides: list[str]) -> dict[str, Any]:
    """Run it, and return seconds, peak bytes and the scores of its ``result.json``."""
    environment = {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as folder:
        command = [*measure.qlora_command(), "train", "quickstart", f"run.dir={folder}", *overrides]
        seconds = measure.timed(command, environment).seconds
        (found,) = Path(folder).glob("**/result.json")
        result = json.loads(found.read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 1),
        "peak_bytes": peak_child_bytes(),
        "steps": result["steps"],
        "train_seconds": result["train_seconds"],
        **{
            f"{figure}_{when}": result[when].get(figure)
            for figure in ("exact_match", "held_out_loss", "stop_rate")
            for when in ("before", "after")
        },
    }


def verdicts(
    found: dict[str, Any], max_seconds: float = MAX_SECONDS, max_gib: float = MAX_GIB
) -> list[tuple[str, str, str, bool]]:
    """(what, measured, limit, kept) for each promise.

    >>> verdicts({"seconds": 200.0, "peak_bytes": 2**30})[0]
    ('wall seconds', '200', '150', False)
    """
    seconds, gib = found["seconds"], found["peak_bytes"] / GIB
    return [
        ("wall seconds", f"{seconds:.0f}", f"{max_seconds:g}", seconds <= max_seconds),
        ("peak memory, GiB", f"{gib:.2f}", f"{max_gib:g}", gib <= max_gib),
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Wall time, memory and score of the quickstart.")
    made.add_argument("--threads", type=measure.positive, help="OMP_NUM_THREADS of the run")
    made.add_argument("--max-seconds", type=float, default=MAX_SECONDS, help="default: 150")
    made.add_argument("--max-gib", type=float, default=MAX_GIB, help="default: 2.5")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    wrong = [text for text in arguments.overrides if "=" not in text]
    if wrong:
        parser().error(f"{wrong[0]!r} is not an override; write section.key=value")
    try:
        found = run(arguments.threads, arguments.overrides)
    except measure.CommandFailed as error:
        raise SystemExit(str(error)) from None
    judged = verdicts(found, arguments.max_seconds, arguments.max_gib)
    measure.report({**measure.circumstances(), **found}, arguments.json)
    rows = [(what, got, limit, "kept" if ok else "PASSED") for what, got, limit, ok in judged]
    for when in ("before", "after"):
        score = found[f"exact_match_{when}"]
        rows.append((f"exact match {when}", "-" if score is None else f"{score:.1%}", "", ""))
    print(measure.table(("what", "measured", "limit", ""), rows))
    raise SystemExit(0 if all(ok for *_, ok in judged) else 1)


if __name__ == "__main__":
    main()
