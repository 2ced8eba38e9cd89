"""``qlora cache``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qlora.cli.app import app

cache_app = typer.Typer(
    help="What is kept on disk to start faster: quantized bases and tokenized rows.",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")


@cache_app.command("list")
def list_cache() -> None:
    """Everything that is kept: kind, name, settings, size, age, and how long ago it was used."""
    import time

    from qlora import places, vault

    now, entries = time.time(), vault.entries()
    where = places.shown(places.cache())
    if not entries:
        print(f"nothing is kept in {where}")
        return
    rows = [("kind", "name", "settings", "size", "made", "used")]
    for entry in entries:
        size, made, used = (
            vault.human(entry.bytes), vault.ago(now - entry.made), vault.ago(now - entry.used)
        )  # fmt: skip
        rows.append((entry.kind, entry.name, entry.settings, size, made, used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"{vault.human(sum(entry.bytes for entry in entries))} in {where}")


@cache_app.command("remove")
def remove_cache(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names that `qlora cache list` shows.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything kept.")] = False,
) -> None:
    """Free the space of what is kept; it is made again when it is needed."""
    from qlora import vault

    if everything == bool(names):
        raise typer.BadParameter("Name what to remove (see `qlora cache list`), or write --all.")
    entries = vault.entries() if everything else vault.named(names or ())
    for entry in entries:
        vault.remove(entry)
        print(f"removed {entry.name}")
    print(f"{vault.human(sum(entry.bytes for entry in entries))} freed")


@cache_app.command("verify")
def verify_cache() -> None:
    """Read every byte of what is kept and compare its hash. Exit code 2 if anything is damaged."""
    from qlora import places, vault

    damaged, entries = [], vault.entries()
    if not entries:
        print(f"nothing is kept in {places.shown(places.cache())}")
    for entry in entries:
        defect = entry.defect()
        if defect is None:
            print(f"ok       {entry.name}")
        else:
            damaged.append(entry.name)
            print(f"damaged  {entry.name}: {defect}")
    if damaged:
        print(
            f"remove what is damaged: qlora cache remove {' '.join(damaged)}\n"
            "nothing is lost by it: it is made again when it is needed",
            file=sys.stderr,
        )
        raise typer.Exit(2)
