"""``qlora train``."""

from __future__ import annotations

from typing import Annotated

import typer

from qlora.cli.app import BEGAN, app
from qlora.errors import Interrupted


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
    finish: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Go on when training has ended: merge, gguf, ollama, vllm, such as merge,gguf:q8_0.",
        ),
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

            wanted = ()
            if finish is not None:
                from qlora import finishing

                wanted = finishing.steps(finish)
            run = trainer.train(
                loaded, resume=resume, allow_change=allow_change or (), budget=budget, began=BEGAN
            )
    except KeyboardInterrupt:
        raise Interrupted("Stopped before the first step.") from None
    if wanted:
        finishing.finish(run, wanted)
