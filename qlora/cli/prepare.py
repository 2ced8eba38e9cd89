"""What comes before a run: ``init``, ``plan``, ``data``, ``selftest``, ``doctor``."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app
from qlora.errors import Interrupted


@app.command()
def init(
    data: Annotated[Path, typer.Argument(help="Your data: .jsonl .json .csv .tsv .parquet .txt")],
    model: Annotated[str, typer.Option(help="The base: a folder or a hub id.")],
    card: Annotated[
        str | None, typer.Option(help="What it should fit: 12GB, t4, rtx3060 ...; default: yours.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The recipe to write; default: DATA's name.")
    ] = None,
) -> None:
    """Look at a data file and write a commented recipe that is ready to train."""
    from qlora import cards, draft, hub
    from qlora.errors import RecipeError
    from qlora.recipe import is_local

    target = out or Path(f"{data.stem}.yaml")
    wanted = cards.named_card(card) if card else None
    if target.exists():
        raise RecipeError(f"{target}: exists already. Name another with --out, or remove it first.")
    seen = draft.look(data)  # refuses a bad file before anything slow
    config = count = None
    if is_local(model) or not hub.unreachable():
        from qlora import hardware

        config, count = draft.read_base(model, data, seen.columns)
        wanted = wanted or hardware.card()
    seen, plan = draft.write(data, model, target, card=wanted, config=config, count=count)
    print(f"{data.name}: {seen.rows:,} rows, read as {seen.form}")
    if plan is not None:
        print(f"{plan.total_bytes / cards.GIB:.2f} GiB predicted on {plan.card.name}")
    else:
        print(
            "not planned: the model's config.json cannot be read here; `qlora train` will check the fit"
        )
    typed = shlex.quote(str(target))
    print(f"wrote {target}\nlook: qlora data {typed}\nnext: qlora train {typed}")


@app.command()
def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or a name of `qlora recipes list`.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as data.max_length=4096.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="12GB, t4, rtx3060 ...; default: the card of this machine.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Trace the real training step beside the prediction.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Published models by cards and lengths; no recipe.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Will it fit? Bytes term by term from config.json alone, what else would fit, and how fast.

    No weight is read or downloaded, and no card is needed. Exit code 2 if it does not fit.
    """
    import json

    from qlora import planning, plansheet
    from qlora.recipe import load_recipe

    if table or recipe is None:
        if recipe is not None or not table or card or as_json or exact:
            raise typer.BadParameter("Name a recipe, or write --table alone.")
        print("\n".join(plansheet.table()))
        return
    if exact:
        print("tracing a whole step, some ten seconds for 8 B parameters ...", file=sys.stderr)
    sheet = planning.plan(load_recipe(recipe, overrides or ()), card, exact=exact)
    print(json.dumps(sheet.to_json(), indent=2) if as_json else sheet)
    if not sheet.fits:
        raise typer.Exit(2)


@app.command()
def data(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or a name of `qlora recipes list`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as data.max_length=512.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="Show the first N rows instead of four chosen ones.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(help="Show one row, such as rows.jsonl:41, or a line of the first source."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write all of it as one page, too.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ledger and the rows as JSON.")
    ] = False,
) -> None:
    """See what would train: every row accounted for, and rows as the model is given them."""
    import json

    from qlora.recipe import load_recipe

    if rows is not None and row is not None:
        raise typer.BadParameter("--rows and --row exclude each other; write one of them.")
    loaded = load_recipe(recipe, overrides or ())
    from rich.console import Console

    from qlora import hub
    from qlora import preview as story
    from qlora.data import require_little_lost
    from qlora.screen import Screen

    if html is not None:
        story.require_page(html)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a row may hold what the terminal cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    with hub.door(loaded):
        seen = story.preview(loaded, Screen(Console(stderr=True)).track, rows=rows, row=row)
    if as_json:
        print(json.dumps(seen.to_json(), indent=2))
    else:
        seen.print(Console())
    if html is not None:
        seen.write(html)
        print(f"wrote {html}", file=sys.stderr if as_json else sys.stdout)
    require_little_lost(loaded, seen.ledger)


@app.command()
def selftest(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or a name of `qlora recipes list`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as data.packing=true.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove on your base, data and card that a step's gradient does not depend on how its rows lie.

    Eight rows go through training packed and padded, in passes of any size, with and without activation
    checkpointing. Exit code 2 if one of these gives another loss or gradient.
    """
    import json

    from qlora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    try:
        from rich.console import Console

        from qlora import invariance
        from qlora import selftest as story

        report = story.examine(loaded, Console(quiet=as_json))
        if as_json:
            print(json.dumps(report.to_json(), indent=2, allow_nan=False))
        else:
            invariance.tell(report, Console())
    except KeyboardInterrupt:
        raise Interrupted("Stopped; the self-test leaves nothing behind.") from None
    report.require_invariance()


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--dir", help="Where runs would be written.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Try each thing a run leans on: card, NF4 kernel, packages, disk, hub. Exit code 2 if one fails."""
    import dataclasses
    import json

    from rich.console import Console

    from qlora import doctor as story

    checks = story.examine(folder)
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        console = Console()
        marks = {
            "ok": "[green]ok[/green]  ",
            "note": "[yellow]note[/yellow]",
            "fail": "[red]fail[/red]",
        }
        for check in checks:
            console.print(
                f"{marks[check.status]}  [bold]{check.name:<10}[/bold] ", end="", highlight=False
            )
            console.print(check.found, markup=False, highlight=False, soft_wrap=True)
            if check.advice:
                console.print(f"{'':18}{check.advice}", style="dim", markup=False, soft_wrap=True)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(2)
