"""A disk that is full or fails: what was saved stays whole, it is told in a line, and the run goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torture
from torture import Operation, Stage

DISK_BYTES = 48 * 2**20  # three times what the store leaves free
Fault = Callable[[Path], Callable[[], None]]  # of a disk: what a child does first


@dataclass(frozen=True)
class Case:
    """A fault in a run, and what it must come to.

    Attributes:
        fault: Begun in the child; see :func:`full` and :func:`failing`.
        code: Of the process that met it.
        said: Words of its line.
        saved: The newest whole checkpoint then, of a run that ended by it; None: no run is left.
        resume: The fault comes in a resume, of a run that was killed with checkpoints 2 and 4.
        lines: Whether the metrics are whole as well.
        changes: To the recipe.
    """

    name: str
    fault: Fault
    code: int
    said: tuple[str, ...]
    saved: int | None = 6
    resume: bool = False
    lines: bool = True
    changes: dict[str, Any] = field(default_factory=dict)


def at(what: str, name: str, times: int = 1, after: int = 0) -> Callable[[Operation], bool]:
    """Says yes to some operations of a kind on files whose name begins so.

    Args:
        what: The kind; empty for any.
        name: How the file's own name, or that of a folder above, begins.
        times: How often; 0 for ever.
        after: So many are let pass.
    """
    seen = [0]

    def asked(operation: Operation) -> bool:
        if what not in ("", operation.what):
            return False
        if not any(part.startswith(name) for part in operation.path.parts):
            return False
        seen[0] += 1
        return seen[0] > after and (not times or seen[0] <= after + times)

    return asked


def failing(
    when: Callable[[Operation], bool], number: int = errno.EIO, below: str = "runs"
) -> Fault:
    """Operations that end in an error of the disk."""

    def fault(disk: Path) -> Callable[[], None]:
        def before(operation: Operation) -> None:
            if when(operation):
                raise OSError(number, os.strerror(number), str(operation.path))

        return lambda: torture.Watch(disk / below, before).begin()

    return fault


def full(
    when: Callable[[Operation], bool], *, until_told: bool = True, below: str = "runs"
) -> Fault:
    """From an operation on not a byte is free; until a save has failed, or for good."""

    def fault(disk: Path) -> Callable[[], None]:
        filler = disk / "filler"

        def before(operation: Operation) -> None:
            if when(operation):
                fill(filler)

        def begin() -> None:
            torture.Watch(disk / below, before).begin()
            if until_told:
                from qlora.keeping import Keeper

                failed = Keeper._failed

                def told(self: Any, *given: Any) -> None:
                    filler.unlink(missing_ok=True)
                    failed(self, *given)

                Keeper._failed = told  # type: ignore[method-assign]

        return begin

    return fault


def fill(filler: Path) -> None:
    """Write until nothing more can be written."""
    with filler.open("ab", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


NO_SPACE, NO_IO = "No space left on device", "Input/output error"
EACH = {"train__save_steps": 1}
GOES_ON = ("step 4 was not saved: ", "the last whole one is checkpoint-2; the run goes on")
ENDS = ("It failed 3 times in a row, so the run is stopped. Free some space, then: qlora train ",)
CASES = [
    *(
        Case(f"full at operation {n} of a save", full(at("", ".checkpoint-4", after=n)), 0,
             (NO_SPACE, *GOES_ON))
        for n in (0, 5, 8, 12, 16, 20)
    ),
    Case("no room before a save", full(at("open", "metrics.jsonl", after=4)), 0,
         ("MiB are needed", *GOES_ON), lines=False),
    Case("full for good", full(at("", ".checkpoint-3"), until_told=False), 2,
         ("step 5 was not saved", *ENDS), 2, changes=EACH),
    Case("a write fails", failing(at("write", ".checkpoint-4")), 0, (NO_IO, *GOES_ON)),
    Case("an open fails", failing(at("open", ".checkpoint-4")), 0, (NO_IO, *GOES_ON)),
    Case("an fsync fails", failing(at("fsync", ".checkpoint-4")), 0, (NO_IO, *GOES_ON)),
    Case("the fsync of the manifest fails", failing(at("fsync", "manifest.json", after=1)), 0,
         (NO_IO, *GOES_ON)),
    Case("a rename fails", failing(at("rename", "checkpoint-4")), 0, (NO_IO, *GOES_ON)),
    Case("no write ever", failing(at("write", ".checkpoint", 0, after=4)), 2,
         (NO_IO, "step 5 was not saved", *ENDS), 2, changes=EACH),
    Case("no rename ever", failing(at("rename", "checkpoint-", 0, after=2)), 2, (NO_IO, *ENDS), 2,
         changes=EACH),
    Case("full at the final adapter", full(at("", ".adapter."), until_told=False), 2,
         (NO_SPACE, "/adapter: cannot be written: ", "checkpoint-6", "--resume")),
    Case("the final adapter's fsync fails", failing(at("fsync", ".adapter.")), 2,
         (NO_IO, "/adapter: cannot be written: ", "checkpoint-6", "--resume")),
    Case("full at the result", full(at("", ".result.json"), until_told=False), 2,
         (NO_SPACE, "cannot be written: ", "checkpoint-6", "--resume")),
    Case("full at the start", full(at("", ".recipe.yaml"), until_told=False), 2,
         (NO_SPACE, "cannot be written: ", "start again"), None),
    Case("full before the first step", full(at("", ".before.json"), until_told=False), 2,
         (NO_SPACE, "cannot be written: ", "start again"), None),
    Case("full when a run is resumed", full(at("", ".metrics.jsonl"), until_told=False), 2,
         (NO_SPACE, "cannot be written: ", "checkpoint-4", "--resume"), 4, resume=True),
    Case("full when a resumed run records itself", full(at("", ".plan.json"), until_told=False), 2,
         (NO_SPACE, "cannot be written: ", "checkpoint-4", "--resume"), 4, resume=True),
    Case("metrics fail", failing(at("open", "metrics.jsonl", after=3)), 0,
         (f"metrics.jsonl cannot be written: {NO_IO}",), lines=False),
    Case("the mirror is full", failing(at("", "", 0), errno.ENOSPC, "mirror"), 0,
         (NO_SPACE, "the run goes on without its copy"), changes={"run__mirror": "mirror"}),
]  # fmt: skip


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a few MiB in a folder.

    Raises:
        PermissionError: Only root may mount one.
    """
    options = f"size={DISK_BYTES}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def problem(case: Case, stage: Stage, disk: Path) -> str:
    """What is wrong with a case's outcome on an empty disk; nothing if it is right."""
    from qlora import store

    if case.resume:
        torture.broken_off(stage, disk)
    for folder in ("runs", "mirror"):
        (disk / folder).mkdir(exist_ok=True)
    resume = "newest" if case.resume else None
    first = done = stage.start(disk, case.fault(disk), resume, **case.changes).wait()
    (disk / "filler").unlink(missing_ok=True)
    wrong = [] if done.code == case.code else [f"exit code {done.code}, not {case.code}"]
    wrong += [f"it did not say {words!r}" for words in case.said if words not in done.said]
    if case.code:
        left = sorted(disk.glob("runs/tiny/*"))
        if case.saved is None:
            wrong += [f"{path} is left" for path in left]
            done = stage.start(disk, **case.changes).wait()
        else:
            newest = store.newest(left[-1] / "checkpoints")
            if newest is None or store.step_of(newest) != case.saved:
                wrong.append(f"the newest whole checkpoint is {newest}")
            done = stage.resumed(disk, **case.changes)
        if done.code:
            wrong.append(f"it did not go on: {done.message or done.said[-500:]}")
    if not wrong:
        wrong += _unlike(case, stage, disk)
    return "; ".join(wrong) + (f"\n{first.said[-2500:]}" if wrong else "")


def _unlike(case: Case, stage: Stage, disk: Path) -> list[str]:
    run = torture.run_in(disk)
    different = torture.differs(run, stage.straight)
    if not case.lines and "adapter" not in different:
        different = ""  # lines that could not be written are not there
    rests = [p.name for f in (run.dir, run.checkpoints) for p in f.glob(".*") if p.name != ".lock"]
    return [*filter(None, [different]), *(f"{name} is left" for name in rests)]


# --- as tests


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    if not torture.HAS_FORK:
        pytest.skip("children are forked, and watched through /proc")
    root = torture.quick_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(root / "cache"))
        yield torture.warm(root)
    shutil.rmtree(root)


@pytest.fixture
def disk(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QLORA_CACHE", str(stage.root / "cache"))
    try:
        with small_disk(stage.folder()) as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_saved_stays_whole_and_the_run_can_go_on(
    case: Case, stage: Stage, disk: Path
) -> None:
    assert problem(case, stage, disk) == ""


def test_there_are_more_than_twenty_faults() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 20
