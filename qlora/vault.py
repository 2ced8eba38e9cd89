"""What is kept on disk because it took long to make, and can be made again: bases and tokenized rows.

Layout of ``places.cache()``::

    bases/<key>/    a quantized base, as save_pretrained writes it
    data/<key>/     tokenized rows and their ledger

Each entry has ``about.json``, for people, and the manifest of :mod:`qlora.rundir` with the SHA-256 of every
file. It appears under its key when it is whole. Keeping is a favour: when it fails, a run goes on without.
Other processes, on other machines even, may write and remove here at any time; nothing is locked, so what
was listed may be gone when it is looked at.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import places, rundir
from qlora.errors import CacheError, CheckpointError

ABOUT = "about.json"
FOLDERS = {"base": "bases", "rows": "data"}
# The least recently used goes first: versions and settings that are no longer asked for.
KEPT_BASES = 4
SPARE_BYTES = 2**30  # left free on the disk: a run's checkpoints matter more
ABANDONED_SECONDS = 24 * 3600  # after which nobody is still writing
UNFINISHED = "writing it was interrupted"
# Of rundir.writing_aside. One without a host is an older version's: it is taken for another machine's.
_PART = re.compile(r"^\.(?P<key>[^.]+)(\.(?P<host>[^.]+))?\.(?P<pid>\d+)\.part$")


@dataclass(frozen=True)
class Entry:
    """One kept thing, or what an interrupted writer left of it."""

    kind: str
    name: str
    settings: str
    folder: Path
    bytes: int
    made: float
    used: float

    @property
    def is_unfinished(self) -> bool:
        return self.folder.name.startswith(".")

    def defect(self) -> str | None:
        """Why it cannot be used, or None; every byte of it is read."""
        return UNFINISHED if self.is_unfinished else _defect(self.folder)


def key(ingredients: Mapping[str, Any]) -> str:
    """A name for what is decided by these values, whatever their order.

    >>> key({"a": 1, "b": None}) == key({"b": None, "a": 1}) != key({"a": 1})
    True
    """
    text = json.dumps(ingredients, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def describe(folder: Path, name: str, settings: str) -> None:
    """Say for people what an entry that is being written is."""
    rundir.write_json(folder / ABOUT, {"name": name, "settings": settings})


def find(key: str) -> tuple[Path | None, tuple[str, ...]]:
    """The kept base of a key if every byte of it is as it was written, and what to tell.

    A damaged one is removed, and so is what a killed writer of the same key left behind.
    """
    folder, notes = _root("base") / key, []
    try:
        for part in folder.parent.glob(f".{key}.*.part"):
            if _is_abandoned(part):
                done = "is removed" if _is_removed(part) else "cannot be removed"
                notes.append(f"a half-written copy in the cache {done}: {UNFINISHED}")
        if not folder.is_dir():
            return None, tuple(notes)
    except OSError as error:
        shown = places.shown(folder.parent)
        return None, (*notes, f"the cache is not used: {shown} cannot be read ({_said(error)})")
    if found := _defect(folder):
        return None, (*notes, discard(folder, found))
    with contextlib.suppress(OSError):  # a read-only cache is used all the same
        os.utime(folder)
    return folder, tuple(notes)


def discard(folder: Path, why: str) -> str:
    """Remove a base that cannot be used; what to tell about it."""
    told = f"the copy in the cache is not used ({why}); "
    if _is_removed(folder):
        return told + "it is removed and made again"
    return (
        told + f"{places.shown(folder)} cannot be removed, so the base is made again at each start"
    )


def keep(
    key: str,
    name: str,
    settings: str,
    size: int,
    write: Callable[[Path], None],
    failures: tuple[type[Exception], ...] = (),
) -> str:
    """Have ``write`` fill a folder that later starts will find; what to tell about it.

    Nothing is kept, and that is told, when the disk has no room or cannot be written, or when a damaged
    base that could not be removed has the name.

    Args:
        key: What :func:`key` gave for it.
        name: As people call it.
        settings: How it was made, in a few words.
        size: Bytes it will take, about.
        write: Fills the folder it is given.
        failures: What ``write`` may raise beside OSError when a disk is full. Nothing is kept then.
    """
    folder = _root("base") / key
    shown = places.shown(folder.parent)
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < size + SPARE_BYTES:
            return (
                f"not kept in the cache: it takes {human(size)}, and {shown} has {human(free)} free "
                f"({human(SPARE_BYTES)} stay free for runs). QLORA_CACHE names another place"
            )
        with rundir.writing_aside(folder) as aside:
            write(aside)
            describe(aside, name, settings)
            rundir.seal(aside)
    except expected as error:
        if _defect(folder):  # else another process was faster with the same
            return f"not kept in the cache: {shown} cannot be written ({_said(error)})"
    told = f"kept in {shown} ({human(size)}): the next start reads that"
    try:
        gone = _evict(folder)
    except OSError as error:
        return f"{told}; older ones stay ({_said(error)})"
    return told + "".join(f"; {entry.name} went for it" for entry in gone)


def entries(*kinds: str) -> list[Entry]:
    """What is kept, of some kinds or of all, by kind and name; leftovers of killed writers too."""
    found = []
    for kind in kinds or FOLDERS:
        root = _root(kind)
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            part = _PART.match(folder.name)
            if folder.is_dir() and (_is_abandoned(folder) if part else folder.name[0] != "."):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed by its writer
                    found.append(_entry(kind, folder, part["key"] if part else folder.name))
    return sorted(found, key=lambda entry: (entry.kind, entry.name))


def named(names: Sequence[str]) -> list[Entry]:
    """The entries of these names.

    Raises:
        CacheError: There is none of a name; says the nearest.
    """
    known = {entry.name: entry for entry in entries()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise CacheError(
                f"{name!r}: nothing of this name is kept in {places.shown(places.cache())}.{hint} "
                "`qlora cache list` shows every name."
            )
    return [known[name] for name in dict.fromkeys(names)]


def remove(entry: Entry) -> None:
    """Take an entry off the disk.

    Raises:
        CacheError: It cannot be removed; says why.
    """
    try:
        shutil.rmtree(entry.folder)
    except OSError as error:
        raise CacheError(
            f"{entry.name}: {places.shown(entry.folder)} cannot be removed "
            f"({error.strerror or error}). Remove that folder by hand."
        ) from None


def human(size: int) -> str:
    """Bytes as people read them.

    >>> human(2**30), human(300 * 2**20), human(10)
    ('1.0 GiB', '300.0 MiB', '0.0 MiB')
    """
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def ago(seconds: float) -> str:
    """How long something is past, in the largest unit that fits.

    >>> ago(3), ago(200), ago(7300), ago(200000)
    ('now', '3 min', '2 h', '2 d')
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "now"


def _root(kind: str) -> Path:
    return places.cache() / FOLDERS[kind]


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _defect(folder: Path) -> str | None:
    """:func:`rundir.defect`, and why a file of it cannot be read."""
    try:
        return rundir.defect(folder)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {_said(error)}"


def _is_removed(folder: Path) -> bool:
    """Take a folder off the disk if that can be done; whether it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _evict(newest: Path) -> list[Entry]:
    """Remove the least recently used bases, down to ``KEPT_BASES``; those that are really gone."""
    kept = sorted((e for e in entries("base") if not e.is_unfinished), key=lambda e: e.used)
    return [e for e in kept[:-KEPT_BASES] if e.folder != newest and _is_removed(e.folder)]


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of each file below that is still there."""
    for place, _, names in os.walk(folder):  # which passes over a folder that vanishes
        for name in names:
            with contextlib.suppress(OSError):
                yield Path(place, name).stat()


def _entry(kind: str, folder: Path, key: str) -> Entry:
    """What a folder holds.

    Raises:
        FileNotFoundError: It is not there any more.
    """
    try:
        about = rundir.read_json(folder / ABOUT)
    except CheckpointError:  # an older one, a torn one, or not written yet: `verify` says which
        about = {}
    whole = not folder.name.startswith(".")
    stem = str(about.get("name", kind)).rstrip("/").rpartition("/")[2].lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", stem).strip("-.") or kind
    stats = list(_stats(folder))
    used = folder.stat().st_mtime  # after its files: they vanish before it, or with it
    return Entry(
        kind=kind,
        name=f"{slug}-{key[:8]}" if whole else f"unfinished-{key[:8]}",
        settings=str(about.get("settings", "")) if whole else UNFINISHED,
        folder=folder,
        bytes=sum(stat.st_size for stat in stats),
        made=min((stat.st_mtime for stat in stats), default=used),
        used=used,
    )


def _is_abandoned(part: Path) -> bool:
    """Whether it is there and nobody writes into it any more.

    Its process is gone, if it ran on this machine, or has been silent for a day.
    """
    match = _PART.match(part.name)
    if match is None:
        return False
    # Elsewhere than on posix os.kill would end the process it asks about.
    if match["host"] == rundir.host() and os.name == "posix":
        try:
            os.kill(int(match["pid"]), 0)
        except (ProcessLookupError, OverflowError):
            return part.is_dir()  # its last act may have been to give it its name
        except OSError:
            pass  # another user's, so it is there
    newest = max((stat.st_mtime for stat in _stats(part)), default=0.0)
    try:
        newest = max(newest, part.stat().st_mtime)
    except OSError:
        return False
    return time.time() - newest > ABANDONED_SECONDS
