"""Rows of one optimizer step as few passes through the model, each row blind to the others.

The unit of a step is the row: which rows share a step is decided by the recipe's batch size and the
sampler, as without packing. Here they are laid out: packed into sequences of ``max_length`` tokens by
best-fit decreasing, or, where a model's attention is not proven to keep packed rows apart, in padded
batches of like length. Either way the step's loss is one sum over its supervised tokens divided by their
number, so the layout changes the speed and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qlora.attention import BOUNDED
from qlora.errors import ModelError
from qlora.kernels.attention import Bounds, in_options
from qlora.rendering import IGNORED
from qlora.settings import Recipe

FLAT = ("flash_attention_2", BOUNDED)  # attention that takes rows' bounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest logit


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows per sequence, by best-fit decreasing: at most 11/9 of the fewest sequences.

    A row goes into the fullest sequence that still holds it. Free space is kept as the bits of one
    integer, so finding that sequence is a shift and not a search.

    >>> best_fit([3, 9, 4, 2, 5], 10)
    [[1], [4, 2], [0, 3]]
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set while some bin has s tokens free
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 0 < length <= capacity, f"row {index} has {length} tokens; {capacity} fit"
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = space - length
        with_space.setdefault(left, []).append(chosen)
        spaces |= 1 << left
    return bins


@dataclass(frozen=True)
class Layout:
    """How the rows of a step become micro-batches.

    ``sequences`` of at most ``max_length`` tokens go through the model at a time. ``packed`` lays
    several rows into one; ``flat`` puts a micro-batch into one sequence without padding, for attention
    that takes rows' bounds (FlashAttention) and so never computes across them; ``maskless`` tells
    transformers to build no mask beside them.
    """

    max_length: int
    sequences: int
    packed: bool
    flat: bool = False
    maskless: bool = False

    def micro_batches(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """Micro-batches of sequences of row indices; every row once, long ones first."""
        if self.packed:
            rows = best_fit(lengths, self.max_length)
            rows.sort(key=lambda one: -sum(lengths[i] for i in one))
        else:
            rows = [[i] for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])]
        return [rows[i : i + self.sequences] for i in range(0, len(rows), self.sequences)]

    def shape(self, batch: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[int, int]:
        """(B, T) of one of :meth:`micro_batches`, before T is padded to a multiple."""
        widths = [sum(lengths[i] for i in one) for one in batch]
        return (1, sum(widths)) if self.flat else (len(batch), max(widths))

    def fill(self, steps: Iterable[Sequence[int]], multiple: int = 1) -> dict[str, float]:
        """What the layout makes of the row lengths of some steps.

        ``fill`` is how much of the sequences' room holds tokens; ``useful``, how many of the computed
        tokens are no padding; ``passes`` and ``rows``, how many of each a step has.
        """
        count = tokens = room = computed = passes = rows = 0
        for lengths in steps:
            count += 1
            rows += len(lengths)
            tokens += sum(lengths)
            for batch in self.micro_batches(lengths):
                passes += 1
                room += len(batch) * self.max_length
                sequences, width = self.shape(batch, lengths)
                computed += sequences * math.ceil(width / multiple) * multiple
        return {
            "fill": round(tokens / max(room, 1), 4),
            "useful": round(tokens / max(computed, 1), 4),
            "passes": round(passes / max(count, 1), 2),
            "rows": round(rows / max(count, 1), 2),
        }


class Collator:
    """The rows of a step as micro-batches of tensors.

    Gives ``micro_batches``, a list of mappings for the model: ``input_ids`` and ``labels`` of shape
    (B, T), and ``position_ids`` (B, T) that begin anew with each row where rows are packed, else an
    ``attention_mask`` (B, T); ``supervised_at``, the places in B x T whose next token is supervised; and in
    a flat layout the rows' bounds under transformers' names, ``cu_seq_lens_q`` and the like. Beside it,
    plain Python values that cost the device nothing: per micro-batch ``rows``, the row numbers, and
    ``tokens``, padding left out; and ``supervised``, the step's tokens that a loss is taken over. A row's
    ``input_ids`` and ``labels`` are lists or, much faster, arrays.
    """

    def __init__(self, layout: Layout, pad_token_id: int, multiple: int = 1) -> None:
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.multiple = multiple  # tensor cores want lengths in multiples of 8

    def __call__(self, step: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in step]
        chosen = self.layout.micro_batches(lengths)
        return {
            "micro_batches": [
                self._tensors([[step[i] for i in one] for one in batch]) for batch in chosen
            ],
            "rows": [[int(step[i]["row"]) for one in batch for i in one] for batch in chosen],
            "supervised": sum(
                int(np.count_nonzero(np.asarray(row["labels"])[1:] != IGNORED)) for row in step
            ),
            "tokens": [sum(lengths[i] for one in batch for i in one) for batch in chosen],
        }

    def _tensors(self, sequences: list[list[dict[str, Any]]]) -> dict[str, Any]:
        if self.layout.flat:
            sequences = [[row for one in sequences for row in one]]
        longest = max(sum(len(row["input_ids"]) for row in one) for one in sequences)
        shape = (len(sequences), math.ceil(longest / self.multiple) * self.multiple)
        # In numpy: torch would start its threads anew for the thread that collates.
        ids = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        # What is left at a sequence's end is, like a row, a stretch of its own: no row can see it.
        positions = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for index, one in enumerate(sequences):
            at = 0
            for row in one:
                end = at + len(row["input_ids"])
                ids[index, at:end] = row["input_ids"]
                labels[index, at:end] = row["labels"]
                labels[index, at] = IGNORED  # the token before it belongs to another row
                positions[index, at:end] = np.arange(end - at)
                at = end
            mask[index, :at] = 1
            positions[index, at:] = np.arange(shape[1] - at)
        third = (
            {"position_ids": positions}
            if self.layout.packed or self.layout.flat
            else {"attention_mask": mask}
        )
        at = np.flatnonzero(labels[:, 1:] != IGNORED)
        at += at // max(shape[1] - 1, 1)  # the last place of a sequence has no next token
        laid_out = {"input_ids": ids, "labels": labels, "supervised_at": at, **third}
        tensors = {name: torch.from_numpy(array) for name, array in laid_out.items()}
        if self.layout.maskless:
            tensors["attention_mask"] = torch.empty(0, 0, 0, 0, dtype=torch.bool)
        return tensors | (_bounds(positions[0]) if self.layout.flat else {})


def sample(rows: Sequence[Sequence[int]], attention: str, device: torch.device) -> dict[str, Any]:
    """A short packed batch of a few rows as the model takes it, for trying things on a loaded model."""
    short = [list(row)[:32] for row in rows]
    layout = Layout(32 * len(short), 1, packed=True, **of(attention))
    batch = Collator(layout, 0)._tensors(
        [[{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in short]]
    )
    return on(device, for_model(batch))


def of(attention: str) -> dict[str, bool]:
    """What of a layout follows from the attention in use.

    A mask of no elements tells transformers that there is nothing to build: it would look at the positions
    of every pass, and the host would wait for what it finds.
    """
    return {"flat": attention in FLAT, "maskless": attention == BOUNDED}


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _bounds(positions: np.ndarray) -> dict[str, Any]:
    """Where the rows of one sequence end, as transformers hands it on to FlashAttention."""
    offsets = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    return in_options(Bounds(torch.from_numpy(offsets), int(np.diff(offsets).max())))


def for_model(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a micro-batch the model itself takes."""
    return {k: v for k, v in batch.items() if k not in ("labels", "supervised_at")}


def choose(
    recipe: Recipe, model: Any, rows: Sequence[Sequence[int]], attention: str
) -> tuple[Layout, str]:
    """The layout the recipe asks for, and a sentence about it; packing is proven on the model first.

    Args:
        recipe: Its ``data.packing``.
        model: The loaded model, as it will train.
        rows: Token ids of a few rows of at least two tokens to try it on.
        attention: The implementation in use.

    Raises:
        ModelError: Packing is asked for and the model's attention lets packed rows see each other.
    """
    asked = recipe.data.packing
    sequences = recipe.train.per_device_train_batch_size
    padded = Layout(recipe.data.max_length, sequences, packed=False)
    if asked is False:
        return padded, "off; rows of like length are padded together"
    proof = prove(model, [rows[i % len(rows)] for i in range(3)], attention)
    if proof.holds:
        layout = Layout(recipe.data.max_length, sequences, packed=True, **of(attention))
        return layout, f"on, proven on this model: {proof}"
    if asked is True:
        raise ModelError(
            f"data.packing is true, but with this model's {attention} attention packed rows are not kept "
            f"apart: {proof}. Write data.packing: auto or false, or another model.attn_implementation."
        )
    return (
        padded,
        f"off: not proven on this model: {proof}; rows of like length are padded together",
    )


@dataclass(frozen=True)
class Proof:
    """What packing two rows did to the second one's logits, as shares of the largest logit."""

    leak: float  # when the first row's tokens are exchanged: 0 where nothing is seen of them
    difference: float  # against the row alone
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.leak == 0.0 and self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"logits move by {self.leak:.2g} when a neighbour changes (must be 0) and differ by "
            f"{self.difference:.2g} from the row alone (at most {self.tolerance:g})"
        )


def prove(model: Any, rows: Sequence[Sequence[int]], attention: str = "sdpa") -> Proof:
    """Try on the loaded model that packed rows cannot see each other.

    Three rows are packed; the logits of the second and third must not change in a bit when the first
    one's tokens do, and must be those of the rows alone, up to the order of a kernel's sums. Mode and
    random state of the model are left as they were.
    """
    device = next(model.parameters()).device
    first, *others = [list(row)[:64] for row in rows[:3]]
    changed = [*first[:1], *reversed(first[1:])]
    if changed == first:
        changed = [token - 1 if token else 1 for token in first]
    layout = Layout(192, 1, packed=True, **of(attention))

    def logits(packed: list[list[int]]) -> torch.Tensor:
        collator = Collator(layout, 0)
        batch = collator._tensors(
            [[{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in packed]]
        )
        asked = on(device, for_model(batch))
        out = model(**asked, use_cache=False)
        return out.logits[0].float()  # type: ignore[no-any-return]

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = logits([first, *others])[len(first) :]
            beside_other = logits([changed, *others])[len(first) :]
            alone = torch.cat([logits([row]) for row in others])
    finally:
        model.train(training)
    scale = float(alone.abs().max())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Proof(
        leak=float((together - beside_other).abs().max()) / scale,
        difference=float((together - alone).abs().max()) / scale,
        tolerance=TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]),
    )
