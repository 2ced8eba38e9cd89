"""A run whose machine is lost goes on from its copy; a copy that fails costs the run nothing."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console
from test_resume import lines, require_equal, weights, write_rows

import qlora
from qlora import mirror, resuming, rundir, sft, store, trainer
from qlora.errors import CheckpointError, Interrupted, RecipeError
from qlora.mirror import Mirror
from qlora.recipe import load_recipe, recipe_from
from qlora.rundir import Run
from qlora.settings import Recipe

pytestmark = pytest.mark.usefixtures("one_thread", "light", "no_waiting_for_the_disk")

START = "20260101-120000"
PATIENCE = 60  # seconds; a test that waits for so long has failed


# --- the thread that copies, on checkpoints that no training wrote


def checkpoint(run: Run, step: int, size: int = 5000) -> Path:
    """A sealed checkpoint of two files."""
    folder = run.checkpoints / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(bytes([step % 256]) * size)
    (folder / "deep" / "state.json").write_text(f'{{"step": {step}}}')
    rundir.seal(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "tiny" / START)
    run.dir.mkdir(parents=True)
    (run.dir / "recipe.yaml").write_text("a recipe")
    (run.dir / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def to_drive(run: Run, told: list[str], tmp_path: Path) -> Iterator[Callable[..., Mirror]]:
    """Makes the mirror of the run, whose thread has ended when the test has."""
    made = []

    def mirrored(keep: int = 2) -> Mirror:
        made.append(Mirror(run, str(tmp_path / "drive"), keep, told.append))
        return made[-1]

    yield mirrored
    for one in made:
        one.finish(PATIENCE)
    assert not [thread for thread in threading.enumerate() if thread.name == "qlora-mirror"]


def steps_in(run: Run) -> list[int]:
    """Of its whole checkpoints; every folder that is named like one must be whole."""
    found = sorted(run.checkpoints.glob("checkpoint-*"), key=store.step_of)
    assert [store.defect(path) for path in found] == [None] * len(found)
    return [store.step_of(path) for path in found]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def idle(one: Mirror) -> None:
    """Wait until all that was offered is copied."""
    with one._changed:
        assert one._changed.wait_for(lambda: not one._busy and one._next is None, PATIENCE)


class Gate:
    """Copies that end when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        self.copied: list[int] = []
        self._copy = mirror.copy_checkpoint
        monkeypatch.setattr(mirror, "copy_checkpoint", self._slowly)

    def _slowly(self, path: Path, target: Run) -> Path:
        self.begun.release()
        assert self.open.wait(PATIENCE)
        self.copied.append(store.step_of(path))
        return self._copy(path, target)


def test_a_checkpoint_and_what_lies_beside_it_are_copied_byte_for_byte(
    run: Run, to_drive: Callable[..., Mirror], told: list[str], tmp_path: Path
) -> None:
    one = to_drive()
    one.offer(checkpoint(run, 3))
    idle(one)
    copy = Run(tmp_path / "drive" / "tiny" / START)
    assert files(copy.checkpoints) == files(run.checkpoints) and len(files(copy.checkpoints)) == 3
    beside = {name: data for name, data in files(copy.dir).items() if "checkpoint" not in name}
    assert set(beside) == {"recipe.yaml", "metrics.jsonl", "mirror.json"}
    assert beside["recipe.yaml"] == b"a recipe"
    assert mirror.is_copy(copy) and not mirror.is_copy(run)
    assert mirror.original_of(copy) == run
    assert told == []


def test_of_a_slow_drive_the_newest_checkpoint_wins_and_nobody_waits(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    gate, one = Gate(monkeypatch), to_drive()
    one.offer(checkpoint(run, 1))
    assert gate.begun.acquire(timeout=PATIENCE)
    for step in (2, 3, 4):
        one.offer(checkpoint(run, step))  # each returns although the first copy has not ended
    assert gate.copied == []
    gate.open.set()
    idle(one)
    assert gate.copied == [1, 4] and steps_in(one.copy) == [1, 4]
    assert told == []


def test_the_end_of_a_run_waits_for_the_last_copy_and_not_for_ever(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    gate, one = Gate(monkeypatch), to_drive()
    one.offer(checkpoint(run, 1))
    assert gate.begun.acquire(timeout=PATIENCE)
    one.offer(checkpoint(run, 2))
    began = time.monotonic()
    assert one.finish(0.2) is False
    assert 0.2 <= time.monotonic() - began < PATIENCE
    assert told == [f"{one.copy.dir}: the last checkpoint's copy was not done in 0 s"]
    threading.Timer(0.2, gate.open.set).start()
    assert one.finish(PATIENCE) is True
    assert gate.copied == [1, 2] and steps_in(one.copy) == [1, 2]


def test_what_the_end_of_a_run_wrote_is_copied_last(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = to_drive()
    one.offer(checkpoint(run, 1))
    run.adapter.mkdir()
    (run.adapter / "weights").write_bytes(b"x" * 100)
    (run.dir / "a.json").write_text("{}")
    rundir.write_json(run.dir / "result.json", {"loss": 1.0})
    order = []
    copyfile = shutil.copyfile

    def noted(source: Any, target: Any, **settings: Any) -> Any:
        order.append(Path(source).name)
        return copyfile(source, target, **settings)

    idle(one)
    monkeypatch.setattr(shutil, "copyfile", noted)
    assert one.finish(PATIENCE) is True
    assert order[-1] == "result.json" and order.count("result.json") == 1
    assert one.copy.result == {"loss": 1.0} and files(one.copy.adapter) == files(run.adapter)
    assert not [
        path for path in one.copy.dir.rglob(".*") if path.suffix in (".part", ".old", ".gone")
    ]


def test_a_mirror_that_was_offered_nothing_is_finished_at_once(
    to_drive: Callable[..., Mirror],
) -> None:
    assert to_drive().finish(0.0) is True


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_checkpoints_are_kept_on_the_drive_as_in_the_run(
    keep: int, run: Run, to_drive: Callable[..., Mirror]
) -> None:
    one = to_drive(keep)
    for step in range(1, 6):
        one.offer(checkpoint(run, step))
        idle(one)
    assert steps_in(one.copy) == list(range(1, 6))[-keep:]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("torn", [True, False])
def test_what_is_newer_on_the_drive_than_in_the_run_never_outlives_it(
    keep: int, torn: bool, run: Run, to_drive: Callable[..., Mirror]
) -> None:
    """After a step back, or a resume from an older checkpoint since the newest one was damaged."""
    one = to_drive(keep)
    stale = checkpoint(one.copy, 9)
    if torn:
        (stale / "adapter.safetensors").write_bytes(b"torn")
    one.offer(checkpoint(run, 4))
    idle(one)
    assert steps_in(one.copy) == [4]
    assert mirror.newest_of([one.copy]) == (one.copy, one.copy.checkpoints / "checkpoint-4")


def test_a_checkpoint_that_is_rotated_away_while_it_is_copied_is_copied_whole(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """Else no copy would ever be done on a drive that is slower than the run."""
    one = to_drive()
    path = checkpoint(run, 3)
    expected = files(path)
    copyfileobj = shutil.copyfileobj

    def late(source: Any, target: Any, length: int = 0) -> None:
        if path.exists():
            store.rotate(run.checkpoints, 1, checkpoint(run, 4))
        assert not path.exists()
        copyfileobj(source, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", late)
    one.offer(path)
    idle(one)
    assert files(one.copy.checkpoints / "checkpoint-3") == expected
    assert told == []


def test_a_checkpoint_that_is_gone_before_its_copy_begins_is_no_failure(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    one = to_drive()
    one.offer(run.checkpoints / "checkpoint-3")
    idle(one)
    one.offer(checkpoint(run, 4))
    idle(one)
    assert told == [] and steps_in(one.copy) == [4]


def test_a_copy_that_is_not_what_was_written_gets_no_name(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    one = to_drive()
    one.offer(checkpoint(run, 3))
    idle(one)
    copyfileobj = shutil.copyfileobj

    def lossy(source: Any, target: Any, length: int = 0) -> None:
        copyfileobj(source, target, length)
        if source.name.endswith(".safetensors"):
            target.seek(17)
            target.write(b"!")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", lossy)
        one.offer(checkpoint(run, 4))
        idle(one)
    assert steps_in(one.copy) == [3]
    (said,) = told
    assert "checkpoint-4: copied, but adapter.safetensors is damaged" in said
    assert said.endswith("; the run goes on without its copy")
    assert not [path for path in one.copy.checkpoints.iterdir() if path.name.startswith(".")]


def test_what_killed_copiers_left_on_the_drive_is_removed(
    run: Run, to_drive: Callable[..., Mirror]
) -> None:
    one = to_drive()
    left = one.copy.checkpoints / ".checkpoint-9.a-lost-machine.1234.part"
    left.mkdir(parents=True)
    one.offer(checkpoint(run, 3))
    idle(one)
    assert not left.exists() and steps_in(one.copy) == [3]


def test_a_failure_is_told_once_until_it_is_another_one(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    one = to_drive()
    copy = mirror.copy_checkpoint
    errors: list[OSError | None] = [
        OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"), None, OSError(errno.EIO, "Input/output error"),
    ]  # fmt: skip

    def failing(path: Path, target: Run) -> Path:
        error = errors[store.step_of(path)]
        if error is not None:
            raise error
        return copy(path, target)

    monkeypatch.setattr(mirror, "copy_checkpoint", failing)
    for step in range(5):
        one.offer(checkpoint(run, step))
        idle(one)
    said = [line.removeprefix(f"{one.copy.dir}: ").partition(";")[0] for line in told]
    assert said == ["No space left on device", "Input/output error", "Input/output error"]
    assert steps_in(one.copy) == [3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_holds_up_no_end_and_the_next_offer_is_copied(
    run: Run, to_drive: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = to_drive()
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "copy_files", lambda *_: 1 / 0)
        one.offer(checkpoint(run, 3))
        with one._changed:
            assert one._changed.wait_for(lambda: one._thread is None, PATIENCE)
    one.offer(checkpoint(run, 4))
    idle(one)
    assert steps_in(one.copy) == [4]


def test_a_copy_in_place_of_the_run_itself_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for folder in (tmp_path / "runs", tmp_path / "link", tmp_path / "x" / ".." / "runs"):
        with pytest.raises(RecipeError, match=r"run.mirror is .*where the run itself is written"):
            Mirror(run, str(folder), 2, print)


def test_a_mirror_may_lie_in_the_home_of_the_user(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Mirror(run, "~/drive", 2, print).copy.dir == tmp_path / "home" / "drive" / "tiny" / START


# --- real runs

STEPS = 8
VALUES: dict[str, dict[str, Any]] = {
    "data": {"max_length": 128, "held_out_fraction": 0.1},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "train": {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2, "logging_steps": 3, "save_steps": 2, "warmup_steps": 0,
        "activation_checkpointing": False,
    },
    "run": {"name": "tiny"},
}  # fmt: skip


def recipe_in(folder: Path, tiny: Path, rows: Path, **changes: Any) -> Recipe:
    """Written to <folder>/runs and mirrored to <folder>/drive."""
    values = {section: dict(keys) for section, keys in VALUES.items()}
    values["model"] = {"name": str(tiny)}
    values["data"]["train"] = str(rows)
    values["run"] |= {"dir": str(folder / "runs"), "mirror": str(folder / "drive")}
    for address, value in changes.items():
        section, _, key = address.partition("__")
        values[section][key] = value
    return recipe_from(values)


def train(recipe: Recipe, **settings: Any) -> tuple[Run, str]:
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=1000), **settings)
    return run, said.getvalue()


@dataclass
class Lost:
    """A machine that was lost in step 6, after checkpoints 2 and 4: its runs, and the drive."""

    folder: Path
    whole: Run  # the undisturbed run

    @property
    def run(self) -> Run:
        return Run(self.folder / "runs" / "tiny" / START)

    @property
    def drive(self) -> Path:
        return self.folder / "drive"

    @property
    def copy(self) -> Run:
        return Run(self.drive / "tiny" / START)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS[:24])


@pytest.fixture(scope="module")
def accident(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, rows: Path, one_thread: None, light: None
) -> Lost:
    folder = tmp_path_factory.mktemp("machine")
    lost = Lost(folder / "lost", Run(folder))
    step, made = sft.RowTrainer.training_step, mirror.Mirror.__init__
    mirrors: list[Mirror] = []

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and not lost.folder.exists():
            idle(mirrors[0])
            lost.folder.mkdir()
            shutil.copytree(Path(self.args.output_dir).parent, lost.run.dir)
            shutil.copytree(mirrors[0].copy.dir, lost.copy.dir)
        return step(self, *args, **kwargs)

    def kept(self: Mirror, *args: Any) -> None:
        made(self, *args)
        mirrors.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        patch.setattr(sft.RowTrainer, "training_step", stepped)
        patch.setattr(mirror.Mirror, "__init__", kept)
        lost.whole, said = train(recipe_in(folder, tiny, rows))
    assert said.count("\nmirror ") == 1 and str(mirrors[0].copy.dir) in said
    _move(lost, folder / lost.whole.dir.relative_to(folder), mirrors[0].copy.dir)
    return lost


def _move(lost: Lost, was: Path, copy_was: Path) -> None:
    """Let recipe and mark say where the files lie now."""
    for run in (lost.run, lost.copy):
        for name in ("recipe.yaml", "mirror.json"):
            path = run.dir / name
            if path.is_file():
                text = path.read_text()
                for old, new in (
                    (was, lost.run.dir), (copy_was, lost.copy.dir),
                    (was.parent.parent, lost.folder / "runs"),
                    (copy_was.parent.parent, lost.drive),
                ):  # fmt: skip
                    text = text.replace(str(old), str(new))
                path.write_text(text)


@pytest.fixture
def lost(accident: Lost, tmp_path: Path) -> Lost:
    """The lost machine's files, at a place of this test's own."""
    here = Lost(tmp_path / "machine", accident.whole)
    shutil.copytree(accident.folder, here.folder)
    _move(here, accident.run.dir, accident.copy.dir)
    return here


def resumed(folder: Path) -> tuple[Run, str]:
    said = io.StringIO()
    run = qlora.resume(folder, console=Console(file=said, width=1000))
    return run, said.getvalue()


def tear(run: Run) -> None:
    (store.newest(run.checkpoints) / "state.safetensors").write_bytes(b"torn")


def test_the_copy_of_a_finished_run_is_the_run(accident: Lost) -> None:
    copies = list(accident.whole.dir.parents[2].glob(f"drive/tiny/{accident.whole.dir.name}"))
    copy = qlora.open_run(copies[0])
    ours, theirs = files(copy.dir), files(accident.whole.dir)
    assert copy.is_complete and set(ours) - set(theirs) == {"mirror.json"}
    assert set(theirs) - set(ours) == {".lock"}
    assert all(theirs[name] == data for name, data in ours.items() if name != "mirror.json")


@pytest.mark.parametrize("where", ["drive", "drive/tiny", f"drive/tiny/{START}"])
def test_a_run_whose_machine_is_gone_is_brought_home_and_ends_bit_for_bit_the_same(
    where: str, lost: Lost
) -> None:
    shutil.rmtree(lost.folder / "runs")
    run, said = resumed(lost.folder / where)
    assert run.dir == lost.run.dir and f"checkpoint-4 is brought home from {lost.copy.dir}" in said
    require_equal(run, lost.whole)
    assert not mirror.is_copy(run) and files(lost.copy.adapter) == files(run.adapter)
    assert lost.copy.is_complete and steps_in(lost.copy) == steps_in(run) == [6, 8]
    for folder in ("runs", "drive"):
        again, said = resumed(lost.folder / folder)
        assert again.is_complete and "has finished" in said  # the same cell may be run once more


def test_a_run_that_is_still_there_goes_on_where_it_is(lost: Lost) -> None:
    run, said = resumed(lost.folder / "runs")
    assert run.dir == lost.run.dir and "brought home" not in said and "from checkpoint-4" in said
    require_equal(run, lost.whole)
    assert steps_in(lost.copy) == [6, 8] and lost.copy.is_complete


def test_resume_alone_finds_what_only_the_drive_has(lost: Lost, tiny: Path, rows: Path) -> None:
    shutil.rmtree(lost.folder / "runs")
    run, _ = train(recipe_in(lost.folder, tiny, rows), resume=resuming.NEWEST)
    assert run.dir == lost.run.dir
    require_equal(run, lost.whole)


def test_of_a_torn_newest_copy_the_one_before_it_is_taken(lost: Lost) -> None:
    shutil.rmtree(lost.folder / "runs")
    tear(lost.copy)
    run, said = resumed(lost.drive)
    assert "checkpoint-2 is brought home" in said
    require_equal(run, lost.whole)
    assert steps_in(lost.copy) == [6, 8]


def test_where_every_copy_is_torn_that_is_said(lost: Lost) -> None:
    shutil.rmtree(lost.folder / "runs")
    for path in lost.copy.checkpoints.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"{lost.copy.dir} has no whole checkpoint"):
        resumed(lost.drive)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint .*checkpoint-4 is damaged"):
        train(load_recipe(lost.copy.recipe_file), resume=lost.copy.dir)
    assert not (lost.folder / "runs").exists()


@pytest.mark.parametrize("asked", ["runs", "drive"])
def test_of_a_run_and_its_copy_the_one_with_the_newer_checkpoint_is_taken(
    asked: str, lost: Lost
) -> None:
    shutil.rmtree(lost.copy.checkpoints / "checkpoint-4")
    run, said = resumed(lost.folder / asked)
    assert run.dir == lost.run.dir and "brought home" not in said and "from checkpoint-4" in said
    require_equal(run, lost.whole)


@pytest.mark.parametrize("asked", ["runs", "drive"])
@pytest.mark.parametrize("torn", [True, False])
def test_a_copy_that_is_newer_than_the_run_is_brought_home(
    asked: str, torn: bool, lost: Lost
) -> None:
    if torn:
        tear(lost.run)
    else:
        shutil.rmtree(lost.run.checkpoints / "checkpoint-4")
    run, said = resumed(lost.folder / asked)
    assert run.dir == lost.run.dir and "checkpoint-4 is brought home" in said
    assert ("checkpoint-4 is passed over" in said) == torn
    require_equal(run, lost.whole)


def test_a_drive_that_is_mounted_elsewhere_goes_on_there(lost: Lost, tmp_path: Path) -> None:
    shutil.rmtree(lost.folder / "runs")
    elsewhere = lost.drive.rename(tmp_path / "mnt")
    run, said = resumed(elsewhere)
    assert f" -> {elsewhere}\n" in said and "changed   run.mirror: " in said
    require_equal(run, lost.whole)
    assert not lost.drive.exists()
    assert Run(elsewhere / "tiny" / START).is_complete
    assert load_recipe(run.recipe_file).run.mirror == str(elsewhere)


def test_the_run_of_a_copy_is_found_from_another_working_directory(
    lost: Lost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With run.dir: runs, which is another folder wherever one stands."""
    for run in (lost.run, lost.copy):
        text = run.recipe_file.read_text()
        run.recipe_file.write_text(text.replace(str(lost.folder / "runs"), "runs"))
    monkeypatch.chdir(tmp_path)
    run, _ = resumed(lost.drive)
    assert run.dir == lost.run.dir and not (tmp_path / "runs").exists()
    require_equal(run, lost.whole)


def test_of_several_runs_the_newest_goes_on_that_can(lost: Lost) -> None:
    shutil.rmtree(lost.folder / "runs")
    others = {day: Run(lost.drive / "tiny" / f"202601{day}-120000") for day in ("02", "03", "04")}
    for other in others.values():
        shutil.copytree(lost.copy.dir, other.dir)
    rundir.write_json(others["04"].dir / "result.json", {})
    for path in others["03"].checkpoints.iterdir():
        (path / "state.json").write_text("{")
    run, _ = resumed(lost.drive)
    assert run.dir.name == others["02"].dir.name
    run, _ = resumed(lost.drive)
    assert run.dir.name == START
    with pytest.raises(CheckpointError, match="no run to resume") as none:
        resuming.newest([lost.drive])
    assert f"{others['03'].dir} has no whole checkpoint" in str(none.value)


def test_a_home_that_cannot_be_written_is_told_and_the_copy_stays(
    lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(lost.folder / "runs")
    before = files(lost.drive)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(
            CheckpointError, match=r"cannot be (brought home|written).*No space left"
        ):
            resumed(lost.drive)
    assert files(lost.drive) == before
    run, _ = resumed(lost.drive)
    require_equal(run, lost.whole)


def test_a_mirror_in_place_of_the_runs_is_refused_and_leaves_no_directory(
    tmp_path: Path, tiny: Path, rows: Path
) -> None:
    recipe = recipe_in(tmp_path, tiny, rows, run__mirror=str(tmp_path / "runs"))
    with pytest.raises(RecipeError, match="where the run itself is written"):
        train(recipe)
    assert not list((tmp_path / "runs").iterdir())


def unwritable(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive.write_text("a file in place of a folder")


def full(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("copyfileobj", "copyfile", "copytree"):
        monkeypatch.setattr(shutil, name, copy)


def vanishing(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = sft.RowTrainer.training_step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            assert (drive / "tiny").is_dir()  # the first copies went well
            shutil.rmtree(drive)
            drive.write_text("gone")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", stepped)


@pytest.mark.parametrize("fate", [unwritable, full, vanishing])
def test_a_drive_that_fails_is_told_of_once_and_costs_the_run_nothing(
    fate: Callable[..., None],
    accident: Lost,
    tmp_path: Path,
    tiny: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer = mirror.Mirror.offer

    def in_turn(self: Mirror, path: Path) -> None:
        offer(self, path)
        idle(self)

    monkeypatch.setattr(mirror.Mirror, "offer", in_turn)
    fate(tmp_path / "drive", monkeypatch)
    run, said = train(recipe_in(tmp_path, tiny, rows))
    require_equal(run, accident.whole)
    told = [line for line in said.splitlines() if line.startswith("mirror")]
    assert len(told) == 1 and told[0].endswith("; the run goes on without its copy"), told


def test_training_is_not_held_up_by_a_drive_that_takes_no_byte(
    accident: Lost, tmp_path: Path, tiny: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    finish = mirror.Mirror.finish
    waited = []

    def opened(self: Mirror, *args: Any) -> bool:
        waited.append(list(gate.copied))  # all steps are taken, and nothing is copied yet
        gate.open.set()
        return finish(self, *args)

    monkeypatch.setattr(mirror.Mirror, "finish", opened)
    run, _ = train(recipe_in(tmp_path, tiny, rows))
    assert waited == [[]] and gate.copied == [2, STEPS]
    require_equal(run, accident.whole)
    copy = Run(tmp_path / "drive" / "tiny" / run.dir.name)
    assert copy.is_complete and store.step_of(store.newest(copy.checkpoints)) == STEPS


def test_a_signal_waits_for_the_last_checkpoint_to_be_on_the_drive(
    accident: Lost, tmp_path: Path, tiny: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sft.RowTrainer.training_step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sft.RowTrainer, "training_step", stepped)
        train(recipe_in(tmp_path, tiny, rows))
    (copy,) = rundir.runs_below(tmp_path / "drive")
    assert store.step_of(store.newest(copy.checkpoints)) == 5
    shutil.rmtree(tmp_path / "runs")
    run, said = resumed(tmp_path / "drive")
    assert "checkpoint-5 is brought home" in said
    assert weights(run).keys() == weights(accident.whole).keys()
    require_equal(run, accident.whole)


def test_an_error_waits_for_the_last_checkpoint_to_be_on_the_drive(
    tmp_path: Path, tiny: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends at once takes the thread with it."""
    gate = Gate(monkeypatch)
    step = sft.RowTrainer.training_step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            threading.Timer(0.3, gate.open.set).start()
            raise ValueError("a bug")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", stepped)
    with pytest.raises(ValueError, match="a bug"):
        train(recipe_in(tmp_path, tiny, rows))
    (copy,) = rundir.runs_below(tmp_path / "drive")
    assert store.step_of(store.newest(copy.checkpoints)) == 4
    assert not [thread for thread in threading.enumerate() if thread.name == "qlora-mirror"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from qlora import load_recipe, sft, store, train

recipe = load_recipe(sys.argv[1])
step = sft.RowTrainer.training_step

def stepped(self, *args, **kwargs):
    if self.state.global_step == 5:  # killed as soon as the second checkpoint is on the drive
        while not list(Path(recipe.run.mirror).glob("tiny/*/checkpoints/checkpoint-4/manifest.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

sft.RowTrainer.training_step = stepped
train(recipe)
"""


def test_a_process_that_is_killed_with_its_disk_goes_on_from_the_drive(
    accident: Lost, tmp_path: Path, tiny: Path, rows: Path
) -> None:
    """The whole story, with a process that is really killed."""
    recipe = recipe_in(tmp_path, tiny, rows)
    (tmp_path / "tiny.yaml").write_text(recipe.dump())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "tiny.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    shutil.rmtree(tmp_path / "runs")
    run, said = resumed(tmp_path / "drive")
    assert "checkpoint-4 is brought home" in said
    require_equal(run, accident.whole)
    assert lines(run) == lines(accident.whole)
