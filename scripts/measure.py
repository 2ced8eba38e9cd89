"""What the benchmarks share: run a command and time it, compare by ratios, say where and when.

Not a command. Absolute seconds mean little on a shared machine, so two things are run in turns, minutes
apart at most, and what is reported is the median of their ratios.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Timed:
    """A command that ended well: its wall seconds and what it printed."""

    seconds: float
    output: str


class CommandFailed(RuntimeError):
    """A timed command ended badly; the text holds the end of what it printed."""


def timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Timed:
    """Run a command in the checkout and time it.

    Raises:
        CommandFailed: It did not exit with 0.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise CommandFailed(f"{' '.join(command)}\nexited with {done.returncode}:\n{said}")
    return Timed(seconds, done.stdout)


def qlora_command() -> list[str]:
    """The ``qlora`` that belongs to this Python: the installed command, or the module."""
    found = shutil.which("qlora", path=str(Path(sys.executable).parent))
    return [found] if found else [sys.executable, "-m", "qlora"]


def turns(pairs: int) -> Iterator[tuple[bool, bool]]:
    """Who goes first in each pair, A B B A: a slow drift of the machine then favours neither.

    >>> list(turns(3))
    [(False, True), (True, False), (False, True)]
    """
    for pair in range(pairs):
        yield (False, True) if pair % 2 == 0 else (True, False)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, pair by pair.

    >>> ratios([1.0, 3.0], [2.0, 2.0])
    [0.5, 1.5]
    """
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of some ratios, and how many there are.

    >>> summary([0.5, 1.5, 0.7])
    {'median': 0.7, 'lowest': 0.5, 'highest': 1.5, 'pairs': 3}
    """
    return {
        "median": round(statistics.median(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
        "pairs": len(values),
    }


def ratio_row(label: str, values: Sequence[float]) -> tuple[str, str, str]:
    """A row of a table of ratios: what, the median, the range.

    >>> ratio_row("steps", [0.5, 0.625, 0.75])
    ('steps', '0.625', '0.500 - 0.750')
    """
    told = summary(values)
    return label, f"{told['median']:.3f}", f"{told['lowest']:.3f} - {told['highest']:.3f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, as wide as they need to be.

    >>> print(table(("what", "n"), [("a", "10")]))
    what  n
    ----  --
    a     10
    """
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    ruled = [headings, ["-" * width for width in widths], *rows]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in ruled]
    return "\n".join(line.rstrip() for line in lines)


def circumstances(commit: str | None = None) -> dict[str, Any]:
    """Commit, date and versions: without them a figure is not a result."""
    return {
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def git_commit() -> str:
    """The checked-out commit, marked when the tree differs from it; ``unknown`` outside of git."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def report(result: Mapping[str, Any], path: Path | None) -> None:
    """Print a result as JSON, or write it to a file."""
    text = json.dumps(result, indent=2, allow_nan=False)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def conclude(result: Mapping[str, Any], judged: Sequence[tuple[str, str, str, bool]]) -> None:
    """Print every ratio of a result and each promise as (what, measured, limit, kept), and end.

    Raises:
        SystemExit: 0 if all are kept, else 1.
    """
    rows = [
        (name.replace("_", " "), f"{of['median']:.3f}", f"{of['lowest']:.3f} - {of['highest']:.3f}")
        for name, of in result.items()
        if isinstance(of, dict) and "median" in of
    ]
    print(table(("ratio", "median", "range"), rows), end="\n\n")
    limits = [(what, got, limit, "kept" if ok else "PASSED") for what, got, limit, ok in judged]
    print(table(("what", "measured", "limit", ""), limits))
    raise SystemExit(0 if all(ok for *_, ok in judged) else 1)
