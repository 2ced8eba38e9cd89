"""Whether the Hugging Face hub can be asked, found out in seconds, and what is here without it.

The libraries retry for most of a minute before they say that there is no network, and then say it in a
traceback. Here one small request is made first, with a deadline over all of it: the name, the connection
and the answer.
"""

from __future__ import annotations

import contextlib
import os
import queue
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from qlora import redact
from qlora.errors import DataError, ModelError
from qlora.recipe import HUB, is_local
from qlora.settings import Recipe

TIMEOUT_SECONDS = 4.0
BROKEN = frozenset({429, 500, 502, 503, 504})  # what a server says that can do nothing now
MAX_ANSWER_BYTES = 64 * 1024
NAMED = 8  # cached things that a message names

_given_up: str | None = None  # why the libraries are told to ask the cache alone, while they are


@dataclass(frozen=True)
class Answer:
    """What came back of one request: a status and the beginning of its body, or why nothing did."""

    status: int = 0
    body: bytes = b""
    problem: str | None = None


def unreachable() -> str | None:
    """Why the hub cannot be asked, in words, or None if it answers.

    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and proxies are respected. A refusal such as 401 is an answer: the
    libraries say better what it means for one model. Within :func:`door` it is not asked twice in vain.
    """
    if _given_up:
        return _given_up
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE forbids asking the hub"
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        host, _ = urlsplit(endpoint).hostname, urlsplit(endpoint).port
    except ValueError as error:
        return f"HF_ENDPOINT is no address ({error})"
    if not host or urlsplit(endpoint).scheme not in ("http", "https"):
        return "HF_ENDPOINT is no address (it must begin with https://)"
    answer = ask(f"{endpoint}/api/models?limit=1", TIMEOUT_SECONDS)
    if answer.problem:
        return f"{host} cannot be reached ({answer.problem})"
    if answer.status in BROKEN:
        return f"{host} answers with the error {answer.status}"
    return None


@contextlib.contextmanager
def door(recipe: Recipe) -> Iterator[str | None]:
    """A block in which a dead hub costs seconds: what is cached is used, without asking for anything.

    The libraries retry each of some ten files for half a minute, even those that lie in the cache. Gives
    what to tell of it, or None if the hub answers or the recipe does not need it. Doors may be nested.

    Raises:
        ModelError: The base is not cached and the hub cannot be asked; names what is cached.
        DataError: The same of a data set of ``data.train``.
    """
    model = None if is_local(recipe.model.name) else recipe.model.name
    sets = [s for s in recipe.data.sources if s.name.startswith(HUB)]
    problem = unreachable() if model or sets else None
    if problem is None:
        yield None
        return
    if model and not _has_model(model, recipe.model.revision):
        raise ModelError(
            f"model.name is {model!r}: not a folder here, not in the local hub cache, and {problem}. "
            f"{cached_words('models')} Check the spelling of a local path, or the network, or download "
            "the model first."
        )
    for source in sets:
        if not _has_dataset(source.name.removeprefix(HUB)):
            raise DataError(
                f"data.train names {source.name!r} (split {source.split!r}), which cannot be read: not in "
                f"the local cache, and {problem}. {cached_words('datasets')} Check its name and the "
                "network, or download it and name the files."
            )
    with _cache_alone(problem):
        yield f"{problem}; what is cached is used"


@contextlib.contextmanager
def _cache_alone(problem: str) -> Iterator[None]:
    """The libraries behave as with ``HF_HUB_OFFLINE=1``, which they read only when they are imported."""
    from huggingface_hub import constants

    global _given_up
    before, told = constants.HF_HUB_OFFLINE, _given_up
    constants.HF_HUB_OFFLINE, _given_up = True, problem
    config = sys.modules.get("datasets.config")
    of_datasets = getattr(config, "HF_HUB_OFFLINE", before)
    if config is not None:
        vars(config)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, _given_up = before, told
        if (config := sys.modules.get("datasets.config")) is not None:  # it may be new
            vars(config)["HF_HUB_OFFLINE"] = of_datasets


def ask(
    url: str, seconds: float, *, headers: Mapping[str, str] | None = None, data: bytes | None = None
) -> Answer:
    """One request, through the proxy that is set; its answer, or the lack of one after ``seconds``.

    Never raises. No redirection is followed, so that a header with a key goes to one place only. A
    certificate that cannot be checked here is no problem of the network: it is an empty answer.
    """
    # In a thread, because a timeout of sockets covers neither names nor a server that dribbles.
    found: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def work() -> None:
        found.put(_ask(url, seconds, headers or {}, data))

    threading.Thread(target=work, daemon=True, name="qlora-ask").start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return Answer(problem=f"no answer in {seconds:.0f} seconds")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


def _ask(url: str, seconds: float, headers: Mapping[str, str], data: bytes | None) -> Answer:
    try:
        request = urllib.request.Request(url, data=data, headers={"User-Agent": "qlora", **headers})
        with urllib.request.build_opener(_Stay).open(request, timeout=seconds) as response:
            return Answer(response.status, response.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code)
    except Exception as error:  # noqa: BLE001 - in a thread of its own; whatever it is, there is no answer
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Answer()
        if isinstance(cause, TimeoutError):
            return Answer(problem=f"no answer in {seconds:.0f} seconds")
        words = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        return Answer(problem=redact.clean(words))


def cached(kind: str) -> list[str]:
    """Hub ids that lie in the local cache, sorted; ``kind`` is ``models`` or ``datasets``."""
    place, prefix = (
        Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser(),
        f"{kind}--",
    )
    try:
        return sorted(
            path.name.removeprefix(prefix).replace("--", "/")
            for path in place.iterdir()
            if path.name.startswith(prefix) and any(path.glob("snapshots/*/*"))
        )
    except OSError:
        return []


def cached_words(kind: str) -> str:
    """A sentence about :func:`cached`, for a message that the hub cannot be asked."""
    here = cached(kind)
    what = kind.replace("datasets", "data sets")
    if not here:
        return f"No {what} are cached."
    more = f" and {len(here) - NAMED} more" if len(here) > NAMED else ""
    return f"Cached {what}: {', '.join(here[:NAMED])}{more}."


def _has_model(name: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except ValueError:  # no name that a hub could have
        return False


def _has_dataset(name: str) -> bool:
    """Whether its files, or the tables made of them, may be here; the libraries decide in the end."""
    if name in cached("datasets"):
        return True
    place = Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()
    try:
        return _plain(name) in {_plain(path.name) for path in place.iterdir()}
    except OSError:
        return False


def _plain(name: str) -> str:
    """Letters and digits alone: ``datasets`` writes Owner/MyRows as ``owner___my_rows``."""
    return "".join(filter(str.isalnum, name)).lower()


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
