"""Checkpoints on disk: written aside, hashed, renamed, and believed only if every byte is still there.

A checkpoint is a folder ``checkpoint-<optimizer step>`` of safetensors and JSON. At no point of a crash is
there a folder of that name that is not whole; what a disk damages later its manifest tells.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora import rundir
from qlora.rundir import MANIFEST, host, seal, writing_aside

SPARE_BYTES = 16 * 2**20  # left free beside a checkpoint: for metrics, and the adapter's tokenizer
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STEP = re.compile(r"^\.?checkpoint-(\d+)(\.|$)")  # also of one that is being written
_LEFTOVER = re.compile(
    r"^\.(checkpoint-\d+|adapter)\.(?P<host>.+)\.(?P<pid>\d+)\.part$|^\..+\.gone$"
)
_REPLACED = re.compile(r"^\.(?P<name>checkpoint-\d+|adapter)\.old$")
_TEXT = re.compile(r"^\.[^.]+\.\w+\.part$")  # of rundir.write_text


@dataclass(frozen=True)
class Found:
    """What lies in a folder of checkpoints: the newest whole one, and what was passed over for it."""

    newest: Path | None
    damaged: tuple[tuple[Path, str], ...] = ()  # newer than it, and what is wrong with each

    @property
    def story(self) -> str:
        """One sentence about the damaged ones; empty without any."""
        return "; ".join(f"{path.name} is damaged: {why}" for path, why in self.damaged)


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step so that it is whole or absent, also through a power cut.

    Args:
        folder: The run's ``checkpoints``.
        step: Its optimizer step. What lies there of the same step is replaced.
        fill: Writes its files into the folder that it is given.

    Returns:
        The checkpoint.

    Raises:
        OSError: And whatever ``fill`` raises; older checkpoints are then as they were.
    """
    final = folder / f"checkpoint-{step}"
    metrics = rundir.sync_metrics(rundir.Run(folder.parent))
    with writing_aside(final, replace=True) as aside:
        fill(aside)
        seal(aside, step=step, metrics=metrics)
    return final


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be believed, or None if it holds just what its manifest says."""
    try:
        why = rundir.defect(checkpoint)
        if why is not None:
            return why
        manifest, named = rundir.read_json(checkpoint / MANIFEST), _STEP.match(checkpoint.name)
        if named and manifest.get("step", int(named[1])) != int(named[1]):
            return f"it is of step {manifest['step']}, not of the one in its name"
        if not manifest["files"]:
            return "its manifest is damaged"
        expected = {MANIFEST, *manifest["files"]}
        found = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    foreign = sorted(found - expected)
    return f"{foreign[0]} is not of its run" if foreign else None


def look(folder: Path) -> Found:
    """The newest whole checkpoint of a folder. Every byte of it is read and compared."""
    damaged: list[tuple[Path, str]] = []
    for path in _checkpoints(folder):
        why = defect(path)
        if why is None:
            return Found(path, tuple(damaged))
        damaged.append((path, why))
    return Found(None, tuple(damaged))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return look(folder).newest


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 for another name."""
    named = _NAME.match(checkpoint.name)
    return int(named[1]) if named else -1


def put_aside(found: Found) -> list[Path]:
    """Rename damaged checkpoints, so that no rotation counts them and their steps can be written again."""
    moved = []
    for path, _ in found.damaged:
        target = path.with_name(f"damaged-{path.name}")
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        moved.append(path.rename(target))
    return moved


def sweep(folder: Path) -> None:
    """Remove what writers that are gone have left half-written: in a run, or in its checkpoints.

    What one was about to replace gets its name back, if the new one never came.
    """
    for path in folder.glob(".*"):
        if (replaced := _REPLACED.match(path.name)) is not None:
            if (folder / replaced["name"]).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(folder / replaced["name"])
            continue
        left = _LEFTOVER.match(path.name)
        if left is None:
            if _TEXT.match(path.name) and path.is_file():
                with suppress(OSError):
                    path.unlink()
        elif not (left["pid"] and left["host"] == host() and _is_another(int(left["pid"]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_another(pid: int) -> bool:
    """Whether another process of this machine has this number; in a container ours is often the last's."""
    return pid != os.getpid() and rundir.is_alive(pid)


def rotate(folder: Path, keep: int, written: Path | None = None) -> None:
    """Delete all but the newest checkpoints; called when the newest of them has just been written.

    Args:
        folder: The run's ``checkpoints``.
        keep: How many; 1 at least. A folder that cannot be removed is left for the next time.
        written: The one that was. One with a later step, which only damage or a step back leaves, is
            then not counted.
    """
    found = _checkpoints(folder)
    if written is not None:
        found = [path for path in found if step_of(path) <= step_of(written)]
    for path in found[max(keep, 1) :]:
        # Under another name first: a crash in here must leave no torn checkpoint behind.
        gone = path.with_name(f".{path.name}.gone")
        try:
            path.rename(gone)
        except OSError:
            continue
        shutil.rmtree(gone, ignore_errors=True)


def require_room(folder: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that its disk has no room for.

    Args:
        folder: The run's ``checkpoints``; created if it is absent.
        needed: Bytes of the checkpoint.

    Raises:
        NoRoom: With both numbers.
    """
    rundir.make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise NoRoom(needed + SPARE_BYTES, free)


class NoRoom(OSError):
    """The disk has no room for a checkpoint."""

    def __init__(self, needed: int, free: int) -> None:
        said = (
            f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free on its disk"
        )
        super().__init__(errno.ENOSPC, said)


def _checkpoints(folder: Path) -> list[Path]:
    """Every folder that is named like one, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)
