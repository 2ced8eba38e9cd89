"""What a run survives on a card: memory that runs out in mid-run, and a resume with paged optimizer state.

Not a command: :mod:`gpu_suite` runs it. Without a card the first is rehearsed with an error made up.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

Train = Callable[..., Any]


@contextmanager
def hungry(step: int) -> Iterator[list[str]]:
    """Fill the card before a step's first forward pass, until relief gives its memory back.

    Gives the texts of the errors that came of it.
    """
    import torch

    from qlora import hardware, sft
    from qlora.relief import Relief

    taken: list[Any] = []
    errors: list[str] = []
    compute_loss, free, said = sft.RowTrainer.compute_loss, Relief.free, hardware.ran_out_of_memory

    def starved(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step == step - 1 and not errors and not taken:
            if not torch.cuda.is_available():
                taken.append(None)
                raise torch.OutOfMemoryError("CUDA out of memory (a rehearsal)")
            size = 2**30
            while size >= 2**12:  # all that is left, in smaller and smaller pieces
                try:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    size //= 2
        return compute_loss(self, model, *args, **kwargs)

    def fed(self: Relief) -> None:
        taken.clear()
        free(self)

    def noted(error: BaseException) -> bool:
        found = said(error)
        if found:
            errors.append(str(error).splitlines()[0])
        return found

    with (
        mock.patch.object(sft.RowTrainer, "compute_loss", starved),
        mock.patch.object(Relief, "free", fed),
        mock.patch.object(hardware, "ran_out_of_memory", noted),
    ):
        yield errors
    taken.clear()


def relieved(recipe: Any, hungry_recipe: Any, train: Train) -> dict[str, Any]:
    """The losses of a run whose third step runs out of memory, beside those of one whose does not."""

    def losses(run: Any) -> list[float]:
        return [line["loss"] for line in run.metrics() if "loss" in line]

    whole = losses(train(recipe))
    with hungry(3) as errors:
        run = train(hungry_recipe)
    pairs = zip(losses(run), whole, strict=True)
    return {
        "oom_retries": run.result["oom_retries"],
        "error": errors[0] if errors else None,
        "largest_loss_difference": max(abs(ours - other) / other for ours, other in pairs),
    }


def resumed_with_pages(recipe: Any, train: Train) -> dict[str, Any]:
    """Whether optimizer state that was paged before a resume is paged after it."""
    from qlora import sft

    made: list[Any] = []
    build = sft.build

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(build(*args, **kwargs))
        return made[-1]

    with mock.patch.object(sft, "build", kept):
        run = train(recipe)
        (run.dir / "result.json").unlink()
        shutil.rmtree(run.adapter)
        shutil.rmtree(run.checkpoints / "checkpoint-4")
        train(recipe, resume=run.dir)
    return {"paged": [_paged(trainer) for trainer in made]}


def _paged(trainer: Any) -> int:
    """How many state tensors lie in managed memory."""
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return sum(
        bool(getattr(value, "is_paged", False))
        for state in inner.state.values()
        for value in state.values()
    )
