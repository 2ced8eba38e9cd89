"""Signals: the first ends a training with a checkpoint, the second at once, and both can be resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torture
from conftest import REPOSITORY
from torture import Child, Done, Stage

from qlora import rundir, store
from qlora.errors import Terminated
from qlora.stopping import SIGNALS, Stopping

INT, TERM = signal.SIGINT, signal.SIGTERM
CODES = {INT: 130, TERM: 143}


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
def folder(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(stage.root / "cache"))
    folder = stage.folder()
    (folder / "runs").mkdir()
    (folder / "mine.yaml").write_text(stage.recipe().dump())
    return folder


def stopped(folder: Path, phase: str, *numbers: int, resume: str | None = None) -> Done:
    """A run through the command line's own code, with signals in a phase of it."""
    begin = torture.signalled(phase, *numbers)

    def act() -> None:
        begin()
        torture.command(folder / "mine.yaml", resume)

    return Child(folder, act).wait()


def newest_step(folder: Path) -> int:
    newest = store.newest(torture.run_in(folder).checkpoints)
    return 0 if newest is None else store.step_of(newest)


def goes_on(stage: Stage, folder: Path, step: int) -> None:
    """It is resumed from a step, to the same end as if nothing had been."""
    done = stage.resumed(folder)
    assert done.code == 0, done.said
    assert done.from_step == step
    assert torture.differs(torture.run_in(folder), stage.straight) == ""


# --- a run


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(("phase", "step"), [("step", 3), ("save", 5)])
def test_a_signal_while_steps_are_taken_saves_the_step_under_way(
    phase: str, step: int, number: int, stage: Stage, folder: Path
) -> None:
    done = stopped(folder, phase, number)
    assert done.code == CODES[signal.Signals(number)], done.said
    assert "stopping when this step is saved; once more stops at once" in done.said
    assert f"checkpoint-{step}." in done.said and "Go on from it: qlora train" in done.said
    assert newest_step(folder) == step  # save_steps is 2: step 3 and 5 are saved for the signal
    goes_on(stage, folder, step)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", ["loading", "before"])
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_nothing(
    phase: str, number: int, stage: Stage, folder: Path
) -> None:
    done = stopped(folder, phase, number)
    assert done.code == CODES[signal.Signals(number)]
    assert "Stopped before the first step; there is nothing to resume." in done.said
    assert "Traceback" not in done.said
    assert not list((folder / "runs").rglob("recipe.yaml"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_a_resumed_run_loads_leaves_its_checkpoint(
    number: int, stage: Stage, folder: Path
) -> None:
    torture.broken_off(stage, folder)
    done = stopped(folder, "loading", number, resume="newest")
    assert done.code == CODES[signal.Signals(number)]
    assert "checkpoint-4." in done.said and "Go on from it" in done.said
    goes_on(stage, folder, 4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_while_the_end_is_measured_leaves_only_that_to_do(
    number: int, stage: Stage, folder: Path
) -> None:
    done = stopped(folder, "after", number)
    assert done.code == CODES[signal.Signals(number)]
    assert "checkpoint-6." in done.said
    assert not torture.run_in(folder).is_complete
    goes_on(stage, folder, 6)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("numbers", "code"), [((INT, INT), 130), ((TERM, TERM), -TERM), ((TERM, INT), 130)]
)
@pytest.mark.parametrize(("phase", "step"), [("step", 2), ("save", 2)])
def test_the_second_signal_stops_at_once_and_leaves_a_run_that_can_go_on(
    phase: str, step: int, numbers: tuple[int, ...], code: int, stage: Stage, folder: Path
) -> None:
    done = stopped(folder, phase, *numbers)
    assert done.code == code, done.said  # a process that a signal ended: 143 in a shell
    assert newest_step(folder) == step
    goes_on(stage, folder, step)


# --- the real command


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_command_ends_with_the_signals_exit_code(
    number: int, make_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__max_steps=5000, train__save_steps=2500, train__logging_steps=1)
    (tmp_path / "mine.yaml").write_text(recipe.dump())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "qlora", "train", str(tmp_path / "mine.yaml")],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        end = time.monotonic() + 120
        while not any(Path(recipe.run.dir).rglob("metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)  # the line is of the measure before; now steps are taken
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == CODES[signal.Signals(number)], said
    run = rundir.open_run(recipe.run.dir)
    assert (
        f"qlora: Stopped. The last complete checkpoint is {store.newest(run.checkpoints)}" in said
    )
    last = max(line["step"] for line in run.metrics() if "loss" in line)
    assert store.newest(run.checkpoints) == run.checkpoints / f"checkpoint-{last}"


# --- handlers


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stopping().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("number", "kind"), [(INT, KeyboardInterrupt), (TERM, Terminated)])
def test_where_no_step_is_taken_a_signal_stops_at_once(number: int, kind: type) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind) as caught, Stopping().listening():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert type(caught.value) is kind
    assert signal.getsignal(number) == before


def test_in_a_thread_nothing_is_listened_to() -> None:
    before, seen = signal.getsignal(INT), []

    def listen() -> None:
        with Stopping().listening():
            seen.append(signal.getsignal(INT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
