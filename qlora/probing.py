"""A few rows on which two forms of a model are held against each other, and what they predict there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora import data, generation, trained
from qlora.agreement import Agreement, compare
from qlora.errors import DataError, RecipeError
from qlora.preparation import Progress, unwatched
from qlora.trained import Trained

ROWS = 8
TOKENS = 128  # of a row: what it costs is a forward pass of ROWS x TOKENS tokens
POSITIONS = 32  # of a row, the last ones: where answers stand
LOGIT_BYTES = 2**27  # of all logits kept, in fp32


@dataclass(frozen=True)
class Probes:
    """Rows of tokens, and where they are from: ``held-out rows``, ``training rows`` or ``general text``."""

    rows: tuple[tuple[int, ...], ...]
    origin: str

    @torch.inference_mode()
    def logits(self, model: Any) -> torch.Tensor:
        """Next-token logits at the last positions of each row: (N, V) in fp32 on the host.

        One forward pass of all rows, padded on the left so that they end together.
        """
        text = model.config.get_text_config()
        fits = LOGIT_BYTES // (4 * text.vocab_size * len(self.rows))
        last = max(1, min(POSITIONS, fits))
        ids, mask = generation.left_padded([list(row) for row in self.rows], 0)
        place = "cpu" if model.device.type == "meta" else model.device  # whose weights stay on disk
        output = model(
            input_ids=ids.to(place),
            attention_mask=mask.to(place),
            use_cache=False,
            logits_to_keep=last,
        )
        there = mask[:, -last:].bool()
        return output.logits.float().cpu()[there]

    def agreement(self, reference: torch.Tensor, model: Any) -> Agreement:
        """A model held against logits that :meth:`logits` gave of another."""
        return compare(reference, self.logits(model))


def probes(found: Trained, progress: Progress = unwatched) -> Probes:
    """Rows that were not trained on, if the run has some and its files are still there.

    Args:
        found: The run, or a merged model that knows its data.
        progress: Shows how far the data is read, where it was not kept.
    """
    rows, origin = _own(found, progress)
    if not rows:
        rows, origin = _general(found), "general text"
    whole = [row for row in rows if len(row) <= TOKENS] or sorted(rows, key=len)
    step = max(1, len(whole) // ROWS)
    chosen = whole[::step][:ROWS]
    return Probes(tuple(tuple(row[:TOKENS]) for row in chosen), origin)


def _own(found: Trained, progress: Progress) -> tuple[list[list[int]], str]:
    if not trained.knows_data(found):
        return [], ""
    try:
        prepared = data.prepare(found.recipe, found.tok, found.config.vocab_size, progress)
    except (
        DataError,
        RecipeError,
        OSError,
    ):  # moved or changed since: it is no matter of this verdict
        return [], ""
    if prepared.held_out is not None:
        return prepared.held_out["input_ids"][:512], "held-out rows"
    return prepared.train[:512]["input_ids"], "training rows"


def _general(found: Trained) -> list[list[int]]:
    from qlora.evaluation import forgetting

    return [found.tok(one.text)["input_ids"] for one in forgetting.passages()]
