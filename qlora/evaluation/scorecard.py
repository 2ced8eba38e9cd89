"""An evaluation as people read it: base and tuned side by side, and what may be concluded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.evaluation.forgetting import Forgetting
from qlora.evaluation.heldout import Rows
from qlora.evaluation.interval import FEWEST, Interval
from qlora.screen import flat, visible

SHOWN = 3  # samples
FIELDS = 12  # of the answers' JSON that are listed one by one
CHARS = 400  # of a sample's cell
SAME, FEW = "no difference", "too few rows"


@dataclass(frozen=True)
class Figures:
    """What one model made of the rows. What was not asked, or is in no row, is None."""

    loss: float
    perplexity: float
    closing_loss: float | None  # of the tokens that end an answer
    answered: int = 0
    exact_match: float | None = None
    field_match: float | None = None  # share of expected JSON fields that are right
    fields: dict[str, float] = field(default_factory=dict)
    valid_json: float | None = None  # share of answers that should be JSON objects and are
    stop_rate: float | None = None


@dataclass(frozen=True)
class Sample:
    """One row that was asked, with what came."""

    address: str
    question: str
    expected: str
    base: str | None
    tuned: str


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model, and of its base beside it, on the same rows.

    Attributes:
        name: Of the run or model.
        adapter: Which of the run's adapters it was; empty for a model without one.
        rows: What was asked.
        base: None where there is no base to compare with.
        tuned: Of the tuned model, or of the only one.
        differences: Tuned less base by the name of the figure, with intervals.
        forgetting: On general text; None where that was not asked.
        lm_eval: By "task metric": base and tuned.
        samples: The first few rows with their answers.
        path: Where it was written; None where it was not.
    """

    name: str
    adapter: str
    rows: Rows
    base: Figures | None
    tuned: Figures
    differences: dict[str, Interval]
    forgetting: Forgetting | None = None
    lm_eval: tuple[dict[str, Any], ...] = ()
    samples: tuple[Sample, ...] = ()
    path: Path | None = None
    scored_fields: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but where it was written, as JSON has it."""
        return {
            "name": self.name, "adapter": self.adapter, "rows": _plain(self.rows),
            "exact_match_of": list(self.scored_fields),
            "base": self.base and _plain(self.base), "tuned": _plain(self.tuned),
            "differences": {name: one.to_json() for name, one in self.differences.items()},
            "forgetting": self.forgetting and self.forgetting.to_json(),
            "lm_eval": list(self.lm_eval), "samples": [_plain(one) for one in self.samples],
        }  # fmt: skip

    def show(self, console: Console) -> None:
        """Print it as a table, with what these rows allow to be said."""
        show(self, console)

    def __str__(self) -> str:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            console = Console(file=nowhere, record=True, width=110)
            self.show(console)
        return console.export_text()


def show(found: Evaluation, console: Console) -> None:
    """Print the table, the general text's verdict, and a few samples."""
    who = "tuned" if found.adapter else "model"
    compares = found.base is not None
    console.print(Text(_title(found), style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in ("base", who) if compares else (who,):
        table.add_column(heading, justify="right", no_wrap=True)
    if compares:
        table.add_column("difference (95 %)", justify="right", no_wrap=True)
        table.add_column("tuned is", no_wrap=True)
    same = few = False
    for name, base, tuned, difference, verdict in _lines(found):
        unshown = verdict.startswith(SAME)
        scant = verdict.startswith(FEW)
        same, few = same or unshown, few or scant
        short = SAME if unshown else FEW if scant else verdict
        cells = [name, base, tuned, difference, short] if compares else [name, tuned]
        table.add_row(*(Text(flat(cell)) for cell in cells))
    console.print(table)
    if same:
        _say(console, "note", f"{SAME}: none that so many rows, or documents, can show")
    if few:
        _say(
            console,
            "note",
            f"{FEW}: a verdict needs {FEWEST} that differ. Ask more with --data FILE, or hold out more "
            "(data.held_out_fraction).",
        )
    if found.scored_fields and found.tuned.answered:
        named = ", ".join(found.scored_fields)
        _say(
            console,
            "note",
            f"exact match: {named} all equal"
            if len(found.scored_fields) > 1
            else f"exact match: of {named}",
        )
    if found.forgetting is not None:
        _say(console, "general", f"{found.forgetting.passages} passages: {found.forgetting}")
    if warning := _of_stopping(found):
        _say(console, "note", warning)
    if found.samples:
        console.print(_samples(found, who))


def _title(found: Evaluation) -> str:
    where = f" ({found.adapter})" if found.adapter not in ("", "adapter") else ""
    asked = f", {found.tuned.answered:,} answered" if found.tuned.answered else ""
    return flat(f"{found.name}{where}: {found.rows.count:,} rows of {found.rows.source}{asked}")


def _lines(found: Evaluation) -> Iterator[tuple[str, str, str, str, str]]:
    """(what, base, tuned, difference, verdict) of everything that was measured."""
    was, now = found.base, found.tuned
    rows: list[tuple[str, str, str, bool]] = [  # name, attribute, format, whether lower is better
        ("loss", "loss", ".4f", True),
        ("perplexity", "perplexity", ".3f", True),
        ("end-of-turn loss", "closing_loss", ".4f", True),
        ("exact match", "exact_match", ".1%", False),
        ("fields right", "field_match", ".1%", False),
    ]
    yield from _of_figures(found, rows)
    for name in list(now.fields)[:FIELDS] if len(now.fields) > 1 else ():
        base = "" if was is None else f"{was.fields[name]:.1%}"
        yield f"  {name}", base, f"{now.fields[name]:.1%}", "", ""
    yield from _of_figures(
        found,
        [
            ("valid JSON", "valid_json", ".1%", False),
            ("stopped by itself", "stop_rate", ".1%", False),
        ],
    )
    for one in found.lm_eval:
        interval = one["difference"]
        said = "" if interval is None else _spread(interval, ".4f")
        base = "" if one["base"] is None else f"{one['base']:.4f}"
        name = f"{one['task']}: {one['metric']}"
        yield (
            name,
            base,
            f"{one['tuned']:.4f}",
            said,
            (one["verdict"] or "").replace("rows", "documents"),
        )


def _of_figures(
    found: Evaluation, rows: list[tuple[str, str, str, bool]]
) -> Iterator[tuple[str, str, str, str, str]]:
    for name, attribute, form, lower in rows:
        now = getattr(found.tuned, attribute)
        if now is None:
            continue
        was = None if found.base is None else getattr(found.base, attribute)
        interval: Interval | None = found.differences.get(attribute)
        difference, verdict = "", ""
        if interval is not None:
            difference = _spread(interval.to_json(), form)
            verdict = interval.verdict(lower_is_better=lower)
        yield name, "" if was is None else format(was, form), format(now, form), difference, verdict


def _spread(found: dict[str, Any], form: str) -> str:
    """A difference and its interval, as ``+94.3% (+91.7 to +96.7)``."""
    if form.endswith("f") and abs(found["difference"]) >= 1:
        form = ".2f"
    ends = [f"{found[end]:+{form}}".removesuffix("%") for end in ("low", "high")]
    return f"{found['difference']:+{form}} ({' to '.join(ends)})"


def _of_stopping(found: Evaluation) -> str:
    """What a low stop rate means: it is one of the commonest faults, and has one common cause."""
    rate = found.tuned.stop_rate
    if rate is None or rate >= 0.9:
        return ""
    return (
        f"{1 - rate:.0%} of the answers did not end by themselves within the length limit "
        "(eval.max_new_tokens): either they are longer than that, or the end of turn was not learned"
    )


def _samples(found: Evaluation, who: str) -> Table:
    headings = ["question", "expected", *(["base"] if found.base is not None else []), who]
    table = Table(title="The first rows", show_lines=True, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold", ratio=1)
    for one in found.samples[:SHOWN]:
        cells = [
            one.question,
            one.expected,
            *([one.base or ""] if found.base is not None else []),
            one.tuned,
        ]
        table.add_row(*(Text(visible(cell[:CHARS])) for cell in cells))
    return table


def _say(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label:<9}", "bold"), " ", flat(text)), soft_wrap=True)


def _plain(value: Any) -> dict[str, Any]:
    listed: dict[str, Any] = json.loads(json.dumps(vars(value)))
    return listed
