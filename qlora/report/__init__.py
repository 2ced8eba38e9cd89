"""A run told on one page that needs nothing else: what came out, curves, data, answers, settings.

The page is made of the run's own files, so it can be made again at any time, of an unfinished run and of
one that somebody else has sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora import accounting, page, rundir
from qlora.chart import CURVE, Chart, Series, figure
from qlora.errors import CheckpointError
from qlora.ledger import Ledger
from qlora.page import Answers, Block, Commands, Fold, Grid, Listing, Section
from qlora.report import dossier
from qlora.report.dossier import Dossier, number, text
from qlora.report.findings import verdicts
from qlora.rundir import Run
from qlora.screen import Screen, duration

PAGE = "report.html"  # in the run's directory
PAGE_BYTES = 2**20  # no page is larger
SAMPLES = 24  # answers that are shown


@dataclass(frozen=True)
class Room:
    """How much a page may hold: points of a curve, samples, characters of a text."""

    points: int = CURVE
    samples: int = SAMPLES
    chars: int = dossier.TEXT_CHARS
    details: bool = True  # ledger and settings


# A page that came out too large is made again with less.
ROOMS = (Room(), Room(200, 12, 500), Room(100, 6, 160), Room(40, 0, 80, False))


def leave(run: Run, screen: Screen) -> None:
    """Write the page into a run that has ended, and say where; failing to is told and fails nothing."""
    try:
        screen.say("report", str(write(dossier.read(run))))
    except Exception as error:  # noqa: BLE001 - the run is done and proven: no page may undo that
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        screen.say("report", f"not written: {why}")


def write(told: Dossier, path: Path | None = None) -> Path:
    """Write the page, whole or not at all; by default into the run.

    Raises:
        CheckpointError: It cannot be written.
    """
    path = told.run.dir / PAGE if path is None else path
    put(path, html(told), "--out")
    return path


def put(path: Path, content: str, option: str) -> None:
    """Write a page; ``option`` is how another file is named.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        with suppress(FileNotFoundError):
            # The folder may have come from somebody else: a link here would be written through.
            path.with_name(f".{path.name}.part").unlink()
        rundir.write_text(path, content)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}. Name another file with {option}."
        ) from None


def tell(told: Sequence[Section], console: Console) -> None:
    """Print sections on a terminal, or into a file."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    shown = page.text(told, width=max(60, console.width), coloured=coloured)
    console.print(shown, soft_wrap=True, end="")


def html(told: Dossier) -> str:
    """The page; at most :data:`PAGE_BYTES` of UTF-8."""
    return within(
        PAGE_BYTES, lambda room: page.document(f"{told.title}: a run", sections(told, room))
    )


def within(limit: int, make: Callable[[Room], str]) -> str:
    """What ``make`` gives for the first of :data:`ROOMS` with which it is small enough."""
    made = ""
    for room in ROOMS:
        made = make(room)
        if len(made.encode()) <= limit:
            break
    return made


def sections(told: Dossier, room: Room = ROOMS[0]) -> list[Section]:
    """The page's sections; what the run does not say is left out, and named at the top."""
    found = [summary(told)]
    if room != ROOMS[0]:
        found[0] = Section(found[0].title, [*found[0].blocks, _SHORTENED])
    for title, blocks in (
        ("loss and learning rate", _curves(told, room)),
        ("memory", _memory(told, room)),
        ("data", _data(told, room)),
        ("held-out rows, asked before and after", _samples(told, room)),
        ("settings", _settings(told, room)),
        ("versions and card", _versions(told)),
        ("how to do it again", _again(told)),
    ):
        if blocks:
            found.append(Section(title, blocks))
    return found


_SHORTENED = Listing("", ["Shortened, so that the page stays below 1 MB."])


def summary(told: Dossier) -> Section:
    """The verdicts, and the run in figures."""
    base = text(told.environment, "base", "name") or text(told.recipe, "model", "name")
    card = text(told.environment, "card", "name")
    of = ", ".join(
        part
        for part in (base and f"base {dossier.placeless(base)}", card and f"trained on {card}")
        if part
    )
    blocks: list[Block] = [Listing("", [of])] if of else []
    blocks += verdicts(told)
    figures = _figures(told)
    if figures:
        blocks.append(Grid([""], figures))
    return Section(told.name, blocks)


def _figures(told: Dossier) -> list[tuple[str, str]]:
    result = told.result
    tokens, seconds = number(result, "tokens"), number(result, "train_seconds")
    trained, all_of = (number(result, f"{what}_parameters") for what in ("trainable", "total"))
    found = [
        ("mean training loss", _said(number(result, "train_loss"))),
        ("tokens trained on", _said(tokens)),
        ("tokens a second", _said(tokens / seconds if tokens and seconds else None)),
        ("waited for data", _said(number(result, "data_wait"), "{:.1%} of the time")),
        ("trained parameters", _said(trained)),
        ("of all parameters", _said(trained / all_of if trained and all_of else None, "{:.2%}")),
        ("in all", duration(number(result, "total_seconds") or 0)),
    ]
    return [(name, said) for name, said in found if said] if told.is_finished else []


def _said(value: float | None, form: str = "") -> str:
    if value is None:
        return ""
    return form.format(value) if form else figure(value)


def _curves(told: Dossier, room: Room) -> list[Block]:
    curves = told.curves
    if not curves.lines:
        return []
    few = len(curves.loss) <= 40
    loss = Chart(
        "loss, in nats a supervised token",
        [
            Series("training, mean since the line before", curves.loss, dots=few),
            Series("held out", curves.held_out, loose=True),
        ],
        marks=curves.skipped,
        steep=True,
        most=room.points,
    )
    rate = Chart("learning rate", [Series("learning rate", curves.rate)], most=room.points)
    speed = Chart("tokens a second", [Series("tokens a second", curves.speed)], most=room.points)
    return [loss, rate, Fold("speed", [speed])]


def _memory(told: Dossier, room: Room) -> list[Block]:
    curves, planned = told.curves, number(told.plan, "total_bytes")
    card = told.environment.get("card")
    is_cpu = text(card, "kind") == "cpu"
    free = None if is_cpu else number(card, "free_bytes")
    what = "of the process, Python and its libraries included" if is_cpu else "of the card"
    levels = [
        (name, value)
        for name, value in (
            ("planned for the model and its training" if is_cpu else "planned", planned),
            ("free at the start", free),
        )
        if value
    ]
    blocks: list[Block] = []
    if curves.memory or curves.peak:
        series = [
            Series("in use at the log line", curves.memory),
            Series("highest so far", curves.peak),
        ]
        blocks.append(
            Chart(f"memory {what}", series, unit="bytes", levels=levels, most=room.points)
        )
    terms = told.plan.get("terms")
    terms = terms if isinstance(terms, Mapping) else {}
    same = {"base_nf4": "base"}  # the plan's name, and that of the metrics
    rows, left = [], dict(curves.held)
    for name in terms:
        held = left.pop(same.get(name, name), None)
        if number(terms, name) or held:
            rows.append((_words(name), _bytes(number(terms, name)), _bytes(held)))
    rows += [(_words(name), "-", _bytes(held)) for name, held in left.items()]
    if rows:
        head = ["planned for the highest point", "held at the last log line"]
        blocks.append(Fold("what holds it", [Grid(head, rows)]))
    return blocks


def _words(name: str) -> str:
    return name.replace("_", " ").replace("nf4", "(NF4)")


def _bytes(value: float | None) -> str:
    return "-" if value is None else figure(value, "bytes")


def _data(told: Dossier, room: Room) -> list[Block]:
    if not told.data or not room.details:
        return []
    try:
        blocks = accounting.recorded(Ledger.from_json(_shorter(told.data, room.chars)))
        page.body(
            [Section("", blocks)]
        )  # what is no figure is found out where it is written as one
        return blocks
    except (TypeError, KeyError, ValueError, AttributeError, LookupError, ArithmeticError):
        return [Listing("", ["data.json is damaged, or of another version of qlora."])]


def _shorter(value: Any, chars: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _shorter(inner, chars) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shorter(inner, chars) for inner in value]
    return value[:chars] if isinstance(value, str) else value


def _samples(told: Dossier, room: Room) -> list[Block]:
    before, after = told.before, told.after
    known = after.samples or before.samples
    if not room.samples or not known:
        return []
    of = after.answers or before.answers
    shown = known[: room.samples]
    blocks: list[Block] = []
    if of > len(shown):
        blocks.append(Listing("", [f"the first {len(shown):,} of {of:,}"]))
    for n, one in enumerate(shown):
        was = before.samples[n] if n < len(before.samples) else None
        if was is not None and was.question != one.question:
            was = None  # of other rows
        texts: list[tuple[str, str, page.Mark | None]] = [
            ("expected", one.expected[: room.chars], None)
        ]
        if was is not None:
            texts.append(("base", was.text[: room.chars], _mark(was.right)))
        if after.samples:
            texts.append(("tuned", one.text[: room.chars], _mark(one.right)))
        blocks.append(Answers(f"row {n + 1}", one.question[: room.chars], texts))
    return [*blocks[:5], Fold(f"{len(blocks) - 5} more", blocks[5:])] if blocks[5:] else blocks


def _mark(right: bool) -> page.Mark:
    return "good" if right else "bad"


def _settings(told: Dossier, room: Room) -> list[Block]:
    if not told.recipe or not room.details:
        return []
    unusual = dossier.placeless(dossier.unusual(told.recipe))
    rows = [(key, dossier.shown(value)[: room.chars]) for key, value in unusual.items()]
    blocks: list[Block] = [
        Fold(
            f"what differs from the defaults: {len(rows):,} settings",
            [Grid(["value"], rows, words=True)],
        )
    ]
    reasons = told.plan.get("reasons")
    if isinstance(reasons, Sequence) and reasons:
        chosen = [str(reason)[: room.chars] for reason in reasons]
        blocks.append(Fold("chosen for this card", [Listing("", chosen)]))
    return blocks


def _versions(told: Dossier) -> list[Block]:
    found = told.environment
    if not found:
        return []
    packages = found.get("packages")
    rows = [("qlora", text(found, "qlora")), ("python", text(found, "python"))]
    rows += [(str(k), str(v)) for k, v in packages.items()] if isinstance(packages, Mapping) else []
    rows += [("cuda", text(found, "cuda")), ("platform", text(found, "platform"))]
    rows += [(f"card {k}", _card(k, v)) for k, v in _pairs(found.get("card"))]
    rows += [(f"base {k}", str(dossier.placeless(v))) for k, v in _pairs(found.get("base"))]
    rows += [(f"digest of the {_words(k)}", v) for k, v in told.before.of.items()]
    rows = [(name[:60], said[:200]) for name, said in rows if said][:80]
    return [
        Fold(
            f"qlora {text(found, 'qlora')}, {text(found, 'card', 'name')}",
            [Grid([""], rows, words=True)],
        )
    ]


def _pairs(value: Any) -> list[tuple[str, Any]]:
    found = value.items() if isinstance(value, Mapping) else ()
    return [(str(k), v) for k, v in found if v is not None]


def _card(name: str, value: Any) -> str:
    size = number({"": value}, "")
    return figure(size, "bytes") if name.endswith("_bytes") and size is not None else str(value)


def _again(told: Dossier) -> list[Block]:
    version = text(told.environment, "qlora")
    lines = [f"pip install qlora=={version}"] if version else []
    lines.append("qlora train recipe.yaml")
    blocks: list[Block] = [
        Listing("", ["In the directory of this run, where its recipe.yaml lies:"]),
        Commands(lines),
        Listing(
            "",
            [
                "The same recipe, versions, card and data take the same steps; on another card, or with "
                "other versions, the figures differ a little.",
            ],
        ),
    ]
    if told.is_finished:
        then = ["qlora chat .", "qlora evaluate .", "qlora merge . --out merged"]
        return [*blocks, Listing("", ["What to do with it:"]), Commands(then)]
    on = "qlora train recipe.yaml --resume ."
    return [*blocks, Listing("", ["To go on where it stopped:"]), Commands([on])]
