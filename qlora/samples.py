"""A few held-out rows answered while the model learns: what a loss does not show."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from qlora import answering, hardware
from qlora.data import Prepared
from qlora.screen import Screen
from qlora.settings import Recipe

CHARS = 2000  # of a text that is kept in the metrics
SHOWN = 60  # of a text on the screen


class Samples(TrainerCallback):
    """Answers the first held-out rows at every evaluation of a training, greedily.

    Weights, random state and modes stay as they are, so the run is bit-identical to one without. The
    answers go to the metrics and in one line to the screen, and to no tracker: they hold rows' text.

    Args:
        recipe: Its ``eval.samples`` says how many; 0 for none.
        prepared: Whose held-out rows are asked.
        screen: Where the first answer is shown.
        record: Takes the line for ``metrics.jsonl``.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        screen: Screen,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        wanted = recipe.eval.model_copy(update={"generate": recipe.eval.samples})
        self.recipe = recipe.model_copy(update={"eval": wanted})
        self.prepared = prepared
        self.screen = screen
        self.record = record
        self._is_training = False  # an evaluation before or after it is somebody else's

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_training = self.recipe.eval.samples > 0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_training = False

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self._is_training:
            return
        try:
            found = answering.answer(
                model, self.prepared.renderer, self.prepared.held_out_examples, self.recipe
            )
        except (RuntimeError, MemoryError) as error:
            if not hardware.ran_out_of_memory(error):
                raise
            found = None
        if found is None:  # outside of the handler, which holds on to the tensors
            self._is_training = False
            hardware.let_go()
            self.screen.say("samples", "no memory is left to answer rows: none are until the end")
            return
        if not found.examples:
            return
        told = [
            {
                "row": example.address,
                "question": example.record.turns[-2].content[:CHARS],
                "expected": expected[:CHARS],
                "answer": answer.text[:CHARS],
                "stopped": answer.stopped,
                "right": right,
            }
            for example, expected, answer, right in zip(
                found.examples, found.expected, found.answers, found.right, strict=True
            )
        ]
        self.record({"step": state.global_step, "time": round(time.time(), 3), "samples": told})
        first = told[0]
        self.screen.say(
            "samples",
            f"step {state.global_step}: {sum(found.right)}/{len(found.right)} right; "
            f"{_short(first['question'])} -> {_short(first['answer'])}",
        )


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= SHOWN else f"{words[: SHOWN - 3]}..."
