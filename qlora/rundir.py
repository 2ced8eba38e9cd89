"""A run on disk: its names, its writes that are whole or absent, and what may be believed.

Layout of ``<dir>/<name>/<start time>/``::

    recipe.yaml plan.json environment.json data.json    what was asked, predicted, installed, fed
    before.json after.json                              what the base and the tuned model answered
    metrics.jsonl                                       one object a log step
    checkpoints/checkpoint-N/                           safetensors, JSON and their manifest
    adapter/                                            the product
    evaluations/<time>.json                             what qlora evaluate measured
    result.json                                         written last: its presence means done
    report.html                                         all of it told on one page

A directory is believed only if the file that was written last says so: ``manifest.json`` with the
size and SHA-256 of every file of a checkpoint, ``result.json`` for a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import CheckpointError, ExportError, RecipeError
from qlora.places import expanded, is_dir, is_file, is_there, shown

MANIFEST = "manifest.json"
_ASIDE: set[Path] = set()  # folders that are being written and get their names when they are synced
_START = re.compile(r"^\d{8}-\d{6}(-\d+)?$")


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not. Reads from disk, so it is never out of date."""

    dir: Path

    @property
    def recipe_file(self) -> Path:
        return self.dir / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The finished adapter; absent until training has ended well."""
        return self.dir / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def is_complete(self) -> bool:
        return (self.dir / "result.json").is_file()

    @property
    def result(self) -> dict[str, Any]:
        """What ``result.json`` says.

        Raises:
            CheckpointError: The run has not finished.
        """
        if not self.is_complete:
            raise CheckpointError(f"{self.dir}: the run has not finished; there is no result.json.")
        return read_json(self.dir / "result.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The log lines so far, oldest first; what a crash or a full disk tore is left out."""
        return [line for line in self._lines() if line is not None]

    def _lines(self) -> list[dict[str, Any] | None]:
        """Every line that was ended; None for one that nobody can have written."""
        path = self.dir / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found: list[dict[str, Any] | None] = []
        for line in filter(None, text.split("\n")[:-1]):
            value = None
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
            whole = isinstance(value, dict) and type(value.get("step")) is int
            found.append(value if whole else None)
        return found


def rewind(run: Run, step: int) -> bool:
    """Drop the metrics of after a checkpoint: a resumed run takes those steps again.

    Returns:
        Whether those of before are as they were when it was written. If not, lines that can be read are
        kept.
    """
    path, whole, text = run.dir / "metrics.jsonl", True, None
    # No hash vouches for what a manifest says beside its files.
    with suppress(CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        then = read_json(run.checkpoints / f"checkpoint-{step}" / MANIFEST).get("metrics")
        if then is not None:
            data = path.read_bytes()[: then["bytes"]] if path.is_file() else b""
            whole = hashlib.sha256(data).hexdigest() == then["sha256"]
            if whole:  # a line that a full disk tore ends here
                text = data.decode("utf-8") + "\n" * (data[-1:] not in (b"", b"\n"))
    if text is None:
        kept = [line for line in run.metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
    write_text(path, text)
    return whole


def sync_metrics(run: Run) -> dict[str, Any]:
    """Have the disk hold the metrics so far: what is written after them must not outlive them.

    Returns:
        Their size and SHA-256, for :func:`rewind`.
    """
    path = run.dir / "metrics.jsonl"
    if not path.is_file():
        return {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    sync_file(path)
    _sync_folder(run.dir)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def create(folder: Path, name: str) -> Run:
    """Claim a new directory under ``folder/name``, named after the time, and prove it writable.

    Raises:
        RecipeError: It cannot be created or written; says which path and why.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    root = expanded(folder)
    if root.parts and root.parts[0].startswith("~"):
        raise RecipeError(
            f"run.dir is {str(folder)!r}, but there is no such home. Choose another with run.dir=DIR."
        )
    for attempt in range(1, 100):
        path = root / name / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            make_folder(path, exist_ok=False)
            (path / ".probe").write_bytes(b"x" * 4096)
            (path / ".probe").unlink()
        except FileExistsError:
            continue  # another run started in the same second
        except OSError as error:
            raise RecipeError(
                f"run.dir is {str(folder)!r}, but {path} cannot be written: {error.strerror}. "
                "Choose another with run.dir=DIR."
            ) from None
        return Run(path)
    raise RecipeError(f"{folder / name}: a hundred runs started in one second; wait and try again.")


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """This process alone writes into a run in this block; the lock ends with the process, however it does.

    Raises:
        CheckpointError: Another process does.
    """
    if os.name != "posix":  # no lock that would end with its process
        yield
        return
    import fcntl

    # Through no link and without emptying it: the folder may have come from somebody else.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run.dir / ".lock", flags, 0o644)
    except OSError as error:
        raise CheckpointError(f"{run.dir}: cannot be written: {error.strerror}.") from None
    with os.fdopen(handle, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{run.dir}: another process trains this run. Wait for it, or stop it first."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def open_run(where: str | Path, *, of_one_name: bool = False) -> Run:
    """The run at a path, or the newest run below it (``runs/quickstart``, or ``runs``).

    Args:
        where: A run's folder, or one or two levels above it.
        of_one_name: Refuse a folder whose runs have several names: what is written is meant for one.

    Raises:
        CheckpointError: Nothing there is a run.
    """
    path = expanded(where)
    if is_file(path / "recipe.yaml"):
        return Run(path)
    if is_dir(path):
        below = runs_below(path)
        names = sorted({run.dir.parent for run in below})
        if of_one_name and len(names) > 1:
            few = ", ".join(map(str, names[:4])) + (" ..." if len(names) > 4 else "")
            raise CheckpointError(f"{where}: runs of several names lie below it. Name one: {few}.")
        if below:
            return max(below, key=lambda run: started(run.dir))
        raise CheckpointError(
            f"{where}: not a run directory (no recipe.yaml), and no run lies below it. "
            "A run is what `qlora train` prints at its end, such as runs/quickstart/20260101-120000."
        )
    if is_file(path):
        raise CheckpointError(
            f"{where}: a file. A run is the folder that `qlora train` prints at its end, such as "
            "runs/quickstart/20260101-120000."
        )
    near = sorted(run.dir.parent.name for run in runs_below(path.parent))
    there = f" In {path.parent} there are {', '.join(dict.fromkeys(near))}." if near else ""
    raise CheckpointError(
        f"{where}: no such directory. A run is what `qlora train` prints at its end.{there}"
    )


def require_free(target: Path) -> None:
    """Return in silence if a folder can be written where nothing is yet.

    Raises:
        ExportError: Something is there, or it cannot be reached.
    """
    if is_there(target):
        raise ExportError(
            f"{shown(target)}: exists already. Name another folder with --out, or remove it first."
        )


def runs_below(folder: Path) -> list[Run]:
    """Every run in a folder of runs, such as ``runs`` or ``runs/quickstart``; none if it is absent.

    Two levels are looked through and no more: what lies deeper is somebody else's.
    """
    with suppress(OSError):
        found = [path for depth in range(3) for path in folder.glob("*/" * depth + "recipe.yaml")]
        return [Run(path.parent) for path in found if _START.match(path.parent.name)]
    return []


def require_named_as_run(run: Run) -> None:
    """Refuse a run whose two folders have names that qlora would not give.

    Raises:
        CheckpointError: It is not ``<name>/<start time>``.
    """
    if not (_START.match(run.dir.name) and re.fullmatch(r"[\w-][\w.-]*", run.dir.parent.name)):
        raise CheckpointError(f"{run.dir}: no run of qlora lies in a folder of such a name.")


def started(folder: Path) -> tuple[str, int]:
    """When a run began, from its directory's name; sorts later ones higher."""
    day, clock, *again = folder.name.split("-")
    return f"{day}-{clock}", int(again[0]) if again else 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: Missing, torn or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return value


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """Create a folder and those above it, so that no power cut takes what is kept in it later."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=exist_ok)
    for folder in missing:
        _sync_folder(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash at any point, sees the old text or the new.

    In a folder of :func:`writing_aside` the disk is not waited for: it is when that gets its name.
    """
    waits = _ASIDE.isdisjoint(path.parents)
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if waits:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()  # on a full disk even this is room
        raise
    if waits:
        _sync_folder(path.parent)


def write_json(path: Path, value: object) -> None:
    """:func:`write_text` of JSON. NaN is refused: it is not JSON and would break every reader."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def writing_aside(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, renamed to ``final`` when the block ends well and removed when it does not.

    Its name tells who writes: ``.<final>.<host>.<pid>.part``. A folder that is there already is only
    replaced if that is asked for.
    """
    aside = final.with_name(f".{final.name}.{host()}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    make_folder(aside.parent)
    aside.mkdir()
    try:
        _ASIDE.add(aside)
        try:
            yield aside
        finally:
            _ASIDE.remove(aside)
        _sync_files([path for path in aside.rglob("*") if path.is_file()])
        if os.name == "posix":
            for path in [aside, *aside.rglob("*")]:
                if path.is_dir():
                    _sync_folder(path)
        old = final.with_name(f".{final.name}.old")  # brought back by store.sweep after a crash
        if replace and final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        aside.rename(final)
        _sync_folder(final.parent)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where that cannot be asked."""
    if os.name != "posix":  # there os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


def host() -> str:
    """This machine, as the names of folders tell it: a process id means nothing on another one."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", platform.node())[:64] or "-"


def seal(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest that makes a checkpoint complete: size and SHA-256 of each file, fsynced.

    ``facts`` stand in the manifest, too.
    """
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:
        synced = pool.submit(_sync_files, paths)  # the disk writes while files are hashed
        sums = list(pool.map(sha256, paths))
        synced.result()
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(paths, sums, strict=True)
    }
    write_json(checkpoint / MANIFEST, facts | {"files": files})


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be believed, or None if every file is what its manifest says."""
    if not (checkpoint / MANIFEST).is_file():
        return "it has no manifest: writing it was interrupted"
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"its manifest names {name!r}, which lies outside of it"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                return f"{name} is damaged"
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return "its manifest is damaged"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_files(paths: list[Path]) -> None:
    """:func:`sync_file` of each; a file system's journal is then written once for many."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(sync_file, paths):
            pass


def sync_file(path: Path) -> None:
    """Have the disk hold what was written to a file."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows wants it writable
        if sys.platform == "darwin":  # there fsync leaves it in the drive's own memory
            import fcntl

            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
        else:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened for fsync on Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
