"""``qlora chat``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from qlora.cli.app import app, look


@app.command()
def chat(
    run: Annotated[
        str,
        typer.Argument(help="A run, runs/NAME for its newest, or the folder of a merged model."),
    ],
    base: Annotated[
        bool, typer.Option("--base", help="Let the base answer first, to compare.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system turn to begin with.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to a tuned model in the terminal; answers are streamed."""
    from rich.console import Console

    look(run)
    from qlora import chat as story
    from qlora.generation import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens)
    story.converse(run, Console(), _questions(), sampling, compare=base, system=system)


def _questions() -> Iterator[str]:
    """Lines typed at a prompt, or piped in."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history at the prompt, where there is any
    while True:
        try:
            line = input("you   " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not sys.stdin.isatty():
            print(f"you   {line}")
        yield line
