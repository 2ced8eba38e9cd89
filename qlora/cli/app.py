"""The command line itself, to which each verb adds its own."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from qlora import __version__

BEGAN = time.monotonic()  # before anything heavy is imported

app = typer.Typer(
    name="qlora",
    help="Fine-tune a language model with QLoRA on one GPU, and prove what came out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"qlora {__version__}")
        raise typer.Exit


def look(where: str) -> None:
    """Refuse what is neither run nor model before anything heavy is imported, and say what is opened.

    Raises:
        CheckpointError: It is neither.
    """
    from qlora import places, recipe, rundir

    path = places.expanded(where)
    names = ("config.json", "adapter_config.json")  # a model; an adapter or checkpoint of a run
    if not any(places.is_file(path / name) for name in names) and not (
        not places.is_there(path) and recipe.is_hub_id(where)
    ):
        rundir.open_run(where)
    if sys.stderr.isatty():
        print(f"loading   {where}", file=sys.stderr)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
