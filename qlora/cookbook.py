"""The recipes that ship with the package: list them, find one by name, copy one to start from."""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import RecipeError
from qlora.places import expanded, is_dir, is_file


@dataclass(frozen=True)
class Entry:
    """A shipped recipe: its name and the first sentence of its header."""

    name: str
    summary: str
    path: Path


def shelf() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def entries() -> list[Entry]:
    """Every shipped recipe, by name."""
    return [Entry(p.stem, _summary(p), p) for p in sorted(shelf().glob("*.yaml"))]


def find(source: str | Path) -> Path:
    """The file behind a path or a shipped name.

    Raises:
        RecipeError: Neither a file nor a known name; the nearest name is given.
    """
    path = expanded(source)
    if is_file(path):
        return path
    named = {entry.name: entry.path for entry in entries()}
    if str(source) in named:
        return named[str(source)]
    if is_dir(path):
        raise RecipeError(f"{source}: a folder; expected a recipe file or a shipped recipe's name.")
    near = difflib.get_close_matches(path.stem or str(source), named, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"{source}: no such file, and no shipped recipe has this name.{hint} "
        "`qlora recipes list` shows them all."
    )


def read(source: str | Path) -> str:
    """The text of a recipe, by path or shipped name.

    Raises:
        RecipeError: See :func:`find`; or it cannot be read as UTF-8.
    """
    path = find(source)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from None


def copy(name: str, destination: str | Path) -> Path:
    """Copy a shipped recipe to a file or into a folder, without overwriting anything.

    Raises:
        RecipeError: Unknown name, or the destination exists or cannot be written.
    """
    path = find(name)
    target = expanded(destination)
    if target.is_dir():
        target = target / path.name
    if target.exists():
        raise RecipeError(f"{target}: exists already. Name another file, or remove it first.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written: {error.strerror}.") from None
    return target


def _summary(path: Path) -> str:
    """The first comment line of a recipe is its summary."""
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()
