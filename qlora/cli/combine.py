"""``qlora combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora.cli.app import app, look
from qlora.errors import Interrupted, RecipeError


@app.command()
def combine(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more finished runs of one base, or runs/NAME.")
    ],
    method: Annotated[
        Literal["linear", "svd", "ties", "dare_ties"],
        typer.Option(
            help="linear: the weighted sum, exactly. svd: that sum cut down to a rank. ties, dare_ties: "
            "entries are chosen first, so that opposed ones do not cancel."
        ),
    ] = "linear",
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="One for each run; default: equal shares of 1."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of entries kept; default: 0.2 for ties, 0.5 for dare_ties."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Of the combination; default: the ranks' sum, for svd the largest of them."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Times the whole.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what dare_ties drops.")] = 42,
    name: Annotated[str, typer.Option(help="Of the new run: OUT/NAME/<now>.")] = "combined",
    out: Annotated[
        Path | None, typer.Option(help="A folder of runs; default: where the first run lies.")
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Held-out rows of each run that are scored; 0: none.")
    ] = 500,
    min_kept: Annotated[
        float | None,
        typer.Option(help="Exit with 2, and write nothing, if a run keeps less of its gain: 0.5."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print result.json.")] = False,
) -> None:
    """Make one adapter of several, and show what each of them still does in it.

    The runs are only read. The new adapter is a run: chat, evaluate, merge, export and serve take it.
    """
    import json

    for run in runs:
        look(run)
    try:
        from rich.console import Console

        from qlora import combining

        made = combining.combine(
            runs,
            method=method,
            weights=_numbers(weights),
            density=density,
            rank=rank,
            scale=scale,
            seed=seed,
            name=name,
            out=out,
            rows=rows,
            min_kept=min_kept,
            console=Console(stderr=as_json),
        )
    except KeyboardInterrupt:
        raise Interrupted("Stopped; nothing was written.") from None
    if as_json:
        print(json.dumps(made.result, indent=2))


def _numbers(text: str | None) -> list[float] | None:
    """The weights in a text such as ``0.7,0.3``."""
    if text is None:
        return None
    try:
        return [float(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise RecipeError(
            f"--weights is {text!r}. Write numbers with commas between them, such as 0.7,0.3."
        ) from None
