"""A folder of checkpoints: what is written is whole or absent, what is damaged is named, the last stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import rundir, store
from qlora.store import NoRoom


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def fill(to: Path) -> None:
    (to / "state.safetensors").write_bytes(bytes(range(256)) * 20)
    (to / "inner").mkdir()
    (to / "inner" / "state.json").write_text('{"step": 1}')


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def gone_pid() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


# --- writing


def test_a_checkpoint_is_named_after_its_step_and_holds_what_its_manifest_says(
    folder: Path,
) -> None:
    found = store.write(folder, 12, fill)
    assert found == folder / "checkpoint-12" and names(folder) == {"checkpoint-12"}
    assert store.defect(found) is None and store.step_of(found) == 12
    manifest = json.loads((found / "manifest.json").read_text())
    assert manifest["step"] == 12
    assert set(manifest["files"]) == {"state.safetensors", "inner/state.json"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_older_ones_and_nothing_of_its_own(
    error: type[BaseException], folder: Path
) -> None:
    older = store.write(folder, 1, fill)

    def broken(to: Path) -> None:
        fill(to)
        raise error

    with pytest.raises(error):
        store.write(folder, 2, broken)
    assert names(folder) == {"checkpoint-1"} and store.newest(folder) == older


def test_a_checkpoint_of_the_same_step_is_replaced(folder: Path) -> None:
    store.write(folder, 3, fill)
    found = store.write(folder, 3, lambda to: (to / "other").write_text("x") and None)
    assert names(found) == {"other", "manifest.json"} and store.defect(found) is None
    assert names(folder) == {"checkpoint-3"}


def test_every_file_and_folder_reaches_the_disk_before_the_checkpoint_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    named: list[set[str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted(handle: int) -> None:
        synced.append(str(os.fstat(handle).st_ino))
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        wanted = {path, *path.rglob("*")}
        named.append({str(p.stat().st_ino) for p in wanted})
        assert named[-1] <= set(synced)
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", noted_rename)
    store.write(folder, 1, fill)
    assert len(named) == 1 and len(named[0]) == 5
    assert str(folder.stat().st_ino) in synced  # and then its name


# --- believing


FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file more": ("extra.bin is not of its run", lambda f: (f / "extra.bin").write_text("x")),
    "a file more, deeper": (
        "inner/extra is not of its run",
        lambda f: (f / "inner" / "extra").write_text("x"),
    ),
    "a pickle": ("optimizer.pt is not of its run", lambda f: (f / "optimizer.pt").write_text("x")),
    "not listed": (
        "state.safetensors is not of its run",
        lambda f: edit(f, drop="state.safetensors"),
    ),
    "nothing listed": ("its manifest is damaged", lambda f: edit(f, files={})),
    "outside": (
        "its manifest names '../checkpoint-1/manifest.json', which lies outside of it",
        lambda f: edit(f, files={"../checkpoint-1/manifest.json": {"bytes": 1, "sha256": ""}}),
    ),
    "absolute": (
        "its manifest names '/etc/hostname', which lies outside of it",
        lambda f: edit(f, files={"/etc/hostname": {"bytes": 1, "sha256": ""}}),
    ),
    "a link out": (
        "its manifest names 'state.safetensors', which lies outside of it",
        lambda f: link_out(f / "state.safetensors"),
    ),
    "another step": (
        "it is of step 7, not of the one in its name",
        lambda f: edit(f, step=7),
    ),
    "a folder in place of a file": (
        "state.safetensors is missing",
        lambda f: ((f / "state.safetensors").unlink(), (f / "state.safetensors").mkdir()),
    ),
    "a file in place of it": (
        "it has no manifest",
        lambda f: (shutil.rmtree(f), f.write_text("x")),
    ),
}


def edit(checkpoint: Path, drop: str = "", **values: object) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text()) | values
    manifest["files"].pop(drop, None)
    path.write_text(json.dumps(manifest))


def link_out(path: Path) -> None:
    other = path.parent.parent / "other"
    path.rename(other)
    path.symlink_to(other)


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_what_no_checkpoint_of_ours_looks_like_is_passed_over_and_named(
    kind: str, folder: Path
) -> None:
    why, damage = FOREIGN[kind]
    older = store.write(folder, 1, fill)
    damage(store.write(folder, 2, fill))
    found = store.look(folder)
    assert found.newest == older
    ((path, said),) = found.damaged
    assert path.name == "checkpoint-2" and said.startswith(why)
    assert found.story.startswith(f"checkpoint-2 is damaged: {why}")


def test_checkpoints_that_have_changed_their_names_are_both_damaged(folder: Path) -> None:
    first, second = store.write(folder, 1, fill), store.write(folder, 2, fill)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    found = store.look(folder)
    assert found.newest is None and len(found.damaged) == 2


def test_a_checkpoint_of_a_version_that_did_not_write_its_step_is_believed(folder: Path) -> None:
    found = store.write(folder, 4, fill)
    manifest = json.loads((found / "manifest.json").read_text())
    (found / "manifest.json").write_text(json.dumps({"files": manifest["files"]}))
    assert store.newest(folder) == found


def test_no_folder_and_an_empty_one_hold_no_checkpoint(folder: Path) -> None:
    assert store.look(folder) == store.Found(None)
    folder.mkdir(parents=True)
    assert store.newest(folder) is None and store.look(folder).story == ""


@pytest.mark.parametrize(
    ("name", "step"), [("checkpoint-0", 0), ("checkpoint-100", 100), ("checkpoint-", -1),
                       ("checkpoint-1x", -1), ("damaged-checkpoint-1", -1), ("checkpoint-best", -1)]
)  # fmt: skip
def test_a_step_is_read_from_a_name(name: str, step: int) -> None:
    assert store.step_of(Path(name)) == step


# --- putting aside, sweeping, rotating


def test_what_is_damaged_is_put_aside_and_its_step_can_be_written_again(folder: Path) -> None:
    store.write(folder, 1, fill)
    for _ in range(2):  # the second time over what was put aside before
        (store.write(folder, 2, fill) / "state.safetensors").write_text("damaged")
        (moved,) = store.put_aside(store.look(folder))
        assert moved == folder / "damaged-checkpoint-2"
        assert names(folder) == {"checkpoint-1", "damaged-checkpoint-2"}
    assert store.defect(store.write(folder, 2, fill)) is None
    store.rotate(folder, 1)
    assert names(folder) == {"checkpoint-2", "damaged-checkpoint-2"}


def test_a_file_in_the_way_of_putting_aside_is_replaced(folder: Path) -> None:
    (store.write(folder, 2, fill) / "state.safetensors").write_text("damaged")
    (folder / "damaged-checkpoint-2").write_text("a file")
    store.put_aside(store.look(folder))
    assert (folder / "damaged-checkpoint-2").is_dir()


def test_what_writers_left_that_are_gone_is_swept_and_nothing_else(folder: Path) -> None:
    store.write(folder, 1, fill)
    host, gone, alive = rundir.host(), gone_pid(), os.getppid()
    swept = {
        f".checkpoint-2.{host}.{gone}.part", f".checkpoint-2.{host}.{os.getpid()}.part",
        f".checkpoint-3.elsewhere.{alive}.part", f".adapter.{host}.{gone}.part", ".checkpoint-0.gone",
        ".checkpoint-1.old",
    }  # fmt: skip
    kept = {f".checkpoint-4.{host}.{alive}.part", "checkpoint-1", ".mine", "damaged-checkpoint-5"}
    for name in (swept | kept) - {"checkpoint-1"}:
        (folder / name).mkdir()
        (folder / name / "x").write_text("x")
    for name in (".recipe.yaml.part", ".metrics.jsonl.part"):
        (folder / name).write_text("half")
    (folder / ".lock").write_text("")
    store.sweep(folder)
    assert names(folder) == kept | {".lock"}


def test_what_was_to_be_replaced_gets_its_name_back_if_the_new_one_never_came(folder: Path) -> None:
    store.write(folder, 3, fill).rename(folder / ".checkpoint-3.old")
    store.sweep(folder)
    assert names(folder) == {"checkpoint-3"} and store.newest(folder) == folder / "checkpoint-3"


def test_rotation_keeps_the_newest(folder: Path) -> None:
    for step in (8, 9, 10, 11):
        store.write(folder, step, fill)
    store.rotate(folder, 2)
    assert names(folder) == {"checkpoint-10", "checkpoint-11"}


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_rotation_never_deletes_the_last(keep: int, folder: Path) -> None:
    written = store.write(folder, 5, fill)
    store.rotate(folder, keep)
    store.rotate(folder, keep, written)
    assert store.newest(folder) == written


def test_a_later_step_that_is_damaged_does_not_rotate_away_what_was_just_written(
    folder: Path,
) -> None:
    for step in (2, 4, 8):
        store.write(folder, step, fill)
    (folder / "checkpoint-8" / "state.safetensors").write_text("damaged")
    written = store.write(folder, 6, fill)
    store.rotate(folder, 1, written)
    assert store.newest(folder) == written
    assert names(folder) == {"checkpoint-6", "checkpoint-8"}


def test_what_cannot_be_removed_is_left_for_the_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        store.write(folder, step, fill)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        store.rotate(folder, 1)
    assert names(folder) == {"checkpoint-1", "checkpoint-2"}
    store.rotate(folder, 1)
    assert names(folder) == {"checkpoint-2"}


# --- room


def test_a_checkpoint_that_has_no_room_is_not_begun_and_both_numbers_are_told(folder: Path) -> None:
    free = shutil.disk_usage(folder.parents[1]).free
    with pytest.raises(
        NoRoom, match=r"[\d,]+ MiB are needed and [\d,]+ MiB are free on its disk"
    ) as no:
        store.require_room(folder, free)
    assert no.value.errno == errno.ENOSPC and isinstance(no.value, OSError)
    assert folder.is_dir() and not names(folder)
    store.require_room(folder, 1)


def test_some_room_is_left_beside_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    store.require_room(folder, 2**30 - store.SPARE_BYTES)
    with pytest.raises(NoRoom):
        store.require_room(folder, 2**30 - store.SPARE_BYTES + 1)


# --- metrics


def test_a_checkpoint_knows_the_metrics_before_it(folder: Path) -> None:
    """Exactly those, to the byte: also of a line of its own step that was written after it."""
    run = rundir.Run(folder.parent)
    run.dir.mkdir()
    path = run.dir / "metrics.jsonl"
    before = "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in (1, 2))
    path.write_text(before)
    store.write(folder, 2, fill)
    for after in (
        "",
        '{"step": 2, "eval_loss": 1.0}\n{"step": 3, "loss": 0.3}\n',
        '{"step": 3, "lo',
    ):
        path.write_text(before + after)
        assert rundir.rewind(run, 2)
        assert path.read_text() == before


@pytest.mark.parametrize(
    ("damaged", "left"),
    [
        ('{"step": 1, "loss": 0.7}\n{"step": 2}\n{"step": 3}\n', [1, 2]),  # another value
        ('{"step": 2}\n', [2]),
        ('{"step": 1}\n\xff\x00\n7\n{"loss": 1}\n{"step": "1"}\n{"step": 2}\n', [1, 2]),
        ("", []),
    ],
)
def test_metrics_that_were_changed_before_a_checkpoint_are_told(
    damaged: str, left: list[int], folder: Path
) -> None:
    run = rundir.Run(folder.parent)
    run.dir.mkdir()
    (run.dir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n')
    store.write(folder, 2, fill)
    (run.dir / "metrics.jsonl").write_bytes(damaged.encode("latin-1"))
    assert not rundir.rewind(run, 2)
    assert [line["step"] for line in run.metrics()] == left


def test_a_line_that_a_full_disk_tore_is_ended(folder: Path) -> None:
    run = rundir.Run(folder.parent)
    run.dir.mkdir()
    (run.dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    store.write(folder, 2, fill)
    assert rundir.rewind(run, 2)
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    assert [line["step"] for line in run.metrics()] == [1, 3]
