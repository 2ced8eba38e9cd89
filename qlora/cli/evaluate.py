"""``qlora evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora.cli.app import app, look
from qlora.errors import Interrupted


@app.command()
def evaluate(
    where: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, its checkpoint, or a model's folder.")
    ],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows to ask; without, those that the run held out."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=0, help="Rows to answer, the first ones: 200, or eval.generate if that is more."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows answered at a time; eval.batch_size.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Measure the base beside the tuned model.")] = True,
    forgetting: Annotated[
        bool, typer.Option(help="Measure the loss on general text, before and after.")
    ] = True,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of EleutherAI's harness, such as arc_easy,piqa."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of more tasks; what is in it is run as code."),
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of a task at most.")
    ] = None,
    lm_eval_chat: Annotated[
        bool | None,
        typer.Option(
            "--lm-eval-chat/--lm-eval-plain",
            help="Put tasks through the chat template, or not; as the run's rows were.",
        ),
    ] = None,
    quant: Annotated[
        Literal["nf4", "none"] | None,
        typer.Option(help="Of a model that is no run: pack it as NF4, or load it as it is."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures to a file, as JSON.")
    ] = None,
) -> None:
    """Measure a tuned model beside its base: loss, answers, what it forgot, and how sure that is.

    Figures go to standard output, progress to standard error. Those of a run are kept in its evaluations/.
    """
    import json

    tasks = [name.strip() for name in (lm_eval or "").split(",") if name.strip()]
    if lm_eval is None and (lm_eval_path or lm_eval_limit or lm_eval_chat is not None):
        from qlora.errors import RecipeError

        raise RecipeError("--lm-eval-... says how tasks are run, and --lm-eval names none.")
    look(where)
    from rich.console import Console

    from qlora import evaluation

    if lm_eval is not None and not tasks:
        from qlora.evaluation import harness

        harness.find(tasks)
    try:
        found = evaluation.evaluate(
            where,
            file=data,
            answers=rows,
            base=base,
            general=forgetting,
            lm_eval=tasks,
            lm_eval_path=lm_eval_path,
            lm_eval_limit=lm_eval_limit,
            lm_eval_chat=lm_eval_chat,
            batch_size=batch_size,
            quant=quant,
            out=out,
            console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        raise Interrupted("Stopped; nothing was written.") from None
    if as_json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        found.show(Console())
        if found.path is not None:
            print(f"written   {found.path}")
