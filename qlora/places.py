"""Paths as people type them and as they are shown back."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(name: str | Path) -> Path:
    """A path with ``~`` resolved; the home of a user who does not exist is left as it was typed."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for such a home


def shown(path: Path) -> str:
    """A path as people type it: relative to where they stand, if it lies below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def cache() -> Path:
    """Where things live that can be made again: ``QLORA_CACHE``, else ``~/.cache/qlora``."""
    if own := os.environ.get("QLORA_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qlora"
