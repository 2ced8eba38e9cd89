"""Memory that runs out, NaN and spikes in steps of real runs on a CPU, and what becomes of each.

    python scripts/torture_steps.py [--only WORD] [--out tests/measurements/torture-steps.json]

The cases are those of ``tests/test_relief.py`` (memory runs out in one pass of one step: the same rows,
loss and gradient's norm within 1e-6 of the undisturbed run's) and of ``tests/test_bad_steps.py`` (a NaN, an
infinity or a spike: no tensor on disk that is not finite, and a run that goes on or says why not). One line
a case. Exit code 1 if one of them is not as it should be.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure

if str(measure.ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(measure.ROOT / "tests"))

HEADINGS = ("what", "case", "outcome")
MEMORY, NUMBERS = "out of memory", "NaN and spike"
WIDTH = 100  # of an outcome in the table


def told(cases: list[dict[str, Any]]) -> dict[str, str]:
    """How many are right, of each kind.

    >>> told([{"what": "spike", "problems": []}, {"what": "spike", "problems": ["other rows"]}])
    {'spike': '1/2'}
    """
    kinds = dict.fromkeys(case["what"] for case in cases)
    of = {kind: [not case["problems"] for case in cases if case["what"] == kind] for kind in kinds}
    return {kind: f"{sum(right)}/{len(right)}" for kind, right in of.items()}


def shortened(text: str, width: int = WIDTH) -> str:
    """The first line of a text, cut where the table ends.

    >>> shortened("step 3: the loss is no number", 6)
    'step 3 ...'
    """
    line = text.partition("\n")[0]
    return line if len(line) <= width else f"{line[:width].rstrip()} ..."


def out_of_memory(folder: Path, word: str) -> Iterator[dict[str, Any]]:
    """What becomes of the steps for which there is no memory."""
    import test_relief

    bench = test_relief.Bench(folder)
    gc.freeze()  # every run collects: let it not pass over all that was imported
    for case in test_relief.CASES:
        if word in case.name:
            began = time.perf_counter()
            taken = case.taken(bench)
            differ = case.problems(bench, taken)
            more = max(
                len(a) - len(b) for a, b in zip(taken.rows, bench.usual(case).rows, strict=True)
            )
            yield {
                "what": MEMORY, "case": case.name,
                "outcome": f"taken again, {more} more {'pass' if more == 1 else 'passes'}, loss within "
                f"{test_relief.loss_difference(taken, bench.usual(case)):.0e}",
                "seconds": round(time.perf_counter() - began, 2), "problems": differ,
            }  # fmt: skip


def no_numbers(folder: Path, word: str) -> Iterator[dict[str, Any]]:
    """What becomes of runs in which a number is none, or far too large."""
    import test_bad_steps

    stable = test_bad_steps.Stable(folder)
    test_bad_steps.STABLE.append(stable)
    for case in test_bad_steps.CASES:
        if word in case.name:
            began = time.perf_counter()
            outcome = case.outcome(stable)
            yield {
                "what": NUMBERS, "case": case.name,
                "outcome": outcome.in_words.replace(f"{folder}/", ""),
                "seconds": round(time.perf_counter() - began, 2),
                "problems": case.problems(outcome, stable),
            }  # fmt: skip
    test_bad_steps.STABLE.clear()


def main() -> None:
    made = argparse.ArgumentParser(description="What becomes of steps that go wrong.")
    made.add_argument("--only", default="", metavar="WORD", help="cases whose name holds it")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the table there, as JSON")
    asked = made.parse_args()

    import torch  # after the arguments: --help should not wait for it
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for kind in (out_of_memory, no_numbers):
        with tempfile.TemporaryDirectory() as name:
            found += kind(Path(name), asked.only)
    if not found:
        made.error(f"no case's name holds {asked.only!r}")
    print(measure.table(HEADINGS, [(f["what"], f["case"], shortened(f["outcome"])) for f in found]))
    for case in found:
        for problem in case["problems"]:
            print(f"wrong: {case['case']}: {problem}")
    for kind, count in told(found).items():
        print(f"{kind}: {count}")
    if asked.out is not None:
        measure.report(measure.circumstances() | {"count": told(found), "cases": found}, asked.out)
    raise SystemExit(any(case["problems"] for case in found))


if __name__ == "__main__":
    main()
