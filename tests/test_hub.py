"""Whether the hub can be asked is found out in seconds, and a dead one costs seconds."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora import hub
from qlora.errors import DataError, ModelError
from qlora.recipe import recipe_from

HEX = "0123456789abcdef" * 2 + "01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, dict(self.headers)))  # type: ignore[attr-defined]
        status, headers, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked may have gone
            for piece in body:
                self.wfile.write(piece)
                time.sleep(0.1 if len(body) > 1 else 0)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine that gives ``answer`` to everything: status, headers, body in pieces."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as served:
        served.daemon_threads = True
        served.answer, served.asked = (200, {}, [b"[]"]), []  # type: ignore[attr-defined]
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{served.server_port}")
        yield served
        served.shutdown()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that accepts connections and never answers, and little patience."""
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def _no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(hub, "ask", refuse)


# --- asking


def test_a_hub_that_answers_is_no_problem_and_is_told_no_token(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert hub.unreachable() is None
    ((command, path, headers),) = server.asked
    assert (command, path) == ("GET", "/api/models?limit=1")
    assert "hf_a" not in str(headers)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_is_an_answer_that_the_libraries_explain(status: int, server: Any) -> None:
    server.answer = (status, {"Location": "http://127.0.0.1:9/"}, [b""])
    assert hub.unreachable() is None
    assert len(server.asked) == 1  # no redirection is followed


@pytest.mark.parametrize("status", sorted(hub.BROKEN))
def test_a_broken_hub_is_a_problem(status: int, server: Any) -> None:
    server.answer = (status, {}, [b""])
    assert hub.unreachable() == f"127.0.0.1 answers with the error {status}"


def test_a_closed_port_is_named_with_its_reason(dead: None) -> None:
    assert hub.unreachable() == "127.0.0.1 cannot be reached (Connection refused)"


def test_a_silent_hub_is_given_up_after_the_time_limit(silent: None) -> None:
    begun = time.monotonic()
    assert hub.unreachable() == "127.0.0.1 cannot be reached (no answer in 0 seconds)"
    assert time.monotonic() - begun < 2


def test_the_time_limit_holds_for_an_answer_that_dribbles(server: Any) -> None:
    server.answer = (200, {}, [b"x"] * 100)
    begun = time.monotonic()
    answer = hub.ask(f"http://127.0.0.1:{server.server_port}/", 0.5)
    assert time.monotonic() - begun < 2
    assert answer.problem is not None and answer.problem.startswith("no answer in")


def test_the_time_limit_holds_for_a_name_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: time.sleep(1))
    begun = time.monotonic()
    assert hub.ask("http://slow.example/", 0.3).problem is not None
    assert time.monotonic() - begun < 0.9


def test_a_name_nobody_has_is_a_problem_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HF_ENDPOINT", "https://no.such.host")
    assert hub.unreachable() == "no.such.host cannot be reached (Name or service not known)"


@pytest.mark.parametrize("host", ["a" * 80 + ".example", "..", "a b", "\x7f"])
def test_a_name_that_is_none_is_a_problem_and_not_an_error(host: str) -> None:
    assert hub.ask(f"http://{host}:9/", 5).problem


def test_what_speaks_no_http_is_a_problem_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        threading.Thread(target=speak, daemon=True).start()
        assert hub.ask(f"http://127.0.0.1:{other.getsockname()[1]}/", 5).problem


def test_a_certificate_that_cannot_be_checked_here_is_left_to_the_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They bring their own list of authorities; the system's may be empty."""

    def unknown(*args: object, **named: object) -> None:
        raise urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", unknown)
    assert hub.unreachable() is None


def test_a_dead_proxy_is_a_problem_and_its_password_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://me:geheimnis@127.0.0.1:9")
    problem = hub.unreachable() or ""
    assert "huggingface.co cannot be reached" in problem and "geheimnis" not in problem


# --- what is asked


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "Yes", "on"])
def test_being_offline_by_wish_needs_no_connection(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_connections(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.unreachable() == "HF_HUB_OFFLINE forbids asking the hub"


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_other_values_do_not_mean_offline(
    value: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.unreachable() is None


@pytest.mark.parametrize(
    ("endpoint", "host", "url"),
    [
        (None, "huggingface.co", "https://huggingface.co"),
        ("", "huggingface.co", "https://huggingface.co"),
        ("https://hf-mirror.example", "hf-mirror.example", "https://hf-mirror.example"),
        ("https://m.example:8443/path/", "m.example", "https://m.example:8443/path"),
        ("http://mirror.example", "mirror.example", "http://mirror.example"),
    ],
)
def test_the_endpoint_that_is_set_is_the_one_asked(
    endpoint: str | None, host: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def note(url: str, seconds: float) -> hub.Answer:
        asked.append(url)
        return hub.Answer(problem="stop here")

    monkeypatch.setattr(hub, "ask", note)
    if endpoint is not None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub.unreachable() == f"{host} cannot be reached (stop here)"
    assert asked == [f"{url}/api/models?limit=1"]


@pytest.mark.parametrize(
    "address", ["http://mirror.example:abc", "mirror.example", "ftp://a", "://"]
)
def test_an_endpoint_that_is_none_is_a_problem_and_not_an_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_connections(monkeypatch)
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "HF_ENDPOINT is no address" in (hub.unreachable() or "")


# --- the door


def _cache(folder: Path, kind: str, name: str) -> None:
    place = folder / "hf" / "hub" / f"{kind}--{name.replace('/', '--')}"
    (place / "snapshots" / HEX).mkdir(parents=True)
    (place / "snapshots" / HEX / "config.json").write_text("{}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(HEX)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return lambda kind, name: _cache(tmp_path, kind, name)


@pytest.fixture
def recipe(rows_file: Path) -> Callable[..., Any]:
    def make(model: str = "embedded:base", train: str = "") -> Any:
        data = {"train": train or str(rows_file)}
        return recipe_from({"model": {"name": model}, "data": data, "run": {"name": "x"}})

    return make


def test_a_local_recipe_asks_nobody(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_connections(monkeypatch)
    with hub.door(recipe()) as note:
        assert note is None


def test_a_hub_that_answers_changes_nothing(server: Any, recipe: Callable[..., Any]) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with hub.door(recipe("nobody/nothing", "hub:nobody/rows")) as note:
        assert note is None and before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_what_is_not_cached_is_refused_with_what_is(
    kind: str, request: pytest.FixtureRequest, recipe: Callable[..., Any], cache: Any
) -> None:
    request.getfixturevalue(kind)
    begun = time.monotonic()
    with pytest.raises(ModelError) as of_model, hub.door(recipe("nobody/nothing")):
        pass
    with pytest.raises(DataError) as of_data, hub.door(recipe(train="hub:nobody/nothing")):
        pass
    assert time.monotonic() - begun < 4
    assert "'nobody/nothing': not a folder here, not in the local hub cache" in str(of_model.value)
    assert "No models are cached." in str(of_model.value)
    assert "'hub:nobody/nothing' (split 'train'), which cannot be read" in str(of_data.value)
    assert "No data sets are cached." in str(of_data.value)
    for number in range(10):
        cache("models", f"owner/m{number}")
    cache("datasets", "owner/rows")
    with pytest.raises(ModelError, match=r"owner/m0, owner/m1, .*owner/m7 and 2 more\."):  # noqa: SIM117
        with hub.door(recipe("nobody/nothing")):
            pass
    with pytest.raises(DataError, match=r"Cached data sets: owner/rows\."):  # noqa: SIM117
        with hub.door(recipe(train="hub:nobody/nothing")):
            pass


def test_with_a_dead_hub_what_is_cached_is_used_and_nobody_is_asked_again(
    dead: None, recipe: Callable[..., Any], cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    cache("models", "owner/model")
    cache("datasets", "owner/rows")
    asked = recipe("owner/model", "hub:owner/rows")
    problem = "127.0.0.1 cannot be reached (Connection refused)"
    with hub.door(asked) as note:
        assert note == f"{problem}; what is cached is used"
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        _no_connections(monkeypatch)
        assert hub.unreachable() == problem
        with hub.door(asked):
            pass
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(AssertionError, match="a connection was tried"):
        hub.unreachable()


def test_the_block_is_left_as_it_was_found_after_an_error(
    dead: None, recipe: Callable[..., Any], cache: Any
) -> None:
    from huggingface_hub import constants

    cache("models", "owner/model")
    with pytest.raises(RuntimeError, match="in the block"), hub.door(recipe("owner/model")):
        raise RuntimeError("in the block")
    assert not constants.HF_HUB_OFFLINE


def test_tables_that_datasets_has_made_count_as_cached(
    dead: None, recipe: Callable[..., Any], cache: Any, tmp_path: Path
) -> None:
    (tmp_path / "hf" / "datasets" / "some_owner___my_rows").mkdir(parents=True)
    with hub.door(recipe(train="hub:some_owner/MyRows")) as note:
        assert note is not None


def test_the_cache_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.cached("models") == []
    _cache(tmp_path, "models", "owner/model")
    (tmp_path / "hf" / "hub" / "models--owner--torn" / "snapshots").mkdir(parents=True)
    assert hub.cached("models") == ["owner/model"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert hub.cached("models") == ["owner/model"] and hub.cached("datasets") == []
