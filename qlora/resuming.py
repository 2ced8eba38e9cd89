"""Which run goes on, from where, and whether it is still the same run."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora import identity, mirror, rundir, store
from qlora.errors import CheckpointError
from qlora.places import expanded
from qlora.recipe import load_recipe
from qlora.rundir import Run
from qlora.screen import Screen
from qlora.settings import Recipe

NEWEST = "newest"  # of the recipe's runs


@dataclass
class Claimed:
    """A run directory that is ours now, and the checkpoint it goes on from; None for a new run."""

    run: Run
    checkpoint: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # of the checkpoint
    allowed: Collection[str] = ()

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else store.step_of(self.checkpoint)

    @property
    def way_back(self) -> str:
        return f"qlora train {self.run.recipe_file} --resume {self.run.dir}"

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
        copies = _copies(run)
        if any(one.is_complete for one in copies):
            passed.append(f"{run.dir} has finished")
        elif mirror.newest_of(copies) is None:
            passed.append(f"{run.dir} has no whole checkpoint")
        else:
            return run
    looked = " and ".join(map(str, places))
    raise CheckpointError(
        f"{looked}: no run to resume"
        + (":\n  " + "\n  ".join(passed[:5]) if passed else ", nor any other.")
        + "\nWithout --resume a new run is started."
    )


def _newest_first(places: list[Path]) -> Iterator[Run]:
    found = {run.dir.name: run for place in reversed(places) for run in rundir.runs_below(place)}
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
    with rundir.locked(home):
        store.sweep(home.checkpoints)
        here = store.look(home.checkpoints)
        for path, why in here.damaged:
            screen.say("resume", f"{path.name} is damaged and passed over: {why}")
        store.put_aside(here)
        source, checkpoint = best
        if source.dir != home.dir:
            screen.say("resume", f"{checkpoint.name} is brought home from {source.dir}")
            mirror.copy_files(source, home)
            (home.dir / mirror.MARK).unlink(missing_ok=True)
            checkpoint = mirror.copy_checkpoint(checkpoint, home)
        rundir.rewind(home, store.step_of(checkpoint))
        shutil.rmtree(home.adapter, ignore_errors=True)  # without a result.json never the product
    screen.say("resume", f"{home.dir} from {checkpoint.name}")
    return Claimed(home, checkpoint, rundir.read_json(checkpoint / "identity.json"), allowed)


def _copies(found: Run) -> list[Run]:
    """The places of one run, home first: where it is written, its mirror, and where it was found."""
    recipe = load_recipe(found.recipe_file)
    home = found
    if (found.dir / mirror.MARK).is_file():
        home = Run(mirror.place_of(found, recipe.run.dir))
    places = [home, found]
    if recipe.run.mirror:
        places.append(Run(mirror.place_of(found, recipe.run.mirror)))
    unique = {run.dir.resolve(): run for run in reversed(places)}
    return [home, *(run for run in unique.values() if run.dir.resolve() != home.dir.resolve())]


def last_words(run: Run) -> str:
    """What can be done with a run that ends here."""
    checkpoint = store.newest(run.checkpoints)
    if checkpoint is None:
        return f"Stopped before the first checkpoint. Metrics so far are in {run.dir}."
    return (
        f"Stopped. The last complete checkpoint is {checkpoint}.\n"
        f"  Go on from it: qlora train {run.recipe_file} --resume {run.dir}"
    )
