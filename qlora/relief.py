"""A step that runs out of memory is taken again: the same rows, in smaller passes."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlora import memory
from qlora.cards import Card
from qlora.errors import DoesNotFit
from qlora.memory import Plan
from qlora.packing import Collator
from qlora.screen import GIB, Screen


@dataclass(frozen=True)
class Pass:
    """One micro-batch: what the model is given, the numbers of its rows, and their tokens."""

    batch: dict[str, Any]
    rows: list[int]
    tokens: int

    @property
    def shape(self) -> str:
        sequences, length = self.batch["input_ids"].shape
        return f"{sequences} x {length:,} tokens"


def passes(step: dict[str, Any]) -> list[Pass]:
    """The micro-batches of a step as :class:`qlora.packing.Collator` gives it."""
    parts = zip(step["micro_batches"], step["rows"], step["tokens"], strict=True)
    return [Pass(*part) for part in parts]


class Relief:
    """Halves the pass that did not fit, a few times in a run.

    Args:
        limit: How many times; ``train.oom_retries``.
        plan: What was predicted, for the autopsy.
        rows: The training rows, by number.
        collator: Lays a half of a pass out.
    """

    def __init__(
        self, limit: int, plan: Plan, card: Card, rows: Any, collator: Collator, screen: Screen
    ) -> None:
        self.limit = limit
        self.plan = plan
        self.card = card
        self.rows = rows
        self.collator = collator
        self.screen = screen
        self.times = 0

    def halve(self, steps: list[Pass], at: int, number: int, phase: str) -> list[Pass]:
        """The passes of a step with the one that did not fit in two.

        Args:
            steps: All passes of the step.
            at: Which of them did not fit.
            number: The step's.
            phase: forward or backward.

        Raises:
            DoesNotFit: It is a single row, or it has happened too often: the autopsy.
        """
        failed = steps[at]
        when = f" in step {number}, in the {phase} pass of {failed.shape}{self._used()}"
        if self.times >= self.limit or len(failed.rows) < 2:
            why = (
                "It is a single row: no smaller pass is left."
                if len(failed.rows) < 2
                else f"It is the {self.times + 1}. time; train.oom_retries allows {self.limit}."
            )
            raise DoesNotFit(f"{memory.explain_out_of_memory(self.plan, when)}\n{why}")
        self.times += 1
        halves = self._halves(failed)
        shapes = ", ".join(half.shape for half in halves)
        self.screen.say(
            "memory",
            f"the {self.card.name} ran out{when}; the step is taken again with this pass as {shapes} "
            f"({self.times} of {self.limit} times). {_way_down(self.plan)}",
        )
        return [*steps[:at], *halves, *steps[at + 1 :]]

    def _halves(self, failed: Pass) -> list[Pass]:
        """The rows of a pass in smaller ones: of half its sequences, or its only one in two."""
        sequences = failed.batch["input_ids"].shape[0]
        if sequences == 1:  # packed or flat, of several rows
            return [
                half for some in _split(failed, self.rows) for half in passes(self.collator(some))
            ]
        # By rows would not do: two halves of the rows of packed sequences may be as wide as all of them.
        layout = replace(self.collator.layout, sequences=(sequences + 1) // 2)
        collator = Collator(layout, self.collator.pad_token_id, self.collator.multiple)
        return passes(collator([self.rows[i] for i in failed.rows]))

    def free(self) -> None:
        """Give back what the failed pass still holds."""
        gc.collect()
        if self.card.kind == "cuda":
            torch.cuda.empty_cache()

    def _used(self) -> str:
        if self.card.kind != "cuda":
            return ""
        held, reserved = torch.cuda.max_memory_allocated(0), torch.cuda.memory_reserved(0)
        return f" ({held / GIB:.2f} GiB at most in tensors, {reserved / GIB:.2f} reserved)"

    def state_dict(self) -> dict[str, Any]:
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times = max(self.times, state["times"])


def _split(failed: Pass, rows: Any) -> list[list[dict[str, Any]]]:
    """Its rows in two halves of about as many tokens: the next longest row goes where fewer are."""
    halves: list[list[dict[str, Any]]] = [[], []]
    tokens = [0, 0]
    for row in sorted((rows[i] for i in failed.rows), key=lambda row: -len(row["input_ids"])):
        into = tokens.index(min(tokens))
        halves[into].append(row)
        tokens[into] += len(row["input_ids"])
    return halves


def _way_down(plan: Plan) -> str:
    if not plan.changes:
        return "A smaller data.max_length or train.per_device_train_batch_size would avoid it."
    change = plan.changes[0]
    return f"{change.key}: {change.new} would avoid it ({change.cost})."
