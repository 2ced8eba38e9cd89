"""Write the locks: every package, its version as installed, and the hash of each of its files.

    make lock

requirements.lock        what qlora runs on, on every platform, but for torch
requirements-torch.lock  torch, whose builds differ by machine: the registry's, and the one tests run on
requirements-cuda.lock   what torch's CUDA build needs beside it
requirements-dev.lock    what tests and checks need beyond that
requirements-tools.lock  what `make lock` and `make fuzz` need

Versions are those installed in .venv; uv finds out what other platforms need (their versions are the
locks' own until those no longer fit) and asks the registry for the hashes. A local version label (``+cpu``)
is left out of the line, so that the same line brings the CUDA build where there is one; the hash of the
labelled file stands with the others.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BUILD = ("hatchling", "editables")  # they install this package itself, without fetching a builder
TOOLS = (
    "uv==0.13.9",
    # 3.0.0 is the last with wheels for Python 3.11; there are none for other platforms.
    "atheris==3.0.0; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'",
)
SYSTEMS = {"linux": ("x86_64", "aarch64"), "darwin": ("arm64",), "win32": ("AMD64",)}
PLATFORMS = [
    {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.0",
     "python_version": python, "implementation_name": "cpython",
     "platform_python_implementation": "CPython"}
    for system, machines in SYSTEMS.items() for machine in machines
    for python in ("3.11", "3.12", "3.13", "3.14")
]  # fmt: skip
PARTS = ("", "-torch", "-cuda", "-dev", "-tools")
RUN, TORCH, CUDA, DEV, KIT = (f"requirements{part}.lock" for part in PARTS)
HEADINGS = {
    RUN: "What qlora runs on but for torch, exactly as tested; hatchling and editables build qlora itself.",
    TORCH: "torch: the registry's files, and the CPU build that the tests run on.",
    CUDA: "What torch's CUDA build needs beside that; a CPU build needs none of it.",
    DEV: "What tests and checks need beyond that.",
    KIT: "What `make lock` and `make fuzz` need.",
}
HOW = "# pip install --require-hashes --no-deps -r {name}. Written by `make lock`.\n"


@dataclass(frozen=True)
class Pin:
    """One package of a lock: ``name==version``, where it is needed, its files, and who needs it."""

    requirement: Requirement
    hashes: tuple[str, ...]
    parents: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return str(canonicalize_name(self.requirement.name))

    @property
    def version(self) -> str:
        return next(iter(self.requirement.specifier)).version

    def __str__(self) -> str:
        marker = f" ; {self.requirement.marker}" if self.requirement.marker else ""
        line = f"{self.name}{self.requirement.specifier}{marker}"
        return " \\\n".join([line, *(f"    --hash=sha256:{one}" for one in self.hashes)]) + "\n"


def read(text: str) -> dict[str, Pin]:
    r"""The packages of a lock, by name.

    >>> text = "six==1.17.0 ; sys_platform == 'win32' \\\n    --hash=sha256:ab \\\n    --hash=sha256:cd\n"
    >>> read(text)["six"].hashes
    ('ab', 'cd')
    >>> str(read(text)["six"]).replace('"', "'") == text
    True
    """
    found: dict[str, Pin] = {}
    name = ""
    for line in text.splitlines():
        body = line.strip().removesuffix("\\").strip()
        if body.startswith("--hash=sha256:"):
            one = body.removeprefix("--hash=sha256:")
            found[name] = replace(found[name], hashes=(*found[name].hashes, one))
        elif body.startswith("#"):
            parent = body.removeprefix("#").strip().removeprefix("via").strip()
            if name and parent:
                found[name] = replace(found[name], parents=found[name].parents | {parent})
        elif body:
            pin = Pin(Requirement(body), ())
            name = pin.name
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = pin
    return found


def for_cuda(pins: Mapping[str, Pin]) -> set[str]:
    """What only torch, or what torch alone brings, needs, and only on Linux: its CUDA libraries."""
    found: set[str] = set()
    while more := {
        name
        for name, pin in pins.items()
        if name not in found
        and "sys_platform == 'linux'" in str(pin.requirement.marker).replace('"', "'")
        and pin.parents <= found | {"torch"}
    }:
        found |= more
    return found


def compiled(wanted: Sequence[str], pins: Sequence[str], seen: Mapping[str, Pin]) -> dict[str, Pin]:
    """What these requirements come to on every platform, with the hash of each file.

    Args:
        wanted: Requirements, as in pyproject.toml.
        pins: ``name==version`` of what is installed here.
        seen: An older lock; its versions are kept where they fit, its hashes are asked for again.
    """
    uv = shutil.which("uv", path=sysconfig.get_path("scripts")) or shutil.which("uv")
    if uv is None:
        raise SystemExit("uv is not installed. Use `make lock`, which brings it.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, installed, out = folder / "asked.in", folder / "installed.txt", folder / "out.lock"
        asked.write_text("\n".join(wanted) + "\n")
        installed.write_text("\n".join(pins) + "\n")
        out.write_text("".join(f"{replace(pin, hashes=())}" for pin in seen.values()))
        subprocess.run(
            [uv, "pip", "compile", asked, "--constraint", installed, "--output-file", out,
             "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--quiet"],
            check=True,
        )  # fmt: skip
        found = read(out.read_text())
    return {name: pin for name, pin in found.items() if used(pin.requirement.marker)}


def used(marker: Marker | None) -> bool:
    """Whether a marker holds on any of the platforms; uv also thinks of PyPy and of browsers."""
    return marker is None or any(marker.evaluate(platform) for platform in PLATFORMS)


def versions() -> dict[str, str]:
    """Every package installed here and its version."""
    return {
        str(canonicalize_name(found.metadata["Name"])): found.version
        for found in importlib.metadata.distributions()
    }


def local_file(name: str, version: str) -> str:
    """SHA-256 of the file that pip installs here for a version with a local label."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
             f"{name}=={version}"],
            check=True,
        )  # fmt: skip
        (file,) = Path(folder).iterdir()
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()


def with_local_files(
    pins: Mapping[str, Pin], installed: Mapping[str, str], seen: Mapping[str, Pin]
) -> dict[str, Pin]:
    """The pins, and beside the registry's hashes those of files with a local label, old and new."""
    changed = dict(pins)
    for name, pin in pins.items():
        old = seen.get(name)
        more = set(old.hashes) if old and old.version == pin.version else set()
        if "+" in installed.get(name, ""):
            more.add(local_file(name, installed[name]))
        elif name != "torch":
            continue
        changed[name] = replace(pin, hashes=tuple(sorted({*pin.hashes, *more})))
    return changed


def lock(name: str, pins: Sequence[Pin]) -> str:
    """The text of a lock."""
    heading = f"# {HEADINGS[name]}\n{HOW.format(name=name)}"
    return heading + "".join(str(pin) for pin in sorted(pins, key=lambda pin: pin.name))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = [*project["dependencies"], *BUILD]
    dev = [*run, *project["optional-dependencies"]["dev"]]
    seen: dict[str, Pin] = {}
    for path in (ROOT / name for name in HEADINGS):
        seen |= read(path.read_text()) if path.exists() else {}
    installed = versions()
    tools = {Requirement(line).name for line in TOOLS}
    pins = [
        f"{name}=={version.partition('+')[0]}"
        for name, version in installed.items()
        if name not in {"qlora", *tools}
    ]
    all_run = with_local_files(compiled(run, pins, seen), installed, seen)
    all_dev = compiled(dev, pins, seen)
    cuda = for_cuda(all_run)
    written = {
        RUN: [pin for name, pin in all_run.items() if name not in {"torch", *cuda}],
        TORCH: [all_run["torch"]],
        CUDA: [all_run[name] for name in cuda],
        # Also what tests want where qlora does not, such as colorama beside Windows.
        DEV: [
            pin
            for name, pin in all_dev.items()
            if name not in all_run or str(pin.requirement) != str(all_run[name].requirement)
        ],
        KIT: list(compiled(TOOLS, [], {}).values()),
    }
    for name, found in written.items():
        (ROOT / name).write_text(lock(name, found))
        print(f"{name}: {len(found)} packages, {sum(len(pin.hashes) for pin in found):,} files")


if __name__ == "__main__":
    main()
