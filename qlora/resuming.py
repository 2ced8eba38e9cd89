"""Which run goes on, from where, and whether it is still the same run."""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora import identity, keeping, mirror, rundir, statefile, store
from qlora.errors import CheckpointError, QLoRAError
from qlora.places import expanded
from qlora.recipe import load_recipe
from qlora.rundir import Run
from qlora.screen import Screen
from qlora.settings import Recipe

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
NEWEST = "newest"  # of the recipe's runs


@dataclass
class Claimed:
    """A run directory that is ours now, and the checkpoint it goes on from; None for a new run."""

    run: Run
    checkpoint: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # of the checkpoint
    allowed: Collection[str] = ()
    damaged: store.Found = field(default_factory=lambda: store.Found(None))

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else store.step_of(self.checkpoint)

    @property
    def way_back(self) -> str:
        return command(self.run)

    def settle(self, screen: Screen) -> None:
        """Take away what comes after the checkpoint; a resume that was refused before changed nothing."""
        if self.checkpoint is None:
            return
        store.put_aside(self.damaged)
        if not rundir.rewind(self.run, self.step):
            screen.say(
                "resume",
                f"metrics.jsonl is not as it was at {self.checkpoint.name}: lines that can be read "
                "are kept",
            )
        # Without a result.json it was never the product.
        shutil.rmtree(self.run.adapter, ignore_errors=True)

    def require_same(self, now: dict[str, Any]) -> list[identity.Change]:
        """What has changed since the checkpoint.

        Raises:
            CheckpointError: Something that decides what is learned and was not allowed.
        """
        if self.checkpoint is None:
            return []
        found = identity.changes(self.identity, now)
        identity.require_same(found, self.allowed, str(self.run.dir), self.way_back)
        return found


def claim(recipe: Recipe, resume: str | Path, allowed: Collection[str], screen: Screen) -> Claimed:
    """The run to resume, with its newest whole checkpoint.

    Args:
        recipe: As it is written.
        resume: A run directory or a folder above some; or :data:`NEWEST`.
        allowed: Fields that may have changed.
        screen: Told what was found and what was passed over.

    Raises:
        CheckpointError: There is nothing to resume; says what was looked at.
    """
    if resume == NEWEST:
        places = [expanded(recipe.run.dir) / recipe.run.name]
        if recipe.run.mirror:
            places.append(expanded(recipe.run.mirror) / recipe.run.name)
        run = newest(places)
    else:
        run = rundir.open_run(resume)
    return _take_up(run, allowed, screen)


def newest(places: list[Path]) -> Run:
    """The newest run under some folders that has not finished and can be resumed.

    Raises:
        CheckpointError: There is none; says why each that was found is not it.
    """
    passed = []
    for run in _newest_first(places):
        try:
            copies = _copies(run)
        except QLoRAError as error:
            passed.append(f"{run.dir} cannot be read: {str(error).splitlines()[0]}")
            continue
        if any(one.is_complete for one in copies):
            passed.append(f"{run.dir} has finished")
        elif mirror.newest_of(copies) is None:
            passed.append(f"{run.dir} has no whole checkpoint")
        else:
            return run
    looked = " and ".join(f"{place}{'' if place.exists() else ' (not there)'}" for place in places)
    raise CheckpointError(
        f"{looked}: no run to resume"
        + (":\n  " + "\n  ".join(passed[:5]) if passed else ", nor any other.")
        + "\nStart a new one without --resume; a run that was given another run.dir or run.name is found "
        "by `--resume RUN`."
    )


def finished(place: Path) -> Run | None:
    """The newest run under a folder that has finished."""
    return next((run for run in _newest_first([place]) if run.is_complete), None)


def _newest_first(places: list[Path]) -> Iterator[Run]:
    # One run and its copy are of one name and start; an earlier place goes first.
    found = {
        (run.dir.parent.name, run.dir.name): run
        for place in reversed(places)
        for run in rundir.runs_below(place.resolve())
    }
    yield from sorted(found.values(), key=lambda run: rundir.started(run.dir), reverse=True)


def _take_up(found: Run, allowed: Collection[str], screen: Screen) -> Claimed:
    copies = _copies(found)
    home = copies[0]
    done = next((run for run in copies if run.is_complete), None)
    if done is not None:
        raise CheckpointError(f"{done.dir}: this run has finished; there is nothing to resume.")
    best = mirror.newest_of(copies)
    if best is None:
        looked = store.look(found.checkpoints)
        raise CheckpointError(
            f"{found.dir}: no whole checkpoint to resume from"
            + (f" ({looked.story})" if looked.story else "")
            + ". Start the run again."
        )
    with disk_errors_told(home), rundir.locked(home):
        store.sweep(home.dir)
        store.sweep(home.checkpoints)
        here = store.look(home.checkpoints)
        for path, why in here.damaged:
            screen.say("resume", f"{path.name} is passed over: {why}")
        source, checkpoint = best
        was = _identity_of(checkpoint)
        if source.dir != home.dir:
            screen.say("resume", f"{checkpoint.name} is brought home from {source.dir}")
            checkpoint = _bring_home(source, checkpoint, home)
    screen.say("resume", f"{home.dir} from {checkpoint.name}")
    ours = tuple((path, why) for path, why in here.damaged if path != checkpoint)
    return Claimed(home, checkpoint, was, allowed, store.Found(checkpoint, ours))


def _identity_of(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint was.

    Raises:
        CheckpointError: It was written by a version of qlora that kept its state otherwise.
    """
    if not (checkpoint / keeping.IDENTITY).is_file():
        raise CheckpointError(
            f"{checkpoint}: it does not say of which run it is ({keeping.IDENTITY} is missing): another "
            "version of qlora wrote it. Resume with that version, or start the run again."
        )
    statefile.require_format(checkpoint)
    return rundir.read_json(checkpoint / keeping.IDENTITY)


def _bring_home(source: Run, checkpoint: Path, home: Run) -> Path:
    try:
        mirror.copy_files(source, home)
        return mirror.copy_checkpoint(checkpoint, home)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint} cannot be brought home to {home.dir}: {error.strerror or error}. Mend that, "
            "then resume again: the copy is as it was."
        ) from None


def _copies(found: Run) -> list[Run]:
    """The places of one run, home first: where it is written, its mirror, and where it was found."""
    recipe = load_recipe(found.recipe_file)
    home = found
    if mirror.is_copy(found):
        rundir.require_named_as_run(found)
        home = mirror.original_of(found) or Run(mirror.place_of(found, recipe.run.dir))
    places = [home, found]
    if recipe.run.mirror:
        places.append(Run(mirror.place_of(found, recipe.run.mirror)))
    unique = {run.dir.resolve(): run for run in reversed(places)}
    return [home, *(run for run in unique.values() if run.dir.resolve() != home.dir.resolve())]


@contextmanager
def disk_errors_told(run: Run) -> Iterator[None]:
    """In this block a disk that is full or fails is told as what it is, with the way on.

    Raises:
        CheckpointError: In place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        kept = store.newest(run.checkpoints)
        way = last_words(run) if kept else "Free some space, then start again."
        raise CheckpointError(f"{run.dir}: cannot be written: {error.strerror}.\n{way}") from None


def last_words(run: Run) -> str:
    """What can be done with a run that ends here."""
    if run.is_complete:
        return f"Stopped when the run had ended: {run.dir} is complete."
    checkpoint = store.newest(run.checkpoints)
    if checkpoint is None:
        return f"Stopped before the first checkpoint. Metrics so far are in {run.dir}."
    return (
        f"Stopped. The last complete checkpoint is {checkpoint}.\n  Go on from it: {command(run)}"
    )


def command(run: Run) -> str:
    """What to type to go on with a run."""
    return shlex.join(["qlora", "train", str(run.recipe_file), "--resume", str(run.dir)])
