"""A first recipe for somebody's data: look at the rows, write a commented file that is ready to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import document, memory, records, rundir, sources
from qlora.cards import GIB, Card
from qlora.errors import DataError, RecipeError
from qlora.ledger import length_that_keeps
from qlora.recipe import EMBEDDED, is_local, recipe_from
from qlora.settings import Data
from qlora.shape import Shape

# Column names of well-known data sets, as ours.
ALIASES: tuple[dict[str, str], ...] = (
    {"prompt": "question", "completion": "answer"},
    {"prompt": "question", "completion": "response"},
    {"prompt": "query", "completion": "response"},
    {"instruction": "instruction", "input": "context", "output": "response"},
    {"prompt": "instruction", "completion": "response"},
    {"prompt": "prompt", "completion": "response"},
    {"prompt": "input", "completion": "output"},
    {"prompt": "source", "completion": "target"},
    {"messages": "conversation"},
    {"messages": "dialogue"},
    {"text": "content"},
    {"text": "document"},
)
CHARS_PER_TOKEN = 3.0  # English is nearer to 4; a low figure errs towards a longer max_length
Count = Callable[[records.Record], tuple[int, int]]
LOST = Data.model_fields["max_lost_fraction"].default
ROWS_MEASURED = 20_000  # more would not change the advice


@dataclass(frozen=True)
class Seen:
    """What a look at a data file gives: rows, their format, a column mapping, and their lengths."""

    rows: int
    form: records.Format
    columns: dict[str, str]
    lengths: tuple[int, ...]  # tokens a row, ascending
    supervised: tuple[int, ...]  # how many of them train, row by row
    counted: bool  # by the tokenizer, rather than estimated from characters

    def keeping(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        return self.lengths[math.ceil(share * len(self.lengths)) - 1]

    def longer_than(self, length: int) -> float:
        """The share of rows that exceed a length."""
        return sum(row > length for row in self.lengths) / len(self.lengths)

    def lost_beyond(self, length: int) -> float:
        """The share of the tokens that train which stand in rows longer than a length."""
        pairs = zip(self.lengths, self.supervised, strict=True)
        return sum(trains for row, trains in pairs if row > length) / sum(self.supervised)

    def enough(self) -> int:
        """The length that 99 % of the rows do not exceed, nor half of what a run may lose."""
        pairs = zip(self.lengths, self.supervised, strict=True)
        kept = length_that_keeps(pairs, 1 - LOST / 2)
        return self.keeping(0.99) if self.form == "text" else max(self.keeping(0.99), kept)


def look(path: Path, count: Count | None = None) -> Seen:
    """Read a data file as training would and describe it.

    Args:
        path: The file.
        count: Tokens of a record and how many of them train, where a tokenizer is at hand; otherwise
            they are estimated.

    Raises:
        DataError: Unreadable, an unknown shape, or a row that cannot be used.
    """
    rows = list(sources.stream(path))
    first = next((row for row in rows if isinstance(row, sources.Row)), None)
    if first is None:
        sources.read(path)  # raises, with what is wrong
    assert first is not None
    columns = _mapping(first.value, path.name)
    form = records.detect(records.renamed(first.value, columns), path.name)
    kept, problems = [], []
    for row in rows:
        if isinstance(row, sources.Bad):
            problems.append(f"{row.address}: {row.reason}")
            continue
        try:
            kept.append(records.parse(records.renamed(row.value, columns), form))
        except records.RowError as error:
            problems.append(f"{row.address}: {error}")
    sources.fail(
        problems,
        f"{path.name}: read as {form}; {len(problems):,} rows cannot be used. Mend or remove them (a "
        "recipe of your own can leave them out with data.on_bad_row: skip):",
    )
    measure = count or _estimate
    pairs = sorted(measure(record) for record in kept[:ROWS_MEASURED])
    lengths, supervised = zip(*pairs, strict=True)
    return Seen(len(rows), form, columns, lengths, supervised, count is not None)


def write(
    data: Path,
    model: str,
    out: Path,
    *,
    card: Card | None = None,
    config: Mapping[str, Any] | None = None,
    count: Count | None = None,
) -> tuple[Seen, memory.Plan | None]:
    """Write a recipe for a data file and a base.

    Args:
        data: A local data file.
        model: A folder, a hub id, or ``embedded:base``.
        out: The recipe to write; never overwritten.
        card: What it should fit, if known.
        config: The model's config.json, if it could be read; without it nothing is planned.
        count: Tokens of a record and how many train, if the tokenizer could be read.

    Returns:
        What was seen in the data, and the plan where there is one.

    Raises:
        RecipeError: ``out`` exists or cannot be written.
        DataError: See :func:`look`.
        DoesNotFit: Even the smallest settings need more than the card has.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already. Name another with --out, or remove it first.")
    seen = look(data, count)
    shape = None if config is None else Shape.from_config(config)
    length = _round_up(seen.enough(), 64)
    if config is not None:
        text = config.get("text_config") or config
        length = min(length, int(text.get("max_position_embeddings") or length))
    batch, plan = 1, None
    if shape is not None and card is not None:
        values = {
            "model": {"name": model},
            "data": {"train": str(data.resolve()), "columns": seen.columns},
            "run": {"name": "draft"},
        }
        batch, length, plan = _largest_that_fits(values, length, shape, card)
    text = _text(data, model, out, seen, length, batch, plan, card, shape)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_text(out, text)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written: {error.strerror}.") from None
    return seen, plan


def read_base(
    model: str, data: Path, columns: Mapping[str, str]
) -> tuple[Mapping[str, Any], Count]:
    """A base's configuration, and a function that counts a record's tokens as training would.

    Raises:
        ModelError: The base or its tokenizer cannot be read.
    """
    from qlora import data as datasets
    from qlora import loader, tokenizer

    values = {
        "model": {"name": model},
        "data": {"train": str(data.resolve()), "columns": dict(columns), "max_length": 8},
        "run": {"name": "draft"},
    }
    recipe = recipe_from(values)
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe, config.commit)
    return config.values, datasets.token_counter(recipe, tok)


def _estimate(record: records.Record) -> tuple[int, int]:
    answers = sum(len(turn.content) for turn in record.turns if turn.role == "assistant")
    chars = len(record.text) + sum(len(turn.content) for turn in record.turns)
    return int(chars / CHARS_PER_TOKEN) + 32, int(
        (len(record.text) + answers) / CHARS_PER_TOKEN
    ) + 1


def _mapping(row: Mapping[str, Any], origin: str) -> dict[str, str]:
    """No mapping where our names are there already, else the first alias that fits."""
    try:
        records.detect(row, origin)
    except DataError:
        for alias in ALIASES:
            if set(alias.values()) <= set(row):
                return {ours: theirs for ours, theirs in alias.items() if ours != theirs}
        raise
    return {}


def _largest_that_fits(
    values: dict[str, Any], length: int, shape: Shape, card: Card
) -> tuple[int, int, memory.Plan]:
    """The largest micro-batch of 16, 8, 4, 2, 1 that fits; then shorter rows, if even 1 does not."""
    while True:
        for batch in (16, 8, 4, 2, 1):
            wanted = values | {
                "data": values["data"] | {"max_length": length},
                "train": {
                    "per_device_train_batch_size": batch,
                    "gradient_accumulation_steps": 16 // batch,
                },
            }
            plan = memory.plan(recipe_from(wanted), shape, card)
            if plan.fits:
                return batch, length, plan
        if length < 128:
            memory.require_fit(plan)  # raises, with what would help
        length = length // 2


def _text(
    data: Path,
    model: str,
    out: Path,
    seen: Seen,
    length: int,
    batch: int,
    plan: memory.Plan | None,
    card: Card | None,
    shape: Shape | None,
) -> str:
    local = is_local(model) and not model.startswith(EMBEDDED)
    if plan is not None:
        fit = (
            f"# Predicted peak on {plan.card.name}: {plan.total_bytes / GIB:.1f} of "
            f"{plan.card.free_bytes / GIB:.1f} GiB."
        )
    elif card is not None:
        fit = (
            f"# Not planned for {card.name}: the model's config.json could not be read here.\n"
            "# `qlora train` checks the fit before it reads a weight."
        )
    else:
        fit = "# `qlora train` checks that it fits your card before it reads a weight."
    columns = ""
    if seen.columns:
        inside = ", ".join(f"{ours}: {theirs}" for ours, theirs in seen.columns.items())
        columns = f"  columns: {{{inside}}}  # ours: yours\n"
    how = "tokens" if seen.counted else "tokens, estimated from characters; the run counts them"
    lengths = (
        f"  # Half of the rows have at most {seen.keeping(0.5):,}, 99 % at most "
        f"{seen.keeping(0.99):,}, the longest {seen.lengths[-1]:,}\n"
        f"  # ({how}). "
        + (
            "A longer one becomes several.\n"
            if seen.form == "text"
            else "Rows longer than max_length are dropped and listed.\n"
        )
    )
    dropped = seen.longer_than(length)
    if dropped > 0.5 and seen.form != "text":
        raise DataError(f"{data.name}: {dropped:.0%} of the rows are longer than {length} tokens.")
    over = ""
    lost = seen.lost_beyond(length)
    if seen.form == "text":
        over = "  over_length: split\n"
    elif lost > LOST / 2:
        over = (
            f"  max_lost_fraction: {min(1.0, math.ceil(lost * 150) / 100)}  # {dropped:.0%} of the rows "
            f"are longer, with {lost:.1%} of what trains; by default {LOST:.0%} may be lost\n"
        )
    rate, why = _learning_rate(shape)
    steps = 16 // batch
    return f"""\
# {out.stem}: {Path(model).name if local else model} on {data.name} ({seen.rows:,} rows).
#
#   qlora train {out}
#
{fit}
# Every other setting and its default: qlora recipes show {out} --resolved
model:
  name: {_quoted(_beside(Path(model), out) if local else model)}

data:
  train: {_quoted(_beside(data, out))}
  format: {seen.form}
{columns}{lengths}  max_length: {length}
{over}  held_out_fraction: 0.05  # never trained on, chosen by content; or held_out: FILE

lora:
  r: 16  # rank matters little; all linear layers matter (QLoRA, figure 2)
  lora_alpha: 32

train:
  num_train_epochs: 1
  # {batch} x {steps} = 16 rows an optimizer step; a larger first number needs more memory.
  # `fit: auto` chooses both, and what is computed again, for the card that the run finds.
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: {steps}
  learning_rate: {rate}  # {why}
"""


def _learning_rate(shape: Shape | None) -> tuple[str, str]:
    """QLoRA's rates (section 5 and appendix B.2); far smaller models want more."""
    weights = shape.parameters if shape is not None else 8_000_000_000
    if weights < 100_000_000:
        return "4e-3", "a model this small wants ten times and more of what suits billions"
    if weights > 20_000_000_000:
        return "1e-4", "QLoRA's rate from 33B"
    return "2e-4", "QLoRA's rate to 13B"


def _quoted(name: str) -> str:
    """A text as YAML, in quotes only where it needs them."""
    return document.dump({"x": name}, width=10**6).removeprefix("x:").strip()


def _beside(path: Path, out: Path) -> str:
    """A path as a recipe names it: relative to the recipe's folder if it lies below, else absolute."""
    path, folder = path.expanduser().resolve(), out.resolve().parent
    return f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
