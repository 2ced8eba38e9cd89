"""``qlora merge``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app


class Onto(StrEnum):
    auto = "auto"
    nf4 = "nf4"
    bit16 = "16bit"


class DType(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A finished run, or runs/NAME for its newest.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: RUN/merged.")
    ] = None,
    onto: Annotated[
        Onto,
        typer.Option(
            help="The base to fold into: what was trained on (nf4, unpacked), the checkpoint it was "
            "quantized from (16bit), or the nearer of both to the trained model, as measured (auto)."
        ),
    ] = Onto.auto,
    dtype: Annotated[
        DType, typer.Option(help="Of the weights; auto: what the run computed in.")
    ] = DType.auto,
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

    from rich.console import Console

    from qlora import merging, places

    console = Console(stderr=as_json)
    merged = merging.merge(
        run, out, onto=onto.value, dtype=dtype.value, max_kl=max_kl, console=console
    )
    if as_json:
        print(json.dumps(merged.to_json() | {"dir": str(merged.dir)}, indent=2))
    else:
        print(f"next      qlora chat {places.shown(merged.dir)}")
