"""The next optimizer step's batch, prepared while the present one trains.

A step's rows are a millisecond of work, so what prepares them must cost less than that. A worker process
of torch's DataLoader does not: to hand over a step of a dozen micro-batches takes longer than to make it,
a process that is spawned (Windows, macOS) needs seconds to start in every epoch and evaluation, and an
error comes back as another one. A thread hands over nothing, and numpy and Arrow do its work in so few
calls that it hardly takes the interpreter from the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device

READ = ("input_ids", "labels", "row")  # columns of a table of rows


class Prefetcher:
    """Loaders whose next batch is read, collated and pinned in a background thread.

    accelerate's loader asks for a batch before it gives out the one before, so that the thread has a
    training step's time for it. Which rows make a batch is drawn as ever, by the loader's own sampler in
    the thread that asks: their order and the random state stay the same.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._next: _Pending | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Batches are prepared ahead in this block, which may be inside another one.

        When the outermost is left, in whatever way, no thread runs any more.
        """
        if self._thread is not None:
            yield
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qlora-prefetch")
        try:
            yield
        finally:
            thread, self._thread = self._thread, None
            thread.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Have the next batch prepared now; without a call it is made when it is needed.

        The time for it is when the device has work in hand: before that, the thread would only hold the
        interpreter up.
        """
        pending, self._next = self._next, None
        if pending is not None and self._thread is not None:
            pending.begin(self._thread)

    def loader(self, loader: Any) -> Any:
        """A loader of the same batches as accelerate's over a table of rows, prepared ahead.

        With ``pin_memory`` they are pinned. What reading or collating raises is raised as it is, when its
        batch is needed.
        """
        rows = loader.dataset.with_format("numpy", columns=list(READ))

        def prepare(numbers: list[int]) -> Any:
            batch = loader.collate_fn(rows.__getitems__(numbers))
            return _pinned(batch) if loader.pin_memory else batch

        def start(numbers: list[int]) -> _Pending:
            self._next = _Pending(partial(prepare, numbers))
            return self._next

        return DataLoaderShard(
            range(len(rows)),
            device=loader.device,
            rng_types=loader.rng_types,
            synchronized_generator=loader.synchronized_generator,
            batch_sampler=loader.batch_sampler,
            collate_fn=start,
            generator=loader.generator,
        )


class _Pending:
    """A batch to come, which accelerate moves to its device like any tensor."""

    def __init__(self, prepare: Callable[[], Any]) -> None:
        self._prepare = prepare
        self._begun: Future[Any] | None = None
        self._is_needed = True

    def begin(self, thread: ThreadPoolExecutor) -> None:
        if self._is_needed:
            self._begun = thread.submit(self._prepare)

    def to(self, device: Any, **_: Any) -> Any:
        """The batch itself, on a device; a copy of pinned memory is not waited for.

        That is not left to accelerate's ``non_blocking``: 1.15 forgets it when a run is resumed.
        """
        self._is_needed = False
        batch = self._prepare() if self._begun is None else self._begun.result()
        return send_to_device(batch, device, non_blocking=True)


def _pinned(value: Any) -> Any:
    """A batch with its tensors in page-locked memory, from which a card copies by itself."""
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: _pinned(one) for key, one in value.items()}
    return [_pinned(one) for one in value] if isinstance(value, list) else value
