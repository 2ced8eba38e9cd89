"""Signals: the first one ends a training after its step, with a checkpoint; the second one at once.

Ctrl-C, a notebook's interrupt button and `kill` come as SIGINT and SIGTERM. Where no step is under way
(loading, evaluating before and after) there is nothing to finish: the first one stops at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import TrainerCallback

from qlora.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping(TrainerCallback):
    """Listens for signals around a run and ends its training between two steps.

    Attributes:
        signal: The one that came while steps were taken; None if none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._in_steps = False
        self._handlers: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are ours in this block; in a thread, where Python has none to give, nothing is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._handlers = {number: signal.signal(number, self._received) for number in SIGNALS}
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """In this block the first signal is remembered, and obeyed when the step has been taken."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # who sends a signal may not wait for long

    def _received(self, number: int, frame: Any) -> None:
        if self._in_steps and self.signal is None:
            self.signal = number
            with suppress(RuntimeError, OSError, ValueError):  # print may be what was interrupted
                print(
                    "\nqlora: stopping when this step is saved; once more stops at once",
                    file=sys.stderr,
                    flush=True,
                )
            return
        self._give_back()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            # None: it was set by other than Python, and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
