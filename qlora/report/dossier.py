"""What the files of a run say, read without believing them: it may be unfinished, torn or a stranger's.

Nothing here raises for what a file holds. What cannot be read is told in :attr:`Dossier.missing`; of what
can be read, numbers are finite and texts are cut and without secrets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora import document, redact, rundir
from qlora.errors import CheckpointError, QLoRAError
from qlora.places import expanded
from qlora.rundir import Run
from qlora.settings import Recipe

READ_BYTES = 2**26  # of a file: what a run writes is far smaller
LINE_CHARS = 2**20  # of a line of metrics
LINES = 1_000_000  # of metrics
LARGEST = 1e30  # a figure beyond it is none
TEXT_CHARS = 1800  # of a text; of a longer one a run keeps 2000, which may end in half a secret
FILE_CHARS = 200_000  # of all texts of a file together
LISTED = 20  # of a list
DEPTH = 12

Steps = list[tuple[float, float | None]]  # a figure by steps; None: it was no number
FILES = (
    "recipe.yaml",
    "metrics.jsonl",
    "result.json",
    "plan.json",
    "data.json",
    "environment.json",
)
_PATH = re.compile(r"^(?:~|/|[A-Za-z]:[\\/]|\\\\|\.\.?/).*[\\/]([^\\/]+)[\\/]*$")


@dataclass(frozen=True)
class Sampled:
    """One held-out question, what was expected, and an answer."""

    question: str
    expected: str
    text: str
    right: bool


@dataclass(frozen=True)
class Measured:
    """What ``before.json`` or ``after.json`` says; ``of`` are digests of the rows and of the base."""

    of: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)  # the recipe's eval
    loss: float | None = None
    answers: int = 0
    right: int = 0
    samples: Sequence[Sampled] = ()


@dataclass
class Curves:
    """What ``metrics.jsonl`` says, by steps."""

    loss: Steps = field(default_factory=list)
    held_out: Steps = field(default_factory=list)
    rate: Steps = field(default_factory=list)
    speed: Steps = field(default_factory=list)  # tokens a second
    memory: Steps = field(default_factory=list)  # bytes
    peak: Steps = field(default_factory=list)
    held: dict[str, float] = field(
        default_factory=dict
    )  # bytes by what holds them, at the last line
    skipped: list[tuple[float, str]] = field(default_factory=list)
    step: int = 0  # the last one
    epoch: float | None = None
    lines: int = 0


@dataclass(frozen=True)
class Dossier:
    """A run as its files tell it."""

    run: Run
    name: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    result: Mapping[str, Any]
    merged: Mapping[str, Any]
    before: Measured
    after: Measured
    curves: Curves
    missing: Sequence[str]

    @property
    def is_finished(self) -> bool:
        """Whether there is a result that can be read."""
        return bool(self.result)

    @property
    def title(self) -> str:
        """The name of the run's recipe."""
        return text(self.recipe, "run", "name") or self.run.dir.parent.name or "run"

    @property
    def peak_bytes(self) -> float | None:
        """The highest point of memory that was seen."""
        seen = [value for _, value in self.curves.peak if value is not None]
        told = number(self.result, "peak_memory_bytes")
        return max(seen, default=None) if told is None else told

    @property
    def checkpoint(self) -> str:
        """The newest checkpoint that has its manifest; its files are not read."""
        named = []
        for path in _listed(self.run.checkpoints):
            step = re.fullmatch(r"checkpoint-(\d{1,12})", path.name)
            if step and (path / rundir.MANIFEST).is_file():
                named.append((int(step[1]), path.name))
        return max(named)[1] if named else ""


def find(where: str | Path) -> Run:
    """The run at a path, or the newest below it; one whose recipe is lost is found by its other files.

    Raises:
        CheckpointError: Nothing there is a run.
    """
    path = expanded(where)
    if any((path / name).is_file() for name in FILES[:3]):
        return Run(path)
    return rundir.open_run(where)


def read(run: Run) -> Dossier:
    """Everything the run's own files say."""
    missing: list[str] = []
    result = _object(run.dir / "result.json", missing, "")
    if not result and not missing and run.is_complete:
        missing.append("result.json is empty")
    found = {
        name: _object(run.dir / f"{name}.json", missing, why)
        for name, why in (
            ("plan", "what was predicted is not known"),
            ("environment", "what it ran on is not known"),
            ("data", "what it was fed is not known"),
        )
    }
    before = _measured(run.dir / "before.json", missing, "the base's answers are not known")
    # A run that was resumed after it had nearly ended may hold those of an earlier end.
    why = "the tuned model's answers are not known" if result else None
    after = _measured(run.dir / "after.json", missing, why)
    return Dossier(
        run=run,
        name=f"{run.dir.resolve().parent.name}/{run.dir.resolve().name}"[:200],
        recipe=_recipe(run.recipe_file, missing),
        result=result,
        merged=_object(run.dir / "merged" / "merge.json", missing, None),
        before=before,
        after=after if result else Measured(),
        curves=_curves(run.dir / "metrics.jsonl", missing),
        missing=missing,
        **found,
    )


def number(value: Any, *path: str) -> float | None:
    """The figure at a path of nested objects; None if there is none, or it is not finite.

    >>> number({"a": {"b": 2}}, "a", "b"), number({"a": True}, "a"), number({"a": 1e400}, "a")
    (2.0, None, None)
    """
    found = at(value, *path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        known = float(found)
    except OverflowError:
        return None
    return known if math.isfinite(known) and abs(known) < LARGEST else None


def text(value: Any, *path: str) -> str:
    """The text at a path of nested objects; empty if there is none."""
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def at(value: Any, *path: str) -> Any:
    """What lies at a path of nested objects; None if nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values by their addresses, ``section.key``."""
    return {
        f"{section}.{key}": value
        for section, values in recipe.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    }


def defaults() -> dict[str, Any]:
    """The value of every setting that has a default, by its address."""
    found = {}
    for section, about in Recipe.model_fields.items():
        model: Any = about.annotation
        for key, setting in model.model_fields.items():
            if not setting.is_required():
                value = setting.get_default(call_default_factory=True)
                found[f"{section}.{key}"] = json.loads(json.dumps(value))
    return found


def unusual(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says that the defaults do not."""
    usual = defaults()
    return {
        key: value
        for key, value in fields(recipe).items()
        if key not in usual or usual[key] != value
    }


def placeless(value: Any) -> Any:
    """A value without the folders of the machine it was written on: a page may be handed on.

    >>> placeless(["/home/me/rows.jsonl", "Qwen/Qwen3-8B", {"path": "C:\\\\data\\\\a.csv"}])
    ['…/rows.jsonl', 'Qwen/Qwen3-8B', {'path': '…/a.csv'}]
    """
    if isinstance(value, Mapping):
        return {key: placeless(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(inner) for inner in value]
    found = _PATH.match(value) if isinstance(value, str) else None
    return f"…/{found[1]}" if found else value


def shown(value: Any) -> str:
    """A setting as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- files


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return


def _defect(path: Path) -> str:
    """Why a file is not opened: it is not there, not a file, somebody's link, or far too large."""
    try:
        if path.is_symlink():
            return "a link, which is not followed"
        if not path.exists():
            return "missing"
        if not path.is_file():
            return "not a file"
        size = path.stat().st_size
    except OSError as error:
        return f"not readable ({error.strerror})"
    if size > READ_BYTES and path.name != "metrics.jsonl":
        return f"{size / 2**20:,.0f} MiB, too large to be of a run"
    return ""


def _object(path: Path, missing: list[str], why: str | None) -> dict[str, Any]:
    """The object in a JSON file; empty if it cannot be read, and told, unless it may well be absent."""
    defect = _defect(path)
    if not defect:
        try:
            return _trimmed(rundir.read_json(path))
        except CheckpointError:
            defect = "damaged"
    if defect == "missing" and not why:
        return {}
    missing.append(f"{path.name} is {defect}{': ' + why if why else ''}")
    return {}


def _trimmed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with long texts and lists cut, and without secrets."""
    room = [FILE_CHARS]

    def cut(one: Any, depth: int) -> Any:
        if isinstance(one, str):
            kept = _cut(one, min(TEXT_CHARS, max(0, room[0])))
            room[0] -= len(kept)
            return kept
        room[0] -= 8
        if depth > DEPTH or room[0] < 0:
            return None
        if isinstance(one, Mapping):
            pairs = ((cut(str(k), depth), cut(v, depth + 1)) for k, v in list(one.items())[:200])
            return dict(pairs)
        return [cut(v, depth + 1) for v in one[:LISTED]] if isinstance(one, list) else one

    return {str(key)[:200]: cut(inner, 0) for key, inner in list(value.items())[:200]}


def _recipe(path: Path, missing: list[str]) -> dict[str, Any]:
    defect = _defect(path)
    if not defect:
        try:
            content = path.read_text(encoding="utf-8")
            return _trimmed(document.parse(content, path.name).value)
        except (QLoRAError, ValueError, OSError, RecursionError):
            defect = "damaged"
    missing.append(f"{path.name} is {defect}: what was asked for is not known")
    return {}


def _measured(path: Path, missing: list[str], why: str | None) -> Measured:
    defect = _defect(path)
    if not defect:
        try:
            kept = rundir.read_json(path)
        except CheckpointError:
            defect = "damaged"
    if defect:
        if why is not None:
            missing.append(f"{path.name} is {defect}: {why}")
        return Measured()
    answers = kept.get("answers")
    listed = [one for one in answers if isinstance(one, dict)] if isinstance(answers, list) else []
    small = _trimmed({"of": kept.get("of"), "eval": kept.get("eval")})
    return Measured(
        of={k: v for k, v in (small["of"] or {}).items() if isinstance(v, str)}
        if isinstance(small["of"], dict)
        else {},
        asked=small["eval"] if isinstance(small["eval"], dict) else {},
        loss=number(kept, "loss"),
        answers=len(listed),
        right=sum(one.get("right") is True for one in listed),
        samples=list(_samples(listed)),
    )


def _samples(answers: Iterable[Mapping[str, Any]]) -> Iterator[Sampled]:
    """Those that stand with their question."""
    for one in answers:
        if not isinstance(one.get("question"), str):
            return
        question, wanted, said = (
            _cut(text(one, key), TEXT_CHARS) for key in ("question", "expected", "text")
        )
        yield Sampled(question, wanted, said, one.get("right") is True)


def _cut(said: str, chars: int) -> str:
    """The beginning of a text, without secrets: cleaned before it is cut, or half of one would stay."""
    if len(said) < redact.MIN_CHARS:
        return said[:chars]
    return redact.clean(said[: chars + TEXT_CHARS])[:chars]


def _curves(path: Path, missing: list[str]) -> Curves:
    curves, torn = Curves(), 0
    defect = _defect(path)
    if defect:
        missing.append(f"{path.name} is {defect}: there are no curves")
        return curves
    for line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        step = number(value, "step")
        if step is None or step < 0:
            torn += 1
            continue
        _add(curves, step, value)
    if torn:
        missing.append(f"{path.name} is damaged: {torn:,} of its lines cannot be read")
    for one in (
        curves.loss,
        curves.held_out,
        curves.rate,
        curves.speed,
        curves.memory,
        curves.peak,
    ):
        one.sort(key=lambda point: point[0])
    return curves


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for _ in range(LINES):
                line = file.readline(LINE_CHARS)
                if not line.endswith("\n"):
                    return  # the last one, which is being written, or is none of ours
                if line.strip():
                    yield line
    except OSError:
        return


def _add(curves: Curves, step: float, line: Mapping[str, Any]) -> None:
    curves.lines += 1
    curves.step = max(curves.step, int(step))
    epoch = number(line, "epoch")
    curves.epoch = curves.epoch if epoch is None else epoch
    for points, key in (
        (curves.loss, "loss"), (curves.held_out, "eval_loss"), (curves.rate, "learning_rate"),
        (curves.speed, "tokens_per_second"), (curves.memory, "memory_bytes"),
        (curves.peak, "peak_memory_bytes"),
    ):  # fmt: skip
        if key in line:
            points.append((step, number(line, key)))
    if "skipped" in line:
        what = _cut(text(line, "skipped"), 300) or "left out"
        curves.skipped.append((step, what))
    held = at(line, "memory")
    if isinstance(held, Mapping):
        sizes = {str(k)[:40]: number(held, k) for k in list(held)[:20]}
        curves.held = {name: size for name, size in sizes.items() if size is not None}
