"""Write requirements.lock and requirements-dev.lock from what is installed.

    make lock

The exact versions of every package that pyproject.toml reaches, directly or through others. Local
version labels (``+cpu``) are left out, so that the same line brings the CUDA build where there is a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BUILD = ("hatchling", "editables")  # they install this package itself, without fetching a builder


def closure(names: list[str]) -> set[str]:
    """Everything installed that these packages need, extras and markers respected."""
    installed = {
        canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()
    }
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(str(canonicalize_name(name)), frozenset[str]()) for name in names]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or name not in installed:
            continue
        seen.add((name, extras))
        for line in installed[name].requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras or {""}
            ):
                waiting.append((str(canonicalize_name(needed.name)), frozenset(needed.extras)))
    return {name for name, _ in seen}


def pinned(names: set[str]) -> str:
    """One ``name==version`` line each, sorted."""
    lines = []
    for name in names:
        found = importlib.metadata.distribution(name)
        lines.append(f"{found.metadata['Name']}=={found.version.partition('+')[0]}")
    return "\n".join(sorted(lines, key=str.lower)) + "\n"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def wanted(lines: list[str]) -> list[str]:
        return [Requirement(line).name for line in lines]

    run = closure([*wanted(project["dependencies"]), *BUILD])
    dev = closure(wanted(project["optional-dependencies"]["dev"])) - run
    (ROOT / "requirements.lock").write_text(
        "# The exact set that is tested. Where there is a GPU the torch line brings the CUDA build.\n"
        "# hatchling and editables build this package itself. Written by `make lock`.\n"
        + pinned(run)
    )
    (ROOT / "requirements-dev.lock").write_text(
        "# What tests and checks need beyond requirements.lock. Written by `make lock`.\n"
        "-r requirements.lock\n" + pinned(dev)
    )
    print(f"{len(run)} packages in requirements.lock, {len(dev)} more in requirements-dev.lock")


if __name__ == "__main__":
    main()
