"""Trackers, when asked: wandb or tensorboard, never in the way of a run.

All failures of a tracker cost a run at most ten seconds together and end in one line, ``note``. wandb lives
in a process of its own: its threads, exit hooks and service cannot hold up this one, a failed online start
can be followed by an offline one (in one process it cannot: wandb issue 9865), and what it does not have it
cannot record: that process gets no argument, no token but wandb's own, and the run directory as its
current one. Nothing but metrics and the listed settings is sent: no console output, no code, no git state,
no host or user name, no rows.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import netrc
import os
import queue
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from qlora import hub, redact
from qlora.errors import RecipeError
from qlora.settings import Recipe

TOTAL_SECONDS = (
    9.0  # that a run waits for its tracker, from start to finish; ending it takes the tenth
)
PROBE_SECONDS = 4.0  # of them for the first answer of the server
GREETING_SECONDS = 2.0  # and for the address of the run
RESERVE_SECONDS = 3.0  # kept for writing the run offline when online it did not start
ERROR_CHARS = 200  # of an error's text in a note

# Settings that a tracker is told. A new one is not sent until it is listed; `data.train` and `model.name`
# lose their folders. Not here: free mappings, columns, and where a run is written.
SENT: dict[str, tuple[str, ...]] = {
    "model": ("name", "revision", "attn_implementation"),
    "quant": ("quant_type", "double_quant", "compute_dtype", "head"),
    "lora": (
        "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "train_new_tokens",
    ),
    "data": (
        "train", "split", "revision", "held_out_fraction", "format", "rendering", "loss_on",
        "max_length", "over_length", "packing",
    ),
    "train": (
        "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
        "weight_decay", "max_grad_norm", "optim", "activation_checkpointing", "kernels", "levels",
        "activation_offload", "mlp_tile", "embedding_offload", "fit", "seed", "logging_steps",
        "eval_steps", "save_steps",
    ),
    "run": ("name",),
    "eval": ("generate", "max_new_tokens", "batch_size"),
}  # fmt: skip

# What wandb's process is given of this one's environment, and what of it only when it goes online.
_GIVEN = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT",
    "USERPROFILE", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME",
    "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_NOTES", "WANDB_JOB_TYPE",
    "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR",
)  # fmt: skip
_GIVEN_ONLINE = (
    "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
)  # fmt: skip


class Tracker(Protocol):
    """Where metrics go besides ``metrics.jsonl``. No method raises."""

    note: str  # what to tell of it; another one after log() or finish() if something failed

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send one line of metrics."""

    def finish(self) -> None:
        """Close the run; afterwards ``note`` has the last word."""


def require(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed, before anything is started.

    Raises:
        RecipeError: ``run.report_to`` is tensorboard, and the package is not there.
    """
    if recipe.run.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(
            "run.report_to is 'tensorboard', which is not installed. Install it with `pip install "
            "tensorboard` (TensorFlow is not needed), or write run.report_to=none: metrics.jsonl has "
            "the same numbers."
        )


def start(recipe: Recipe, run_dir: Path) -> Tracker:
    """The tracker that ``run.report_to`` asks for, started.

    Raises:
        RecipeError: As :func:`require`.
    """
    require(recipe)
    if recipe.run.report_to == "none":
        return Silent()
    if recipe.run.report_to == "tensorboard":
        return Tensorboard(run_dir / "tensorboard")
    name = f"{recipe.run.name}-{run_dir.name}"
    return Wandb(recipe.run.project, name, run_dir, recipe.model_dump(mode="json"))


def news(tracker: Any) -> str:
    """The tracker's note if it is not the one that was given here last time, else empty.

    >>> tracker = Silent()
    >>> tracker.note = "wandb offline"
    >>> news(tracker), news(tracker)
    ('wandb offline', '')
    """
    told, tracker.told = getattr(tracker, "told", ""), tracker.note
    return "" if told == tracker.note else str(tracker.note)


def sent(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a tracker is told of a recipe's values: the listed settings, without folders and secrets.

    >>> sent({"lora": {"r": 8}, "run": {"dir": "/home/me"}, "model": {"name": "/home/me/base"}})
    {'model': {'name': 'base'}, 'lora': {'r': 8}, 'run': {}}
    """
    told: dict[str, dict[str, Any]] = {}
    for section, keys in SENT.items():
        if isinstance(values := recipe.get(section), Mapping):
            told[section] = redact.cleaned({key: values[key] for key in keys if key in values})
    if "name" in told.get("model", {}):
        told["model"]["name"] = _without_folder(told["model"]["name"])
    if "train" in told.get("data", {}):
        listed = told["data"]["train"]
        told["data"]["train"] = [
            _without_folder(item["name"] if isinstance(item, Mapping) else item)
            for item in (listed if isinstance(listed, list) else [listed])
        ]
    return told


def _without_folder(name: object) -> str:
    path = Path(str(name))
    return path.name if path.is_absolute() or str(name).startswith((".", "~")) else str(name)


class Silent:
    """The tracker that tracks nothing."""

    note = ""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Drop the values."""

    def finish(self) -> None:
        """Nothing to finish."""


class Tensorboard:
    """Event files for ``tensorboard --logdir``, written by tensorboard's own record writer.

    PyTorch's SummaryWriter (2.13) writes in a thread: when the disk is full, that thread prints its
    traceback and the error comes out of a later call; and its file is named after the host.
    """

    def __init__(self, folder: Path) -> None:
        self.note = ""
        self._writer: Any = None
        self._begun = False
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            self._events = event_pb2
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"events.out.tfevents.{time.time_ns() // 10**9}.{os.getpid()}.qlora"
            self._writer = RecordWriter(path.open("ab"))
            self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
            self.note = f"tensorboard --logdir {folder}"
        except Exception as error:  # noqa: BLE001 - nothing of a tracker may stop a run
            self._give_up(error)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write the numbers among the values as scalars."""
        if self._writer is None:
            return
        try:
            if not self._begun:  # what an interrupted run wrote of later steps is not shown
                self._begun = True
                log = self._events.SessionLog(status=self._events.SessionLog.START)
                now = time.time()
                self._write(self._events.Event(wall_time=now, step=step, session_log=log))
            event = self._events.Event(wall_time=time.time(), step=step)
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    event.summary.value.add(tag=name, simple_value=float(value))
            self._write(event)
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def finish(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _give_up(self, error: Exception) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # closing flushes, and fails as writing did
                writer.close()
        self.note = _line(f"tensorboard failed and is left out: {_named(error)}")


class Wandb:
    """A wandb run in a process of its own: online, else offline with how to send it, else left out."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self.note = ""
        self._left = TOTAL_SECONDS
        self._folder = folder
        self._lines: list[bytes] = []
        self._child: _Child | None = None
        self._online = False
        try:
            with self._waiting():
                mode, reason = mode_now()
            if mode == "disabled":
                self.note = f"wandb is disabled ({reason})"
                return
            self._settings = {
                "project": project,
                "name": name,
                "config": sent(config),
                "id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            }
            child = self._begin(mode)
            self.note = _line(f"wandb {mode} ({reason})")
            if self._online:
                with self._waiting():
                    child.listen(time.monotonic() + GREETING_SECONDS, "started")
                if child.url:
                    self.note = _line(f"wandb online: {child.url}")
        except Exception as error:  # noqa: BLE001 - nothing of a tracker may stop a run
            self._give_up(_named(error))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Queue one line of metrics; never waits."""
        if self._child is None:
            return
        try:
            line = json.dumps({"log": values, "step": step}, default=float).encode() + b"\n"
            self._lines.append(line)
            self._child.send(line)
            self._child.listen(0.0, "finished")
            if self._child.failure:
                self._go_offline()
        except Exception as error:  # noqa: BLE001
            self._give_up(_named(error))

    def finish(self) -> None:
        """Close the run, in what is left of the seconds a tracker may cost."""
        if self._child is None:
            return
        try:
            with self._waiting():
                deadline = time.monotonic() + max(0.0, self._left)
                self._finish(deadline)
        except Exception as error:  # noqa: BLE001
            self._give_up(_named(error))
        finally:
            if self._child is not None:
                self._child.end()
            self._child = None
            self._lines.clear()

    def _finish(self, deadline: float) -> None:
        child: _Child | None = self._child
        assert child is not None
        child.send(_FINISH)
        child.listen(deadline - (RESERVE_SECONDS if self._online else 0.0), "finished")
        if not child.done and (child.failure or not child.folder):
            child = self._go_offline()
            if child is None:
                return
            child.send(_FINISH)
            child.listen(deadline, "finished")
        if child.done and self._online:
            return
        if not child.folder:
            self._give_up(child.failure or "no answer in time")
            return
        if child.done:
            what = "wandb wrote the run offline"
        else:
            what = f"wandb did not take all of the run ({child.failure or 'no answer in time'})"
        where = shlex.quote(child.folder)
        # wandb 0.31 passes over a run that began online, unless it is told not to.
        option = "--include-online " if self._online else ""
        self.note = _line(f"{what}; send it with: wandb sync {option}{where}")

    def _begin(self, mode: str) -> _Child:
        self._online = mode == "online"
        self._child = _Child(self._folder, online=self._online)
        self._child.send(json.dumps({**self._settings, "mode": mode}).encode() + b"\n")
        return self._child

    def _go_offline(self) -> _Child | None:
        """Say all of it again to an offline run in a fresh process; the second failure is the last."""
        assert self._child is not None
        failure = self._child.failure or "no answer in time"
        self._child.end()
        if not self._online:
            self._give_up(failure)
            return None
        child = self._begin("offline")
        self.note = _line(f"wandb offline ({failure})")
        for line in self._lines:
            child.send(line)
        return child

    def _give_up(self, failure: str) -> None:
        if self._child is not None:
            self._child.end()
        self._child = None
        self.note = _line(f"wandb failed and is left out: {failure}")

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self._left -= time.monotonic() - begun


_FINISH = b'{"finish": true}\n'


class _Child:
    """wandb's process, as seen from here. Only :meth:`listen` and :meth:`end` wait, for a stated time."""

    def __init__(self, folder: Path, *, online: bool) -> None:
        self.url = ""
        self.folder = ""  # where wandb writes the run, once it has started
        self.failure = ""
        self.done = False
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._to_say: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qlora.tracking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder,
            env=_environment(online),
            start_new_session=True,  # Ctrl-C is for the run, which then finishes its tracker
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        # Threads, because a pipe to a process that does not read blocks when it is full.
        self._threads = [
            threading.Thread(target=_feed, args=(self._process.stdin, self._to_say), daemon=True),
            threading.Thread(target=_hear, args=(self._process.stdout, self._said), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, line: bytes) -> None:
        self._to_say.put(line)

    def listen(self, until: float, word: str) -> None:
        """Take in what it said, until it said this word or failed, or the clock shows ``until``."""
        while not (self.failure or self.done or (word == "started" and self.folder)):
            try:
                line = self._said.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            if line is None:
                self.failure = "its process ended"
                return
            message = json.loads(line)
            self.url = message.get("url", self.url)
            self.folder = message.get("folder", self.folder)
            self.failure = message.get("failed", "")
            self.done = "finished" in message

    def end(self) -> None:
        """End the process, and with it wandb's service, at once if it has not ended by itself."""
        self._to_say.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.done:
                self._process.wait(0.5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        for thread in self._threads:
            thread.join(0.5)
        for thread, pipe in zip(
            self._threads, (self._process.stdin, self._process.stdout), strict=True
        ):
            if pipe is not None and not thread.is_alive():
                with contextlib.suppress(OSError):
                    pipe.close()


def _feed(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended; the other thread notices
        while (line := lines.get()) is not None:
            while line:
                line = line[pipe.write(line) :]


def _hear(pipe: IO[bytes], said: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):
        rest = b""
        while piece := pipe.read(4096):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                said.put(line)
    said.put(None)


def _environment(online: bool) -> dict[str, str]:
    names = _GIVEN + (_GIVEN_ONLINE if online else ())
    given = {name: os.environ[name] for name in names if name in os.environ}
    # Where this very package lies; -P keeps the current folder out of the path.
    given["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    given["WANDB_ERROR_REPORTING"] = "false"  # its reports of crashes hold more than metrics
    return given


def _serve() -> None:
    """Be wandb's process: settings and metrics come in, a line each; what became of it goes out."""
    # wandb's service inherits 0 and 1: it must not hold our pipes open, nor write into them.
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)

    def say(**message: object) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps(message), file=out, flush=True)

    try:
        asked = json.loads(lines.readline() or "{}")
        import wandb

        run = wandb.init(
            project=asked["project"],
            name=asked["name"],
            id=asked["id"],
            dir=".",
            config=asked["config"],
            mode=asked["mode"],
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                silent=True,
                host="",
                username="",
                email="",
                program="",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
                x_disable_viewer=True,
                init_timeout=30.0,  # nobody waits for it but finish()
                finish_timeout=2 * TOTAL_SECONDS,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1.0,  # what is written can be sent after a kill
            ),
        )
        say(url=str(run.url or ""), folder=str(Path(run.settings.sync_dir).resolve()))
        finished = False
        for line in lines:
            message = json.loads(line)
            if finished := "finish" in message:
                break
            run.log(message["log"], step=message["step"])
        if not finished:  # the run was killed; wandb may wait for a dead network, this process not
            watch = threading.Timer(2 * TOTAL_SECONDS, os._exit, (1,))
            watch.daemon = True
            watch.start()
        run.finish(exit_code=0 if finished else 1)
        say(finished=True)
    except BaseException as error:  # noqa: BLE001 - SystemExit of wandb too: all of it is one line
        say(failed=_named(error))
        os._exit(1)  # no exit hook of wandb may wait now
    wandb.teardown()


def mode_now() -> tuple[str, str]:
    """(online, offline or disabled, and why): by WANDB_MODE, the key, and what the server says to it.

    The server is asked here, within four seconds, because wandb's own start takes 90 to fail, and a key
    that it does not accept ends the process.
    """
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("disabled", "offline", "dryrun"):
        return ("disabled" if asked == "disabled" else "offline"), f"WANDB_MODE={asked}"
    base = (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")
    try:
        host, _ = urlsplit(base).hostname or "", urlsplit(base).port
    except ValueError:
        host = ""
    if not host or urlsplit(base).scheme not in ("http", "https"):
        return "offline", "WANDB_BASE_URL is no address"
    key = os.environ.get("WANDB_API_KEY") or _key_in_netrc(host)
    if not key:
        return "offline", "no WANDB_API_KEY"
    login = base64.b64encode(f"api:{key}".encode()).decode()
    answer = hub.ask(
        f"{base}/graphql",
        PROBE_SECONDS,
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
        data=json.dumps({"query": "query Viewer { viewer { id } }"}).encode(),
    )
    if answer.problem:
        return "offline", f"{host} cannot be reached ({answer.problem})"
    if answer.status in (401, 403) or b'"viewer":null' in answer.body.replace(b" ", b""):
        return "offline", f"{host} does not accept the key"
    if answer.status >= 300:
        return "offline", f"{host} answers with the error {answer.status}"
    return "online", host


def _key_in_netrc(host: str) -> str:
    for path in redact.netrc_files():
        with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
            login = netrc.netrc(str(path)).authenticators(host)
            return (login[2] or "") if login else ""
    return ""


def _named(error: BaseException) -> str:
    # Cleaned before it is cut: half a secret is not recognized.
    return redact.clean(f"{type(error).__name__}: {error}")[:ERROR_CHARS]


def _line(text: str) -> str:
    """One line without secrets."""
    return redact.clean(" ".join(text.split()))


if __name__ == "__main__":
    _serve()
