"""Every bad input of ``tests/test_bad_inputs.py`` through the command line, and what each one gets.

    python scripts/torture_inputs.py [--only WORD] [--out tests/measurements/bad-inputs.json]

One line a case: the name, the exit code, the first line of the message (of a note: where it stands in what
is printed). Right is a case with its exit code, file, line and advice, in at most twelve lines, without a
traceback and without what the row says; silent is one that went through with nothing said. Exit code 1 if
a case is not right.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

if str(measure.ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(measure.ROOT / "tests"))

HEADINGS = ("input", "exit", "said")
WIDTH = 110  # of a message in the table


def shortened(text: str, width: int = WIDTH) -> str:
    """A message's first line, cut where the table ends.

    >>> shortened("rows.jsonl:9: not valid JSON", 12)
    'rows.jsonl:9 ...'
    """
    return text if len(text) <= width else f"{text[:width].rstrip()} ..."


def told(cases: list[dict[str, Any]]) -> str:
    """How many are right, and how many went through in silence.

    >>> told([{"problems": [], "silent": False}, {"problems": ["exit code 0, not 2"], "silent": True}])
    '1/2, 1 silent'
    """
    right = sum(not case["problems"] for case in cases)
    return f"{right}/{len(cases)}, {sum(case['silent'] for case in cases)} silent"


def main() -> None:
    made = argparse.ArgumentParser(description="What bad inputs get from the command line.")
    made.add_argument("--only", default="", metavar="WORD", help="cases whose name holds it")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the table there, as JSON")
    asked = made.parse_args()

    import pytest  # after the arguments: --help should not wait for torch
    import test_bad_inputs
    import torch

    chosen = [case for case in test_bad_inputs.CASES if asked.only in case.name]
    if not chosen:
        made.error(f"no case's name holds {asked.only!r}")
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as name:
        shelf = test_bad_inputs.Shelf(Path(name))
        shelf.warm()
        for number, case in enumerate(chosen):
            with pytest.MonkeyPatch.context() as patch:
                folder = Path(name) / f"case-{number}"
                folder.mkdir()
                outcome = test_bad_inputs.answer(case, shelf, folder, patch)
            found.append(
                {
                    "name": case.name,
                    "exit_code": outcome.code,
                    "said": case.line(outcome).replace(f"{folder}/", ""),
                    "seconds": round(outcome.seconds, 2),
                    "silent": case.silent(outcome),
                    "problems": case.problems(outcome),
                }
            )
    rows = [(f["name"], str(f["exit_code"]), shortened(f["said"])) for f in found]
    print(measure.table(HEADINGS, rows))
    for case in found:
        for problem in case["problems"]:
            print(f"wrong: {case['name']}: {problem}")
    print(told(found))
    if asked.out is not None:
        measure.report(measure.circumstances() | {"count": told(found), "cases": found}, asked.out)
    raise SystemExit(any(case["problems"] for case in found))


if __name__ == "__main__":
    main()
