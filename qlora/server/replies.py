"""What goes back to a request: the engine's words as they come, in the shapes of OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qlora.engine import ANSWERED, Answering, Ending, Engine, Question, Reason, Tell
from qlora.server.protocol import Asked, Kind

LOOK_SECONDS = 0.5  # how often a request that waits looks whether its client is still there
GONE = 499  # as nginx counts those who did not wait; nobody is there to be told
REASONS: dict[Reason, tuple[int, str]] = {
    "timeout": (
        504,
        "the answer was not finished within the server's limit of {seconds:g} seconds.",
    ),
    "memory": (503, "the server ran out of memory. Ask for less, or later."),
    "failed": (500, "the model failed on this request."),
    "cancelled": (503, "the request was cancelled."),
}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error",
    429: "rate_limit_error",
}  # fmt: skip


class Refused(Exception):
    """A request that gets no answer, with its status and what to say."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error")
        fault = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fault}


class Spoken:
    """What the engine says to one request's questions, brought to the server's own thread."""

    def __init__(self, engine: Engine, questions: Sequence[Question], stream: bool) -> None:
        self.texts = [""] * len(questions)
        self.endings: list[Ending | None] = [None] * len(questions)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, str, Ending | None]] = asyncio.Queue()
        self._parts: list[list[str]] = [[] for _ in questions]
        self._stream = stream
        tells = [self._teller(index) for index in range(len(questions))]
        self._answerings: list[Answering] = engine.ask(questions, tells)

    def _teller(self, index: int) -> Tell:
        def tell(piece: str, ending: Ending | None) -> None:
            if not self._stream:  # one message an answer: the loop need not wake up for each piece
                self._parts[index].append(piece)
                if ending is None:
                    return
                piece = "".join(self._parts[index])
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece, ending))

        return tell

    async def pieces(
        self, is_gone: Callable[[], Any] | None
    ) -> AsyncIterator[tuple[int, str, Ending | None]]:
        """(question, piece, how it ended or None) until all have ended."""
        while None in self.endings:
            try:
                async with asyncio.timeout(LOOK_SECONDS if is_gone else None):
                    index, piece, ending = await self._queue.get()
            except TimeoutError:
                if is_gone is not None and await is_gone():
                    raise Refused(GONE, "the client went away.") from None
                continue
            self.texts[index] += piece
            self.endings[index] = ending
            yield index, piece, ending

    def require_answers(self, seconds: float) -> None:
        """Refuse what did not end well."""
        for ending in self.endings:
            if ending is not None and ending.reason not in ANSWERED:
                status, said = REASONS[ending.reason]
                raise Refused(status, said.format(seconds=seconds), code=ending.reason)

    def cancel(self) -> None:
        for answering in self._answerings:
            answering.cancel()


class Reply:
    """What goes back to one request. Its id and time are the same in every chunk."""

    def __init__(self, asked: Asked, kind: Kind, questions: Sequence[Question]) -> None:
        self.asked, self.kind, self.questions = asked, kind, questions
        self.id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, texts: Sequence[str], endings: Sequence[Ending | None]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, (text, ending) in enumerate(zip(texts, endings, strict=True)):
            said: dict[str, Any] = {"text": text}
            if self.kind == "chat":
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            reason = ending.reason if ending else None
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._head(name) | {"choices": choices, "usage": self._usage(endings)}

    def opening(self, index: int) -> dict[str, Any] | None:
        if self.kind != "chat":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return self._chunk(index, said, None)

    def closing(self, index: int, ending: Ending) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(index, said, ending.reason)

    def usage_alone(self, endings: Sequence[Ending | None]) -> dict[str, Any]:
        return self._head(self._chunk_name) | {"choices": [], "usage": self._usage(endings)}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        none_yet = {"usage": None} if self.asked.include_usage else {}
        return self._head(self._chunk_name) | {"choices": [choice], **none_yet}

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": name, "created": self.created, "model": self.asked.model,
        }  # fmt: skip

    def _usage(self, endings: Sequence[Ending | None]) -> dict[str, int]:
        asked = sum(len(question.prompt) for question in self.questions)
        spoken = sum(len(ending.tokens) for ending in endings if ending is not None)
        return {
            "prompt_tokens": asked,
            "completion_tokens": spoken,
            "total_tokens": asked + spoken,
        }
