"""A run directory that came from somebody else: on a shared drive, or by download."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
from rich.console import Console

from qlora import mirror, resuming, rundir, sft, store, trainer
from qlora.errors import CheckpointError, Interrupted, RecipeError
from qlora.rundir import Run
from qlora.screen import Screen

QUIET = Console(quiet=True)


@pytest.fixture
def stopped(make_recipe, monkeypatch, tmp_path):
    """(recipe, run) of a run that was stopped in its fifth step."""
    original = sft.RowTrainer.compute_loss

    def interrupted(self, model, *args, **kwargs):
        if model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    recipe = make_recipe(run__mirror=str(tmp_path / "drive"))
    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", interrupted)
        with pytest.raises(Interrupted):
            trainer.train(recipe, console=QUIET)
    return recipe, rundir.open_run(recipe.run.dir)


def copy_of(run: Run, tmp_path: Path) -> Run:
    (copy,) = rundir.runs_below(tmp_path / "drive")
    return copy


def test_links_in_a_copy_are_not_followed_and_other_files_stay_where_they_are(stopped, tmp_path):
    recipe, run = stopped
    copy = copy_of(run, tmp_path)
    secret = tmp_path / "token"
    secret.write_text("private")
    (copy.dir / "authorized_keys").write_text("mine")
    (copy.dir / "notes.txt").symlink_to(secret)
    shutil.rmtree(run.dir)
    claimed = resuming.claim(recipe, copy.dir, (), Screen(QUIET))
    assert claimed.run.dir == run.dir
    assert not (run.dir / "authorized_keys").exists() and not (run.dir / "notes.txt").exists()
    (copy.dir / "data.json").unlink()
    (copy.dir / "data.json").symlink_to(secret)
    shutil.rmtree(run.dir)
    with pytest.raises(CheckpointError, match=r"data\.json is a link"):
        resuming.claim(recipe, copy.dir, (), Screen(QUIET))
    assert secret.read_text() == "private"


def test_a_copy_is_not_brought_home_under_a_name_that_no_run_has(stopped, tmp_path):
    recipe, run = stopped
    copy = copy_of(run, tmp_path)
    disguised = tmp_path / "drive" / "tiny" / ".ssh"
    copy.dir.rename(disguised)
    shutil.rmtree(run.dir)
    with pytest.raises(CheckpointError, match="no run of qlora"):
        resuming.claim(recipe, disguised, (), Screen(QUIET))


@pytest.mark.skipif(os.name != "posix", reason="no lock file elsewhere")
def test_a_lock_that_is_a_link_empties_nothing(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    run = Run(tmp_path / "run")
    run.dir.mkdir()
    (run.dir / ".lock").symlink_to(target)
    with pytest.raises(CheckpointError, match="cannot be written"), rundir.locked(run):
        pass
    assert target.read_text() == "precious"


@pytest.mark.parametrize(
    "facts",
    [{"bytes": -1, "sha256": 3}, {"bytes": "x"}, [], {"sha256": "0"}, 7],
    ids=["negative", "text", "list", "half", "number"],
)
def test_a_manifest_that_lies_about_the_metrics_ends_in_no_traceback(stopped, facts):
    _, run = stopped
    newest = store.newest(run.checkpoints)
    manifest = json.loads((newest / rundir.MANIFEST).read_text())
    (newest / rundir.MANIFEST).write_text(json.dumps(manifest | {"metrics": facts}))
    rundir.rewind(run, store.step_of(newest))
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../../x"])
def test_a_manifest_with_an_impossible_name_is_a_damaged_one(stopped, name):
    _, run = stopped
    newest = store.newest(run.checkpoints)
    files = {name: {"bytes": 1, "sha256": "0"}}
    (newest / rundir.MANIFEST).write_text(json.dumps({"files": files}))
    assert store.defect(newest)


def test_a_resume_that_is_refused_changes_nothing(stopped, make_recipe, tmp_path):
    recipe, run = stopped
    with (run.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "skipped": "a spike"}\n')
    (run.adapter).mkdir()
    (run.adapter / "x").write_text("x")

    def everything():
        return {p: p.read_bytes() for p in sorted(run.dir.rglob("*")) if p.is_file()}

    before = everything()
    other = make_recipe(run__mirror=recipe.run.mirror, train__learning_rate=1e-4)
    with pytest.raises(CheckpointError, match="learning_rate"):
        trainer.train(other, resume=run.dir, console=QUIET)
    assert everything() == before
    # An allowed change that dies before its first checkpoint leaves the recipe of the one that is there.
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", lambda *_, **__: 1 / 0)
        patch.setattr(sft.RowTrainer, "evaluate", lambda *_, **__: {"eval_loss": 1.0})
        trainer.train(other, resume=run.dir, allow_change=["train.learning_rate"], console=QUIET)
    assert trainer.resume(run.dir, console=QUIET).is_complete


def test_a_mirror_that_is_the_run_itself_is_refused_before_the_base_is_loaded(
    make_recipe, monkeypatch
):
    from qlora import loader

    monkeypatch.setattr(loader, "load_base", lambda *_, **__: pytest.fail("weights were read"))
    recipe = make_recipe()
    recipe = make_recipe(run__mirror=recipe.run.dir)
    with pytest.raises(RecipeError, match=r"run\.mirror is"):
        trainer.train(recipe, console=QUIET)
    assert not Path(recipe.run.dir).exists() or not list(Path(recipe.run.dir).glob("*/*"))


def test_the_model_is_free_after_a_stop_although_the_error_is_kept(make_recipe, monkeypatch):
    """As a notebook keeps it: the next cell, qlora.resume, must find the card empty."""
    seen = []
    build = sft.build

    def kept(*args, **kwargs):
        built = build(*args, **kwargs)
        seen.append(weakref.ref(built.model))
        return built

    original = sft.RowTrainer.compute_loss

    def interrupted(self, model, *args, **kwargs):
        if model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(sft, "build", kept)
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", interrupted)
    with pytest.raises(Interrupted) as caught:
        trainer.train(make_recipe(), console=QUIET)
    gc.collect()
    assert caught.value.__traceback__ is not None and seen[0]() is None


def test_commands_that_are_printed_can_be_typed(tmp_path):
    run = Run(tmp_path / "my runs" / "a" / "20260101-120000")
    assert f"--resume '{run.dir}'" in resuming.command(run)


def test_a_copy_holds_what_a_run_needs_and_its_result_only_when_all_is_there(tmp_path):
    source, target = Run(tmp_path / "run"), Run(tmp_path / "copy")
    source.dir.mkdir()
    for name in (*mirror.FILES, "result.json", "other.txt"):
        (source.dir / name).write_text(name)
    mirror.copy_files(source, target)
    assert {p.name for p in target.dir.iterdir()} == set(mirror.FILES)
    mirror.copy_files(source, target, result=True)
    assert target.is_complete and not (target.dir / "other.txt").exists()
