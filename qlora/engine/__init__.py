"""Many people's questions to one model: a queue, and one thread that answers them together.

Questions join and leave between two steps (:mod:`qlora.engine.slots`), each to an adapter of its own
(:mod:`qlora.engine.stacked`) and with its own sampling. What is answered does not depend on who else asks.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from qlora import hardware, tokenizer
from qlora.engine.slots import Slots
from qlora.engine.spelling import Spelling
from qlora.engine.stacked import Stacked
from qlora.errors import QLoRAError
from qlora.generation import Sampling

Reason = Literal["stop", "length", "cancelled", "timeout", "memory", "failed"]
ANSWERED: tuple[Reason, ...] = ("stop", "length")


class Busy(QLoRAError):
    """The queue is full; ``seconds`` is when to ask again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Closed(QLoRAError):
    """The engine takes no more questions."""


@dataclass(frozen=True)
class Question:
    """What is asked: the prompt's tokens, of whom, and how the answer is chosen and ended."""

    prompt: tuple[int, ...]
    adapter: str | None = None  # None: the bare base
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None  # None: another answer each time, where it is sampled
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How an answer ended. ``tokens`` are all that were chosen, the one that ended it included."""

    reason: Reason
    tokens: tuple[int, ...]
    seconds: float


Tell = Callable[[str, Ending | None], None]


class Answering:
    """A question on its way. What it says goes to ``tell``, from the engine's thread."""

    def __init__(self, question: Question, tell: Tell, tok: Any, deadline: float) -> None:
        self.question = question
        self.deadline = deadline
        self.began = time.monotonic()
        self.tokens: list[int] = []
        self.spelling = Spelling(tok, question.stop)
        self.cancelled = False
        self._tell = tell
        seed = int.from_bytes(os.urandom(7), "big") if question.seed is None else question.seed
        self._dice = torch.Generator().manual_seed(seed)

    def cancel(self) -> None:
        """Nobody waits for it any more: its row is free at the next step. May be called at any time."""
        self.cancelled = True

    def throw(self) -> float:
        """The next number of this question's own dice, in [0, 1)."""
        if self.question.sampling.temperature == 0.0:
            return 0.0
        return float(torch.rand((), generator=self._dice, dtype=torch.float64))

    def say(self, piece: str) -> None:
        if piece:
            self._tell(piece, None)

    def end(self, reason: Reason) -> Ending:
        if reason in ANSWERED:
            self.say(self.spelling.finish())
        ending = Ending(reason, tuple(self.tokens), time.monotonic() - self.began)
        self._tell("", ending)
        return ending


class Engine:
    """Owns a model from :meth:`start` to :meth:`close`; nobody else may use it in between.

    Args:
        model: The base, with no peft on it.
        tok: Its tokenizer.
        stacked: The adapters that hang on it.
        slots: How many questions are answered at once.
        waiting: How many more may wait.
        seconds: How long a question may take, waiting included.
        heard: Told of each ending.
    """

    def __init__(
        self,
        model: Any,
        tok: Any,
        stacked: Stacked,
        *,
        slots: int = 8,
        waiting: int = 8,
        seconds: float = 120.0,
        heard: Callable[[Question, Ending], None] = lambda question, ending: None,
    ) -> None:
        self.tok = tok
        self.seconds = seconds
        self.limit = slots + waiting
        self.steps: dict[int, int] = {}  # how many steps had so many rows at work
        self._slots = Slots(model, stacked, slots)
        self._stops = frozenset(tokenizer.stop_ids(tok, model.generation_config))
        self._heard = heard
        self._changed = threading.Condition()
        self._waiting: deque[Answering] = deque()
        self._rows: dict[int, Answering] = {}
        self._usual = 1.0  # seconds that an answer takes, as it was of late
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="qlora-engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Questions that wait for a row."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Questions that are being answered."""
        return len(self._rows)

    def ask(self, questions: Sequence[Question], tells: Sequence[Tell]) -> list[Answering]:
        """Take some questions, all or none; each is told to its own ``tell``, from another thread.

        Raises:
            Busy: There is no room for all of them.
            Closed: The engine was closed.
        """
        with self._changed:
            if self._closed:
                raise Closed("The server is stopping. Ask again when it is back.")
            busy = len(self._waiting) + len(self._rows)
            if busy + len(questions) > self.limit:
                raise Busy(
                    f"{busy} requests are being answered or wait, of at most {self.limit}. Ask again "
                    "later.",
                    min(60, max(1, math.ceil(self._usual))),
                )
            deadline = time.monotonic() + self.seconds
            taken = [
                Answering(question, tell, self.tok, deadline)
                for question, tell in zip(questions, tells, strict=True)
            ]
            self._waiting.extend(taken)
            self._changed.notify_all()
        return taken

    def answer(self, question: Question) -> tuple[str, Ending]:
        """The whole answer, waited for.

        Raises:
            Busy, Closed: As :meth:`ask`.
        """
        pieces: list[str] = []
        ended = threading.Event()
        endings: list[Ending] = []

        def tell(piece: str, ending: Ending | None) -> None:
            pieces.append(piece)
            if ending is not None:
                endings.append(ending)
                ended.set()

        self.ask([question], [tell])
        ended.wait()
        return "".join(pieces), endings[0]

    def close(self, *, wait: bool = True) -> None:
        """Take nothing more, answer what was taken (or, without ``wait``, leave it), and stop."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._rows.values()]
            self._changed.notify_all()
        if not wait:
            for one in left:
                one.cancel()
        if self._thread.is_alive():
            self._thread.join()

    # --- the thread

    def _run(self) -> None:
        try:
            self._work()
        finally:  # whatever ended it (a card that is lost fails at each call): nobody waits for it
            with self._changed:
                self._closed = True
                left = [*self._waiting, *self._rows.values()]
                self._waiting.clear()
                self._rows.clear()
            for one in left:
                self._ended(one, "failed")

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closed):
                    self._changed.wait()
                if self._closed and not (self._waiting or self._rows):
                    return
            self._let_go()
            self._let_in()
            if self._rows:
                self._step()

    def _let_go(self) -> None:
        """End what nobody waits for and what took too long."""
        now = time.monotonic()
        with self._changed:
            late = [one for one in self._waiting if one.cancelled or now > one.deadline]
            for one in late:
                self._waiting.remove(one)
        for one in late:
            self._ended(one, "cancelled" if one.cancelled else "timeout")
        for slot, one in list(self._rows.items()):
            if one.cancelled or now > one.deadline:
                self._leave(slot, "cancelled" if one.cancelled else "timeout")

    def _let_in(self) -> None:
        for slot in range(self._slots.count):
            if slot in self._rows:
                continue
            with self._changed:
                if not self._waiting:
                    return
                one = self._waiting.popleft()
                self._rows[slot] = one
            question = one.question
            try:
                logits = self._slots.fill(slot, question.prompt, question.adapter)
                self._take(slot, logits[None])
            except Exception as error:  # noqa: BLE001 - the others are answered, whatever it is
                self._failed([slot], error)

    def _step(self) -> None:
        rows = dict(self._rows)
        self.steps[len(rows)] = self.steps.get(len(rows), 0) + 1
        tokens = [rows[slot].tokens[-1] if slot in rows else 0 for slot in range(self._slots.count)]
        try:
            logits = self._slots.step(tokens)
            chosen = [rows[slot] for slot in rows]
            self._take_all(list(rows), chosen, logits[list(rows)])
        except Exception as error:  # noqa: BLE001 - the next ones are answered, whatever it is
            self._failed(list(rows), error)

    def _take(self, slot: int, logits: torch.Tensor) -> None:
        self._take_all([slot], [self._rows[slot]], logits)

    def _take_all(
        self, slots: Sequence[int], answers: Sequence[Answering], logits: torch.Tensor
    ) -> None:
        """Choose a token for each row and say what it says. Logits of shape (rows, V)."""
        sane = logits.isfinite().all(dim=-1).tolist()
        samplings = [one.question.sampling for one in answers]
        tokens = choose(logits, samplings, [one.throw() for one in answers])
        for slot, one, token, finite in zip(slots, answers, tokens, sane, strict=True):
            if not finite:
                self._leave(slot, "failed")
                continue
            one.tokens.append(token)
            if token in self._stops:
                self._leave(slot, "stop")
                continue
            one.say(one.spelling.feed(token))
            if one.spelling.ended:
                self._leave(slot, "stop")
            elif len(one.tokens) >= one.question.sampling.max_new_tokens:
                self._leave(slot, "length")

    def _leave(self, slot: int, reason: Reason) -> None:
        self._slots.free(slot)
        with self._changed:
            one = self._rows.pop(slot)
        self._ended(one, reason)

    def _ended(self, one: Answering, reason: Reason) -> None:
        ending = one.end(reason)
        if reason in ANSWERED:
            self._usual += 0.2 * (ending.seconds - self._usual)
        self._heard(one.question, ending)

    def _failed(self, slots: Sequence[int], error: Exception) -> None:
        reason: Reason = "memory" if hardware.ran_out_of_memory(error) else "failed"
        del error
        for slot in slots:
            if slot in self._rows:
                self._leave(slot, reason)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def choose(
    logits: torch.Tensor, samplings: Sequence[Sampling], throws: Sequence[float]
) -> list[int]:
    """A token for each row of (rows, V) logits: the likeliest at temperature 0, else the one thrown.

    Of a row that is sampled, the likeliest tokens that together hold ``top_p`` of the probability are laid
    side by side in [0, 1), as long as they are likely, and the throw falls on one of them.
    """
    tokens = logits.argmax(dim=-1)
    hot = [row for row, sampling in enumerate(samplings) if sampling.temperature != 0.0]
    if hot:
        device = logits.device

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        # Below it the likeliest is certain, and a logit by it would be infinite.
        temperatures = column([max(samplings[row].temperature, 1e-6) for row in hot])
        chances = torch.softmax(logits[hot].double() / temperatures, dim=-1)
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        before = chances.cumsum(dim=-1) - chances
        kept = before < column([samplings[row].top_p for row in hot])
        kept[:, 0] = True
        ends = (chances * kept).cumsum(dim=-1)
        thrown = column([throws[row] for row in hot]) * ends[:, -1:]
        place = torch.searchsorted(ends, thrown, right=True)
        place = torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1)
        tokens[hot] = order.gather(1, place)[:, 0]
    return [int(token) for token in tokens.tolist()]
