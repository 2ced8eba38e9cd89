"""What each of several adapters still does after they became one: its own held-out rows, scored again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora import adapter, answering, data, rundir, scoring, table
from qlora.errors import CheckpointError, DataError, ModelError, RecipeError
from qlora.screen import Screen
from qlora.trained import Trained

HALF = 0.5  # of what an adapter had gained: below, its task is called weak
FAR, FAR_NATS = (
    1.5,
    0.05,
)  # a combined loss beyond this many times the own one, and nats, is far above it
Progress = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True)
class Figures:
    """A model on some held-out rows; what was not asked is None."""

    held_out_loss: float | None = None
    exact_match: float | None = None
    stop_rate: float | None = None
    answered: int = 0


@dataclass(frozen=True)
class Task:
    """One adapter's rows, as the base, the adapter alone and the combination do on them.

    Attributes:
        run: Whose rows.
        rows: How many were scored; 0 if none.
        note: Why none were, or what is odd about them.
    """

    run: str
    rows: int = 0
    note: str = ""
    base: Figures = Figures()
    alone: Figures = Figures()
    combined: Figures = Figures()

    @property
    def kept(self) -> float | None:
        """The share of the adapter's own gain in loss that is left; None if it had gained nothing."""
        figures = (self.base, self.alone, self.combined)
        return _share(*(one.held_out_loss for one in figures), sign=-1)

    @property
    def kept_matches(self) -> float | None:
        """The same of the exact matches, where rows were answered."""
        return _share(*(one.exact_match for one in (self.base, self.alone, self.combined)), sign=1)

    @property
    def verdict(self) -> str:
        """``kept``, ``weak``, ``BROKEN`` (worse than the base), ``no gain`` or nothing.

        Weak is less than half of the gain, or a loss far above the adapter's own: from a base that knew
        nothing of the task, nearly all of the gain can be kept by answers that are of no use.
        """
        if not self.rows:
            return ""
        if self.kept is None:
            return "no gain"
        if self.kept < 0:
            return "BROKEN"
        least = min(share for share in (self.kept, self.kept_matches) if share is not None)
        alone, both = self.alone.held_out_loss, self.combined.held_out_loss
        far = alone is not None and both is not None and both > FAR * alone + FAR_NATS
        return "weak" if least < HALF or far else "kept"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "kept": self.kept,
            "kept_matches": self.kept_matches,
            "verdict": self.verdict,
        }


def _share(
    base: float | None, alone: float | None, combined: float | None, *, sign: int
) -> float | None:
    if base is None or alone is None or combined is None or sign * (alone - base) <= 0:
        return None
    return (combined - base) / (alone - base)


def measure(
    model: Any, parts: Sequence[tuple[str, Trained]], combined: str, rows: int, screen: Screen
) -> list[Task]:
    """Every part's own held-out rows, scored three times.

    Args:
        model: The base with all adapters on it; which one is on afterwards is not said.
        parts: The name of each adapter in the model, and its run.
        combined: The name of their combination.
        rows: Held-out rows of each run at most; 0 scores nothing.
        screen: Shows how far it is.
    """
    if not rows:
        return [Task(found.name, note="not asked for") for _, found in parts]
    return [_task(model, name, found, combined, rows, screen) for name, found in parts]


def _task(model: Any, name: str, found: Trained, combined: str, limit: int, screen: Screen) -> Task:
    assert found.run is not None
    if "combination" in found.run.result:
        return Task(found.name, note="a combination itself: it has no rows of its own")
    try:
        prepared = data.prepare(found.recipe, found.tok, found.config.vocab_size, screen.track)
    except (DataError, RecipeError, ModelError, OSError) as error:
        first = str(error).splitlines()[0]
        return Task(found.name, note=f"its data cannot be read: {first}")
    held_out, note = prepared.held_out, ""
    if held_out is None:
        return Task(found.name, note="its recipe holds no rows out")
    if _digest(found) not in ("", table.digest(held_out)):
        note = (
            "its data has changed since it was trained: some of these rows may have been trained on"
        )
    chosen = [held_out[index] for index in range(min(limit, len(held_out)))]

    def figures(form: Callable[[], AbstractContextManager[Any]]) -> Figures:
        with form():
            scores = scoring.score(
                model, chosen, found.tok.pad_token_id, found.renderer.closing,
                progress=screen.track,
            )  # fmt: skip
            loss = scoring.mean(scores)
            asked = prepared.held_out_examples[: len(chosen)] if found.recipe.eval.generate else []
            if not asked:
                return Figures(loss)
            said = answering.answer(model, found.renderer, asked, found.recipe, screen.track)
            return Figures(loss, said.exact_match, said.stop_rate, len(said.answers))

    return Task(
        found.name,
        len(chosen),
        note,
        base=figures(lambda: adapter.disabled(model)),
        alone=figures(lambda: _on(model, name)),
        combined=figures(lambda: _on(model, combined)),
    )


@contextmanager
def _on(model: Any, name: str) -> Iterator[None]:
    adapter.use(model, name)
    yield


def _digest(found: Trained) -> str:
    """Of the held-out rows that the run measured itself on; empty if it does not say."""
    assert found.run is not None
    try:
        return str(rundir.read_json(found.run.dir / "before.json")["of"]["held_out"])
    except (CheckpointError, LookupError, TypeError):
        return ""


def tell(tasks: Sequence[Task], screen: Screen) -> None:
    """A table of all tasks, and a line for each that came out badly."""
    if any(task.rows for task in tasks):
        shown = Table(title="Each adapter's own held-out rows", title_justify="left")
        for heading in ("adapter", "rows", "", "base", "alone", "combined", "kept", ""):
            numeric = heading in ("rows", "base", "alone", "combined", "kept")
            shown.add_column(heading, justify="right" if numeric else "left", overflow="fold")
        for task in tasks:
            _add(shown, task)
        screen.console.print(shown)
    for task in tasks:
        if task.note:
            screen.say("note", f"{task.run}: {task.note}" if task.rows else
                       f"{task.run} was not scored: {task.note}")  # fmt: skip
        if task.verdict == "BROKEN":
            screen.say("BROKEN", f"{task.run}: the combination is worse than the base on its rows")
        elif task.verdict == "weak":
            screen.say("weak", f"{task.run}: more than half of what it had learned is lost")
        elif task.verdict == "no gain":
            screen.say("note", f"{task.run} alone is no better than the base on its rows")
    if any(task.verdict in ("BROKEN", "weak") for task in tasks):
        screen.say(
            "try",
            "another --method, other --weights, or a larger --density; the runs are unchanged",
        )


def _add(shown: Table, task: Task) -> None:
    if not task.rows:
        shown.add_row(Text(task.run), "-", "not scored")
        return
    figures = (task.base, task.alone, task.combined)
    losses = [_figure(one.held_out_loss, "{:.4f}") for one in figures]
    bad = task.verdict in ("BROKEN", "weak")
    verdict = Text(task.verdict, style="bold red" if bad else "")
    shown.add_row(
        Text(task.run), f"{task.rows:,}", "loss", *losses, _figure(task.kept, "{:.1%}"), verdict
    )
    if task.combined.answered:
        matches = [_figure(one.exact_match, "{:.1%}") for one in figures]
        kept = _figure(task.kept_matches, "{:.1%}")
        shown.add_row("", f"{task.combined.answered:,}", "exact match", *matches, kept, "")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
