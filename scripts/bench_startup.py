"""How long ``qlora`` takes to speak, beside the import that a training script begins with.

    python scripts/bench_startup.py

runs ``qlora --help``, ``qlora recipes list`` and ``python -c "from trl import SFTTrainer"`` in turns and
prints the ratios: 0.1 means a tenth of the import. Exit code 1 where a command fails.
"""

from __future__ import annotations

import argparse
import sys

import measure

IMPORT = [sys.executable, "-c", "from trl import SFTTrainer"]
VERBS = {"qlora --help": ["--help"], "qlora recipes list": ["recipes", "list"]}


def compare(rounds: int) -> dict[str, list[float]]:
    """For each verb, its seconds by those of the import beside it, one ratio a round.

    The first round is thrown away: it reads the files from disk and writes bytecode.
    """
    found: dict[str, list[float]] = {name: [] for name in VERBS}
    for round_ in range(rounds + 1):
        spent = {
            name: measure.timed([*measure.qlora_command(), *verb]).seconds
            for name, verb in VERBS.items()
        }
        imported = measure.timed(IMPORT).seconds
        if round_:
            for name, seconds in spent.items():
                found[name].append(seconds / imported)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Startup of the command line, as a ratio.")
    made.add_argument("--rounds", type=measure.positive, default=5, help="default: 5")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    try:
        found = compare(arguments.rounds)
    except measure.CommandFailed as error:
        raise SystemExit(str(error)) from None
    rows = [measure.ratio_row(name, values) for name, values in found.items()]
    told = {name: measure.summary(values) for name, values in found.items()}
    measure.report({**measure.circumstances(), "by_trl_import": told}, arguments.json)
    print(measure.table(("command", "by trl's import", "range"), rows))


if __name__ == "__main__":
    main()
