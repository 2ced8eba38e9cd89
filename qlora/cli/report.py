"""``qlora report`` and ``qlora compare``: what came of one run, and of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(help="A run directory, finished or not, or runs/NAME for its newest.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: report.html in the run.")
    ] = None,
) -> None:
    """Tell a run on one page: verdicts, curves, memory, data, answers, settings, how to do it again.

    The page needs no network and nothing beside it. Every run writes its own when it ends.
    """
    from rich.console import Console

    from qlora import report as story
    from qlora.preview import require_page
    from qlora.report import dossier

    found = dossier.find(run)
    if out is not None:
        require_page(out)
    told = dossier.read(found)
    console = Console()
    story.tell([story.summary(told)], console)
    console.print(f"wrote {story.write(told, out)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more run directories, or runs/NAME for its newest.")
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write the same as a page, with the curves over each other.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Put runs side by side: what differs in their settings, and what came of it."""
    import json
    import sys

    from rich.console import Console

    from qlora import report as story
    from qlora.preview import require_page
    from qlora.report import comparing

    if html is not None:
        require_page(html)
    seen = comparing.compare(runs)
    if as_json:
        print(json.dumps(seen.to_json(), indent=2))
    else:
        story.tell(seen.sections(), Console())
    if html is not None:
        seen.write(html)
        print(f"wrote {html}", file=sys.stderr if as_json else sys.stdout)
