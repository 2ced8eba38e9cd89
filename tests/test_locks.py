"""The locks: every package once, at the version installed, with the hash of each of its files."""

from __future__ import annotations

import doctest
import hashlib
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))
write_locks = importlib.import_module("write_locks")

LOCKS = sorted(path.name for path in ROOT.glob("requirements*.lock"))
SETUP = ("requirements.lock", "requirements-torch.lock", "requirements-cuda.lock")


def pins(name: str) -> dict[str, Any]:
    """A lock's packages; one that is there twice is refused by the reader."""
    return dict(write_locks.read((ROOT / name).read_text(encoding="utf-8")))


def test_the_locks_are_those_that_the_writer_writes_and_make_installs() -> None:
    assert set(LOCKS) == set(write_locks.HEADINGS)
    makefile = (ROOT / "Makefile").read_text()
    for name in LOCKS:
        assert f"-r {name}" in makefile or f" {name} |" in makefile
    for line in re.findall(r"pip install.*", makefile):
        assert "--require-hashes" in line or "-e ." in line, line


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_has_an_exact_version_and_hashes(name: str) -> None:
    found = pins(name)
    assert found
    for pin in found.values():
        assert re.fullmatch(r"==[\w.!]+", str(pin.requirement.specifier)), pin
        assert not pin.requirement.extras and not pin.requirement.url
        assert pin.hashes and len(set(pin.hashes)) == len(pin.hashes)
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in pin.hashes)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_as_the_writer_writes_it(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert write_locks.lock(name, list(pins(name).values())) == text


def test_no_package_is_in_two_locks_but_one_that_tests_want_on_more_platforms() -> None:
    names = [name for lock in LOCKS for name in pins(lock)]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"colorama"}  # qlora wants it on Windows, the harness everywhere
    ours, theirs = (
        pins(lock)["colorama"] for lock in ("requirements.lock", "requirements-dev.lock")
    )
    assert ours.requirement.marker and not theirs.requirement.marker
    assert ours.requirement.specifier == theirs.requirement.specifier


@pytest.mark.parametrize("name", LOCKS)
def test_what_is_installed_has_the_locks_version(name: str) -> None:
    optional = name in ("requirements-cuda.lock", "requirements-tools.lock")
    installed = write_locks.versions()
    for pin in pins(name).values():
        if pin.requirement.marker is not None and not pin.requirement.marker.evaluate():
            continue
        if pin.name in installed or not optional:
            assert installed[pin.name].partition("+")[0] == pin.version, pin.name


def test_the_locks_hold_all_that_the_installed_packages_ask_for_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {name for lock in LOCKS for name in pins(lock)}
    waiting = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    seen: set[str] = set()
    while waiting:
        needed = Requirement(waiting.pop())
        name = str(canonicalize_name(needed.name))
        extras = needed.extras or {""}
        if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in extras):
            continue
        assert name in locked, f"{name} is in no lock; run `make lock`"
        for line in importlib.metadata.requires(name) or []:
            inner = Requirement(line)
            if inner.marker and "extra" in str(inner.marker):
                if any(inner.marker.evaluate({"extra": extra}) for extra in needed.extras):
                    assert str(canonicalize_name(inner.name)) in locked, f"{name}: {line}"
            elif str(canonicalize_name(inner.name)) not in seen:
                seen.add(str(canonicalize_name(inner.name)))
                waiting.append(line)


def test_what_only_some_platforms_need_says_so() -> None:
    conditional = {n for lock in SETUP[:2] for n, p in pins(lock).items() if p.requirement.marker}
    assert "colorama" in conditional  # of tqdm and click, on Windows
    for pin in pins("requirements-cuda.lock").values():
        assert "sys_platform == " in str(pin.requirement.marker), pin.name
    torch = pins("requirements-torch.lock")
    assert set(torch) == {"torch"} and torch["torch"].requirement.marker is None
    assert {"triton", "nvidia-cudnn-cu13"} <= set(pins("requirements-cuda.lock"))


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    """pip itself, on a wheel made here, in the mode that the Makefile asks for."""
    wheel = tmp_path / "demo_of_a_lock-1-py3-none-any.whl"
    about = "demo_of_a_lock-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("demo_of_a_lock.py", "")
        file.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: demo-of-a-lock\nVersion: 1\n"
        )
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for given, code in (
        (digest, 0),
        (digest[:-1] + ("0" if digest[-1] != "0" else "1"), 1),
        ("", 1),
    ):
        lock = tmp_path / "demo.lock"
        lock.write_text("demo-of-a-lock==1" + (f" --hash=sha256:{given}" if given else "") + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-index",
             "--find-links", str(tmp_path), "--target", str(tmp_path / "there"), "-r", str(lock)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code and given:
            assert "DO NOT MATCH THE HASHES" in done.stderr


# --- the writer's own arithmetic


def test_cudas_libraries_are_told_apart_by_who_asks_for_them() -> None:
    lines = """\
        torch==2 --
        linux-of-torch==1 ; sys_platform == 'linux' -- torch
        linux-of-that==1 ; platform_machine == 'x86_64' and sys_platform == 'linux' -- linux-of-torch
        linux-of-others==1 ; sys_platform == 'linux' -- torch, wandb
        of-torch==1 -- torch
        windows==1 ; sys_platform == 'win32' -- torch
    """
    given = {}
    for line in filter(str.strip, lines.splitlines()):
        asked, _, parents = line.strip().partition(" --")
        pin = write_locks.Pin(
            Requirement(asked), ("ab",), frozenset(filter(None, parents.strip().split(", ")))
        )
        given[pin.name] = pin
    assert write_locks.for_cuda(given) == {"linux-of-torch", "linux-of-that"}


def test_what_no_platform_of_ours_needs_is_left_out() -> None:
    for marker, used in (
        ("sys_platform == 'win32'", True),
        ("platform_machine == 'aarch64' and sys_platform == 'linux'", True),
        ("python_version >= '3.13'", True),
        ("sys_platform == 'emscripten'", False),
        ("implementation_name == 'pypy'", False),
        ("python_version < '3.11'", False),
    ):
        assert write_locks.used(Requirement(f"x; {marker}").marker) is used, marker
    assert write_locks.used(None)


def test_the_hash_of_a_local_build_stands_with_the_registrys_and_outlives_a_lock_made_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(write_locks, "local_file", lambda name, version: f"{name}-{version}")

    def pin(version: str, *hashes: str) -> dict[str, Any]:
        return {"torch": write_locks.Pin(Requirement(f"torch=={version}"), hashes)}

    def hashes(installed: str, seen: dict[str, Any]) -> tuple[str, ...]:
        found = write_locks.with_local_files(pin("2", "of-registry"), {"torch": installed}, seen)
        return tuple(found["torch"].hashes)

    assert hashes("2+cpu", {}) == ("of-registry", "torch-2+cpu")
    assert hashes("2", {}) == ("of-registry",)
    assert hashes("2", pin("2", "of-registry", "of-cpu")) == ("of-cpu", "of-registry")
    assert hashes("2", pin("1", "of-cpu")) == ("of-registry",)


def test_a_package_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="six is there twice"):
        write_locks.read("six==1 \\\n    --hash=sha256:ab\nsix==2\n")


def test_the_examples_are_true() -> None:
    failed, tried = doctest.testmod(write_locks)
    assert not failed and tried
