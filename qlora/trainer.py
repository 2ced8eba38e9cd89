"""The main story: a recipe in, a run directory with a proven adapter out.

:func:`train` is meant to be read from top to bottom. Everything that can be refused is refused before
the weights are read; everything that is claimed at the end was checked on the way; whatever ends a run
before its end leaves it where it can go on.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
import traceback
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from qlora import (
    adapter,
    alive,
    cards,
    durations,
    hardware,
    hub,
    identity,
    loader,
    memory,
    recording,
    report,
    resuming,
    rundir,
    sft,
    speed,
    store,
    tracking,
    verdict,
)
from qlora.errors import (
    CheckpointError,
    DoesNotFit,
    Interrupted,
    QLoRAError,
    RecipeError,
    Terminated,
    TrainingDiverged,
)
from qlora.guard import RollBack
from qlora.mirror import is_copy
from qlora.places import expanded
from qlora.ready import (
    ROLLED_BACK,
    Ready,
    fitted_for,
    prepare,
    probe,
    require_host,
    tell_fit,
)
from qlora.recipe import load_recipe
from qlora.resuming import Claimed
from qlora.rundir import Run
from qlora.screen import Screen, duration
from qlora.settings import Recipe
from qlora.shape import Shape
from qlora.stopping import Stopping

SPEED_STEPS = 5  # fewer steps say nothing of a card's speed
MIRROR_SECONDS = 20  # to wait for a copy when a signal ended the run


def train(
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    allow_change: Collection[str] = (),
    budget: str | None = None,
    began: float | None = None,
    console: Console | None = None,
) -> Run:
    """Fine-tune as the recipe says and return the finished run.

    Args:
        recipe: What to do; see :func:`qlora.load_recipe`.
        resume: A run directory to go on with from its newest whole checkpoint, bit for bit as if it had
            never stopped; or "newest", the newest run of this recipe.
        allow_change: Fields in which a resumed run may differ although they decide what is learned, such
            as ``train.learning_rate``.
        budget: The longest time until the run has ended, such as 90m: steps and schedule are fitted to it.
        began: From when that counts, by ``time.monotonic()``; now by default.
        console: Where progress is shown; standard output by default.

    Returns:
        The run: its adapter passed the alive check, and ``run.result`` has the figures.

    Raises:
        QLoRAError: Anything the user can mend, as a message that says how. A run that fails before
            its first step leaves no directory behind.
        Interrupted: A signal stopped it; it can be resumed.
    """
    began = time.monotonic() if began is None else began
    screen, stopping = Screen(console or Console()), Stopping()
    identity.require_known(allow_change)
    if allow_change and resume is None:
        raise RecipeError(
            "--allow-change is about a run that is resumed; add --resume, or leave it out."
        )
    seconds = _seconds(budget)
    claimed, ready = None, None
    try:
        tracking.require(recipe)
        hardware.let_go()  # of what an earlier run left in this process
        with stopping.listening(), hub.door(recipe) as note:
            try:
                if note:
                    screen.say("hub", note)
                card = hardware.card()
                config = loader.read_config(recipe)
                shape = Shape.from_config(config.values)
                sft.require_known_fields(recipe)
                if resume is not None:
                    claimed = resuming.claim(recipe, resume, allow_change, screen)
                fitted = fitted_for(recipe, shape, card, claimed)
                tell_fit(fitted, card, screen)
                require_host(fitted.plan, card)
                if claimed is None:
                    claimed = Claimed(rundir.create(Path(recipe.run.dir), recipe.run.name))
                with resuming.disk_errors_told(claimed.run), rundir.locked(claimed.run):
                    ready = prepare(
                        recipe,
                        fitted,
                        card,
                        config,
                        shape,
                        claimed,
                        screen,
                        stopping,
                        seconds,
                        began,
                    )
                    return _carry_out(ready)
            finally:
                if ready is not None:
                    _wind_up(ready)
    except KeyboardInterrupt as signal:
        words = _last_words(claimed, ready, resume)
        _let_go_of(signal)
        raise Interrupted(words, 143 if isinstance(signal, Terminated) else 130) from None
    except (DoesNotFit, TrainingDiverged) as error:
        _let_go_of(error)
        if claimed is None or _is_unborn(claimed, ready):
            raise
        raise type(error)(f"{error}\n{resuming.last_words(claimed.run)}") from None
    except QLoRAError as error:
        _let_go_of(error)
        raise
    finally:
        if claimed is not None and _is_unborn(claimed, ready):
            shutil.rmtree(claimed.run.dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: other runs are in it
                claimed.run.dir.parent.rmdir()
        ready = None  # a notebook keeps this frame with the error, and would keep the model


def _wind_up(ready: Ready) -> None:
    """End what runs beside the training, also after an error."""
    ready.tracker.finish()
    if news := tracking.news(ready.tracker):
        ready.screen.say("tracking", news)
    if ready.mirror and not (ready.run.is_complete or ready.stopping.signal):
        ready.mirror.finish(MIRROR_SECONDS)


def _last_words(claimed: Claimed | None, ready: Ready | None, resume: object) -> str:
    if claimed is not None and not _is_unborn(claimed, ready):
        return resuming.last_words(claimed.run)
    if resume is not None:
        return "Stopped before the first step; the run is as it was."
    return "Stopped before the first step; there is nothing to resume."


def _let_go_of(error: BaseException) -> None:
    """Free what the frames of an error hold: a notebook keeps the last one, and with it the model."""
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__


def resume(
    folder: str | Path, *, allow_change: Collection[str] = (), console: Console | None = None
) -> Run:
    """Go on with the newest unfinished run under a folder: the one cell to run after a lost machine.

    Args:
        folder: Where runs are written, a run, or what ``run.mirror`` named. A run whose own directory is
            lost, or older than its copy, is brought home from there first.
        allow_change: As for :func:`train`.
        console: As for :func:`train`.

    Returns:
        The run; if none is unfinished, the newest that has finished.

    Raises:
        QLoRAError: As :func:`train`; there is no run, or none with a whole checkpoint.
    """
    try:
        run = resuming.newest([expanded(folder)])
    except CheckpointError:
        done = resuming.finished(expanded(folder))
        if done is None:
            raise
        Screen(console or Console()).say("run", f"{done.dir} has finished")
        return done
    recipe = load_recipe(run.recipe_file)
    if is_copy(run):  # where the drive is now
        mirrored = recipe.run.model_copy(update={"mirror": str(run.dir.parent.parent)})
        recipe = recipe.model_copy(update={"run": mirrored})
    return train(recipe, resume=run.dir, allow_change=allow_change, console=console)


def _is_unborn(claimed: Claimed, ready: Ready | None) -> bool:
    """Whether nothing worth keeping was done yet."""
    # The steps are counted anew after a step back: what was saved before it is worth keeping.
    begun = ready is not None and ready.progress.steps
    return (
        claimed.checkpoint is None and not begun and store.newest(claimed.run.checkpoints) is None
    )


def _carry_out(ready: Ready) -> Run:
    """Measure, train, save, prove, measure again."""
    run, model, screen, progress = ready.run, ready.model, ready.screen, ready.progress
    measured = (ready.trainer, model, ready.prepared, ready.recipe, screen)
    kept = run.dir / "before.json"
    of = {"held_out": ready.held_out, "base": ready.identity["base"]}
    began = time.monotonic()
    before, seconds = verdict.recall(ready.prepared, ready.recipe, of, kept, screen)
    if before is None:
        before = verdict.measure(*measured, "before")
        seconds = time.monotonic() - began
        verdict.keep(before, seconds, ready.recipe, of, kept)
    ready.answering.append(seconds)
    try:
        steps = _take_steps(ready)
        if ready.stopping.signal is not None:
            if ready.mirror:
                ready.mirror.finish(MIRROR_SECONDS)
            raise Interrupted(resuming.last_words(run), 128 + ready.stopping.signal)
        if adapter.base_digest(model) != ready.identity["base"]:
            raise CheckpointError(
                "the frozen base changed during training; the adapter is worthless."
            )
        alive.require_finite(model, steps)
        _save(ready)
        began = time.monotonic()
        after = verdict.measure(*measured, "after")
        seconds = time.monotonic() - began
    except (RuntimeError, MemoryError) as error:
        if not hardware.ran_out_of_memory(error):
            raise
        raise DoesNotFit(memory.explain_out_of_memory(ready.plan)) from None
    progress.timeline.between()
    verdict.keep(after, seconds, ready.recipe, of, run.dir / "after.json")
    result = recording.result(ready, steps, before, after)
    rundir.sync_metrics(run)
    rundir.write_json(run.dir / "result.json", result)
    session = progress.session
    if progress.steps >= SPEED_STEPS:
        rate = session.tokens / session.train_seconds
        dtype = cards.compute_dtype(ready.recipe, ready.card)
        speed.remember(
            ready.card, dtype, ready.recipe, ready.shape, rate, time.strftime("%Y-%m-%d")
        )
    report.leave(run, screen)
    if ready.mirror and ready.mirror.finish():
        screen.say("mirror", str(ready.mirror.copy.dir))
    verdict.tell(before, after, ready.recipe, screen)
    screen.say(
        "time",
        f"{duration(result['train_seconds'])} of training, {duration(result['total_seconds'])} in all",
    )
    screen.say("run", str(run.dir))
    screen.say("next", shlex.join(["qlora", "chat", str(run.dir)]))
    return run


def _take_steps(ready: Ready) -> int:
    """All steps that are left, from a checkpoint again where it must be; gives the last one's number."""
    trainer, checkpoint = ready.trainer, ready.claimed.checkpoint
    if checkpoint is not None and ready.keeper.finished(trainer, checkpoint):
        return store.step_of(checkpoint)  # only what comes after training was missing
    while True:
        done = 0 if checkpoint is None else store.step_of(checkpoint)
        try:
            with ready.stopping.after_the_step(), ready.progress.shown(trainer.total_steps, done):
                outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return int(outcome.global_step)
        except RollBack as bad:
            checkpoint = store.newest(ready.run.checkpoints)
            if checkpoint is None:
                raise TrainingDiverged(
                    f"{bad}\n  There is no checkpoint yet to go back to. Lower train.learning_rate, raise "
                    "train.warmup_steps, or look at these rows."
                ) from None
            ready.guard.step_back()
            with contextlib.suppress(OSError):  # a run that is killed before its next checkpoint
                said = {"rate": ready.guard.rate, "roll_backs": ready.guard.roll_backs}
                rundir.write_json(ready.run.dir / ROLLED_BACK, said)
            rundir.rewind(ready.run, store.step_of(checkpoint))
            ready.screen.say(
                "guard",
                f"back to {checkpoint.name}, and on with {ready.guard.rate:g} times the learning rate "
                f"({ready.guard.roll_backs}. time)",
            )
            trainer.start_over()


def _save(ready: Ready) -> None:
    """Write the product and prove it."""
    run = ready.run
    try:
        with rundir.writing_aside(run.adapter) as folder:
            adapter.save(ready.model, folder, ready.recipe.model.name)
            ready.tok.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{run.adapter}: cannot be written: {getattr(error, 'strerror', None) or error}.\n"
            f"{resuming.last_words(run)}"
        ) from None
    ready.alive.update(alive.verify(ready.model, run.adapter, probe(ready.prepared, ready.card)))


def _seconds(budget: str | None) -> float | None:
    try:
        return None if budget is None else durations.seconds(budget)
    except ValueError as error:
        raise RecipeError(f"--budget is {error}.") from None
