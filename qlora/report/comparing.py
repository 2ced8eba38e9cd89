"""Runs side by side: in what their settings differ, what came of each, and whether it can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora import page, report, rundir
from qlora.chart import Chart, Series, figure
from qlora.errors import CheckpointError, QLoRAError
from qlora.page import Block, Grid, Listing, Section, Verdict
from qlora.places import expanded
from qlora.report import ROOMS, Room, dossier
from qlora.report.dossier import Dossier, number, text
from qlora.screen import duration

NAMED = 8  # runs named in a message
POINTS = 2400  # of all curves of a chart together


@dataclass(frozen=True)
class Comparison:
    """Two or more runs, read; none of them is loaded."""

    runs: Sequence[Dossier]

    @cached_property
    def names(self) -> list[str]:
        """A name for each, no two of them equal."""
        found = [one.name for one in self.runs]
        if len({one.rpartition("/")[0] for one in found}) == 1:
            found = [one.rpartition("/")[2] for one in found]
        seen: dict[str, int] = {}
        for n, name in enumerate(found):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                found[n] = f"{name} ({seen[name]})"
        return found

    @cached_property
    def notes(self) -> list[Verdict]:
        """What keeps these figures from being compared, and what is not there yet."""
        return [*self._unfinished(), *self._rows(), *self._surroundings(), *self._missing()]

    def settings(self) -> dict[str, list[Any]]:
        """By address, the value of each run where they differ; None where a run does not say.

        ``run`` is left out: where a run is written, and its name, decide nothing of it.
        """
        each = [dossier.fields(one.recipe) for one in self.runs]
        keys = dict.fromkeys(key for values in each for key in values if key.split(".")[0] != "run")
        found = {key: [values.get(key) for values in each] for key in keys}
        return {key: values for key, values in found.items() if not _same(values)}

    def figures(self) -> dict[str, list[float | None]]:
        """By name, the figure of each run."""
        return {name: [ask(one) for one in self.runs] for name, (ask, _) in FIGURES.items()}

    def to_json(self) -> dict[str, Any]:
        """The runs with their figures, the settings that differ, and the notes."""
        figures = self.figures()
        runs = [
            {
                "name": name,
                "dir": str(one.run.dir),
                "finished": one.is_finished,
                "step": one.curves.step,
                "figures": {key: values[n] for key, values in figures.items()},
            }
            for n, (name, one) in enumerate(zip(self.names, self.runs, strict=True))
        ]
        notes = [{"about": note.about, "said": note.said} for note in self.notes]
        return {"runs": runs, "settings": self.settings(), "notes": notes}

    def sections(self, room: Room = ROOMS[0]) -> list[Section]:
        """What to look at, on a terminal or a page."""
        states = [
            "finished" if one.is_finished else f"not finished (step {one.curves.step:,})"
            for one in self.runs
        ]
        rows: list[tuple[str, ...]] = [("state", *states)]
        for name, values in self.figures().items():
            if any(value is not None for value in values):
                said = FIGURES[name][1]
                rows.append((name, *("-" if v is None else said(v) for v in values)))
        settings = [
            (key, *(one[: room.chars] for one in self._apart(values)))
            for key, values in self.settings().items()
        ]
        told: list[Block] = list(self.notes)
        return [
            Section("what came of them", [*told, Grid(self.names, rows)]),
            Section(
                "settings that differ",
                [Grid(self.names, settings) if settings and room.details else Listing("", [
                    "not shown: the page would be too large" if settings else "none"])],
            ),
            Section("loss", self._charts(room)),
        ]  # fmt: skip

    def html(self) -> str:
        """The page; at most :data:`qlora.report.PAGE_BYTES`."""
        return report.within(
            report.PAGE_BYTES,
            lambda room: page.document("runs compared", self.sections(room)),
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            CheckpointError: It cannot be written.
        """
        report.put(path, self.html(), "--html")

    def _apart(self, values: Sequence[Any]) -> list[str]:
        """Settings as they are written; folders of this machine are numbered where only these differ."""
        whole = [
            dossier.shown(value) if one.recipe else "-"
            for one, value in zip(self.runs, values, strict=True)
        ]
        pairs = [
            (dossier.shown(dossier.placeless(v)), w) for v, w in zip(values, whole, strict=True)
        ]
        numbers = {value: n for n, value in enumerate(dict.fromkeys(whole), start=1)}
        return [
            "-" if full == "-"
            else f"{short} (folder {numbers[full]})"
            if any(a == short and b != full for a, b in pairs)
            else short
            for short, full in pairs
        ]  # fmt: skip

    def _charts(self, room: Room) -> list[Block]:
        most = max(12, min(room.points, POINTS * room.points // ROOMS[0].points // len(self.runs)))
        pairs = list(zip(self.names, self.runs, strict=True))
        training = [Series(name, one.curves.loss) for name, one in pairs]
        held = [
            Series(name, one.curves.held_out, loose=len(one.curves.held_out) < 4, dots=True)
            for name, one in pairs
        ]
        return [
            Chart("training loss", training, steep=True, most=most),
            Chart("held-out loss", held, steep=True, most=most),
        ]

    def _unfinished(self) -> list[Verdict]:
        names = [n for n, one in zip(self.names, self.runs, strict=True) if not one.is_finished]
        if not names:
            return []
        verb = "has" if len(names) == 1 else "have"
        return [Verdict("note", "not finished", f"{_some(names)} {verb} no figures of an end yet")]

    def _rows(self) -> list[Verdict]:
        found = []
        for key, what, so in (
            (
                "held_out",
                "held-out rows",
                "their held-out losses and scores are of other questions",
            ),
            ("base", "base", "the losses before training are of other models"),
        ):
            digests = [one.before.of.get(key) for one in self.runs]
            unknown = [n for n, digest in zip(self.names, digests, strict=True) if not digest]
            known = {digest for digest in digests if digest}
            if len(known) > 1:
                found.append(Verdict("bad", what, f"not the same in all runs: {so}"))
            elif unknown:
                found.append(
                    Verdict(
                        "note", what, f"whether they are the same is not known of {_some(unknown)}"
                    )
                )
        asked = [one.before.asked for one in self.runs if one.before.asked]
        changed = [
            key
            for key in ("generate", "exact_match", "max_new_tokens")
            if not _same([values.get(key) for values in asked])
        ]
        if changed:
            keys = ", ".join(f"eval.{key}" for key in changed)
            found.append(
                Verdict("note", "exact match", f"asked in other ways ({keys}): not one measure")
            )
        if not found:
            found.append(
                Verdict("good", "comparable", "the same held-out rows and base, asked in one way")
            )
        return found

    def _surroundings(self) -> list[Verdict]:
        cards = [text(one.environment, "card", "name") for one in self.runs]
        found = []
        if not _same(cards):
            found.append(
                Verdict(
                    "note", "card", "not the same: speed, memory and time are of other machines"
                )
            )
        packages = [one.environment.get("packages") for one in self.runs]
        known = [one for one in packages if isinstance(one, Mapping)]
        names = dict.fromkeys(str(name) for one in known for name in one)
        other = [name for name in names if not _same([one.get(name) for one in known])]
        if other:
            found.append(Verdict("note", "versions", f"not the same: {', '.join(other[:NAMED])}"))
        return found

    def _missing(self) -> list[Verdict]:
        return [
            Verdict("note", name, what)
            for name, one in zip(self.names, self.runs, strict=True)
            for what in one.missing[:NAMED]
        ]


def compare(where: Sequence[str | Path]) -> Comparison:
    """Read two or more runs; each is a run directory, or a folder whose newest run is meant.

    Raises:
        CheckpointError: Fewer than two, one of them twice, or something that is no run.
    """
    if len(where) < 2:
        raise CheckpointError(f"compare puts two or more runs side by side.{_offered(where)}")
    runs = [dossier.find(one) for one in where]
    seen: dict[Path, str | Path] = {}
    for asked, run in zip(where, runs, strict=True):
        first = seen.setdefault(run.dir.resolve(), asked)
        if first is not asked:
            raise CheckpointError(
                f"{first} and {asked} are one run: {run.dir}. Name another one beside it."
            )
    read = [dossier.read(run) for run in runs]
    return Comparison([replace(one, name=one.name[:80]) for one in read])


def _offered(where: Sequence[str | Path]) -> str:
    """The runs that a folder holds, to choose from."""
    folder = expanded(where[0]) if where else Path("runs")
    folder = folder.resolve().parent if (folder / "recipe.yaml").is_file() else folder
    try:
        found = sorted(
            (run.dir for run in rundir.runs_below(folder)), key=rundir.started, reverse=True
        )
    except (OSError, QLoRAError):
        found = []
    if not found:
        return " Name another run beside it."
    names = [str(path) for path in found]
    return f" In {folder} there are: {_some(names)}."


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


# --- the figures


def _of_result(*path: str) -> Callable[[Dossier], float | None]:
    return lambda one: number(one.result, *path)


def _loss_before(one: Dossier) -> float | None:
    told = number(one.result, "before", "held_out_loss")
    return one.before.loss if told is None else told


def _loss_now(one: Dossier) -> float | None:
    """Of a run that has not finished, the last one."""
    if one.is_finished:
        return number(one.result, "after", "held_out_loss")
    seen = [y for x, y in one.curves.held_out if y is not None and x > 0]
    return seen[-1] if seen else None


def _match_before(one: Dossier) -> float | None:
    told = number(one.result, "before", "exact_match")
    if told is None and one.before.answers:
        return one.before.right / one.before.answers
    return told


def _steps(one: Dossier) -> float | None:
    told = number(one.result, "steps")
    return float(one.curves.step) if told is None and one.curves.lines else told


def _train_loss(one: Dossier) -> float | None:
    """The last one: the mean over a run is mostly of its beginning."""
    seen = [y for _, y in one.curves.loss if y is not None]
    return seen[-1] if seen else number(one.result, "train_loss")


def _speed(one: Dossier) -> float | None:
    tokens, seconds = number(one.result, "tokens"), number(one.result, "train_seconds")
    if tokens and seconds:
        return tokens / seconds
    seen = [y for _, y in one.curves.speed if y is not None]
    return seen[-1] if seen else None


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _bytes(value: float) -> str:
    return figure(value, "bytes")


FIGURES: Mapping[str, tuple[Callable[[Dossier], float | None], Callable[[float], str]]] = {
    "steps": (_steps, figure),
    "training loss, last": (_train_loss, _loss),
    "held-out loss before": (_loss_before, _loss),
    "held-out loss, last": (_loss_now, _loss),
    "exact match before": (_match_before, _share),
    "exact match after": (_of_result("after", "exact_match"), _share),
    "answers that stop": (_of_result("after", "stop_rate"), _share),
    "tokens": (_of_result("tokens"), figure),
    "tokens a second": (_speed, figure),
    "planned memory": (lambda one: number(one.plan, "total_bytes"), _bytes),
    "peak memory": (lambda one: one.peak_bytes, _bytes),
    "trained parameters": (_of_result("trainable_parameters"), figure),
    "steps left out": (_of_result("skipped_steps"), figure),
    "time of training": (_of_result("train_seconds"), duration),
    "time in all": (_of_result("total_seconds"), duration),
}
