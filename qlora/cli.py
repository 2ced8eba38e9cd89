"""The front door: verbs, overrides, and errors without a traceback.

Nothing heavy is imported until a verb needs it: ``qlora --help`` and ``qlora recipes list`` never load
torch.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from qlora import __version__
from qlora.errors import Interrupted, QLoRAError

_BEGAN = time.monotonic()  # before anything heavy is imported

app = typer.Typer(
    name="qlora",
    help="Fine-tune a language model with QLoRA on one GPU, and prove what came out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes that ship with qlora.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
cache_app = typer.Typer(
    help="What is kept on disk to start faster: quantized bases and tokenized rows.",
    no_args_is_help=True,
)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command line. A user's mistake ends in a short message and exit code 2."""
    try:
        app(_with_resume_filled_in(sys.argv[1:]))
    except QLoRAError as error:
        from qlora import redact

        print(f"qlora: {redact.clean(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _with_resume_filled_in(arguments: list[str]) -> list[str]:
    """`--resume` may stand alone: it then means the newest run of the recipe.

    >>> _with_resume_filled_in(["train", "mine.yaml", "--resume", "lora.r=8"])
    ['train', 'mine.yaml', '--resume', 'newest', 'lora.r=8']
    """
    filled = []
    for index, argument in enumerate(arguments):
        filled.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        is_override = "=" in following and "." in following.partition("=")[0]
        if argument == "--resume" and (following.startswith("-") or is_override):
            filled.append("newest")
    return filled


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


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or a name of `qlora recipes list`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as lora.r=32.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN]",
            help="Go on with a run from its newest whole checkpoint; without RUN, the recipe's newest.",
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD", help="Resume although FIELD, which decides what is learned, differs."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End within 90m, 2h ...: steps are fitted to it."),
    ] = None,
) -> None:
    """Fine-tune as a recipe says; ends with where the adapter is and what to type next.

    Ctrl-C and SIGTERM save the step under way and end with 130 and 143; --resume goes on from there.
    """
    from qlora.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    try:
        from qlora import hub

        with hub.door(loaded):  # a dead hub is told of before anything slow is imported
            from qlora import trainer

            trainer.train(
                loaded, resume=resume, allow_change=allow_change or (), budget=budget, began=_BEGAN
            )
    except KeyboardInterrupt:
        raise Interrupted("Stopped before the first step.") from None


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
    print(f"wrote {target}\nlook: qlora data {target}\nnext: qlora train {target}")


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run directory, or runs/NAME for its newest.")],
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

    from qlora import rundir

    rundir.open_run(run)
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


@cache_app.command("list")
def list_cache() -> None:
    """Everything that is kept: kind, name, settings, size, age, and how long ago it was used."""
    import time

    from qlora import places, vault

    now, entries = time.time(), vault.entries()
    where = places.shown(places.cache())
    if not entries:
        print(f"nothing is kept in {where}")
        return
    rows = [("kind", "name", "settings", "size", "made", "used")]
    for entry in entries:
        size, made, used = (
            vault.human(entry.bytes), vault.ago(now - entry.made), vault.ago(now - entry.used)
        )  # fmt: skip
        rows.append((entry.kind, entry.name, entry.settings, size, made, used))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"{vault.human(sum(entry.bytes for entry in entries))} in {where}")


@cache_app.command("remove")
def remove_cache(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names that `qlora cache list` shows.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything kept.")] = False,
) -> None:
    """Free the space of what is kept; it is made again when it is needed."""
    from qlora import vault

    if everything == bool(names):
        raise typer.BadParameter("Name what to remove (see `qlora cache list`), or write --all.")
    entries = vault.entries() if everything else vault.named(names or ())
    for entry in entries:
        vault.remove(entry)
        print(f"removed {entry.name}")
    print(f"{vault.human(sum(entry.bytes for entry in entries))} freed")


@cache_app.command("verify")
def verify_cache() -> None:
    """Read every byte of what is kept and compare its hash. Exit code 2 if anything is damaged."""
    from qlora import places, vault

    damaged, entries = [], vault.entries()
    if not entries:
        print(f"nothing is kept in {places.shown(places.cache())}")
    for entry in entries:
        defect = entry.defect()
        if defect is None:
            print(f"ok       {entry.name}")
        else:
            damaged.append(entry.name)
            print(f"damaged  {entry.name}: {defect}")
    if damaged:
        print(
            f"remove what is damaged: qlora cache remove {' '.join(damaged)}\n"
            "nothing is lost by it: it is made again when it is needed",
            file=sys.stderr,
        )
        raise typer.Exit(2)
