"""The main story: a recipe in, a run directory with a proven adapter out.

:func:`train` is meant to be read from top to bottom. Everything that can be refused is refused before
the weights are read; everything that is claimed at the end was checked on the way; whatever ends a run
before its end leaves it where it can go on.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from qlora import (
    adapter,
    cards,
    data,
    dress,
    durations,
    fitting,
    fused,
    fusing,
    hardware,
    identity,
    loader,
    memory,
    packing,
    recording,
    rehearsal,
    resuming,
    rundir,
    sft,
    siblings,
    speed,
    store,
    table,
    tokenizer,
    tracking,
    verdict,
)
from qlora.budget import Budget
from qlora.callbacks import TrackedProgress
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import (
    CheckpointError,
    DoesNotFit,
    Interrupted,
    RecipeError,
    Terminated,
    TrainingDiverged,
)
from qlora.fitting import Fitted
from qlora.guard import RollBack, StepGuard
from qlora.keeping import Keeper
from qlora.memory import Plan
from qlora.mirror import MARK, Mirror
from qlora.places import expanded
from qlora.recipe import load_recipe
from qlora.relief import Relief
from qlora.resuming import Claimed
from qlora.rundir import Run
from qlora.screen import GIB, Screen, duration
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
        console: Where progress is shown; standard output by default.

    Returns:
        The run: its adapter passed the alive check, and ``run.result`` has the figures.

    Raises:
        QLoRAError: Anything the user can mend, as a message that says how. A run that fails before
            its first step leaves no directory behind.
        Interrupted: A signal stopped it; it can be resumed.
    """
    began = time.monotonic()
    screen, stopping = Screen(console or Console()), Stopping()
    identity.require_known(allow_change)
    claimed, ready = None, None
    try:
        with stopping.listening():
            card = hardware.card()
            config = loader.read_config(recipe)
            shape = Shape.from_config(config.values)
            sft.require_known_fields(recipe)
            if resume is not None:
                claimed = resuming.claim(recipe, resume, allow_change, screen)
            fitted = _fitted(recipe, shape, card, claimed)
            dtype = cards.compute_dtype(fitted.recipe, card)
            screen.say(
                "card", f"{card.name}, {card.free_bytes / GIB:.1f} GiB free, computes in {dtype}"
            )
            needed = fitted.plan.total_bytes / GIB
            screen.say("plan", f"{needed:.2f} GiB needed ({fitted.plan.method})")
            for reason in fitted.reasons:
                screen.say("fit", reason)
            _require_host(fitted.plan, card)
            if claimed is None:
                claimed = Claimed(rundir.create(Path(recipe.run.dir), recipe.run.name))
            with rundir.locked(claimed.run):
                ready = _prepare(
                    recipe, fitted, card, config, shape, claimed, screen, stopping, budget, began
                )
                return _carry_out(ready)
    except KeyboardInterrupt as signal:
        words = (
            "Stopped before the first step; there is nothing to resume."
            if claimed is None or _is_unborn(claimed, ready)
            else resuming.last_words(claimed.run)
        )
        raise Interrupted(words, 143 if isinstance(signal, Terminated) else 130) from None
    finally:
        if ready is not None:
            ready.tracker.finish()
        if claimed is not None and _is_unborn(claimed, ready):
            shutil.rmtree(claimed.run.dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: other runs are in it
                claimed.run.dir.parent.rmdir()


def resume(
    folder: str | Path, *, allow_change: Collection[str] = (), console: Console | None = None
) -> Run:
    """Go on with the newest unfinished run under a folder: the one cell to run after a lost machine.

    Args:
        folder: Where runs are written, a run, or what ``run.mirror`` named. A run whose own directory is
            lost, or older than its copy, is brought home from there first.
        allow_change: As for :func:`train`.
        console: As for :func:`train`.

    Raises:
        QLoRAError: As :func:`train`; nothing there can be resumed.
    """
    run = resuming.newest([expanded(folder)])
    recipe = load_recipe(run.recipe_file)
    if (run.dir / MARK).is_file():  # where the drive is now
        mirrored = recipe.run.model_copy(update={"mirror": str(run.dir.parent.parent)})
        recipe = recipe.model_copy(update={"run": mirrored})
    return train(recipe, resume=run.dir, allow_change=allow_change, console=console)


@dataclass
class _Ready:
    """All that a run needs, loaded and proven, before its first step."""

    recipe: Recipe  # with what train.fit: auto chose
    claimed: Claimed
    card: Card
    shape: Shape
    plan: Plan
    prepared: Prepared
    tok: Any
    model: Any
    trainer: sft.RowTrainer
    counts: adapter.Counts
    identity: dict[str, Any]
    held_out: str
    screen: Screen
    stopping: Stopping
    progress: TrackedProgress
    guard: StepGuard
    keeper: Keeper
    relief: Relief
    budget: Budget
    mirror: Mirror | None
    stage: dress.DressRehearsal
    tracker: Any
    began: float
    answering: list[float] = field(default_factory=list)  # seconds that the measure before took
    alive: dict[str, float] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        return self.claimed.run


def _is_unborn(claimed: Claimed, ready: _Ready | None) -> bool:
    """Whether nothing worth keeping was done yet."""
    return claimed.checkpoint is None and (ready is None or not ready.progress.steps)


def _prepare(
    written: Recipe,
    fitted: Fitted,
    card: Card,
    config: Any,
    shape: Shape,
    claimed: Claimed,
    screen: Screen,
    stopping: Stopping,
    budget: str | None,
    began: float,
) -> _Ready:
    run, recipe, plan = claimed.run, fitted.recipe, fitted.plan
    seconds = _seconds(budget)
    tok, pad_note = tokenizer.load(recipe, config.commit)
    prepared = data.prepare(recipe, tok, config.vocab_size, screen.track)
    screen.tell_data(prepared, tok, pad_note)
    now = recording.identity_of(written, recipe, card, prepared, tok)
    claimed.require_same(now)
    tracker = _tracker(recipe, run, screen)
    base = loader.load_base(recipe, card, config, bars=screen.live)
    screen.say(
        "base",
        f"{base.facts['architecture']}: {base.facts['quantized_linears']} linears in 4 bits, "
        f"{base.facts['footprint_bytes'] / 2**20:,.1f} MiB, {base.facts['attention']} attention"
        + (" (quantized before, from the cache)" if base.facts["from_cache"] else ""),
    )
    for note in base.notes:
        screen.say("base", note)
    model = adapter.attach(base.model, recipe, new_tokens(base.model, recipe, prepared, screen))
    counts = adapter.count(model)
    screen.say("adapter", str(counts))
    kernels = fusing.fuse(model, recipe, shape, card, prepared, base.facts, screen)
    if kernels is None and fused.applies(recipe, shape):
        fitted = fusing.unfuse(model, recipe, written, shape, card, base.facts, screen)
        recipe, plan = fitted.recipe, fitted.plan
        _require_host(plan, card)
    now |= {"base": adapter.base_digest(model)}
    for change in claimed.require_same(now):
        screen.say("changed", str(change) + (", as allowed" if change.decides else ""))
    now["allowed"] = recording.allowed_so_far(claimed, now)
    recording.record(run, written, fitted, card, prepared, base.facts)
    layout, note = packing.choose(
        recipe, model, prepared.train[:3]["input_ids"], base.facts["attention"]
    )
    screen.say("packing", note)

    mirror = None
    if recipe.run.mirror:
        mirror = Mirror(
            run, recipe.run.mirror, recipe.train.save_total_limit, _teller(screen, "mirror")
        )
    progress = TrackedProgress(run.dir / "metrics.jsonl", screen, card, tracker, began)
    rows = table.Numbered(prepared.train)
    guard = StepGuard(
        recipe, prepared.addresses, lambda row: len(rows[row]["input_ids"]), screen,
        judged=progress.judged, record=progress.write,
    )  # fmt: skip
    alive: dict[str, float] = {}

    def prove(folder: Path, called: Path) -> None:
        # A dead adapter stops the run in minutes, not after two days. The first step of a warmup
        # has the rate zero: after it there is nothing to see yet.
        if not alive and progress.has_learned:
            alive.update(adapter.verify_alive(model, folder, _probe(prepared, card), called))
            screen.say("proof", f"{called.name} read back: B is alive, logits equal memory's")

    answering: list[float] = []
    limit = Budget(
        seconds, began, screen, afterwards=lambda: _afterwards(answering, keeper),
        rate=lambda: guard.rate, expect=progress.expect,
    )  # fmt: skip
    observers: dict[str, Any] = {"progress": progress, "guard": guard, "budget": limit}
    keeper = Keeper(
        run, base_name=recipe.model.name, keep=recipe.train.save_total_limit,
        every_seconds=recipe.run.save_every and durations.seconds(recipe.run.save_every),
        identity=now, observers=observers, rate=lambda: guard.rate, proof=prove,
        restart_optimizer="optimizer" in claimed.allowed,
        then=mirror.offer if mirror else lambda checkpoint: None, screen=screen,
    )  # fmt: skip
    trainer = sft.build(
        recipe, run, card, model, tok, prepared, layout, keeper=keeper,
        observers=[guard, progress], callbacks=[guard, progress, limit, stopping],
        head=kernels and kernels.head,
    )  # fmt: skip
    relief = Relief(recipe.train.oom_retries, plan, card, rows, trainer.data_collator, screen)
    observers["relief"] = trainer.relief = relief
    guard.blame, guard.scale, limit.trainer = trainer.blame, trainer.scale, trainer
    stage = dress.DressRehearsal(trainer, recipe, plan, card, run, screen)
    if dress.is_wanted(recipe, card):
        trainer.add_callback(stage)
    return _Ready(
        recipe, claimed, card, shape, plan, prepared, tok, model, trainer, counts, now,
        "" if prepared.held_out is None else table.digest(prepared.held_out), screen, stopping,
        progress, guard, keeper, relief, limit, mirror, stage, tracker, began, answering, alive,
    )  # fmt: skip


def _carry_out(ready: _Ready) -> Run:
    """Measure, train, save, prove, measure again."""
    run, model, screen, progress = ready.run, ready.model, ready.screen, ready.progress
    measured = (ready.trainer, model, ready.prepared, ready.recipe, screen)
    kept = run.dir / "before.json"
    began = time.monotonic()
    before = verdict.recall(ready.prepared, ready.recipe, ready.held_out, kept, screen)
    if before is None:
        before = verdict.measure(*measured, "before")
        verdict.keep(before, ready.recipe, ready.held_out, kept)
    ready.answering.append(time.monotonic() - began)
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
        adapter.require_finite(model, steps)
        _save(ready)
        after = verdict.measure(*measured, "after")
    except (RuntimeError, MemoryError) as error:
        if not hardware.ran_out_of_memory(error):
            raise
        raise DoesNotFit(memory.explain_out_of_memory(ready.plan)) from None
    progress.timeline.between()
    result = recording.result(ready, steps, before, after)
    rundir.write_json(run.dir / "result.json", result)
    session = progress.session
    if progress.steps >= SPEED_STEPS:
        rate = session.tokens / session.train_seconds
        dtype = cards.compute_dtype(ready.recipe, ready.card)
        speed.remember(
            ready.card, dtype, ready.recipe, ready.shape, rate, time.strftime("%Y-%m-%d")
        )
    if ready.mirror and ready.mirror.finish():
        screen.say("mirror", str(ready.mirror.copy.dir))
    verdict.tell(before, after, ready.recipe, screen)
    screen.say(
        "time",
        f"{duration(result['train_seconds'])} of training, {duration(result['total_seconds'])} in all",
    )
    screen.say("run", str(run.dir))
    screen.say("next", f"qlora chat {run.dir}")
    return run


def _take_steps(ready: _Ready) -> int:
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
            rundir.rewind(ready.run, store.step_of(checkpoint))
            ready.screen.say(
                "guard",
                f"back to {checkpoint.name}, and on with {ready.guard.rate:g} times the learning rate "
                f"({ready.guard.roll_backs}. time)",
            )
            trainer.start_over()


def _save(ready: _Ready) -> None:
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
    ready.alive.update(
        adapter.verify_alive(ready.model, run.adapter, _probe(ready.prepared, ready.card))
    )


def _afterwards(answering: list[float], keeper: Keeper) -> float:
    """Seconds that the end of a run takes, at most: as much as its beginning, and two saves."""
    return 2.0 + 1.5 * sum(answering) + 2 * keeper.longest_save


def _seconds(budget: str | None) -> float | None:
    try:
        return None if budget is None else durations.seconds(budget)
    except ValueError as error:
        raise RecipeError(f"--budget is {error}.") from None


def _teller(screen: Screen, label: str) -> Any:
    return lambda text: screen.say(label, text)


def _fitted(recipe: Recipe, shape: Shape, card: Card, claimed: Claimed | None) -> Fitted:
    """The settings that run, with their plan; a resumed run keeps those of its first start."""
    try:
        if claimed is None or not shape.known:
            return rehearsal.fit(recipe, shape, card)
        stored = claimed.run.dir / "plan.json"
        values = rundir.read_json(stored) if stored.is_file() else {}
        return fitting.again(recipe, shape, card, values)
    except DoesNotFit as error:
        other = siblings.instead(recipe, shape, card)
        hint = f"\nThe largest sibling that would fit: {other}." if other else ""
        raise DoesNotFit(f"{error}{hint}") from None


def _require_host(plan: Plan, card: Card) -> None:
    """Refuse an offload that the host has no room for: pinned memory cannot be swapped out."""
    available = hardware.ram_bytes()[1]
    if card.kind == "cuda" and plan.host_bytes > available:
        raise DoesNotFit(
            f"train.activation_offload and train.embedding_offload keep {plan.host_bytes / GIB:.1f} GiB in "
            f"the host's memory (predicted), of which {available / GIB:.1f} GiB are available. Lower "
            "data.max_length or train.per_device_train_batch_size, or write false for one of them."
        )


def new_tokens(base: Any, recipe: Recipe, prepared: Prepared, screen: Screen) -> list[int]:
    """Tokens in use that the base never learned: to train, if the recipe says so; told in any case."""
    used = [int(token) for token in prepared.ledger.special_tokens]
    new = adapter.untrained_tokens(base, used)
    asked = recipe.lora.train_new_tokens
    if new:
        named = ", ".join(prepared.renderer.tok.convert_ids_to_tokens(new)[:8])
        what = (
            "their embedding rows train with the adapter"
            if asked
            else "lora.train_new_tokens=true trains their embedding rows"
        )
        screen.say("tokens", f"{len(new)} in use look untrained in this base ({named}); {what}")
    elif asked:
        screen.say(
            "tokens", "none in use looks untrained in this base: no embedding row is trained"
        )
    return new if asked else []


def _tracker(recipe: Recipe, run: Run, screen: Screen) -> Any:
    if recipe.run.report_to == "none":
        return tracking.Silent()
    tracker = tracking.Wandb(
        recipe.run.project,
        f"{recipe.run.name}-{run.dir.name}",
        run.dir,
        recipe.model_dump(mode="json"),
    )
    screen.say("tracking", tracker.note)
    return tracker


def _probe(prepared: Prepared, card: Card) -> torch.Tensor:
    """A few tokens of the first training row, shape (1, T), on the card."""
    return torch.tensor([prepared.train[0]["input_ids"][:256]], device=hardware.device(card))
