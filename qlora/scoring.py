"""How surprised a model is by rows: the loss of each one, and of the token that ends an answer.

The loss of training is one figure for all rows of a step. Here every row keeps its own, so that two models
can be compared row by row, and the figures are those of the trainer's held-out loss when they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora import hardware
from qlora.errors import DoesNotFit, ModelError
from qlora.rendering import IGNORED
from qlora.step import CHUNK_BYTES

BATCH_TOKENS = 4096  # of a pass, padding included
AT_ONCE = CHUNK_BYTES * 4  # bytes of fp32 logits that are held at a time
Progress = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True)
class RowScore:
    """What a model made of one row, in nats.

    Attributes:
        nll: The negative log-likelihoods of the row's supervised tokens, summed.
        tokens: How many those are.
        closing_nll: Of those among them that end an answer.
        closing_tokens: How many of those there are.
    """

    nll: float
    tokens: int
    closing_nll: float = 0.0
    closing_tokens: int = 0


def mean(scores: Iterable[RowScore]) -> float | None:
    """Nats a supervised token, every token of every row alike; None where there is none.

    >>> mean([RowScore(6.0, 3), RowScore(1.0, 4)])
    1.0
    """
    return _mean([(score.nll, score.tokens) for score in scores])


def closing_mean(scores: Iterable[RowScore]) -> float | None:
    """Nats a token that ends an answer; None where none is supervised."""
    return _mean([(score.closing_nll, score.closing_tokens) for score in scores])


def score(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    closing: int | Collection[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = lambda starts, _: starts,
    label: str = "scoring",
) -> list[RowScore]:
    """The loss of every row, in their order, whatever rows share a pass.

    The model's mode and the random state stay as they are. Where a pass runs out of memory its rows go
    through one by one.

    Args:
        model: A causal model of transformers, with an adapter of peft or without.
        rows: With ``input_ids`` and ``labels`` (-100 where nothing is supervised), of equal length.
        pad_token_id: Fills up the shorter rows of a pass; no figure depends on it.
        closing: The token, or the tokens, that end an answer.
        batch_tokens: Of a pass at most, padding included, unless one row is longer.
        progress: Wraps the passes, to show how far it is.
        label: What it is told that this is.

    Raises:
        DoesNotFit: One row alone needs more memory than there is.
        ModelError: A loss is not a finite number.
    """
    ends = {closing} if isinstance(closing, int) else set(closing or ())
    lengths = [len(row["input_ids"]) for row in rows]
    batches = batched(lengths, batch_tokens)
    found: dict[int, RowScore] = {}
    was_training = model.training
    model.eval()
    try:
        for at in progress(range(len(batches)), label):
            chosen = batches[at]
            for index, one in zip(
                chosen, _scores(model, [rows[i] for i in chosen], pad_token_id, ends), strict=True
            ):
                if not math.isfinite(one.nll):
                    raise ModelError(
                        f"the loss of row {index + 1} is {one.nll}, not a finite number: the model "
                        "overflows in this dtype (on a T4 some do in fp16), or its weights are broken. "
                        "Try quant.compute_dtype: float32."
                    )
                found[index] = one
    finally:
        model.train(was_training)
    return [found[index] for index in range(len(rows))]


def batched(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of rows by pass, long ones first, each with at most so many tokens when it is padded.

    >>> batched([2, 9, 3, 3], 6)
    [[1], [2, 3], [0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[batches[-1][0]] if batches else 0
        if not batches or (len(batches[-1]) + 1) * width > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _scores(
    model: Any, rows: Sequence[Mapping[str, Any]], pad_token_id: int, ends: set[int]
) -> list[RowScore]:
    try:
        return _one_pass(model, rows, pad_token_id, ends)
    except (RuntimeError, MemoryError) as error:
        if not hardware.ran_out_of_memory(error):
            raise
    # Outside of the handler: the error holds on to the frames, and they to the tensors.
    if len(rows) == 1:
        raise DoesNotFit(
            f"A row of {len(rows[0]['input_ids']):,} tokens needs more memory than is free to be scored. "
            "End what else uses the card, or leave out such rows."
        )
    hardware.let_go()
    return [one for row in rows for one in _scores(model, [row], pad_token_id, ends)]


def _one_pass(
    model: Any, rows: Sequence[Mapping[str, Any]], pad_token_id: int, ends: set[int]
) -> list[RowScore]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = model.device
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
        mask[index, :length] = 1
    at = (labels[:, 1:] != IGNORED).nonzero()  # (N, 2): a row, and a place whose next token counts
    wanted = labels[at[:, 0], at[:, 1] + 1]
    with torch.no_grad():
        losses = _losses(base, ids.to(device), mask.to(device), at.to(device), wanted.to(device))
    sums = torch.zeros((4, len(rows)), dtype=torch.float64)
    closes = torch.isin(wanted, torch.tensor(sorted(ends), dtype=wanted.dtype))
    for kind, (values, chosen) in enumerate(
        ((losses, slice(None)), (losses.new_ones(len(losses)), slice(None)),
         (losses, closes), (losses.new_ones(len(losses)), closes))
    ):  # fmt: skip
        sums[kind].index_add_(0, at[chosen, 0], values[chosen])
    return [
        RowScore(nll, int(tokens), closing_nll, int(closing))
        for nll, tokens, closing_nll, closing in sums.T.tolist()
    ]


def _losses(
    base: Any, ids: torch.Tensor, mask: torch.Tensor, at: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The loss (N,) of each wanted token, computed in fp32, on the host in fp64.

    The layers run once; the logits are made for some of the wanted tokens at a time and let go.
    """
    head = base.get_output_embeddings()
    dtype = getattr(head, "dtype", None) or head.weight.dtype
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        out = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = out.last_hidden_state[at[:, 0], at[:, 1]]
        del out
        size = max(1, AT_ONCE // (4 * base.config.get_text_config().vocab_size))
        found = [torch.empty(0, dtype=torch.float64)]
        for start in range(0, len(hidden), size):
            some = slice(start, start + size)
            logits = logits_of(base, hidden[some]).float()
            losses = functional.cross_entropy(logits, wanted[some], reduction="none")
            found.append(losses.double().cpu())
            del logits
    return torch.cat(found)


def logits_of(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) of the last hidden states (N, H), by the model's own code after its layers.

    Families scale, cap or bias their logits each in its own way: what the model does to them is not written
    here a second time. Its layers are stood in for by what they would give.

    Args:
        base: The causal model, without the wrapper of peft.
        hidden: After the last norm.
    """
    with _given(base.base_model, hidden[None]):
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        logits: torch.Tensor = base(input_ids=ids, use_cache=False).logits
    return logits[0]


@contextmanager
def _given(trunk: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """In this block the layers compute nothing and give these hidden states (1, N, H)."""
    before = trunk.__dict__.get("forward")
    trunk.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del trunk.forward
        else:
            trunk.forward = before  # type: ignore[method-assign]


def _mean(pairs: Sequence[tuple[float, int]]) -> float | None:
    count = sum(tokens for _, tokens in pairs)
    return math.fsum(nll for nll, _ in pairs) / count if count else None
