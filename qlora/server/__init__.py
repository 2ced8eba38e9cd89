"""An OpenAI-shaped endpoint for tuned models. The only module that touches a web framework.

What a request may do is little: it fetches nothing, writes nothing, is not logged, and is refused where it
is too large, too long, too many or not understood. A failure is told in a sentence, never as a stack trace.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qlora import __version__
from qlora.address import host_name, is_loopback
from qlora.engine import ANSWERED, Busy, Closed, Ending, Question
from qlora.server import protocol, schemas
from qlora.server.meter import Meter
from qlora.server.protocol import BadRequest, Kind
from qlora.server.replies import Refused, Reply, Spoken
from qlora.server.serving import Serving, Unknown

DISCARDED_BYTES = 2**25  # of a body too large, read to its end: the client then hears why
DRAIN_SECONDS = 30


def create(
    serving: Serving, meter: Meter, keys: Sequence[str] = (), loopback: bool = True
) -> FastAPI:
    """The application. With keys each request but for ``/health`` must carry one of them."""
    app = FastAPI(title="qlora", version=__version__, docs_url=None, redoc_url=None)
    desk = _Desk(serving, meter)

    def offer(path: str, kind: Kind) -> None:
        async def answer(request: Request) -> Response:
            return await desk.answer(request, kind)

        app.add_api_route(
            path, answer, methods=["POST"], name=kind, operation_id=kind, response_class=JSONResponse,
            responses={
                200: _content(schemas.ANSWER[kind], events=True),
                **_faults(400, 404, 408, 413, 429, 500, 503, 504, *([401] if keys else [])),
            },
            openapi_extra={
                "requestBody": {
                    "required": True, "content": {"application/json": {"schema": schemas.request(kind)}},
                }
            },
        )  # fmt: skip

    offer("/v1/chat/completions", "chat")
    offer("/v1/completions", "completion")
    shut = _faults(400, *([401] if keys else []))

    @app.get("/v1/models", responses={200: _content(schemas.MODELS), **shut})
    async def models() -> Response:
        listed = [*serving.aliases, *serving.voices]
        shown = [
            {"id": name, "object": "model", "created": serving.began, "owned_by": "qlora"}
            for name in listed
        ]
        return JSONResponse({"object": "list", "data": shown})

    @app.get(
        "/health", responses={200: _content(schemas.HEALTH), 503: _content(schemas.HEALTH), **shut}
    )
    async def health() -> Response:
        alive = serving.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": {"text/plain": {"schema": schemas.TEXT}}}, **shut},
    )
    async def metrics() -> Response:
        return PlainTextResponse(desk.metrics(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> Response:
        return _response(error)

    @app.exception_handler(HTTPException)
    async def miss(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path[:200]} is nothing that this server does."
        headers = dict(error.headers) if error.headers else None
        return _response(Refused(error.status_code, said, headers=headers))

    app.add_middleware(_Gate, meter=meter, keys=tuple(keys), loopback=loopback)
    return app


class _Gate:
    """Lets nobody in who came by another name than this machine's, or without a key where one is needed.

    A page in a browser can have its own name point to 127.0.0.1; what it cannot change is the Host header
    in which that name stands.
    """

    def __init__(self, app: Any, meter: Meter, keys: tuple[str, ...], loopback: bool) -> None:
        self.app, self.meter = app, meter
        self.keys, self.loopback = [key.encode() for key in keys], loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = None
        if self.loopback and not is_loopback(
            host_name(headers.get(b"host", b"").decode("latin-1"))
        ):
            refused = Refused(
                400,
                "the Host header is not of this machine. Ask http://127.0.0.1 or http://localhost.",
            )
        elif self.keys and scope["path"] != "/health" and not self._has_key(headers):
            refused = Refused(
                401, "a key is needed: Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if refused is None:
            await self.app(scope, receive, send)
            return
        self.meter.add("qlora_requests_total", status=str(refused.status), model="?")
        await _response(refused)(scope, receive, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        known = [hmac.compare_digest(given.strip(), key) for key in self.keys]  # all, always
        return scheme.lower() == b"bearer" and any(known)


class _Desk:
    """Takes requests to the engine, and its pieces back to who asked."""

    def __init__(self, serving: Serving, meter: Meter) -> None:
        self.serving, self.meter, self.limits = serving, meter, serving.limits

    async def answer(self, request: Request, kind: Kind) -> Response:
        began, name = time.monotonic(), "?"
        status = 500
        try:
            asked = protocol.read(await self._body(request), kind)
            name = self.serving.voice(asked.model).name
            questions = await asyncio.to_thread(self.serving.questions, asked)
            spoken = Spoken(self.serving.engine, questions, asked.stream)
            reply = Reply(asked, kind, questions)
            if asked.stream:
                status = 200
                events = self._events(spoken, reply, name)
                return StreamingResponse(events, media_type="text/event-stream", headers=_UNKEPT)
            try:
                async for _ in spoken.pieces(request.is_disconnected):
                    pass
                spoken.require_answers(self.limits.seconds)
            finally:
                spoken.cancel()
            status = 200
            return JSONResponse(reply.whole(spoken.texts, spoken.endings))
        except Unknown as error:
            status = 404
            raise Refused(404, str(error), error.param, "model_not_found") from None
        except BadRequest as error:
            status = 400
            raise Refused(400, str(error), error.param) from None
        except Busy as error:
            status = 429
            raise Refused(
                429, str(error), code="queue_full", headers={"Retry-After": str(error.seconds)}
            ) from None
        except Closed as error:
            status = 503
            raise Refused(503, str(error)) from None
        except Refused as error:
            status = error.status
            raise
        except Exception as error:  # noqa: BLE001 - a client is told a sentence, whatever it is
            print(f"qlora: a request failed with {type(error).__name__}", file=sys.stderr)
            raise Refused(500, "the server failed on this request.") from None
        finally:
            self.meter.add("qlora_requests_total", status=str(status), model=name)
            if not (status == 200 and asked.stream):
                self.meter.time("qlora_request_seconds", time.monotonic() - began, model=name)

    async def _body(self, request: Request) -> bytes:
        """The request's body.

        Raises:
            BadRequest: It is not said to be JSON.
            Refused: It is larger than the limit, or does not come.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            kind != "application/json"
        ):  # the only one that a foreign page in a browser cannot send unasked
            raise BadRequest("the request must have Content-Type: application/json.")
        limit, size, kept = self.limits.body_bytes, 0, []
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= limit:
                        kept.append(chunk)
                    elif size > DISCARDED_BYTES:
                        break
        except TimeoutError:
            raise Refused(408, "the body of the request did not come in time.") from None
        if size > limit:
            raise Refused(
                413, f"the body has more than {limit:,} bytes, the most that is taken. Send less.",
                code="body_too_large",
            )  # fmt: skip
        return b"".join(kept)

    async def _events(self, spoken: Spoken, reply: Reply, name: str) -> AsyncIterator[str]:
        """Server-sent events. Whoever goes away in the middle frees the rows of his answer."""
        began = time.monotonic()
        try:
            for index in range(len(spoken.endings)):
                if (first := reply.opening(index)) is not None:
                    yield _event(first)
            async for index, piece, ending in spoken.pieces(None):
                if piece:
                    yield _event(reply.piece(index, piece))
                if ending is not None:
                    if ending.reason not in ANSWERED:
                        spoken.require_answers(self.limits.seconds)
                    yield _event(reply.closing(index, ending))
            if reply.asked.include_usage:
                yield _event(reply.usage_alone(spoken.endings))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.body())
        finally:
            spoken.cancel()
            self.meter.time("qlora_request_seconds", time.monotonic() - began, model=name)

    def metrics(self) -> str:
        engine = self.serving.engine
        sizes = dict(engine.steps)  # a copy: the engine goes on
        steps = sum(sizes.values())
        rows = sum(size * count for size, count in sizes.items())
        return self.meter.text(
            {
                "qlora_queue_length": engine.queued,
                "qlora_active_requests": engine.active,
                "qlora_decode_steps": steps,
                "qlora_decode_rows": rows,
                "qlora_mean_batch_size": rows / steps if steps else 0.0,
            }
        )


_UNKEPT = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _response(refused: Refused) -> Response:
    return JSONResponse(refused.body(), refused.status, refused.headers)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _content(schema: dict[str, Any], *, events: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if events:
        content["text/event-stream"] = {"schema": schemas.EVENT}
    return {"content": content}


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": "An error, as OpenAI's.", **_content(schemas.ERROR)}
        for status in statuses
    }


# --- the process


def heard_by(meter: Meter) -> Callable[[Question, Ending], None]:
    """What counts each ending: tokens in and out by adapter, and how answers ended."""

    def heard(question: Question, ending: Ending) -> None:
        name = question.adapter or "base"
        meter.add("qlora_prompt_tokens_total", len(question.prompt), model=name)
        meter.add("qlora_completion_tokens_total", len(ending.tokens), model=name)
        meter.add("qlora_answers_total", reason=ending.reason, model=name)

    return heard


def run(serving: Serving, meter: Meter, sock: socket.socket, keys: Sequence[str]) -> int:
    """Serve until SIGTERM (then 0) or Ctrl-C (then 130); those being answered get their answers.

    A second signal does not wait for them.
    """
    host = sock.getsockname()[0]
    server = make(create(serving, meter, keys, is_loopback(host)))
    caught: list[int] = []

    def stop(number: int, frame: Any) -> None:
        server.force_exit = bool(caught)
        server.should_exit = True
        caught.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    serving.engine.start()
    try:
        asyncio.run(server._serve(sockets=[sock]))  # `serve` would put its own signals over ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        serving.engine.close(wait=not server.force_exit)
    return 130 if signal.SIGINT in caught else 0


def make(app: FastAPI) -> uvicorn.Server:
    """uvicorn, which says nothing by itself and logs no request."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, log_level="critical", access_log=False, lifespan="off",
            server_header=False, timeout_graceful_shutdown=DRAIN_SECONDS, ws="none",
        )
    )  # fmt: skip
