"""A tiny run to torture: trained in forked children, watched, killed, damaged and taken up again.

Everything is loaded once; a child inherits it and is gone after one training. What a run came to is
compared bit for bit with one that nobody disturbed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conftest import ROWS, save_tiny

HAS_FORK = hasattr(os, "fork") and sys.platform.startswith("linux")  # and /proc
PATIENCE = 120.0  # seconds for one child


@dataclass(frozen=True)
class Learned:
    """What a run came to."""

    adapter: bytes
    losses: tuple[
        tuple[int, str, float], ...
    ]  # (step, which loss, value), as they stand in the metrics


@dataclass(frozen=True)
class Done:
    """A child that has ended: its exit code (-9 for a SIGKILL) and what it printed."""

    code: int
    said: str

    @property
    def from_step(self) -> int:
        """The step of the checkpoint that it went on from; 0 if it began anew."""
        lines = [line for line in self.said.splitlines() if line.startswith("resume ")]
        found = [line.rpartition("from checkpoint-")[2] for line in lines if " from check" in line]
        return next((int(step) for step in reversed(found) if step.isdigit()), 0)

    @property
    def message(self) -> str:
        """What it said last."""
        return next((s for s in reversed(self.said.splitlines()) if s.startswith("qlora: ")), "")


class Child:
    """A forked process that does one thing in a folder of its own."""

    def __init__(self, folder: Path, act: Callable[[], object]) -> None:
        self.said = folder.with_name(f"{folder.name}.said")  # the folder may be a full disk
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # else every collection in the child copies all that was loaded
        # A signal may not come between the fork and the child's own code.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        with warnings.catch_warnings():
            # Python 3.12 warns of threads of libraries that sleep while nothing is computed.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _live(folder, self.said, act, held)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        gc.unfreeze()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> Done:
        """Its end; one that hangs is killed, and that is an error."""
        end, nap = time.monotonic() + seconds, 0.001
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                text = self.said.read_text(errors="replace") if self.said.is_file() else ""
                return Done(os.waitstatus_to_exitcode(status), text)
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a child did not end in {seconds:.0f} s:\n{_tail(self.said)}")
            time.sleep(nap)
            nap = min(nap * 1.5, 0.02)


def _live(folder: Path, said: Path, act: Callable[[], object], mask: set[signal.Signals]) -> None:
    """The whole life of a child; exit codes as on the command line, 1 for what nobody foresaw."""
    from qlora.errors import QLoRAError

    code = 1
    try:
        os.chdir(folder)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            with _rendering_remembered():
                act()
            code = 0
        except QLoRAError as error:
            print(f"qlora: {error}", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            print("qlora: interrupted", file=sys.stderr)
            code = 130
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - a fork must never return into its parent's code
            traceback.print_exc()
    finally:
        os._exit(code)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.is_file() else ""


class Stage:
    """A base, rows and a cache, and the run that nobody disturbs.

    Args:
        root: A folder of its own.
        changes: To the recipe: ``section__key=value``.
    """

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        self.changes = changes
        self.base = save_tiny(root / "tiny")
        self.rows = root / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self._folders = 0

    def recipe(self, **changes: Any) -> Any:
        """The recipe; its runs lie in ``runs`` of the working directory."""
        from qlora.recipe import recipe_from

        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.base)},
            "data": {"train": str(self.rows), "max_length": 128, "held_out_fraction": 0.1},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "save_total_limit": 2,
                "warmup_steps": 0, "activation_checkpointing": False,
            },
            "run": {"dir": "runs", "name": "tiny"},
            "eval": {},
        }  # fmt: skip
        for address, value in (self.changes | changes).items():
            section, _, key = address.partition("__")
            values.setdefault(section, {})[key] = value
        return recipe_from(values)

    def folder(self) -> Path:
        """A new, empty one."""
        self._folders += 1
        path = self.root / f"at-{self._folders}"
        path.mkdir()
        return path

    def start(
        self,
        folder: Path,
        first: Callable[[], object] = lambda: None,
        resume: str | None = None,
        **changes: Any,
    ) -> Child:
        """Train in a child; ``first`` is called in it before."""
        recipe = self.recipe(**changes)

        def act() -> None:
            first()
            train(recipe, resume)

        return Child(folder, act)

    def resumed(self, folder: Path, resume: str = "newest", **changes: Any) -> Done:
        return self.start(folder, resume=resume, **changes).wait()

    @cached_property
    def straight(self) -> Learned:
        """What the undisturbed run comes to."""
        folder = self.folder()
        done = self.start(folder).wait()
        assert done.code == 0, done.said
        return learned(run_in(folder))


def quick_folder() -> Path:
    """A new folder, in memory where there is room: the disk would be waited for at every fsync."""
    memory = Path("/dev/shm")
    roomy = (
        memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    )
    return Path(tempfile.mkdtemp(prefix="qlora-", dir=memory if roomy else None))


def train(recipe: Any, resume: str | None) -> None:
    """As ``qlora train`` does, without a terminal."""
    import torch
    from rich.console import Console

    from qlora import trainer

    torch.set_num_threads(1)
    trainer.train(recipe, resume=resume, console=Console(file=sys.stdout, width=1000))


def warm(root: Path) -> Stage:
    """Import all that a training needs, so that children need not."""
    stage = Stage(root)
    from rich.console import Console

    from qlora import trainer

    recipe = stage.recipe(run__dir=str(root / "warm"), train__max_steps=1)
    with _rendering_remembered():
        trainer.train(recipe, console=Console(quiet=True))
    shutil.rmtree(root / "warm")
    return stage


_RENDERED: dict[str, Any] = {}


@contextmanager
def _rendering_remembered() -> Iterator[None]:
    """A chat template's process need not be started in every child: what it said before is said again."""
    from qlora import templates

    exchange = templates._exchange

    def remembered(*given: Any) -> Any:
        asked = repr(given)
        if asked not in _RENDERED:
            _RENDERED[asked] = exchange(*given)
        return list(_RENDERED[asked])

    templates._exchange = remembered
    try:
        yield
    finally:
        templates._exchange = exchange


def run_in(folder: Path, below: str = "runs") -> Any:
    """The newest run in a folder."""
    from qlora import rundir

    return rundir.open_run(folder / below)


def learned(run: Any) -> Learned:
    """What a finished run came to."""
    losses = [
        (line["step"], key, line[key])
        for line in (
            json.loads(s) for s in (run.dir / "metrics.jsonl").read_text().split("\n") if s
        )
        for key in ("loss", "eval_loss")
        if key in line
    ]
    return Learned((run.adapter / "adapter_model.safetensors").read_bytes(), tuple(losses))


def differs(run: Any, straight: Learned, *, evaluations: bool = True) -> str:
    """In what a run came to something else; empty if it did not.

    Args:
        run: A run that has ended.
        straight: What it should have come to.
        evaluations: Compare held-out losses in the metrics, too, not the losses of steps alone.
    """
    if not run.is_complete:
        return "it has no result.json"
    if not (run.adapter / "adapter_model.safetensors").is_file():
        return "it has no adapter"
    try:
        found = learned(run)
    except ValueError as error:
        return f"metrics that cannot be read: {error}"
    wrong = []
    if found.adapter != straight.adapter:
        wrong.append("another adapter")
    lines = [
        [line for line in one.losses if evaluations or line[1] == "loss"]
        for one in (found, straight)
    ]
    if lines[0] != lines[1]:
        steps = [step for step, key, _ in found.losses if key == "loss"]
        wrong.append(f"other metrics (steps {steps})")
    return ", ".join(wrong)


def digest(folder: Path, passed_over: str = "nothing") -> str:
    """Of every name and byte below a folder, but what has a name that begins so."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(passed_over) for part in path.relative_to(folder).parts):
            continue
        content = path.read_bytes() if path.is_file() else b"folder"
        found.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return found.hexdigest()


# --- signals


def command(recipe_file: Path, resume: str | None = None) -> None:
    """``qlora train`` as it is typed."""
    from qlora import cli

    sys.argv = ["qlora", "train", str(recipe_file), *(["--resume", resume] if resume else [])]
    cli.main()


def signalled(phase: str, *numbers: int) -> Callable[[], None]:
    """For a child: it gets signals, one after the other, at the beginning of a phase of its run."""

    def strike(*_: Any, **__: Any) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    def begin() -> None:
        from qlora import loader, sft, verdict

        if phase == "loading":
            _before(loader, "load_base", strike)
        elif phase in ("before", "after"):
            _before(verdict, "measure", lambda *given, **_: given[-1] == phase and strike())
        elif phase == "step":
            _before(sft.RowTrainer, "compute_loss", lambda one, model, *_, **__: (
                model.training and one.state.global_step == 2 and strike()))  # fmt: skip
        elif phase == "save":
            Watch(Path.cwd() / "runs", lambda operation: (
                operation.what == "rename" and operation.path.name == "checkpoint-4" and strike()
            )).begin()  # fmt: skip
        else:
            raise AssertionError(phase)

    return begin


def _before(owner: Any, name: str, act: Callable[..., object]) -> None:
    function = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        act(*given, **named)
        return function(*given, **named)

    setattr(owner, name, wrapped)


# --- every operation on files, and what is on the disk when it does not come to it


@dataclass(frozen=True)
class Operation:
    """What is about to be done to a file."""

    number: int
    what: str
    path: Path

    def __str__(self) -> str:
        return f"{self.number} {self.what} {self.path.name}"


class Watch:
    """Tells every operation on files below a folder, in this process, before it is done, and can refuse it.

    Python's audit events tell what opens for writing, creates, renames and removes; os.fsync and the
    writer of safetensors, which is not Python's, are wrapped. There is no way back: for children.

    Args:
        folder: The one that is watched.
        before: Called with each operation; what it does to files is not told, what it raises is raised
            where the operation was asked for.

    Attributes:
        named: The newest step of which a checkpoint got its name.
        kept: The newest step that the store, or the mirror, said to be kept.
    """

    def __init__(self, folder: Path, before: Callable[[Operation], None]) -> None:
        self.folder = folder
        self.before = before
        self.count = 0
        self.named = self.kept = 0
        self.synced: dict[Path, int] = {}  # bytes on the disk for sure, of files that hold more
        self.opened: dict[
            Path, int
        ] = {}  # bytes held before, of files opened since the last operation
        self.names: list[
            tuple[str, tuple[Path, ...], int]
        ] = []  # changed, not for sure on the disk
        self._turn = threading.RLock()  # one operation at a time, also of several threads
        self._busy = threading.local()
        self._over = False

    def begin(self) -> None:
        from safetensors import torch as tensors

        from qlora import mirror, store

        fsync, serialize = os.fsync, tensors.serialize_file

        def synced(handle: int) -> None:
            path = _opened(handle)
            self.about("fsync", path)
            fsync(handle)
            with self._turn:
                self.synced.pop(path, None)
                self.names = [n for n in self.names if path not in {p.parent for p in n[1]}]

        def serialized(given: Any, path: Any, *rest: Any, **named: Any) -> Any:
            at = Path(os.path.abspath(path))  # noqa: PTH100 - as the audit events tell it
            with self._turn:
                if self.about("write", at):
                    self._written(at, truncates=True)
            return serialize(given, path, *rest, **named)

        def kept(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*given: Any, **named: Any) -> Any:
                checkpoint = function(*given, **named)
                if Path(os.path.abspath(checkpoint)).is_relative_to(self.folder):  # noqa: PTH100
                    self.kept = max(self.kept, store.step_of(checkpoint))
                return checkpoint

            return wrapped

        os.fsync, tensors.serialize_file = synced, serialized
        store.write = kept(store.write)
        mirror.copy_checkpoint = kept(mirror.copy_checkpoint)
        sys.addaudithook(self._audited)

    def end(self) -> None:
        """Tell nothing any more."""
        self._over = True

    def about(self, what: str, path: Path) -> bool:
        """Tell an operation; False if it is of another place."""
        if self._is_silent or not path.is_relative_to(self.folder):
            return False
        with self._turn:
            self.count += 1
            self._busy.now = True
            try:
                self.before(Operation(self.count, what, path))
            finally:
                self._busy.now = False
            self.opened = {}
        return True

    @property
    def _is_silent(self) -> bool:
        return self._over or getattr(self._busy, "now", False)

    def _audited(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self._is_silent:
            return
        with self._turn:
            self._audited_alone(event, given)

    def _audited_alone(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            at = _place(path, -1)
            if self.about("open", at):
                self._written(at, truncates=bool(flags & os.O_TRUNC))
        elif event == "os.rename":
            source, target = _place(given[0], given[2]), _place(given[1], given[3])
            if self.about("rename", target):
                self._renamed(source, target)
        else:
            at = _place(given[0], given[-1])
            if self.about(_EVENTS[event], at) and (event != "os.mkdir" or not at.exists()):
                self.names.append(("new" if event == "os.mkdir" else "gone", (at,), self.count))
                self.synced.pop(at, None)

    def _written(self, path: Path, *, truncates: bool) -> None:
        """A file is about to be written, after the operation was told."""
        size = path.stat().st_size if path.is_file() else 0
        if not path.exists():
            self.names.append(("new", (path,), self.count))
        self.opened[path] = 0 if truncates else size
        self.synced[path] = 0 if truncates else self.synced.get(path, size)

    def _renamed(self, source: Path, target: Path) -> None:
        self.names.append(("rename", (source, target), self.count))
        for path in [p for p in self.synced if p.is_relative_to(source)]:
            self.synced[target / path.relative_to(source)] = self.synced.pop(path)
        step = target.name.removeprefix("checkpoint-")
        if step != target.name and step.isdigit():
            self.named = max(self.named, int(step))


_EVENTS = {
    "open": "open", "os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove",
    "os.rmdir": "rmdir", "os.truncate": "truncate", "os.link": "link", "os.symlink": "link",
}  # fmt: skip


def _place(path: Any, handle: int) -> Path:
    text = os.fsdecode(path)
    if handle != -1 and not Path(text).is_absolute():
        text = str(_opened(handle) / text)
    return Path(os.path.abspath(text))  # noqa: PTH100


def _opened(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


@dataclass(frozen=True)
class Point:
    """A disk as a crash leaves it."""

    folder: Path
    operation: str  # that was not done any more
    kind: str  # "killed", "torn" in a write, "unsynced" data or "unnamed" files lost with the power
    at_least: int  # the step that can be gone on from
    digest: str

    def __str__(self) -> str:
        return f"{self.kind} before {self.operation}"


class Recorder:
    """Copies what is watched before every operation: what a process that dies there leaves.

    A process that is killed leaves what it has written (the page cache is not its own), and of the last
    write any part. A power cut also takes what was not synced: data of files, or the names of files.

    Args:
        into: Where the points lie.
        watched: The folder, directly in the working directory.
        at_least: The step that can be gone on from at the beginning.
        since: Operations before it are not recorded, but seen.
    """

    def __init__(
        self,
        into: Path,
        watched: Path,
        at_least: int = 0,
        since: Callable[[Operation], bool] = lambda operation: True,
    ) -> None:
        self.into, self.watched, self.since = into, watched, since
        self.watch = Watch(watched, self.before)
        self.watch.named = self.watch.kept = at_least
        self.points: list[Point] = []
        self._begun = False
        self._disks: dict[str, Path] = {}  # by digest; equal ones lie there once
        self._at: dict[int, Path] = {}  # before an operation

    def before(self, operation: Operation) -> None:
        self._begun = self._begun or self.since(operation)
        if not self._begun:
            self.watch.names.clear()  # they cannot be undone without a copy of what was before
            return
        watch, number = self.watch, operation.number
        disk = self.into / f"{number:04d}"
        shutil.copytree(self.watched, disk / self.watched.name)
        disk = self._at[number] = self._keep(disk, operation, "killed", watch.named)
        for part in (0.0, 0.5):
            sizes = {
                path: before + int((path.stat().st_size - before) * part)
                for path, before in watch.opened.items()
                if path.is_file()
            }
            if sizes:
                torn = self._variant(disk, f"{number:04d}-torn-{part:g}")
                for path, size in sizes.items():
                    os.truncate(self._in(torn, path), size)
                self._keep(torn, operation, "torn", watch.named)
        unsynced = {p: size for p, size in watch.synced.items() if p.is_file()}
        if unsynced:
            for how in ("absent", "zeros"):
                lost = self._variant(disk, f"{number:04d}-unsynced-{how}")
                for path, size in unsynced.items():
                    whole = path.stat().st_size
                    os.truncate(self._in(lost, path), size)
                    if how == "zeros":
                        os.truncate(self._in(lost, path), whole)
                self._keep(lost, operation, "unsynced", watch.kept)
        if watch.names:
            lost = self._variant(disk, f"{number:04d}-unnamed")
            for what, paths, when in reversed(watch.names):
                for path in paths:
                    self._undo(lost, path, None if what == "new" else when)
            self._keep(lost, operation, "unnamed", watch.kept)

    def _in(self, disk: Path, path: Path) -> Path:
        return disk / self.watched.name / path.relative_to(self.watched)

    def _variant(self, disk: Path, name: str) -> Path:
        other = disk.with_name(name)
        shutil.copytree(disk, other)
        return other

    def _undo(self, disk: Path, path: Path, when: int | None) -> None:
        at = self._in(disk, path)
        if at.is_dir():
            shutil.rmtree(at)
        else:
            at.unlink(missing_ok=True)
        if when is None:
            return
        was = self._in(self._at[when], path)
        at.parent.mkdir(parents=True, exist_ok=True)
        if was.is_dir():
            shutil.copytree(was, at)
        elif was.is_file():
            shutil.copy2(was, at)

    def _keep(self, disk: Path, operation: Operation, kind: str, at_least: int) -> Path:
        found = digest(disk)
        kept = self._disks.setdefault(found, disk)
        if kept != disk:
            shutil.rmtree(disk)
        self.points.append(Point(kept, str(operation), kind, at_least, found))
        return kept


def record(
    stage: Stage,
    folder: Path,
    below: str = "runs",
    *,
    resume: str | None = None,
    at_least: int = 0,
    since: Callable[[Operation], bool] = lambda operation: True,
    **changes: Any,
) -> list[Point]:
    """Every crash point of a run in a folder, of what is done below one of its folders."""
    into = stage.folder()
    watched = folder / below
    watched.mkdir(exist_ok=True)
    recipe = stage.recipe(**changes)

    def act() -> None:
        recorder = Recorder(into, watched, at_least, since)
        recorder.watch.begin()
        train(recipe, resume)
        recorder.watch.end()
        rows = [[str(p.folder), p.operation, p.kind, p.at_least, p.digest] for p in recorder.points]
        (into / "points.json").write_text(json.dumps(rows))

    done = Child(folder, act).wait()
    assert done.code == 0, done.said
    rows = json.loads((into / "points.json").read_text())
    return [Point(Path(row[0]), *row[1:]) for row in rows]


def dying(folder: Path, when: Callable[[Operation], bool]) -> Callable[[], None]:
    """For a child: it dies, as by SIGKILL, before the first operation of a kind below a folder."""

    def begin() -> None:
        def before(operation: Operation) -> None:
            if when(operation):
                os.kill(os.getpid(), signal.SIGKILL)

        Watch(folder, before).begin()

    return begin


def broken_off(stage: Stage, folder: Path, **changes: Any) -> Any:
    """A run that was killed at its third checkpoint; with two whole ones, of steps 2 and 4."""

    def third(operation: Operation) -> bool:
        return operation.what == "rename" and operation.path.name == "checkpoint-6"

    done = stage.start(folder, dying(folder / "runs", third), **changes).wait()
    assert done.code == -signal.SIGKILL, done.said
    return run_in(folder)


def wreck(run: Any) -> None:
    """What years of crashes may leave in a run: a damaged newest checkpoint, and rests of every kind."""
    from qlora import rundir

    newest = run.checkpoints / "checkpoint-4" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8] + b"damaged!")
    for name in (
        f".checkpoint-8.{rundir.host()}.999999.part",
        ".checkpoint-1.old",
        ".checkpoint-0.gone",
        "damaged-checkpoint-4",
    ):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "state.json").write_text("{")
    (run.dir / f".adapter.{rundir.host()}.999999.part").mkdir()
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.dir / ".recipe.yaml.part").write_text("model:")
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')


# --- what becomes of them


@dataclass(frozen=True)
class Claim:
    """What a resume of a disk begins with."""

    step: int  # 0: refused
    message: str
    digest: str  # of the run then


def claims(stage: Stage, points: list[Point], **changes: Any) -> list[Claim]:
    """Begin to resume each point, one after the other: sweep, put aside, bring home, rewind."""
    folder = stage.folder()
    disks = list(dict.fromkeys(point.folder for point in points))
    recipe = stage.recipe(**changes)

    def act() -> None:
        from rich.console import Console

        from qlora import resuming
        from qlora.errors import QLoRAError
        from qlora.screen import Screen

        screen = Screen(Console(quiet=True))
        rows = []
        for disk in disks:
            os.chdir(disk)
            try:
                claimed = resuming.claim(recipe, "newest", (), screen)
                claimed.settle(screen)
                row: list[Any] = [claimed.step, ""]
            except QLoRAError as error:
                row = [0, str(error)]
            # What was put aside is read no more.
            rows.append([*row, digest(disk / "runs", "damaged-")])
        (folder / "claims.json").write_text(json.dumps(rows))

    done = Child(folder, act).wait()
    assert done.code == 0, done.said
    rows = json.loads((folder / "claims.json").read_text())
    found = {disk: Claim(*row) for disk, row in zip(disks, rows, strict=True)}
    return [found[point.folder] for point in points]


def _runs(folder: Path) -> str:
    return "runs" if (folder / "runs").is_dir() else "mirror"


def problems(
    stage: Stage,
    points: list[Point],
    tell: Callable[[int, int], None] = lambda *_: None,
    **changes: Any,
) -> list[str]:
    """What is wrong with crash points: each must go on from its newest checkpoint to the same end.

    Disks that are equal byte for byte, once a resume has tidied them, are trained on once.
    """
    found, ends = [], dict[str, str]()
    begun = claims(stage, points, **changes)
    for number, (point, claim) in enumerate(zip(points, begun, strict=True)):
        tell(number, len(points))
        if claim.step == 0:
            if "has finished" in claim.message:
                wrong = differs(run_in(point.folder, _runs(point.folder)), stage.straight)
            elif "no run to resume" in claim.message or "no whole checkpoint" in claim.message:
                wrong = "nothing to resume" if point.at_least else ""
            else:
                wrong = claim.message
        elif claim.step < point.at_least:
            wrong = f"it goes on from step {claim.step}, not {point.at_least}"
        else:
            if claim.digest not in ends:
                done = stage.resumed(point.folder, **changes)
                ends[claim.digest] = (
                    differs(run_in(point.folder), stage.straight)
                    if done.code == 0
                    else done.said[-800:]
                )
            wrong = ends[claim.digest]
        if wrong:
            found.append(f"{point}: {wrong}")
    return found
