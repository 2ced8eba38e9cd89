"""Chat templates, rendered in a process of their own that has little time, little memory and no secrets.

A template is a program that came with a download. Jinja's sandbox keeps it from Python's objects, but
not from looping for ever or from building gigabytes, and no list of forbidden operations is complete. So a
child process renders: the kernel ends it when one rendering has used its processor time, and refuses it
memory beyond its limit, whatever the template does and on whichever row. It cannot write a file, and its
environment holds no tokens. Many renderings travel at once, so that a row costs less than it would here.

What is rendered equals, byte for byte, what ``apply_chat_template`` gives (transformers 5.23).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import marshal
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import jinja2
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser

from qlora.errors import ModelError

MAX_CHARS = 64 * 1024  # of a template
MAX_SECONDS = 2  # of processor time, for one rendering
MAX_BYTES = 256 * 2**20  # of memory, above what the process has when it starts
MAX_TEXT = 16 * 2**20  # characters of what is rendered; a row has at most a million

_FRAME = struct.Struct("<cQ")  # what a message is, and its length in bytes
_READY, _TEXT, _REFUSED, _INVALID, _LONG, _MEMORY = b"+", b"T", b"R", b"I", b"L", b"M"
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")
_CODE = "import sys; sys.path[:] = sys.argv[1:]; from qlora import templates; templates.serve()"

Variables = Mapping[str, Any]


class Refused(ValueError):
    """The template itself refuses what it is given; the text is its own."""


class _Stopped(Exception):
    """A rendering met a limit, or the process that did it is gone; the text says which."""


def require_small(template: str, origin: str) -> None:
    """Refuse a template that is larger than any that a model needs.

    Raises:
        ModelError: It has more than 64 Ki characters.
    """
    if len(template) > MAX_CHARS:
        raise ModelError(
            f"{origin}: {len(template):,} characters; at most {MAX_CHARS:,}. Name a shorter template in "
            "data.chat_template."
        )


def render(template: str, conversations: Sequence[Variables], origin: str) -> list[str | Refused]:
    """What a chat template makes of each set of variables; a refusal stands in its place.

    Args:
        template: Jinja text, as transformers reads it.
        conversations: Of each rendering ``messages``, ``tools`` and the rest, of JSON's types; what is
            of another type is shown to the template as its type's name.
        origin: What an error calls the template.

    Raises:
        ModelError: It is too large or no valid Jinja, or a rendering used up its time, its memory or the
            length of its text.
    """
    require_small(template, origin)
    with _LOCK:
        if len(conversations) > 1:
            with contextlib.suppress(_Stopped):  # one of them: which one, each alone will say
                return _exchange(template, conversations, origin)
        texts: list[str | Refused] = []
        for variables in conversations:
            try:
                texts += _exchange(template, [variables], origin)
            except _Stopped as stopped:
                raise ModelError(
                    f"{origin}: {stopped} on {_described(variables)}. A template needs milliseconds, so "
                    "this one is broken or hostile: name another in data.chat_template, or another base."
                ) from None
        return texts


# --- the side that asks

_LOCK = threading.Lock()
_worker: _Worker | None = None


def _exchange(
    template: str, conversations: Sequence[Variables], origin: str
) -> list[str | Refused]:
    global _worker
    if _worker is None or not _worker.lives():
        _worker = _Worker()
    try:
        return _worker.render(template, conversations, origin)
    except BaseException:  # an answer that nobody has read would be taken for the next one's
        _worker.close()
        _worker = None
        raise


class _Worker:
    """The process that renders, and the pipes to it."""

    def __init__(self) -> None:
        path = [*filter(None, map(os.path.abspath, sys.path)), str(Path(__file__).parent.parent)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _CODE, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
        pipes = self.process.stdin, self.process.stdout, self.process.stderr
        assert pipes[0] and pipes[1] and pipes[2]
        self.requests, self.replies, self.errors = pipes[0], pipes[1], pipes[2]
        self.owner = os.getpid()
        self.known: dict[str, int] = {}  # templates that it has, by number
        atexit.register(self.close)
        if _received(self.replies)[0] != _READY:
            said = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            self.close()
            raise ModelError(
                f"chat templates are rendered in a process of their own, which does not start: {said}. "
                f"Try {sys.executable} -c 'import jinja2'."
            )

    def lives(self) -> bool:
        """Whether it can be asked; a process forked from its owner must not."""
        return self.owner == os.getpid() and self.process.poll() is None

    def render(
        self, template: str, conversations: Sequence[Variables], origin: str
    ) -> list[str | Refused]:
        news = None if template in self.known else template
        number = self.known.setdefault(template, len(self.known))
        try:
            request = marshal.dumps((number, news, list(conversations)))
        except ValueError:  # a type that it does not know
            request = marshal.dumps((number, news, _plain(list(conversations))))
        watch = None
        if not hasattr(
            signal, "setitimer"
        ):  # Windows: no kernel watches over there, so this side does
            watch = threading.Timer(MAX_SECONDS * len(conversations), self.process.kill)
            watch.start()
        try:
            _send(self.requests, _TEXT, request)
            return [self._reply(origin) for _ in conversations]
        except OSError:
            raise _Stopped(self._fate()) from None
        finally:
            if watch is not None:
                watch.cancel()

    def _reply(self, origin: str) -> str | Refused:
        kind, said = _received(self.replies)
        text = said.decode("utf-8", "surrogatepass")
        if kind == _TEXT:
            return text
        if kind == _REFUSED:
            return Refused(text)
        if kind == _INVALID:
            raise ModelError(
                f"{origin}: no valid Jinja: {text}. Correct it, or name another in data.chat_template."
            )
        raise _Stopped(text if kind in (_LONG, _MEMORY) else self._fate())

    def _fate(self) -> str:
        """Why it gave no answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(MAX_SECONDS)
        code = self.process.poll()
        if code == -getattr(signal, "SIGPROF", 0) or not hasattr(signal, "setitimer"):
            return f"it used up its {MAX_SECONDS} seconds"
        return f"the process that renders it ended (code {code})"

    def close(self) -> None:
        """End it and forget it; in a process forked from its owner, only forget it."""
        atexit.unregister(self.close)
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process.returncode = self.process.returncode or 0
        for pipe in (self.requests, self.replies, self.errors):
            with contextlib.suppress(OSError):  # what was not sent cannot be any more
                pipe.close()


def _described(variables: Variables) -> str:
    """A conversation without what is said in it."""
    messages = variables.get("messages") or ()
    roles = [str(message.get("role")) for message in messages]
    shown = ", ".join(roles[:4]) + (", ..." if len(roles) > 4 else "")
    noun = "turn" if len(roles) == 1 else "turns"
    return f"a conversation of {len(roles):,} {noun} ({shown})"


def _send(pipe: IO[bytes], kind: bytes, said: bytes) -> None:
    pipe.write(_FRAME.pack(kind, len(said)))
    pipe.write(said)
    pipe.flush()


def _received(pipe: IO[bytes]) -> tuple[bytes, bytes]:
    """One message; at the end of the pipe, or of nonsense, the kind is empty."""
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return b"", b""
    kind, size = _FRAME.unpack(head)
    said = pipe.read(size) if size <= 2**30 else b""
    return (kind, said) if len(said) == size else (b"", b"")


# --- the side that renders


def serve() -> None:
    """Answer on standard output what is asked on standard input, until there is nothing more."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which closes the pipe
    environment = _environment()
    environment.from_string("{{ 1 }}").render()  # what is imported late is imported now
    known: dict[int, jinja2.Template] = {}
    _limit()
    gc.freeze()
    _send(replies, _READY, b"")
    while (request := _received(requests))[0]:
        try:
            number, news, conversations = marshal.loads(request[1])
            del request
            armed = -1.0
            for variables in conversations:
                if (
                    now := time.perf_counter()
                ) - armed > MAX_SECONDS / 40:  # it is not free to wind it
                    _clock(MAX_SECONDS)
                    armed = now
                kind, said = _answer(environment, known, number, news, variables)
                replies.write(_FRAME.pack(kind, len(said)))
                replies.write(said)
        except MemoryError:
            said = f"it used up its {MAX_BYTES >> 20} MB of memory".encode()
            replies.write(_FRAME.pack(_MEMORY, len(said)) + said)
        _clock(0)
        replies.flush()


def _answer(
    environment: jinja2.Environment,
    known: dict[int, jinja2.Template],
    number: int,
    news: str | None,
    variables: dict[str, Any],
) -> tuple[bytes, bytes]:
    """One rendering, with the clock running."""
    try:
        if number not in known:
            assert news is not None
            known[number] = environment.from_string(news)
        messages = [_message(_plain(message)) for message in variables["messages"]]
        rest = {name: _plain(value) for name, value in variables.items() if name != "messages"}
        text = known[number].render(messages=messages, **rest)
    except jinja2.TemplateSyntaxError as error:
        return _INVALID, f"line {error.lineno}: {error.message}".encode("utf-8", "replace")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the template made it
        name = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return _REFUSED, f"{name}{error}"[:2000].encode("utf-8", "replace")
    if len(text) > MAX_TEXT:
        return _LONG, f"it wrote {len(text):,} characters, more than {MAX_TEXT:,},".encode()
    return _TEXT, text.encode("utf-8", "surrogatepass")


def _clock(seconds: float) -> None:
    """Let the kernel end this process after so much more of its processor time; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit() -> None:
    """Take away what rendering has no use for: more memory, writing files, leaving a core dump.

    Only Linux keeps to the limit of memory: macOS accepts it without effect, Windows has none.
    """
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MAX_BYTES
    for kind, value in limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))


def _plain(value: Any) -> Any:
    """The value made of JSON's types alone; anything else becomes its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    for kind in (str, int, float):
        if isinstance(value, kind):  # of a subclass, which may have methods
            return kind(value)
    return f"<{type(value).__name__}>"


def _message(said: dict[str, Any]) -> dict[str, Any]:
    """A message without empty fields, its reasoning under each of the names that templates use."""
    said = {name: value for name, value in said.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in said:
            return {"thinking": said[name], **said, "reasoning_content": said[name]}
    return said


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for masks that are not made here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call with a body, as transformers makes of it: what is set inside stays inside.
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict``, to be called or asked for ``fromkeys``, without the class's other doors."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Names(jinja2.utils.Namespace):
    """Jinja's own, without names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:
        self, *given = args
        values = dict(*given, **fields)
        for name in values:
            _require_public(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no room for the name {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> jinja2.Environment:
    """The dialect of chat templates: Jinja's immutable sandbox with what transformers adds to it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Names,
    }
    return environment
