"""``qlora recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app

recipes_app = typer.Typer(help="The recipes that ship with qlora.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.command("list")
def list_recipes() -> None:
    """Every shipped recipe with its summary."""
    from qlora import cookbook

    entries = cookbook.entries()
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.summary}")


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe, or a file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Every value, defaults and overrides included.")
    ] = False,
) -> None:
    """Print a recipe as it is written, or with every value that will hold."""
    from qlora import cookbook

    if resolved or overrides:
        from qlora.recipe import load_recipe

        print(load_recipe(name, overrides or ()).dump(), end="")
    else:
        print(cookbook.read(name), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="A file or folder; nothing is overwritten.")],
) -> None:
    """Copy a shipped recipe to start your own from."""
    from qlora import cookbook

    path = cookbook.copy(name, destination)
    print(f"wrote {path}\nnext: qlora train {path}")


@recipes_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a recipe, for completion and checks in an editor."""
    import json

    from qlora.settings import json_schema

    print(json.dumps(json_schema(), indent=2))
