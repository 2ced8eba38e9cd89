"""``qlora export``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, look


class To(StrEnum):
    gguf = "gguf"
    ollama = "ollama"
    hub = "hub"
    vllm = "vllm"


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A finished run, or the folder of a merged model.")],
    to: Annotated[To, typer.Option(help="For whom.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A folder, or one .gguf file; default: a folder in the run."),
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a GGUF file: f32, f16, bf16, q8_0; with the extra gguf also q4_k_m and its "
            "like. May be given several times. Default: q8_0."
        ),
    ] = None,
    llama_cpp: Annotated[
        str | None,
        typer.Option(
            "--llama-cpp", help="A checkout of llama.cpp; default: its converter is fetched once."
        ),
    ] = None,
    repo: Annotated[str | None, typer.Option(help="On the hub: owner/name.")] = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="Let everybody see it; a new repository is private otherwise."
        ),
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Send the merged model to the hub, not the adapter.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The base's hub id, where the run had it as a folder.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send the listed files without asking.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Hand a run to llama.cpp, Ollama, vLLM or the hub, with proof that it is still the same model."""
    import json

    look(run)
    from rich.console import Console

    from qlora import export as story

    def agree(lines: Sequence[str]) -> bool:
        print("\n".join(lines), file=sys.stderr if as_json else sys.stdout)
        if yes:
            return True
        if not sys.stdin.isatty():
            from qlora.errors import ExportError

            raise ExportError(
                f"{repo}: nobody is here to agree to this list. Write --yes if it is right."
            )
        return typer.confirm("Send these files?")

    console = Console(stderr=as_json, soft_wrap=True)
    made = story.export(
        run, to.value, out=out, quants=tuple(quant or [story.QUANT]), llama_cpp=llama_cpp, repo=repo,
        public=public, merged=merged, base=base, agree=agree, console=console,
    )  # fmt: skip
    if as_json:
        found = {
            "to": made.to,
            "where": made.where,
            "files": [one.to_json() for one in made.written],
        }
        print(json.dumps(found, indent=2))
    elif to == To.ollama:
        print(f"next      cd {made.where} && ollama create NAME -f Modelfile && ollama run NAME")
    elif to == To.vllm:
        print(f"next      sh {made.where}/serve.sh   (in an environment of vLLM)")
    elif to == To.hub:
        print(f"next      {made.where}")
