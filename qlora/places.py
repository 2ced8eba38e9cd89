"""Paths as people type them and as they are shown back."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(name: str | Path) -> Path:
    """A path with ``~`` resolved; the home of a user who does not exist is left as it was typed."""
    try:
        return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for such a home
    except ValueError:  # a home whose name holds a NUL character
        return Path(name)


# pathlib raises for a name that is too long and for a folder that is closed to us; these say no.


def is_file(path: Path) -> bool:
    """Whether it is a file that can be seen from here."""
    return os.path.isfile(path)  # noqa: PTH113


def is_dir(path: Path) -> bool:
    """Whether it is a folder that can be seen from here."""
    return os.path.isdir(path)  # noqa: PTH112


def is_there(path: Path) -> bool:
    """Whether anything of this name can be seen from here."""
    return os.path.exists(path)  # noqa: PTH110


def shown(path: Path) -> str:
    """A path as people type it: relative to where they stand, if it lies below."""
    try:
        return str(Path(os.path.realpath(path)).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def cache() -> Path:
    """Where things live that can be made again: ``QLORA_CACHE``, else ``~/.cache/qlora``."""
    if own := os.environ.get("QLORA_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qlora"
