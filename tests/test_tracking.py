"""wandb and tensorboard when asked, where they can, and never in the way of a run."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora import hub, tracking
from qlora.errors import RecipeError
from qlora.settings import Recipe

KEY = "0123456789abcdef" * 2 + "01234567"
ROOT = Path(__file__).resolve().parent.parent
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


class _Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"]))  # type: ignore[attr-defined]
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A wandb server on this machine that gives ``answer`` to everything."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as served:
        served.answer = (200, b'{"data":{"viewer":{"id":"me"}}}')  # type: ignore[attr-defined]
        served.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{served.server_port}")
        yield served
        served.shutdown()


FAKE = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace as Settings

here = Path(__file__).parent
plan = json.loads((here / "plan.json").read_text())


def do(name, mode, *said):
    with (here / "calls.jsonl").open("a") as file:
        print(json.dumps([name, mode, *said]), file=file)
    what = plan.get(f"{mode} {name}", plan.get(name))
    if what == "raise":
        raise RuntimeError("broken " + "x" * 5000)
    if what == "exit":
        raise SystemExit(1)
    if what == "die":
        os._exit(3)
    if what == "hang":
        time.sleep(600)
    if what == "print":
        print("noise")
        os.write(1, b"more noise\\n")


def init(*, mode, dir, settings, **named):
    facts = {"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ)}
    do("init", mode, named, vars(settings), facts)
    place = Path(dir) / "wandb" / mode
    place.mkdir(parents=True)
    return Settings(
        url="http://here/run" if mode == "online" else None,
        settings=Settings(sync_dir=str(place)),
        log=lambda values, step: do("log", mode, values, step),
        finish=lambda exit_code: do("finish", mode, exit_code),
    )


def teardown():
    do("teardown", "")
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[[], list[Any]]]:
    """wandb of one's own in the process of wandb: what each call does; gives the calls so far."""
    folder = tmp_path / "fake"
    folder.mkdir()

    def install(**plan: str) -> Callable[[], list[Any]]:
        (folder / "wandb.py").write_text(FAKE)
        named = {name.replace("_", " "): what for name, what in plan.items()}
        (folder / "plan.json").write_text(json.dumps(named))
        usual = tracking._environment

        def environment(online: bool) -> dict[str, str]:
            given = usual(online)
            return given | {"PYTHONPATH": f"{folder}{os.pathsep}{given['PYTHONPATH']}"}

        monkeypatch.setattr(tracking, "_environment", environment)
        path = folder / "calls.jsonl"
        return lambda: [json.loads(line) for line in path.read_text().splitlines()]

    return install


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run directory."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def run_of(folder: Path, steps: int = 3) -> tuple[tracking.Wandb, float]:
    """A whole life of a tracker, and the seconds it took."""
    begun = time.monotonic()
    tracker = tracking.Wandb("p", "n", folder, {"lora": {"r": 8}})
    for step in range(steps):
        tracker.log({"loss": 1.0 / (step + 1)}, step=step)
    tracker.finish()
    return tracker, time.monotonic() - begun


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
    monkeypatch.setattr(hub, "ask", None)  # calling it would raise
    assert tracking.mode_now() == (mode, f"WANDB_MODE={asked.lower()}")


def test_without_a_key_wandb_stays_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ask", None)
    assert tracking.mode_now() == ("offline", "no WANDB_API_KEY")


def test_with_a_key_and_a_dead_host_wandb_is_offline_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    mode, reason = tracking.mode_now()
    assert time.monotonic() - begun < 5
    assert (mode, reason) == ("offline", "127.0.0.1 cannot be reached (Connection refused)")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert tracking.mode_now()[0] == "offline"
        assert time.monotonic() - begun < 3


def test_with_a_key_that_the_host_knows_wandb_is_online(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert tracking.mode_now() == ("online", "127.0.0.1")
    ((path, login),) = server.asked
    assert path == "/graphql" and login.startswith("Basic ")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"", "127.0.0.1 does not accept the key"),
        (403, b"", "127.0.0.1 does not accept the key"),
        (200, b'{"data": {"viewer": null}}', "127.0.0.1 does not accept the key"),
        (500, b"", "127.0.0.1 answers with the error 500"),
        (302, b"", "127.0.0.1 answers with the error 302"),
    ],
)
def test_a_server_that_refuses_is_found_out_before_wandb_is(
    status: int, body: bytes, said: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server.answer = (status, body)
    assert tracking.mode_now() == ("offline", said)


@pytest.mark.parametrize("place", ["NETRC", ".netrc", "_netrc"])
def test_a_key_may_lie_in_netrc(
    place: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "home" / place
    path.write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    if place == "NETRC":
        monkeypatch.setenv("NETRC", str(path))
    assert tracking.mode_now()[0] == "online"


@pytest.mark.parametrize("content", ["machine api.example password x login y\n", "machine", "\x00"])
def test_a_netrc_without_this_host_or_sense_is_no_key(
    content: str, server: Any, tmp_path: Path
) -> None:
    path = tmp_path / "home" / ".netrc"
    path.write_text(content)
    path.chmod(0o600)
    assert tracking.mode_now() == ("offline", "no WANDB_API_KEY")


def test_a_dead_proxy_is_found_out_and_its_password_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("https_proxy", "http://me:geheimnis@127.0.0.1:9")
    mode, reason = tracking.mode_now()
    assert mode == "offline" and "cannot be reached" in reason and "geheimnis" not in reason


@pytest.mark.parametrize("address", ["http://localhost:abc", "localhost", "ftp://x", "http://"])
def test_an_address_that_is_none_means_offline(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert tracking.mode_now() == ("offline", "WANDB_BASE_URL is no address")


# --- never in the way


def test_a_disabled_wandb_is_not_even_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(tracking, "_Child", None)  # calling it would raise
    tracker, _ = run_of(folder)
    assert tracker.note == "wandb is disabled (WANDB_MODE=disabled)"
    assert list(folder.iterdir()) == []


def test_this_process_never_imports_wandb(
    fake: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    assert "failed" not in run_of(folder)[0].note


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raise", "exit", "die", "hang"])
def test_a_failure_of_wandb_ends_the_tracking_in_one_line(
    failing: str,
    how: str,
    fake: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "TOTAL_SECONDS", 1.5)
    calls = fake(**{failing: how})
    tracker, seconds = run_of(folder)
    after = tracker.note
    tracker.log({"loss": 1.0}, step=9)
    tracker.finish()
    assert tracker.note == after and len(after.splitlines()) == 1 and len(after) < 300
    if how == "hang" and failing != "init":
        assert after.startswith("wandb did not take all of the run (no answer in time); send it")
    else:
        assert after.startswith("wandb failed and is left out: ")
    assert seconds < 3
    assert [name for name, *_ in calls()].count(failing) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
@pytest.mark.parametrize("how", ["raise", "exit", "die", "hang"])
def test_what_fails_online_is_written_offline_from_its_first_line(
    failing: str,
    how: str,
    server: Any,
    fake: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "TOTAL_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "GREETING_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "RESERVE_SECONDS", 1.5)
    calls = fake(**{f"online_{failing}": how})
    tracker, seconds = run_of(folder)
    assert seconds < 4
    if how == "hang" and failing != "init":  # it began online: wandb has it on disk
        wanted = (
            f"(no answer in time); send it with: wandb sync --include-online {folder}/wandb/online"
        )
    else:
        wanted = f"wandb wrote the run offline; send it with: wandb sync {folder}/wandb/offline"
        logged = [rest for name, mode, *rest in calls() if (name, mode) == ("log", "offline")]
        assert logged == [[{"loss": 1.0}, 0], [{"loss": 0.5}, 1], [{"loss": 1 / 3}, 2]]
        first, second = (rest[0]["id"] for name, _, *rest in calls() if name == "init")
        assert first == second  # sent later, it is the same run
    assert tracker.note.endswith(wanted)


def test_a_log_line_that_cannot_be_sent_ends_the_tracking_only(
    fake: Callable[..., Any], folder: Path
) -> None:
    fake()
    tracker = tracking.Wandb("p", "n", folder, {})
    tracker.log({"loss": object()}, step=1)
    assert tracker.note.startswith("wandb failed and is left out: TypeError")
    tracker.finish()


def test_logging_never_waits_for_wandb(fake: Callable[..., Any], folder: Path) -> None:
    fake(init="hang")
    tracker = tracking.Wandb("p", "n", folder, {})
    begun = time.monotonic()
    for step in range(5000):  # more than any pipe holds
        tracker.log({"loss": 1.0, "text": "x" * 50}, step=step)
    assert time.monotonic() - begun < 2
    tracker._left = 0.2
    tracker.finish()


def test_only_metrics_and_listed_settings_reach_wandb(
    fake: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setenv("MY_SECRET", "a home-made secret")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    calls = fake(init="print")
    secret = {"model_init_kwargs": {"token": "x"}}
    recipe = {"lora": {"r": 8}, "train": {"seed": 1, "sft_config": secret}, "run": {"dir": "/home"}}
    tracker = tracking.Wandb("project", "name", folder, recipe)
    tracker.log({"loss": 0.5}, step=7)
    tracker.finish()
    (_, mode, init, settings, facts), log, finish, *_ = calls()
    assert init.pop("id") and mode == "offline"
    assert init == {
        "project": "project",
        "name": "name",
        "config": {"lora": {"r": 8}, "train": {"seed": 1}, "run": {}},
    }
    assert settings["console"] == "off" and settings["save_code"] is False
    assert settings["disable_code"] and settings["disable_git"]
    assert settings["x_disable_meta"] and settings["x_disable_stats"]
    assert len(facts["argv"]) == 1 and facts["cwd"] == str(folder)
    assert set(facts["environment"]) <= {
        *tracking._GIVEN,
        "PYTHONPATH",
        "WANDB_ERROR_REPORTING",
        "LC_CTYPE",
    }
    assert KEY not in json.dumps(facts) and "secret" not in json.dumps(facts)
    assert log == ["log", "offline", {"loss": 0.5}, 7] and finish == ["finish", "offline", 0]


def test_a_killed_run_still_closes_its_tracker(fake: Callable[..., Any], folder: Path) -> None:
    calls = fake()
    tracker = tracking.Wandb("p", "n", folder, {})
    tracker.log({"loss": 0.5}, step=7)
    child = tracker._child
    assert child is not None
    child.send(b"")
    child._to_say.put(None)
    child._threads[0].join(5)
    assert child._process.stdin is not None
    child._process.stdin.close()  # what the system does for a process that is killed
    assert child._process.wait(10) == 0
    child._threads[1].join(5)
    assert ["finish", "offline", 1] in calls()
    tracker.finish()


# --- what is told of a recipe


def test_every_setting_that_is_sent_exists() -> None:
    for section, keys in tracking.SENT.items():
        known: Any = Recipe.model_fields[section].annotation
        assert set(keys) <= set(known.model_fields), section


def test_names_lose_their_folders_and_commits_stay() -> None:
    told = tracking.sent(
        {
            "model": {"name": "/home/jane/bases/mine", "revision": "0" * 40},
            "data": {
                "train": ["/home/jane/rows.jsonl", "hub:owner/rows", {"name": "~/more.jsonl"}]
            },
        }
    )
    assert told == {
        "model": {"name": "mine", "revision": "0" * 40},
        "data": {"train": ["rows.jsonl", "hub:owner/rows", "more.jsonl"]},
    }
    assert tracking.sent({"model": {"name": "Qwen/Qwen3-8B"}})["model"]["name"] == "Qwen/Qwen3-8B"


# --- the real wandb


def test_an_offline_run_of_the_real_wandb_holds_metrics_and_nothing_of_the_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USER", "jane-doe-the-user")
    monkeypatch.setenv("LOGNAME", "jane-doe-the-user")
    tracker, seconds = run_of(folder)
    assert seconds < 10 and capfd.readouterr() == ("", "")
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert tracker.note == f"wandb wrote the run offline; send it with: wandb sync {log.parent}"
    assert b"loss" in log.read_bytes()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"debug.log", log.name}
    strangers = ["jane-doe", str(ROOT), sys.executable, "qlora.tracking", "pytest", "git@"]
    for path in files:
        assert [word for word in strangers if word.encode() in path.read_bytes()] == [], path
    host = socket.gethostname().encode()  # a length-prefixed field of a message, if it were there
    assert bytes([len(host)]) + host not in log.read_bytes()
    assert not (ROOT / "wandb").exists()


def test_the_real_wandb_closes_a_run_whose_process_is_killed_and_leaves_nobody_behind(
    folder: Path,
) -> None:
    code = f"""
import os, signal, sys, time
from pathlib import Path
from qlora.tracking import Wandb
tracker = Wandb("p", "n", Path({str(folder)!r}), {{}})
tracker.log({{"loss": 0.5}}, step=0)
tracker._child.listen(time.monotonic() + 20, "started")
print(tracker._child._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL and done.stderr == ""
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(child)
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in log.read_bytes()


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- tensorboard


def test_a_tensorboard_that_is_not_installed_is_refused_at_the_door(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = make_recipe(run__report_to="tensorboard")
    for refuse in (lambda: tracking.require(recipe), lambda: tracking.start(recipe, tmp_path)):
        with pytest.raises(RecipeError, match="pip install tensorboard"):
            refuse()
    tracking.require(make_recipe(run__report_to="wandb"))


@needs_tensorboard
def test_importing_tensorboard_makes_no_warning_and_loads_no_tensorflow_and_no_torch(
    folder: Path,
) -> None:
    code = f"""
import sys
from pathlib import Path
from qlora.tracking import Tensorboard
tracker = Tensorboard(Path({str(folder)!r}))
tracker.log({{"loss": 0.5}}, step=1)
tracker.finish()
print(sorted({{"tensorflow", "torch"}} & set(sys.modules)), tracker.note)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.stderr, done.stdout) == ("", f"[] tensorboard --logdir {folder}\n")


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@needs_tensorboard
def test_tensorboard_reads_the_numbers_back(folder: Path) -> None:
    tracker = tracking.Tensorboard(folder / "tensorboard")
    for step in (1, 2, 3):
        tracker.log({"loss": 1 / step, "phase": "text", "flag": True, "tokens": step}, step=step)
    assert scalars(folder / "tensorboard", "loss")[-1] == (3, pytest.approx(1 / 3))  # at once
    tracker.finish()
    tracker.finish()
    assert scalars(folder / "tensorboard", "tokens") == [(1, 1), (2, 2), (3, 3)]
    (file,) = (folder / "tensorboard").iterdir()
    assert socket.gethostname() not in file.name.split(".")


@needs_tensorboard
def test_a_resumed_run_takes_the_place_of_the_steps_that_were_lost(folder: Path) -> None:
    for steps in ((1, 2, 3, 4), (3, 4, 5)):
        tracker = tracking.Tensorboard(folder)
        for step in steps:
            tracker.log({"loss": len(steps) * 10 + step}, step=step)
        tracker.finish()
        (path,) = folder.glob("*.qlora")  # files are read in the order of their names
        path.rename(folder / f"events.out.tfevents.{len(list(folder.iterdir()))}")
    assert scalars(folder, "loss") == [(1, 41), (2, 42), (3, 33), (4, 34), (5, 35)]


@needs_tensorboard
@pytest.mark.parametrize("when", ["at the start", "in mid-run", "at the end"])
def test_a_failure_of_tensorboard_ends_it_in_one_line(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if when == "at the start":
        (folder / "tensorboard").write_text("a file stands where the folder should")
    tracker = tracking.Tensorboard(folder / "tensorboard")
    tracker.log({"loss": 1.0}, step=1)
    if tracker._writer is not None:
        method = "write" if when == "in mid-run" else "close"
        opened = tracker._writer._writer
        monkeypatch.setattr(tracker._writer, method, full)
    tracker.log({"loss": 1.0}, step=2)
    tracker.finish()
    note = tracker.note
    tracker.log({"loss": 1.0}, step=3)
    tracker.finish()
    if when != "at the start":
        opened.close()
    assert tracker.note == note and len(note.splitlines()) == 1
    error = "FileExistsError" if when == "at the start" else "OSError: [Errno 28] No space left"
    assert note.startswith(f"tensorboard failed and is left out: {error}")
    assert capfd.readouterr() == ("", "")


# --- none and all


def test_a_note_is_news_once(folder: Path, fake: Callable[..., Any]) -> None:
    fake(log="raise")
    tracker = tracking.Wandb("p", "n", folder, {})
    assert tracking.news(tracker) == "wandb offline (no WANDB_API_KEY)"
    assert tracking.news(tracker) == ""
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert "wandb failed" in tracking.news(tracker) and tracking.news(tracker) == ""
    assert tracking.news(tracking.Silent()) == ""


def test_the_silent_tracker_takes_everything_and_says_nothing(
    make_recipe: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    tracker = tracking.start(make_recipe(), tmp_path)
    tracker.log({"loss": float("nan")}, step=-1)
    tracker.finish()
    assert isinstance(tracker, tracking.Silent) and tracker.note == ""
    assert capsys.readouterr() == ("", "")
