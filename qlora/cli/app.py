"""The command line itself, to which each verb adds its own."""

from __future__ import annotations

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


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
