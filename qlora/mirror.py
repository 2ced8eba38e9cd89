"""A second copy of a run, on a drive that outlives the machine.

Each complete checkpoint is copied while training goes on, under another name, and renamed when it has been
read back whole. A mirror that fails is told of and never stops a run.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from qlora import rundir, store
from qlora.errors import CheckpointError
from qlora.places import expanded
from qlora.rundir import Run

WAIT_SECONDS = 600  # for the last copy, at the end of a run
MARK = "mirror.json"  # tells a copy from the run itself


class Mirror:
    """Copies a run's checkpoints to another folder, one at a time, the newest first.

    Args:
        run: The run that is copied.
        folder: ``run.mirror``: the copy lies in ``<folder>/<name>/<start time>``.
        keep: Checkpoints kept there.
        tell: Told a failure, in a sentence.
    """

    def __init__(self, run: Run, folder: str, keep: int, tell: Callable[[str], None]) -> None:
        self.run = run
        self.copy = Run(place_of(run, folder))
        self.keep = keep
        self.tell = tell
        self._next: Path | None = None
        self._changed = threading.Condition()
        self._busy = False
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
            done = self._changed.wait_for(lambda: not self._busy and self._next is None, seconds)
        if not done:
            self.tell(f"{self.copy.dir}: the last copy was not done in {seconds:.0f} s")
            return False
        return self._attempt(self._finish) if self.run.is_complete else True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                checkpoint, self._next = self._next, None
                self._busy = True
            assert checkpoint is not None
            self._attempt(partial(self._one, checkpoint))
            with self._changed:
                self._busy = False
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
        copy_checkpoint(checkpoint, self.copy)
        store.rotate(self.copy.checkpoints, self.keep)

    def _finish(self) -> None:
        with rundir.writing_aside(self.copy.adapter, replace=True) as aside:
            shutil.copytree(self.run.adapter, aside, dirs_exist_ok=True)
        copy_files(self.run, self.copy)  # result.json among them: last, as in the run


def place_of(run: Run, folder: str) -> Path:
    """Where a run's copy lies."""
    return expanded(folder) / run.dir.parent.name / run.dir.name


def copy_files(source: Run, target: Run) -> None:
    """Copy what lies beside the checkpoints, each file whole or not at all; ``result.json`` last."""
    target.dir.mkdir(parents=True, exist_ok=True)
    files = [path for path in source.dir.iterdir() if path.is_file() and path.name[0] != "."]
    for path in sorted(files, key=lambda path: (path.name == "result.json", path.name)):
        aside = target.dir / f".{path.name}.part"
        shutil.copyfile(path, aside)
        rundir.sync_file(aside)
        aside.replace(target.dir / path.name)


def copy_checkpoint(checkpoint: Path, target: Run) -> Path:
    """Copy a checkpoint, read it back, and only then give it its name.

    Raises:
        CheckpointError: What was read back is not what was written.
    """
    final = target.checkpoints / checkpoint.name
    with rundir.writing_aside(final, replace=True) as aside:
        shutil.copytree(checkpoint, aside, dirs_exist_ok=True)
        why = store.defect(aside)
        if why is not None:
            raise CheckpointError(f"{final}: copied, but {why}")
    return final


def newest_of(runs: Iterable[Run]) -> tuple[Run, Path] | None:
    """The place among copies of one run with the newest whole checkpoint, and that checkpoint."""
    found = [(run, path) for run in runs if (path := store.newest(run.checkpoints)) is not None]
    return max(found, key=lambda one: store.step_of(one[1]), default=None)
