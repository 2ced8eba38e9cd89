"""A directory is believed only as far as the file that was written last vouches for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from qlora import rundir, store
from qlora.errors import CheckpointError, RecipeError
from qlora.rundir import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return rundir.create(tmp_path / "runs", "mine")


def checkpoint(run: Run, step: int, *, sealed: bool = True) -> Path:
    """A checkpoint folder with two files, one of them deeper."""
    folder = run.checkpoints / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "state.json").write_text('{"step": 1}')
    if sealed:
        rundir.seal(folder)
    return folder


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- a new run


def test_a_run_is_a_new_folder_named_after_the_time(tmp_path: Path) -> None:
    before = time.strftime("%Y%m%d-%H%M%S")
    run = rundir.create(tmp_path / "runs", "mine")
    after = time.strftime("%Y%m%d-%H%M%S")
    assert run.dir.parent == tmp_path / "runs" / "mine"
    assert before <= run.dir.name <= after
    assert list(run.dir.iterdir()) == []  # the probe is gone again


def test_runs_that_start_in_the_same_second_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
    runs = [rundir.create(tmp_path, "mine") for _ in range(12)]
    assert len({run.dir for run in runs}) == 12
    for run in runs:
        (run.dir / "recipe.yaml").write_text("x")
    assert rundir.open_run(tmp_path) == runs[-1]  # -12 is later than -2


@pytest.mark.parametrize("blocked", ["runs", "runs/mine"])
def test_a_file_in_place_of_a_folder_is_refused_with_its_path(blocked: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file")
    with pytest.raises(RecipeError) as caught:
        rundir.create(tmp_path / "runs", "mine")
    message = str(caught.value)
    assert message.startswith(f"run.dir is {str(tmp_path / 'runs')!r}, but ")
    assert str(tmp_path / "runs" / "mine") in message and "Not a directory" in message
    assert "run.dir=DIR" in message
    assert (tmp_path / blocked).read_text() == "a file"


def test_a_full_disk_is_found_when_the_run_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecipeError, match=r"cannot be written: No space left.*run\.dir=DIR"):
        rundir.create(tmp_path, "mine")


def test_a_folder_may_be_in_the_home_of_the_user_but_not_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rundir.create(Path("~/runs"), "mine").dir.parent == tmp_path / "runs" / "mine"
    with pytest.raises(RecipeError, match="no-such-user-here"):
        rundir.create(Path("~no-such-user-here"), "mine")


# --- finding a run


def test_a_run_is_opened_by_its_path_its_name_or_the_folder_of_all(tmp_path: Path) -> None:
    for name in ("a/20260101-120000", "a/20260103-120000", "b/20260102-120000"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text("x")
    # Not runs: no recipe yet; a recipe of another kind.
    (tmp_path / "a" / "20260109-120000").mkdir()
    (tmp_path / "a" / "copies").mkdir()
    (tmp_path / "a" / "copies" / "recipe.yaml").write_text("x")
    newest = Run(tmp_path / "a" / "20260103-120000")
    assert rundir.open_run(tmp_path / "a" / "20260103-120000") == newest
    assert rundir.open_run(str(tmp_path / "a")) == newest
    assert rundir.open_run(tmp_path) == newest
    assert rundir.open_run(tmp_path / "b").dir.name == "20260102-120000"


def test_a_folder_without_a_run_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run directory .*no run lies below it.*qlora"):
        rundir.open_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory.*qlora train"):
        rundir.open_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: "):
        rundir.open_run(tmp_path / "file")


def test_a_run_is_complete_when_its_result_is_there(run: Run) -> None:
    assert not run.is_complete
    with pytest.raises(CheckpointError, match=r"has not finished; there is no result\.json"):
        _ = run.result
    rundir.write_json(run.dir / "result.json", {"loss": 0.5})
    assert run.is_complete
    assert run.result == {"loss": 0.5}


@pytest.mark.parametrize("torn", ["", '{"loss": 0.', "[1]", "\x00"])
def test_a_torn_result_is_refused_with_its_path(torn: str, run: Run) -> None:
    (run.dir / "result.json").write_text(torn)
    with pytest.raises(CheckpointError, match=r"result\.json: "):
        _ = run.result


def test_a_torn_last_line_of_the_metrics_is_left_out(run: Run) -> None:
    assert run.metrics() == []
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 4)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    path = run.dir / "metrics.jsonl"
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        assert run.metrics() == lines[: whole[:cut].count("\n")]


# --- writes that are whole or absent


def test_a_write_replaces_all_of_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    rundir.write_text(path, "a long first text, naïve – 漢字\n")
    rundir.write_text(path, "short\n")
    assert everything_in(tmp_path) == {"plan.json": b"short\n"}


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    rundir.write_text(path, "old")

    def broken(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), broken)
    with pytest.raises(OSError, match="No space"):
        rundir.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    rundir.write_text(path, "newer")  # what the failure left behind is in nobody's way
    assert everything_in(tmp_path) == {"plan.json": b"newer"}


def test_a_text_reaches_the_disk_before_its_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        order.append("fsync")
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    rundir.write_text(tmp_path / "x", "x")
    assert order[:2] == ["fsync", "rename"]


def test_json_is_written_as_people_and_every_reader_can_read_it(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "naïve – 漢字"}
    rundir.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value == rundir.read_json(tmp_path / "x.json")
    assert "naïve – 漢字" in text and text.endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_written_as_json(number: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        rundir.write_json(tmp_path / "x.json", {"loss": number})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_written_aside_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with rundir.writing_aside(final) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("x")
        assert not final.exists()
    assert everything_in(tmp_path) == {"adapter/deep/x": b"x"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_folder_written_aside_leaves_nothing_when_it_fails(
    error: type[BaseException], tmp_path: Path
) -> None:
    final = tmp_path / "adapter"
    with pytest.raises(error), rundir.writing_aside(final) as folder:
        (folder / "x").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_crash_left_aside_is_not_taken_over(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with pytest.raises(RuntimeError), rundir.writing_aside(final) as folder:
        left = folder
        raise RuntimeError
    left.mkdir()
    (left / "stale").write_text("from a killed process")
    with rundir.writing_aside(final) as folder:
        (folder / "fresh").write_text("x")
    assert everything_in(tmp_path) == {"adapter/fresh": b"x"}


def test_a_folder_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    final.mkdir()
    (final / "x").write_text("mine")
    with pytest.raises(OSError), rundir.writing_aside(final) as folder:
        (folder / "x").write_text("other")
    assert everything_in(tmp_path) == {"adapter/x": b"mine"}


# --- checkpoints


def test_a_sealed_checkpoint_is_whole_and_lists_every_file(run: Run) -> None:
    folder = checkpoint(run, 5)
    assert rundir.defect(folder) is None
    files = json.loads((folder / "manifest.json").read_text())["files"]
    expected = {
        name: data for name, data in everything_in(folder).items() if name != "manifest.json"
    }
    assert files == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in expected.items()
    }
    assert len(files) == 2


def test_a_sealed_checkpoint_may_be_moved(run: Run, tmp_path: Path) -> None:
    shutil.move(checkpoint(run, 5), tmp_path / "elsewhere")
    assert rundir.defect(tmp_path / "elsewhere") is None


def test_sealing_again_takes_in_what_was_added(run: Run) -> None:
    folder = checkpoint(run, 5)
    (folder / "more").write_text("x")
    rundir.seal(folder)
    assert rundir.defect(folder) is None
    (folder / "more").write_text("y")
    assert rundir.defect(folder) == "more is damaged"


DAMAGES = {
    "truncated": ("adapter.safetensors is damaged", lambda f: _cut(f / "adapter.safetensors")),
    "emptied": ("adapter.safetensors is damaged", lambda f: (f / "adapter.safetensors").write_text("")),
    "bit flip": ("adapter.safetensors is damaged", lambda f: _flip(f / "adapter.safetensors")),
    "grown": ("inner/state.json is damaged", lambda f: _grow(f / "inner" / "state.json")),
    "missing": ("inner/state.json is missing", lambda f: (f / "inner" / "state.json").unlink()),
    "a folder gone": ("inner/state.json is missing", lambda f: shutil.rmtree(f / "inner")),
    "no manifest": ("it has no manifest", lambda f: (f / "manifest.json").unlink()),
    "torn manifest": ("its manifest is damaged", lambda f: _cut(f / "manifest.json")),
    "empty manifest": ("its manifest is damaged", lambda f: (f / "manifest.json").write_text("")),
    "no files in it": ("its manifest is damaged", lambda f: (f / "manifest.json").write_text("{}")),
    "a list": ("its manifest is damaged", lambda f: (f / "manifest.json").write_text("[]")),
    "a list of files": (
        "its manifest is damaged",
        lambda f: (f / "manifest.json").write_text('{"files": ["adapter.safetensors"]}'),
    ),
    "no sums": (
        "its manifest is damaged",
        lambda f: (f / "manifest.json").write_text('{"files": {"inner/state.json": {}}}'),
    ),
}  # fmt: skip


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_any_damage_is_found_and_named(kind: str, run: Run) -> None:
    expected, damage = DAMAGES[kind]
    folder = checkpoint(run, 5)
    damage(folder)
    assert (rundir.defect(folder) or "").startswith(expected)


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_the_newest_checkpoint_that_is_whole_is_taken(kind: str, run: Run) -> None:
    older, newest = checkpoint(run, 9), checkpoint(run, 10)
    checkpoint(run, 2)
    assert store.newest(run.checkpoints) == newest  # by number: as text, 9 comes last
    DAMAGES[kind][1](newest)
    assert store.newest(run.checkpoints) == older


def test_where_no_checkpoint_is_whole_there_is_none(run: Run) -> None:
    assert store.newest(run.checkpoints) is None
    checkpoint(run, 5, sealed=False)
    (run.checkpoints / "checkpoint-best").mkdir()
    (run.checkpoints / "checkpoint-7").write_text("a file")
    assert store.newest(run.checkpoints) is None


def test_a_checkpoint_half_written_aside_is_not_found(run: Run) -> None:
    whole = checkpoint(run, 5)
    with rundir.writing_aside(run.checkpoints / "checkpoint-6") as folder:
        (folder / "x").write_text("x")
        rundir.seal(folder)
        assert store.newest(run.checkpoints) == whole
    assert store.newest(run.checkpoints) == run.checkpoints / "checkpoint-6"


def _made(folder: Path, name: str, start: str) -> Path:
    run = folder / name / start
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    return run


def test_runs_are_looked_for_two_levels_down_and_no_deeper(tmp_path):
    _made(tmp_path / "runs", "a", "20260101-000000")
    newer = _made(tmp_path / "runs", "b", "20260102-000000")
    assert rundir.open_run(tmp_path / "runs").dir == newer
    with pytest.raises(CheckpointError, match="no run lies below it"):
        rundir.open_run(tmp_path)


def test_what_is_written_is_meant_for_a_run_of_one_name(tmp_path):
    mine = _made(tmp_path, "a", "20260101-000000")
    assert rundir.open_run(tmp_path, of_one_name=True).dir == mine
    _made(tmp_path, "b", "20260102-000000")
    with pytest.raises(
        CheckpointError, match=r"runs of several names lie below it\. Name one: .*/a, "
    ):
        rundir.open_run(tmp_path, of_one_name=True)
    assert rundir.open_run(tmp_path / "a", of_one_name=True).dir == mine


def test_a_wrong_name_is_told_with_those_that_are_there(tmp_path):
    _made(tmp_path, "mine", "20260101-000000")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"no such directory\. .* In \S+ there are mine\."):
        rundir.open_run(tmp_path / "mien")
    with pytest.raises(CheckpointError, match=r"mine\.yaml: a file\. A run is the folder that"):
        rundir.open_run(tmp_path / "mine.yaml")
