"""A second copy of a run, on a drive that outlives the machine.

Each complete checkpoint is copied while training goes on, under another name, and renamed when it has been
read back whole. A mirror that fails is told of and never stops a run.
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from qlora import rundir, store
from qlora.errors import CheckpointError, RecipeError
from qlora.places import expanded
from qlora.rundir import Run

COPY_BYTES = 2**20  # at a time
WAIT_SECONDS = 600  # for the last copy, at the end of a run
MARK = "mirror.json"  # tells a copy from the run itself
# Of a run directory, what is copied; a drive may hold anything else, and links to anywhere.
FILES = (
    "recipe.yaml", "plan.json", "environment.json", "data.json", "rejected.jsonl", "before.json",
    "roll_backs.json", "metrics.jsonl",
)  # fmt: skip
# What the end of a run wrote, in this order.
ENDING = ("after.json", "report.html", "result.json")


class Mirror:
    """Copies a run's checkpoints to another folder, one at a time, the newest first.

    Args:
        run: The run that is copied.
        folder: ``run.mirror``: the copy lies in ``<folder>/<name>/<start time>``.
        keep: Checkpoints kept there.
        tell: Told a failure, in a sentence.

    Raises:
        RecipeError: The copy would be the run itself.
    """

    def __init__(self, run: Run, folder: str, keep: int, tell: Callable[[str], None]) -> None:
        self.run = run
        self.copy = Run(place_of(run, folder))
        if self.copy.dir.resolve() == run.dir.resolve():
            raise RecipeError(
                f"run.mirror is {folder!r}, which is where the run itself is written. Name another folder, "
                "on another drive, or leave it out."
            )
        self.keep = keep
        self.tell = tell
        self._next: Path | None = None
        self._changed = threading.Condition()
        self._busy = False
        self._is_over = False
        self._thread: threading.Thread | None = None
        self._told = ""

    def offer(self, checkpoint: Path) -> None:
        """Have a complete checkpoint copied; one that still waits is passed over for it."""
        with self._changed:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="qlora-mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, seconds: float = WAIT_SECONDS) -> bool:
        """Wait for the last copy, then copy what the end of a run wrote. False if that failed."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._thread is None, seconds)
        if not done:
            self.tell(
                f"{self.copy.dir}: the last checkpoint's copy was not done in {seconds:.0f} s"
            )
        # The product is small: it may well arrive where a checkpoint did not.
        ended = self._attempt(self._finish) if self.run.is_complete else True
        return done and ended

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._next is not None or self._is_over)
                    checkpoint, self._next = self._next, None
                    if checkpoint is None:
                        return
                    self._busy = True
                self._attempt(partial(self._one, checkpoint))
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
        finally:  # nobody waits for a thread that is gone
            with self._changed:
                self._busy, self._thread = False, None
                self._changed.notify_all()

    def _attempt(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except (OSError, shutil.Error, CheckpointError) as error:
            said = f"{self.copy.dir}: {getattr(error, 'strerror', None) or error}"
            if said != self._told:
                self._told = said
                self.tell(f"{said}; the run goes on without its copy")
            return False
        self._told = ""
        return True

    def _one(self, checkpoint: Path) -> None:
        copy_files(self.run, self.copy)
        rundir.write_json(self.copy.dir / MARK, {"of": str(self.run.dir.resolve())})
        store.sweep(self.copy.checkpoints)
        try:
            copied = copy_checkpoint(checkpoint, self.copy)
        except FileNotFoundError:
            if checkpoint.is_dir():
                raise
            return  # rotated away before it was begun; a newer one is offered by then
        # A run that went back has left newer ones here, or torn ones: no rotation may prefer them.
        _drop_after(self.copy.checkpoints, store.step_of(checkpoint))
        store.rotate(self.copy.checkpoints, self.keep, copied)

    def _finish(self) -> None:
        with rundir.writing_aside(self.copy.adapter, replace=True) as aside:
            shutil.copytree(self.run.adapter, aside, dirs_exist_ok=True)
        copy_files(self.run, self.copy, result=True)


def place_of(run: Run, folder: str) -> Path:
    """Where a run's copy lies."""
    return expanded(folder) / run.dir.parent.name / run.dir.name


def is_copy(run: Run) -> bool:
    """Whether a run directory is another one's copy."""
    return (run.dir / MARK).is_file()


def original_of(copy: Run) -> Run | None:
    """The run that a copy is of, if it lies on this machine."""
    try:
        run = Run(Path(rundir.read_json(copy.dir / MARK)["of"]))
    except (CheckpointError, KeyError, TypeError):
        return None
    same = run.dir.name == copy.dir.name and run.dir.parent.name == copy.dir.parent.name
    return run if same and run.recipe_file.is_file() else None


def copy_files(source: Run, target: Run, *, result: bool = False) -> None:
    """Copy what lies beside the checkpoints, each file whole or not at all.

    Args:
        source: What is copied.
        target: Where to.
        result: What the end of a run wrote as well, ``result.json`` last: when all else is copied.

    Raises:
        OSError: A file cannot be read or written.
    """
    rundir.make_folder(target.dir)
    for name in (*FILES, *ENDING) if result else FILES:
        path, aside = source.dir / name, target.dir / f".{name}.part"
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link; a run's files are copied, not what they point to."
            )
        if path.is_file():
            aside.unlink(missing_ok=True)  # it may be a link, and would be written through
            shutil.copyfile(path, aside, follow_symlinks=False)
            rundir.sync_file(aside)
            aside.replace(target.dir / name)


def copy_checkpoint(checkpoint: Path, target: Run) -> Path:
    """Copy a checkpoint, read it back, and only then give it its name.

    Its files are held open meanwhile, so that a run which deletes it does not end a slow copy: of a drive
    that is slower than the run no copy would ever be done.

    Raises:
        CheckpointError: What was read back is not what was written.
        OSError: A file cannot be read or written.
    """
    final = target.checkpoints / checkpoint.name
    with rundir.writing_aside(final, replace=True) as aside, ExitStack() as held:
        paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        if not paths:
            raise FileNotFoundError(errno.ENOENT, "it holds no file", str(checkpoint))
        opened = [(path, held.enter_context(path.open("rb"))) for path in paths]
        for path, file in opened:
            copied = aside / path.relative_to(checkpoint)
            copied.parent.mkdir(parents=True, exist_ok=True)
            with copied.open("wb") as to:
                shutil.copyfileobj(file, to, COPY_BYTES)
        why = store.defect(aside)
        if why is not None:
            raise CheckpointError(f"{final}: copied, but {why}")
    return final


def _drop_after(folder: Path, step: int) -> None:
    for path in folder.glob("checkpoint-*"):
        if store.step_of(path) > step:
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")), ignore_errors=True)


def newest_of(runs: Iterable[Run]) -> tuple[Run, Path] | None:
    """The place among copies of one run with the newest whole checkpoint, and that checkpoint."""
    found = [(run, path) for run in runs if (path := store.newest(run.checkpoints)) is not None]
    return max(found, key=lambda one: store.step_of(one[1]), default=None)
