"""Files to tokenized rows in one pass, with a ledger that accounts for every one of them.

TRL is handed ``input_ids`` and ``labels`` and told to prepare nothing: what trains is decided by
:mod:`qlora.rendering`, what is kept is decided here. Rows stream through to tables on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import qlora
from qlora import ledger, records, rundir, sources, table, tokenizer, vault
from qlora.errors import DataError, ModelError
from qlora.intake import Input, inputs
from qlora.ledger import Account, Ledger
from qlora.packing import Layout
from qlora.preparation import Example, Preparation, Progress, require_renderable, unwatched
from qlora.records import Record
from qlora.rendering import Renderer
from qlora.settings import Recipe

MEASURED_STEPS = 200  # of an epoch, to say how well rows pack


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows ready for the trainer, what the model is asked with, and the ledger.

    ``train`` and ``held_out`` have the columns of :data:`qlora.table.SCHEMA`; ``row`` numbers them in
    ``addresses`` also after a draw.
    """

    train: Any
    held_out: Any
    addresses: Sequence[str]
    renderer: Renderer
    ledger: Ledger
    rejected: Path | None
    from_cache: bool
    cache_defect: str | None = None  # what was wrong with kept rows that were made again

    @cached_property
    def held_out_examples(self) -> list[Example]:
        """The held-out rows as records, to be asked."""
        if self.held_out is None:
            return []
        pairs = zip(self.held_out["address"], self.held_out["record"], strict=True)
        return [Example(a, records.from_json(json.loads(r))) for a, r in pairs]


def prepare(recipe: Recipe, tok: Any, vocab_size: int, progress: Progress = unwatched) -> Prepared:
    """Everything between the files and the trainer; refuses data that would not train as meant.

    Args:
        recipe: Where the data is and which part of it trains.
        tok: The base's tokenizer.
        vocab_size: Rows of the base's embedding; a token beyond it would crash on the device.
        progress: Wraps the rows as they are read (with their number, if known), to show how far it is.

    Raises:
        DataError: As :func:`tokenize`; or over-long rows cost more than ``data.max_lost_fraction`` of
            the supervised tokens (names the ``max_length`` that would keep the rest).
        ModelError: Rows need a chat template and the tokenizer has none.
    """
    prepared = tokenize(recipe, tok, vocab_size, progress)
    require_little_lost(recipe, prepared.ledger)
    return prepared


def tokenize(recipe: Recipe, tok: Any, vocab_size: int, progress: Progress = unwatched) -> Prepared:
    """Read, check, split, render, mask and tokenize the data, or find that in the cache.

    Held-out rows come from ``data.held_out``, or are those whose content hash falls below
    ``data.held_out_fraction``: equal rows fall on one side, whatever their order or file.

    Raises:
        DataError: A file that cannot be read, a format that is not clear, rows that cannot be used (all
            files are gone through first; twenty are listed), no rows left, or tokens beyond the model.
        ModelError: Rows need a chat template and the tokenizer has none, or it pads with a token that the
            model does not have.
    """
    if tok.pad_token_id is not None and tok.pad_token_id >= vocab_size:
        raise ModelError(
            f"the tokenizer pads with {tok.pad_token!r}, token {tok.pad_token_id}, but the model's "
            f"embedding has {vocab_size:,} rows. Name a pad_token of the vocabulary in its "
            "tokenizer_config.json, or none: then one is chosen."
        )
    train, held_out = inputs(recipe)
    renderer = renderer_for(recipe, tok, [*train, *held_out])

    def build(folder: Path) -> None:
        Preparation(recipe, renderer, vocab_size, folder).run(train, held_out, progress)
        names = [source.name for source in recipe.data.sources]
        settings = f"up to {recipe.data.max_length:,} tokens, loss on {recipe.data.loss_on}"
        vault.describe(folder, names[0], settings)

    keep = recipe.data.cache and all(found.digest for found in [*train, *held_out])
    folder, hit, defect = table.cached(
        _key(recipe, tok, vocab_size, train, held_out), build, keep=keep
    )
    rows = table.load(folder / "train.arrow")
    asked = table.load(folder / "held_out.arrow")
    account = Ledger.from_json(rundir.read_json(folder / "ledger.json"))
    drawn = _draw(recipe, rows, account)
    rejected = folder / "rejected.jsonl"
    return Prepared(
        train=drawn,
        held_out=asked if len(asked) else None,
        addresses=rows["address"],
        renderer=renderer,
        ledger=account,
        rejected=rejected if rejected.exists() else None,
        from_cache=hit,
        cache_defect=defect,
    )


def require_little_lost(recipe: Recipe, account: Ledger) -> None:
    """Return in silence while over-long rows cost little.

    Raises:
        DataError: They cost more than the recipe allows; says how much and what length would keep it.
    """
    over, asked = account.over_length, recipe.data
    long = over.dropped.count + over.shortened.count
    if asked.over_length == "error" and long:
        sources.fail(
            over.dropped.first,
            f"data.over_length is error and {ledger.counted(long, 'is', 'are')} longer than "
            f"data.max_length ({asked.max_length:,} tokens). Raise it, or write drop, truncate or split:",
            total=long,
        )
    if over.share_lost > asked.max_lost_fraction or not account.train.rows:
        first = (over.dropped.first or over.shortened.first or ["none"])[0]
        raise DataError(
            f"data.max_length is {asked.max_length:,}, and {ledger.counted(long, 'is', 'are')} longer "
            f"(first: {first}): "
            f"{over.share_lost:.1%} of the supervised tokens would be lost, "
            f"{asked.max_lost_fraction:.1%} may be.\n"
            f"  data.max_length={over.length_that_keeps} keeps {over.share_it_keeps:.1%} of them, if the "
            "model has as many positions; data.over_length=truncate shortens prompts; or remove those "
            "rows (`qlora data` lists them), or raise data.max_lost_fraction to train without them."
        )


def renderer_for(recipe: Recipe, tok: Any, inputs: Sequence[Input]) -> Renderer:
    """Resolve ``data.rendering`` for these inputs, once, by their first rows.

    Raises:
        ModelError: Rows need a chat template and the tokenizer has none.
        DataError: Plain rendering of rows that are conversations; or an input that cannot be read.
    """
    asked = recipe.data.rendering
    if asked == "chat":
        tokenizer.require_template(tok, "data.rendering is chat")
    forms = {found.form() for found in inputs}
    chat = asked == "chat" or (asked == "auto" and forms != {"text"} and bool(tok.chat_template))
    return Renderer(tok, chat=chat, loss_on=recipe.data.loss_on)


def token_counter(recipe: Recipe, tok: Any) -> Callable[[Record], tuple[int, int]]:
    """A function that counts a record's tokens and how many of them train, rendered as training would."""
    found, _ = inputs(recipe)
    renderer = renderer_for(recipe, tok, found)

    def count(record: Record) -> tuple[int, int]:
        require_renderable(renderer, record, found[0].origin)
        row = renderer.encode(record)
        return len(row.input_ids), row.supervised

    return count


def _key(
    recipe: Recipe, tok: Any, vocab_size: int, train: Sequence[Input], held_out: Sequence[Input]
) -> str:
    """What decides the tables: the content, how it is read and rendered, and the tokenizer."""
    asked = recipe.data
    said = {
        "qlora": qlora.__version__,
        "table": table.VERSION,
        "ledger": Ledger(sources=[Account("")]).to_json(),  # its form; another one is read otherwise
        "tokenizer": hashlib.sha256(tok.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tok.chat_template,
        "special": {name: str(token) for name, token in tok.special_tokens_map.items()},
        "vocab_size": vocab_size,
        "inputs": [
            [found.source, found.origin, found.digest, found.settings.format, found.settings.columns]
            for found in [*train, *held_out]
        ],
        "sides": [len(train), asked.held_out_fraction],
        "asked": [
            asked.on_bad_row, asked.rendering, asked.loss_on, asked.max_length, asked.over_length,
            asked.max_lost_fraction,
        ],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _draw(recipe: Recipe, rows: Any, account: Ledger) -> Any:
    """The rows of an epoch: all of them, or as many of each source as its weight allows."""
    source, lengths, supervised = (
        table.column(rows, name).astype(np.int64) for name in ("source", "length", "supervised")
    )
    chosen = np.arange(len(rows))
    if recipe.data.sources[0].weight is not None:
        chosen = _share_out(recipe, source, supervised)
    for index, one in enumerate(account.sources):
        own = chosen[source[chosen] == index]
        one.trained, one.not_drawn = len(own), int((source == index).sum()) - len(own)
        one.tokens, one.supervised_tokens = int(lengths[own].sum()), int(supervised[own].sum())
    account.train.rows = len(chosen)
    account.train.tokens = int(lengths[chosen].sum())
    account.train.supervised_tokens = int(supervised[chosen].sum())
    account.train.longest = int(lengths[chosen].max(initial=0))
    account.lengths = ledger.histogram(lengths[chosen].tolist())
    account.packing = packing_facts(recipe, lengths[chosen])
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def _share_out(recipe: Recipe, source: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """Indices such that supervised tokens stand as the weights, and no row is used twice."""
    weights = np.array([float(s.weight or 0) for s in recipe.data.sources])
    available = np.array([supervised[source == i].sum() for i in range(len(weights))])
    if not available.all():
        empty = recipe.data.sources[int(np.argmin(available))].name
        raise DataError(f"data.train gives {empty!r} a weight, but no row of it is left to train.")
    wanted = weights * (available / weights).min()
    generator = np.random.default_rng(recipe.train.seed)
    kept = []
    for index, limit in enumerate(wanted):
        own = generator.permutation(np.flatnonzero(source == index))
        sums = np.cumsum(supervised[own])
        kept.append(own[: int(np.searchsorted(sums, limit, side="left")) + 1])
    return np.sort(np.concatenate(kept))


def packing_facts(recipe: Recipe, lengths: np.ndarray) -> dict[str, Any]:
    """How the rows of an epoch's steps lie packed and padded, tried on at most 200 steps."""
    asked = recipe.train
    size = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
    order = np.random.default_rng(asked.seed).permutation(len(lengths))[: size * MEASURED_STEPS]
    steps = [lengths[order[i : i + size]].tolist() for i in range(0, len(order), size)]
    return {
        name: Layout(recipe.data.max_length, asked.per_device_train_batch_size, packed).fill(steps)
        for name, packed in (("packed", True), ("padded", False))
    }
