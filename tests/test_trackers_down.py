"""A tracker or a hub that is dead, slow or refusing: the same adapter, and seconds at most.

Each case is a whole run. Its trained weights must be, byte for byte, those of a run without a tracker.
"""

from __future__ import annotations

import http.server
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console

from qlora import tracking, trainer
from qlora.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "0123456789abcdef" * 2 + "01234567"
ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 10.0  # that a tracker may cost a run
NO_NETWORK_SECONDS = 5.0  # until a run that needs the hub says so
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_RUN_ID", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))


class _Wandb(http.server.BaseHTTPRequestHandler):
    """As much of wandb's server as an online run needs, until it dies."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.is_dead:  # type: ignore[attr-defined]
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            query = json.loads(asked)
        except ValueError:
            query = {}
        name = query.get("query", "")
        data: dict[str, Any] = {}
        if "viewer" in name:
            data = {"viewer": {"id": "me"}}
        elif "UpsertBucket" in name:
            run = query["variables"].get("name")
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": run, "displayName": run, "project": project}
            data = {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
            self.server.runs.append(run)  # type: ignore[attr-defined]
        answer = json.dumps({"data": data}).encode()
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    status = 200
    is_dead = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Wandb)
        self.runs: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *args: object) -> None:
        """A client that went away is none."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    with _Server() as served:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{served.server_port}")
        yield served
        served.shutdown()


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A recipe of six steps with a tracker."""
    folder = tmp_path_factory.mktemp("trackers")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(report_to: str) -> Any:
        return recipe_from(
            {
                "model": {"name": str(tiny)},
                "data": {"train": str(rows), "max_length": 128, "held_out_fraction": 0.1},
                "lora": {"r": 4},
                "train": {
                    "max_steps": 6, "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "logging_steps": 1,
                    "save_steps": 3, "warmup_steps": 0, "activation_checkpointing": False,
                },
                "run": {"dir": str(folder / "runs"), "name": "tiny", "report_to": report_to},
            }
        )  # fmt: skip

    return make


def trained(recipe: Any) -> tuple[Any, bytes, list[float], str]:
    """A run, its weights, its losses, and what it said."""
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=500))
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    return run, weights, losses, said.getvalue()


@pytest.fixture(scope="module")
def baseline(make: Callable[[str], Any]) -> tuple[bytes, list[float]]:
    """Weights and losses of the run without a tracker."""
    _, weights, losses, _ = trained(make("none"))
    assert len(losses) == 6
    return weights, losses


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], float]]:
    """The seconds that a run has spent in its tracker."""
    spent = [0.0]

    def timed(owner: Any, name: str) -> None:
        usual = getattr(owner, name)

        def method(*args: Any, **named: Any) -> Any:
            begun = time.monotonic()
            try:
                return usual(*args, **named)
            finally:
                spent[0] += time.monotonic() - begun

        monkeypatch.setattr(owner, name, method)

    for owner in (tracking.Wandb, tracking.Tensorboard):
        for name in ("__init__", "log", "finish"):
            timed(owner, name)
    yield lambda: spent[0]


def tracking_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("tracking")]


# --- wandb


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("dead", "127.0.0.1 cannot be reached (Connection refused)"),
        ("slow", "127.0.0.1 cannot be reached (no answer in 4 seconds)"),
        ("refusing the key", "127.0.0.1 does not accept the key"),
        ("broken", "127.0.0.1 answers with the error 500"),
        ("without a name", "wandb.invalid cannot be reached"),
    ],
)
def test_a_run_whose_wandb_is(
    how: str,
    reason: str,
    make: Callable[[str], Any],
    baseline: tuple[bytes, list[float]],
    clock: Callable[[], float],
    server: _Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    silent = None
    if how == "dead":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    elif how == "slow":
        silent = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    elif how == "without a name":
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    else:
        server.status = 401 if how == "refusing the key" else 500
    capfd.readouterr()
    run, weights, losses, said = trained(make("wandb"))
    if silent is not None:
        silent.close()
    assert (weights, losses) == baseline
    assert clock() < LIMIT_SECONDS
    (log,) = run.dir.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in log.read_bytes()
    begun, ended = tracking_lines(said)
    assert begun.split(maxsplit=1)[1].startswith(f"wandb offline ({reason}")
    assert ended.endswith(f"wandb wrote the run offline; send it with: wandb sync {log.parent}")
    assert "wandb" not in "".join(capfd.readouterr())


def test_a_run_whose_wandb_dies_in_mid_run(
    make: Callable[[str], Any],
    baseline: tuple[bytes, list[float]],
    clock: Callable[[], float],
    server: _Server,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    usual = tracking.Wandb.log

    def log(self: tracking.Wandb, values: dict[str, Any], step: int) -> None:
        if step == 3:
            assert self._child is not None
            self._child.listen(time.monotonic() + 20, "started")  # it may be slow, but it lives
            server.is_dead = True
        usual(self, values, step)

    monkeypatch.setattr(tracking.Wandb, "log", log)
    capfd.readouterr()
    run, weights, losses, said = trained(make("wandb"))
    assert (weights, losses) == baseline
    assert server.runs and clock() < LIMIT_SECONDS
    (log_file,) = run.dir.glob("wandb/run-*/run-*.wandb")
    assert log_file.read_bytes().count(b"loss") >= 6
    begun, ended = tracking_lines(said)
    assert "wandb online" in begun
    assert ended.endswith(f"send it with: wandb sync --include-online {log_file.parent}")
    assert "wandb" not in "".join(capfd.readouterr())


def test_a_process_whose_wandb_died_ends_in_time_and_well(server: _Server, tmp_path: Path) -> None:
    """No exit hook and no child holds up the interpreter."""
    code = f"""
import sys, time
from pathlib import Path
from qlora.tracking import Wandb
tracker = Wandb("p", "n", Path({str(tmp_path)!r}), {{}})
tracker.log({{"loss": 0.5}}, step=0)
print(tracker.note, flush=True)
input()
tracker.log({{"loss": 0.4}}, step=1)
tracker.finish()
"""
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert "wandb online" in process.stdout.readline()
        server.is_dead = True
        _, errors = process.communicate("\n", timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - begun < LIMIT_SECONDS + 2


# --- tensorboard


@needs_tensorboard
@pytest.mark.parametrize("how", ["unwritable", "on a full disk", "dying in mid-run"])
def test_a_run_whose_tensorboard_is(
    how: str,
    make: Callable[[str], Any],
    baseline: tuple[bytes, list[float]],
    clock: Callable[[], float],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start = tracking.Tensorboard.__init__
    usual = tracking.Tensorboard._write

    def unwritable(self: tracking.Tensorboard, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("a file stands where the folder should")
        start(self, folder)

    def full(self: tracking.Tensorboard, event: Any) -> None:
        if how == "on a full disk" or event.step >= 3:
            raise OSError(28, "No space left on device")
        usual(self, event)

    if how == "unwritable":
        monkeypatch.setattr(tracking.Tensorboard, "__init__", unwritable)
    else:
        monkeypatch.setattr(tracking.Tensorboard, "_write", full)
    capfd.readouterr()
    _, weights, losses, said = trained(make("tensorboard"))
    assert (weights, losses) == baseline
    assert clock() < LIMIT_SECONDS
    lines = tracking_lines(said)
    assert len(lines) == (2 if how == "dying in mid-run" else 1)
    assert "tensorboard failed and is left out: " in lines[-1]
    assert "tensorboard" not in "".join(capfd.readouterr())


@needs_tensorboard
def test_a_run_with_tensorboard_is_the_same_run(
    make: Callable[[str], Any], baseline: tuple[bytes, list[float]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, weights, losses, said = trained(make("tensorboard"))
    assert (weights, losses) == baseline
    (line,) = tracking_lines(said)
    assert line.endswith(f"tensorboard --logdir {run.dir / 'tensorboard'}")
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)]


# --- the hub


@pytest.mark.parametrize("what", ["model", "data set"])
@pytest.mark.parametrize("how", ["dead", "slow", "refusing"])
def test_a_run_whose_hub_is(how: str, what: str, server: _Server, tmp_path: Path) -> None:
    """The command line, in a process of its own: the libraries read their settings at import."""
    recipe = tmp_path / "mine.yaml"
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    name = "nobody/nothing" if what == "model" else "embedded:base"
    train = "rows.jsonl" if what == "model" else "hub:nobody/nothing"
    recipe.write_text(f'model: {{name: "{name}"}}\ndata: {{train: "{train}"}}\n')
    cached = tmp_path / "hf" / "hub" / f"{'models' if what == 'model' else 'datasets'}--own--cached"
    (cached / "snapshots" / "0").mkdir(parents=True)
    (cached / "snapshots" / "0" / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.status = 503
        port = {"dead": 9, "slow": silent.getsockname()[1], "refusing": server.server_port}[how]
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "qlora", "train", str(recipe)],
            capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - begun
    assert done.returncode == 2 and "Traceback" not in done.stderr
    problem = {
        "dead": "127.0.0.1 cannot be reached (Connection refused)",
        "slow": "127.0.0.1 cannot be reached (no answer in 4 seconds)",
        "refusing": "127.0.0.1 answers with the error 503",
    }[how]
    assert "nobody/nothing'" in done.stderr and problem in done.stderr
    kind = "models" if what == "model" else "data sets"
    assert f"Cached {kind}: own/cached." in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert seconds < (LIMIT_SECONDS if how == "slow" else NO_NETWORK_SECONDS)
    assert not (tmp_path / "runs").exists()
