"""Whether the hub can be asked is found out in seconds, without asking it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from qlora import hub


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a socket on this machine that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port on this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def _no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)


def test_an_open_port_is_no_problem(listening: int) -> None:
    assert hub.connection_problem("127.0.0.1", listening) is None


def test_a_closed_port_is_named_with_its_reason(closed: int) -> None:
    problem = hub.connection_problem("127.0.0.1", closed)
    assert problem == "127.0.0.1 cannot be reached (Connection refused)"


def test_a_name_nobody_has_is_a_problem_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    problem = hub.connection_problem("no.such.host", 443)
    assert problem == "no.such.host cannot be reached (Name or service not known)"


@pytest.mark.parametrize("host", ["a" * 80 + ".example", "..", "a b", ""])
def test_a_name_that_is_none_is_a_problem_and_not_an_error(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def numbers_only(host: str, *rest: object, **named: object) -> object:
        host.encode("idna")  # what the resolver does first, and where a bad name fails
        return resolve(host, *rest, flags=socket.AI_NUMERICHOST)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", numbers_only)
    problem = hub.connection_problem(host, 9)
    assert problem is not None and "cannot be reached" in problem


def test_a_silent_host_is_given_up_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        # A full backlog leaves the next connection without an answer.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        begun = time.monotonic()
        problem = hub.connection_problem(*address)
        assert time.monotonic() - begun < 2
        for one in waiting:
            one.close()
    assert problem == "127.0.0.1 cannot be reached (timed out)"


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "Yes", "on"])
def test_being_offline_by_wish_needs_no_connection(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_connections(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.unreachable() == "HF_HUB_OFFLINE forbids asking the hub"


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_other_values_do_not_mean_offline(
    value: str, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening}")
    assert hub.unreachable() is None


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_behind_a_proxy_nothing_is_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_connections(monkeypatch)
    monkeypatch.setenv(name, "http://proxy.example:3128")
    assert hub.unreachable() is None


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [
        (None, "huggingface.co", 443),
        ("", "huggingface.co", 443),
        ("https://hf-mirror.example", "hf-mirror.example", 443),
        ("https://hf-mirror.example:8443/path", "hf-mirror.example", 8443),
        ("http://mirror.example", "mirror.example", 80),
    ],
)
def test_the_endpoint_that_is_set_is_the_one_tried(
    endpoint: str | None, host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def note(address: tuple[str, int], timeout: float) -> None:
        asked.append(address)
        raise OSError("stop here")

    monkeypatch.setattr(socket, "create_connection", note)
    if endpoint is not None:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub.unreachable() == f"{host} cannot be reached (stop here)"
    assert asked == [(host, port)]


def test_an_endpoint_with_a_bad_port_is_a_problem_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:abc")
    assert "HF_ENDPOINT" in (hub.unreachable() or "")
