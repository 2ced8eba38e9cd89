"""All that a run needs, loaded and proven, before its first step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora import (
    adapter,
    alive,
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
    packing,
    recording,
    rehearsal,
    rundir,
    sft,
    siblings,
    table,
    tokenizer,
    tracking,
)
from qlora.budget import Budget
from qlora.callbacks import TrackedProgress
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import DoesNotFit
from qlora.fitting import Fitted
from qlora.guard import StepGuard
from qlora.keeping import Keeper
from qlora.memory import Plan
from qlora.mirror import Mirror
from qlora.relief import Relief
from qlora.resuming import Claimed
from qlora.rundir import Run
from qlora.samples import Samples
from qlora.screen import GIB, Screen
from qlora.settings import Recipe
from qlora.shape import Shape
from qlora.stopping import Stopping

ROLLED_BACK = "roll_backs.json"  # what no checkpoint knows yet


@dataclass
class Ready:
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
    tracker: tracking.Tracker
    began: float
    answering: list[float] = field(default_factory=list)  # seconds of what the end does again
    alive: dict[str, float] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        return self.claimed.run


def prepare(
    written: Recipe,
    fitted: Fitted,
    card: Card,
    config: Any,
    shape: Shape,
    claimed: Claimed,
    screen: Screen,
    stopping: Stopping,
    seconds: float | None,
    began: float,
) -> Ready:
    """Read data, tokenizer and base, prove what is to be used on them, and build the trainer.

    Args:
        written: The recipe as it is written.
        fitted: The recipe that runs, and its plan.
        card: Where it runs.
        config: The base's configuration.
        shape: And its shape.
        claimed: The run; one that is resumed is compared with what it was.
        screen: Where it is told.
        stopping: Ends the training on a signal.
        seconds: ``--budget``; None without.
        began: ``time.monotonic()`` of the start.

    Raises:
        QLoRAError: Anything that can be refused before the first step.
    """
    run, recipe, plan = claimed.run, fitted.recipe, fitted.plan
    mirror = None
    if recipe.run.mirror:
        mirror = Mirror(
            run, recipe.run.mirror, recipe.train.save_total_limit, _teller(screen, "mirror")
        )
    tok, pad_note = tokenizer.load(recipe, config.commit)
    prepared = data.prepare(recipe, tok, config.vocab_size, screen.track)
    screen.tell_data(prepared, tok, pad_note)
    now = recording.identity_of(written, recipe, card, prepared, tok)
    claimed.require_same(now)
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
        require_host(plan, card)
    hashing = time.monotonic()
    now |= {"base": adapter.base_digest(model), "chosen": fitted.chosen}
    answering = [time.monotonic() - hashing]  # which the end of the run does again
    changed = claimed.require_same(now)
    for change in changed:
        screen.say("changed", str(change) + (", as allowed" if change.decides else ""))
    now["allowed"] = recording.allowed_so_far(claimed, now)
    claimed.settle(screen)
    is_other = any(change.decides for change in changed)
    recording.record(run, fitted, card, prepared, base.facts)
    if not is_other:  # else only with the first checkpoint that is of it
        recording.write_recipe(run, written)
    layout, note = packing.choose(
        recipe, model, prepared.train[:3]["input_ids"], base.facts["attention"]
    )
    screen.say("packing", note)

    progress = TrackedProgress(run.dir / "metrics.jsonl", screen, card, tracking.Silent(), began)
    rows = table.Numbered(prepared.train)
    guard = StepGuard(
        recipe, prepared.addresses, lambda row: len(rows[row]["input_ids"]), screen,
        judged=progress.judged, record=progress.write,
    )  # fmt: skip
    if (run.dir / ROLLED_BACK).is_file():
        told = rundir.read_json(run.dir / ROLLED_BACK)
        guard.rate, guard.roll_backs = told["rate"], told["roll_backs"]
    proven: dict[str, float] = {}

    def prove(folder: Path, called: Path) -> None:
        # A dead adapter stops the run in minutes, not after two days. The first step of a warmup
        # has the rate zero: after it there is nothing to see yet.
        if not proven and progress.has_learned:
            proven.update(alive.verify(model, folder, probe(prepared, card), called))
            screen.say("proof", f"{called.name} read back: B is alive, logits equal memory's")

    def saved(checkpoint: Path) -> None:
        if is_other:
            recording.write_recipe(run, written)
        if mirror is not None:
            mirror.offer(checkpoint)

    limit = Budget(
        seconds, began, screen, afterwards=lambda: _afterwards(answering, keeper),
        rate=lambda: guard.rate, expect=progress.expect,
    )  # fmt: skip
    observers: dict[str, Any] = {"progress": progress, "guard": guard, "budget": limit}
    keeper = Keeper(
        run, base_name=recipe.model.name, keep=recipe.train.save_total_limit,
        every_seconds=recipe.run.save_every and durations.seconds(recipe.run.save_every),
        identity=now, observers=observers, rate=lambda: guard.rate, proof=prove,
        restart_optimizer=any(change.field == "optimizer" for change in changed),
        then=saved, way_back=claimed.way_back, screen=screen,
    )  # fmt: skip
    trainer = sft.build(
        recipe, run, card, model, tok, prepared, layout, keeper=keeper,
        observers=[guard, progress],
        callbacks=[
            guard, progress, limit, stopping, Samples(recipe, prepared, screen, progress.write),
        ],
        head=kernels and kernels.head,
    )  # fmt: skip
    relief = Relief(recipe.train.oom_retries, plan, card, rows, trainer.data_collator, screen)
    observers["relief"] = trainer.relief = relief
    guard.blame, guard.scale, limit.trainer = trainer.blame, trainer.scale, trainer
    stage = dress.DressRehearsal(trainer, recipe, plan, card, run, screen)
    if dress.is_wanted(recipe, card):
        trainer.add_callback(stage)
    progress.tracker = tracker = _tracker(recipe, run, screen)  # last: what fails above leaves none
    return Ready(
        recipe, claimed, card, shape, plan, prepared, tok, model, trainer, counts, now,
        "" if prepared.held_out is None else table.digest(prepared.held_out), screen, stopping,
        progress, guard, keeper, relief, limit, mirror, stage, tracker, began, answering, proven,
    )  # fmt: skip


def tell_fit(fitted: Fitted, card: Card, screen: Screen) -> None:
    """Card, plan and what was chosen for it."""
    dtype = cards.compute_dtype(fitted.recipe, card)
    screen.say("card", f"{card.name}, {card.free_bytes / GIB:.1f} GiB free, computes in {dtype}")
    needed = fitted.plan.total_bytes / GIB
    screen.say("plan", f"{needed:.2f} GiB needed ({fitted.plan.method})")
    for reason in fitted.reasons:
        screen.say("fit", reason)


def fitted_for(recipe: Recipe, shape: Shape, card: Card, claimed: Claimed | None) -> Fitted:
    """The settings that run, with their plan; a resumed run keeps those of its first start."""
    try:
        if claimed is None or not shape.known or _asks_otherwise(recipe, claimed):
            return rehearsal.fit(recipe, shape, card)
        stored = claimed.run.dir / "plan.json"
        values = rundir.read_json(stored) if stored.is_file() else {}
        if "chosen" in claimed.identity:  # hashed, as plan.json is not
            values["chosen"] = claimed.identity["chosen"]
        return fitting.again(recipe, shape, card, values)
    except DoesNotFit as error:
        other = siblings.instead(recipe, shape, card)
        hint = f"\nThe largest sibling that would fit: {other}." if other else ""
        raise DoesNotFit(f"{error}{hint}") from None


def _asks_otherwise(recipe: Recipe, claimed: Claimed) -> bool:
    """Whether the recipe now says something else of what ``train.fit: auto`` decides than it did."""
    was, now = claimed.identity.get("recipe", {}), identity.fields_of(recipe)
    asked = [f"train.{name}" for name in ("fit", *fitting.CHOSEN)]
    return recipe.train.fit == "auto" and any(was.get(name) != now[name] for name in asked)


def require_host(plan: Plan, card: Card) -> None:
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


def _tracker(recipe: Recipe, run: Run, screen: Screen) -> tracking.Tracker:
    tracker = tracking.start(recipe, run.dir)
    if news := tracking.news(tracker):
        screen.say("tracking", news)
    return tracker


def probe(prepared: Prepared, card: Card) -> torch.Tensor:
    """A few tokens of the first training row, shape (1, T), on the card."""
    return torch.tensor([prepared.train[0]["input_ids"][:256]], device=hardware.device(card))


def _afterwards(answering: list[float], keeper: Keeper) -> float:
    """Seconds that the end of a run takes, at most: as much as its beginning, and two saves."""
    return 2.0 + 1.5 * sum(answering) + 2 * keeper.longest_save


def _teller(screen: Screen, label: str) -> Any:
    return lambda text: screen.say(label, text)
