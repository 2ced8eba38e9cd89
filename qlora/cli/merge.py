"""``qlora merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora.cli.app import app, look


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A finished run, or runs/NAME for its newest.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: RUN/merged.")
    ] = None,
    onto: Annotated[
        Literal["auto", "nf4", "16bit"],
        typer.Option(
            help="The base to fold into: what was trained on (nf4, unpacked), the checkpoint it was "
            "quantized from (16bit), or the nearer of both to the trained model, as measured (auto)."
        ),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the weights; auto: what the run computed in."),
    ] = "auto",
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Refuse beyond so many nats a token from the trained model (KL)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Write adapter and base as one 16-bit model, and prove that it is what was trained."""
    import json

    from qlora import places, rundir

    look(run)
    if out is not None:
        rundir.require_free(places.expanded(out))
    from rich.console import Console

    from qlora import merging

    console = Console(stderr=as_json)
    merged = merging.merge(run, out, onto=onto, dtype=dtype, max_kl=max_kl, console=console)
    if as_json:
        print(json.dumps(merged.to_json() | {"dir": str(merged.dir)}, indent=2))
    else:
        print(f"next      qlora chat {places.shown(merged.dir)}")
