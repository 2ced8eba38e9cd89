"""Files to tokenized rows, with a ledger that accounts for every one of them.

The only module that touches datasets. TRL is handed ``input_ids`` and ``labels`` and told to prepare
nothing: what trains is decided by :mod:`qlora.rendering`, what is kept is decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from qlora import hub, records, sources, tokenizer
from qlora.errors import DataError
from qlora.recipe import HUB, local_path
from qlora.records import Record
from qlora.rendering import IGNORED, Encoded, Renderer
from qlora.settings import Recipe
from qlora.sources import Row


@dataclass(frozen=True)
class Example:
    """A record with its address in the data."""

    address: str
    record: Record


@dataclass
class Ledger:
    """What became of every row: read, dropped and why, held out, its tokens, what trains."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    rendering: str = ""
    rows_read: int = 0
    duplicates: int = 0
    too_long: list[str] = field(default_factory=list)
    leaked: int = 0
    train: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON for ``data.json``; the addresses of dropped rows are all listed."""
        return dict(vars(self))


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows ready for the trainer, the held-out examples for generation, and the ledger."""

    train: Dataset
    held_out: Dataset | None
    held_out_examples: list[Example]
    renderer: Renderer
    addresses: list[str]
    ledger: Ledger


def load_examples(recipe: Recipe, ledger: Ledger) -> tuple[list[Example], list[Example]]:
    """Read, parse and split the data: (train, held out). Announces formats in the ledger.

    Held-out rows come from ``data.held_out``, or are those whose content hash falls below
    ``data.held_out_fraction``: equal rows fall on one side, whatever their order or file.

    Raises:
        DataError: A file or row that cannot be read, a format that is not clear, or no rows left.
    """
    train = [example for name in recipe.data.train for example in _read(name, recipe, ledger)]
    ledger.rows_read = len(train)
    hashes = [records.fingerprint(example.record) for example in train]
    ledger.duplicates = len(hashes) - len(set(hashes))
    if recipe.data.held_out is not None:
        held_out = _read(recipe.data.held_out, recipe, ledger)
        withheld = {records.fingerprint(example.record) for example in held_out}
        kept = [e for e, h in zip(train, hashes, strict=True) if h not in withheld]
        ledger.leaked = len(train) - len(kept)  # a row that is asked later must not be learned now
        train = kept
    else:
        limit = int(recipe.data.held_out_fraction * 2**64)
        side = [int(h[:16], 16) < limit for h in hashes]
        held_out = [e for e, out in zip(train, side, strict=True) if out]
        train = [e for e, out in zip(train, side, strict=True) if not out]
    if not train:
        raise DataError(
            f"data.train holds {ledger.rows_read:,} rows and all of them are held out. "
            "Bring more rows or lower data.held_out_fraction."
        )
    return train, held_out


def prepare(
    recipe: Recipe,
    tok: Any,
    vocab_size: int,
    progress: Callable[[Sequence[Example], str], Iterable[Example]] = lambda rows, _: rows,
) -> Prepared:
    """Everything between the files and the trainer.

    Args:
        recipe: Where the data is and which part of it trains.
        tok: The base's tokenizer.
        vocab_size: Rows of the base's embedding; a token beyond it would crash on the device.
        progress: Wraps the rows while they are encoded, to show how far it is.

    Raises:
        DataError: As :func:`load_examples`; or a row without a trained token, too many rows longer
            than ``data.max_length`` (names the length that keeps 99 %), or a token outside the model.
    """
    ledger = Ledger()
    train, held_out = load_examples(recipe, ledger)
    renderer = renderer_for(recipe, tok, [*train, *held_out])
    ledger.rendering = "chat" if renderer.chat else "plain"
    limit = recipe.data.max_length

    def encoded(examples: list[Example], label: str) -> list[tuple[Example, Encoded]]:
        problems: list[str] = []
        rows = []
        for example in progress(examples, label):
            try:
                rows.append((example, renderer.encode(example.record)))
            except DataError as error:
                problems.append(f"{example.address}: {error}")
        sources.fail(problems, f"{len(problems):,} rows cannot be rendered and masked:")
        largest = max((max(row.input_ids) for _, row in rows), default=0)
        if largest >= vocab_size:
            raise DataError(
                f"the tokenizer gives token {largest}, but the model's embedding has {vocab_size:,} "
                "rows. The tokenizer belongs to another model."
            )
        return rows

    pairs = encoded(train, "tokenizing")
    kept = [(e, row) for e, row in pairs if len(row.input_ids) <= limit]
    ledger.too_long = [e.address for e, row in pairs if len(row.input_ids) > limit]
    if not kept or len(ledger.too_long) > recipe.data.max_drop_fraction * len(pairs):
        lengths = sorted(len(row.input_ids) for _, row in pairs)
        enough = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
        raise DataError(
            f"data.max_length is {limit}, but {len(ledger.too_long):,} of {len(pairs):,} rows are "
            f"longer (the longest has {lengths[-1]:,} tokens; first: {ledger.too_long[0]}).\n"
            f"  data.max_length={enough} keeps 99 % of them; or raise data.max_drop_fraction "
            f"(now {recipe.data.max_drop_fraction:g}) to train without them."
        )
    kept_held_out = [
        (e, row)
        for e, row in encoded(held_out, "tokenizing held-out")
        if len(row.input_ids) <= limit
    ]
    ledger.train = _totals([row for _, row in kept])
    ledger.held_out = _totals([row for _, row in kept_held_out])
    return Prepared(
        train=_dataset([row for _, row in kept]),
        held_out=_dataset([row for _, row in kept_held_out]) if kept_held_out else None,
        held_out_examples=[e for e, _ in kept_held_out],
        renderer=renderer,
        addresses=[e.address for e, _ in kept],
        ledger=ledger,
    )


def renderer_for(recipe: Recipe, tok: Any, examples: Sequence[Example]) -> Renderer:
    """Resolve ``data.rendering`` for these rows, once.

    Raises:
        ModelError: Rows need a chat template and the tokenizer has none.
        DataError: Plain rendering of rows that are conversations.
    """
    asked = recipe.data.rendering
    needing = next((e for e in examples if e.record.needs_template), None)
    if asked == "plain" and needing is not None:
        raise DataError(
            f"data.rendering is plain, but {needing.address} holds a conversation, which only a chat "
            "template can render. Write data.rendering: chat."
        )
    if asked == "chat":
        tokenizer.require_template(tok, "data.rendering is chat")
    elif asked == "auto" and needing is not None:
        tokenizer.require_template(tok, f"{needing.address} holds a conversation")
    talks = any(example.record.turns for example in examples)
    chat = asked == "chat" or (asked == "auto" and talks and bool(tok.chat_template))
    return Renderer(tok, chat=chat, completion_only=recipe.data.completion_only_loss)


def token_counter(recipe: Recipe, tok: Any) -> Callable[[Record], int]:
    """A function that counts the tokens of the recipe's records, rendered as training would."""
    first, _ = load_examples(recipe, Ledger())
    renderer = renderer_for(recipe, tok, first)
    return lambda record: len(renderer.encode(record).input_ids)


class Collator:
    """Pads a batch on the right and keeps its row numbers, so that a bad batch can be named.

    Gives ``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T), and two plain Python values
    that cost the device nothing: ``rows``, a list of B row numbers, and ``tokens``, padding left out.
    """

    def __init__(self, pad_token_id: int, multiple: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = multiple  # tensor cores want lengths in multiples of 8

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        width = -(-longest // self.multiple) * self.multiple
        filled = torch.full((len(batch), width), self.pad_token_id)
        labels = torch.full((len(batch), width), IGNORED)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for index, row in enumerate(batch):
            length = len(row["input_ids"])
            filled[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            mask[index, :length] = 1
        return {
            "input_ids": filled,
            "attention_mask": mask,
            "labels": labels,
            "rows": [row["row"] for row in batch],
            "tokens": sum(len(row["input_ids"]) for row in batch),
        }


def _read(name: str, recipe: Recipe, ledger: Ledger) -> list[Example]:
    """The examples of one source; every row must have the format of the first."""
    rows = _hub_rows(name, recipe) if name.startswith(HUB) else sources.read(local_path(name))
    origin = rows[0].origin
    mapping = recipe.data.columns
    unknown = sorted(set(mapping) - set(records.COLUMNS))
    if unknown:
        raise DataError(
            f"data.columns maps {unknown[0]!r}, which is not one of our columns: "
            f"{', '.join(records.COLUMNS)}. Write ours first: {{prompt: question}}."
        )
    absent = sorted(set(mapping.values()) - set(rows[0].value))
    if absent:
        raise DataError(
            f"data.columns names {absent[0]!r}, but {origin} has the columns "
            f"{', '.join(rows[0].value)}."
        )
    first = records.renamed(rows[0].value, mapping)
    form = recipe.data.format
    form = records.detect(first, origin) if form == "auto" else form
    examples: list[Example] = []
    problems: list[str] = []
    for row in rows:
        try:
            record = records.parse(records.renamed(row.value, mapping), form)
            examples.append(Example(row.address, record))
        except records.RowError as error:
            problems.append(f"{row.address}: {error}")
    unusable = f"{len(problems):,} of {len(rows):,} rows cannot be used"
    sources.fail(problems, f"{origin}: read as {form}; {unusable}. Mend or remove them:")
    ledger.sources.append({"name": name, "format": form, "rows": len(rows)})
    return examples


def _hub_rows(name: str, recipe: Recipe) -> list[Row]:
    repository = name.removeprefix(HUB)
    problem = hub.unreachable()
    try:
        table = load_dataset(repository, split=recipe.data.split, revision=recipe.data.revision)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = problem or str(error).splitlines()[0]
        raise DataError(
            f"data.train names {name!r} (split {recipe.data.split!r}), which cannot be read: {reason}. "
            "Check its name and split, or download it and name the files."
        ) from None
    rows = [Row(name, number, dict(value)) for number, value in enumerate(table, start=1)]
    if not rows:
        raise DataError(f"data.train names {name!r}, which has no rows in {recipe.data.split!r}.")
    return rows


def _totals(rows: Sequence[Encoded]) -> dict[str, int]:
    lengths = Counter(len(row.input_ids) for row in rows)
    return {
        "rows": len(rows),
        "tokens": sum(length * times for length, times in lengths.items()),
        "supervised_tokens": sum(row.supervised for row in rows),
        "longest": max(lengths, default=0),
    }


def _dataset(rows: Sequence[Encoded]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "row": list(range(len(rows))),
        }
    )
