"""wandb when asked, where it can, and never in the way of a run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora import tracking

KEY = "0123456789abcdef" * 2 + "01234567"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A wandb server that only accepts connections, on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """wandb with an init, log and finish of one's own; gives the list of calls."""

    def install(**behaviour: Exception) -> list[Any]:
        calls: list[Any] = []

        def call(name: str) -> Callable[..., Any]:
            def method(*args: object, **named: object) -> object:
                calls.append((name, args, named))
                if name in behaviour:
                    raise behaviour[name]
                return SimpleNamespace(log=call("log"), finish=call("finish"))

            return method

        module = SimpleNamespace(init=call("init"), Settings=lambda **named: named)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return calls

    return install


# --- which mode


@pytest.mark.parametrize(
    ("asked", "mode"),
    [
        ("disabled", "disabled"),
        ("DISABLED", "disabled"),
        ("offline", "offline"),
        ("dryrun", "offline"),
    ],
)
def test_the_mode_that_is_asked_for_needs_no_connection(
    asked: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(socket, "create_connection", None)  # calling it would raise
    assert tracking.mode_now() == (mode, f"WANDB_MODE={asked.lower()}")


def test_without_a_key_wandb_stays_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", None)
    assert tracking.mode_now() == ("offline", "no WANDB_API_KEY")


def test_with_a_key_and_a_dead_host_wandb_is_offline_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    mode, reason = tracking.mode_now()
    assert time.monotonic() - begun < 6
    assert mode == "offline"
    assert "127.0.0.1 cannot be reached" in reason and KEY not in reason


def test_with_a_key_and_a_host_wandb_is_online(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking.mode_now() == ("online", "127.0.0.1")


@pytest.mark.parametrize("place", ["NETRC", ".netrc", "_netrc"])
def test_a_key_may_lie_in_netrc(
    place: str, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "home" / place
    path.write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    assert tracking.mode_now()[0] == "online"


@pytest.mark.parametrize("content", ["machine api.example password x login y\n", "machine", "\x00"])
def test_a_netrc_without_this_host_or_sense_is_no_key(
    content: str, here: None, tmp_path: Path
) -> None:
    path = tmp_path / "home" / ".netrc"
    path.write_text(content)
    path.chmod(0o600)
    assert tracking.mode_now() == ("offline", "no WANDB_API_KEY")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_behind_a_proxy_wandb_itself_must_find_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://127.0.0.1:9")
    monkeypatch.setenv(name, "http://127.0.0.1:3128")
    assert tracking.mode_now()[0] == "online"


def test_an_address_that_is_none_never_raises(
    fake: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:abc")
    assert "wandb" in tracking.Wandb("p", "n", tmp_path, {}).note


# --- never in the way


def test_a_disabled_wandb_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = tracking.Wandb("p", "n", tmp_path, {})
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert tracker.note == "wandb is disabled (WANDB_MODE=disabled)"
    assert list((tmp_path).glob("wandb*")) == []


def test_a_wandb_that_cannot_be_imported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb failed and is left out" in tracking.Wandb("p", "n", tmp_path, {}).note


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("broken " + "x" * 5000), OSError(28, "disk full")])
def test_a_failure_of_wandb_is_noted_once_and_ends_the_tracking_only(
    failing: str, error: Exception, fake: Callable[..., list[Any]], tmp_path: Path
) -> None:
    calls = fake(**{failing: error})
    tracker = tracking.Wandb("p", "n", tmp_path, {})
    tracker.log({"loss": 1.0}, step=1)
    if failing != "finish":
        tracker.log({"loss": 1.0}, step=2)
    tracker.finish()
    tracker.finish()
    assert tracker.note.startswith(f"wandb failed and is left out: {type(error).__name__}: ")
    assert len(tracker.note) < 300
    assert [name for name, _, _ in calls].count(failing) == 1
    assert calls[-1][0] == failing  # nothing is tried after the failure


def test_only_metrics_and_the_recipe_are_sent(
    fake: Callable[..., list[Any]], tmp_path: Path
) -> None:
    calls = fake()
    tracker = tracking.Wandb("project", "name", tmp_path, {"lora": {"r": 8}})
    tracker.log({"loss": 0.5}, step=7)
    tracker.finish()
    (_, _, init), log, finish = calls
    settings = init.pop("settings")
    assert init == {
        "project": "project",
        "name": "name",
        "dir": str(tmp_path),
        "config": {"lora": {"r": 8}},
        "mode": "offline",
    }
    assert settings["console"] == "off" and settings["save_code"] is False
    assert settings["disable_code"] and settings["disable_git"]
    assert settings["init_timeout"] <= 30
    assert log == ("log", ({"loss": 0.5},), {"step": 7})
    assert finish == ("finish", (), {})
    assert tracker.note == "wandb offline (no WANDB_API_KEY)"


def test_the_silent_tracker_takes_everything_and_says_nothing(capsys: Any) -> None:
    tracker = tracking.Silent()
    tracker.log({"loss": float("nan")}, step=-1)
    tracker.finish()
    assert tracker.note == ""
    assert capsys.readouterr() == ("", "")


def test_an_offline_run_of_the_real_wandb_is_written_below_the_folder(tmp_path: Path) -> None:
    """In a process of its own: wandb leaves a service and threads behind."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"""
import json
from pathlib import Path
from qlora.tracking import Wandb
tracker = Wandb("p", "n", Path({str(folder)!r}), {{"lora": {{"r": 8}}}})
for step in range(3):
    tracker.log({{"loss": 1.0 / (step + 1)}}, step=step)
tracker.finish()
print(json.dumps(tracker.note))
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 30
    assert json.loads(done.stdout) == "wandb offline (no WANDB_API_KEY)"
    assert done.stderr == ""
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in log.read_bytes()
    assert not (ROOT / "wandb").exists()
