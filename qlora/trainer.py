"""The main story: a recipe in, a run directory with a proven adapter out.

:func:`train` is meant to be read from top to bottom. Everything that can be refused is refused before
the weights are read; everything that is claimed at the end was checked on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.metadata
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import qlora
from qlora import (
    adapter,
    cards,
    data,
    dress,
    evaluation,
    fitting,
    fused,
    fusing,
    hardware,
    loader,
    memory,
    packing,
    rehearsal,
    rundir,
    sft,
    siblings,
    speed,
    tokenizer,
    tracking,
)
from qlora.callbacks import AfterSave, StopOnNonFinite, TrackedProgress
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import CheckpointError, DoesNotFit, Interrupted, RecipeError
from qlora.evaluation import Answered
from qlora.fitting import Fitted
from qlora.memory import Plan
from qlora.recipe import load_recipe
from qlora.rundir import Run
from qlora.screen import GIB, Screen, duration
from qlora.settings import Recipe
from qlora.shape import Shape

SPEED_STEPS = 5  # fewer steps say nothing of a card's speed
RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets",
    "tokenizers", "safetensors",
)  # fmt: skip


def train(
    recipe: Recipe, *, resume: str | Path | None = None, console: Console | None = None
) -> Run:
    """Fine-tune as the recipe says and return the finished run.

    Args:
        recipe: What to do; see :func:`qlora.load_recipe`.
        resume: A run directory to go on with, from its newest whole checkpoint. The recipe must be
            the one it was started with.
        console: Where progress is shown; standard output by default.

    Returns:
        The run: its adapter passed the alive check, and ``run.result`` has the figures.

    Raises:
        QLoRAError: Anything the user can mend, as a message that says how. A run that fails before
            its first step leaves no directory behind.
    """
    started = time.perf_counter()
    screen = Screen(console or Console())
    card = hardware.card()
    config = loader.read_config(recipe)
    shape = Shape.from_config(config.values)
    sft.require_known_fields(recipe)
    written, fitted = recipe, _fitted(recipe, shape, card, resume)
    recipe, plan = fitted.recipe, fitted.plan  # with what train.fit: auto chose
    dtype = cards.compute_dtype(recipe, card)
    screen.say("card", f"{card.name}, {card.free_bytes / GIB:.1f} GiB free, computes in {dtype}")
    screen.say("plan", f"{plan.total_bytes / GIB:.2f} GiB needed ({plan.method})")
    for reason in fitted.reasons:
        screen.say("fit", reason)
    _require_host(plan, card)

    run, checkpoint = _claim(written, resume)
    try:
        tok, pad_note = tokenizer.load(recipe, config.commit)
        prepared = data.prepare(recipe, tok, config.vocab_size, screen.track)
        screen.tell_data(prepared, tok, pad_note)
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
        _record(run, written, fitted, card, prepared, base.facts)
        layout, note = packing.choose(
            recipe, model, prepared.train[:3]["input_ids"], base.facts["attention"]
        )
        screen.say("packing", note)
        watcher = StopOnNonFinite(prepared.addresses, scaled=dtype == "float16")
        progress = TrackedProgress(run.dir / "metrics.jsonl", screen, card, tracker)
        alive: dict[str, float] = {}

        def after_save(checkpoint: Path) -> None:
            # A dead adapter stops the run in minutes, not after two days. The first step of a warmup
            # has the rate zero: after it there is nothing to see yet.
            if not alive and progress.has_learned:
                alive.update(adapter.verify_alive(model, checkpoint, _probe(prepared, card)))
                screen.say(
                    "proof", f"{checkpoint.name} read back: B is alive, logits equal memory's"
                )
            rundir.seal(checkpoint)

        trainer = sft.build(
            recipe, run, card, model, tok, prepared, layout,
            observers=[watcher, progress], callbacks=[watcher, progress, AfterSave(after_save)],
            head=kernels and kernels.head,
        )  # fmt: skip
        stage = dress.DressRehearsal(trainer, recipe, plan, card, run, screen)
        if dress.is_wanted(recipe, card):
            trainer.add_callback(stage)
    except BaseException:
        if checkpoint is None:
            shutil.rmtree(run.dir, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: other runs are in it
                run.dir.parent.rmdir()
        raise

    unborn = False  # nothing worth keeping was done yet
    try:
        digest = adapter.base_digest(model)
        before = _measure(trainer, model, prepared, recipe, screen, "before")
        done = 0 if checkpoint is None else rundir.step_of(checkpoint)
        with progress.shown(trainer.total_steps, done):
            outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        after = _measure(trainer, model, prepared, recipe, screen, "after")
        if adapter.base_digest(model) != digest:
            raise CheckpointError(
                "the frozen base changed during training; the adapter is worthless."
            )
        with rundir.writing_aside(run.adapter) as folder:
            adapter.save(model, folder, recipe.model.name)
            tok.save_pretrained(folder)
        alive.update(adapter.verify_alive(model, run.adapter, _probe(prepared, card)))
        progress.timeline.between()
        result = {
            "recipe": recipe.run.name,
            "steps": outcome.global_step,
            "train_loss": outcome.training_loss,
            "before": _figures(before),
            "after": _figures(after),
            "alive": alive,
            "base_unchanged": True,
            "trainable_parameters": counts.trainable,
            "total_parameters": counts.total,
            "tokens": progress.tokens,
            "train_seconds": round(progress.train_seconds, 2),
            "data_wait": progress.data_wait,
            "total_seconds": round(time.perf_counter() - started, 2),
            "peak_memory_bytes": hardware.memory_in_use(card)[1],
            "peak_step": progress.timeline.peak_step,
            "peak_tokens": progress.timeline.peak_tokens,
            "predicted_memory_bytes": plan.total_bytes,
            "rehearsed_memory_bytes": stage.found and stage.found.measured_bytes,
        }
        rundir.write_json(run.dir / "result.json", result)
        if progress.steps >= SPEED_STEPS:
            rate = progress.tokens / progress.train_seconds
            speed.remember(card, dtype, recipe, shape, rate, time.strftime("%Y-%m-%d"))
    except (DoesNotFit, RecipeError):  # of the rehearsal
        unborn = checkpoint is None and not progress.steps
        raise
    except (RuntimeError, MemoryError) as error:
        if not hardware.ran_out_of_memory(error):
            raise
        raise DoesNotFit(memory.explain_out_of_memory(plan)) from None
    except KeyboardInterrupt:
        raise Interrupted(_last_words(run)) from None
    finally:
        tracker.finish()
        if unborn:
            shutil.rmtree(run.dir, ignore_errors=True)
    _tell_result(screen, run, recipe, result, before, after)
    return run


def _fitted(recipe: Recipe, shape: Shape, card: Card, resume: str | Path | None) -> Fitted:
    """The settings that run, with their plan; a resumed run keeps those of its first start."""
    try:
        if resume is None or not shape.known:
            return rehearsal.fit(recipe, shape, card)
        stored = rundir.open_run(resume).dir / "plan.json"
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


def _claim(recipe: Recipe, resume: str | Path | None) -> tuple[Run, Path | None]:
    """A new run directory, or the one to resume with its newest whole checkpoint."""
    if resume is None:
        return rundir.create(Path(recipe.run.dir), recipe.run.name), None
    run = rundir.open_run(resume)
    if run.is_complete:
        raise CheckpointError(f"{run.dir}: this run has finished; there is nothing to resume.")
    then = load_recipe(run.recipe_file)
    if then != recipe:
        was, now = then.dump().splitlines(), recipe.dump().splitlines()
        changed = [line for line in difflib.ndiff(was, now) if line[0] in "+-"]
        raise CheckpointError(
            f"{run.dir}: the recipe is not the one this run was started with:\n  "
            + "\n  ".join(changed)
            + f"\nGo on with: qlora train {run.recipe_file} --resume {run.dir}"
        )
    checkpoint = rundir.newest_complete(run)
    if checkpoint is None:
        raise CheckpointError(
            f"{run.dir}: no whole checkpoint to resume from. Start the run again."
        )
    rundir.rewind(run, rundir.step_of(checkpoint))
    shutil.rmtree(run.adapter, ignore_errors=True)  # without a result.json it was never the product
    return run, checkpoint


def _record(
    run: Run, recipe: Recipe, fitted: Fitted, card: Card, prepared: Prepared, facts: dict[str, Any]
) -> None:
    rundir.write_text(run.recipe_file, recipe.dump())
    rundir.write_json(run.dir / "plan.json", fitted.to_json())
    rundir.write_json(run.dir / "data.json", prepared.ledger.to_json())
    if prepared.rejected is not None:
        shutil.copy(prepared.rejected, run.dir / "rejected.jsonl")
    rundir.write_json(
        run.dir / "environment.json",
        {
            "qlora": qlora.__version__,
            "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "card": dataclasses.asdict(card),
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "base": facts,
        },
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


def _measure(
    trainer: Any, model: Any, prepared: Prepared, recipe: Recipe, screen: Screen, when: str
) -> tuple[float | None, Answered | None]:
    """Held-out loss and, if asked, answers; says both in one line."""
    loss = None
    if prepared.held_out is not None:
        loss = float(trainer.evaluate()["eval_loss"])
    answered = None
    if recipe.eval.generate and prepared.held_out_examples:
        answered = evaluation.answer(
            model, prepared.renderer, prepared.held_out_examples, recipe, screen.track
        )
    said = [] if loss is None else [f"held-out loss {loss:.4f}"]
    if answered is not None and answered.examples:
        said.append(f"exact match {sum(answered.right)}/{len(answered.right)}")
    if said:
        screen.say(when, ", ".join(said))
    return loss, answered


def _figures(measured: tuple[float | None, Answered | None]) -> dict[str, Any]:
    loss, answered = measured
    figures: dict[str, Any] = {"held_out_loss": loss}
    if answered is not None:
        figures |= {
            "exact_match": answered.exact_match,
            "stop_rate": answered.stop_rate,
            "answered": len(answered.examples),
        }
    return figures


def _probe(prepared: Prepared, card: Card) -> torch.Tensor:
    """A few tokens of the first training row, shape (1, T), on the card."""
    return torch.tensor([prepared.train[0]["input_ids"][:256]], device=hardware.device(card))


def _last_words(run: Run) -> str:
    checkpoint = rundir.newest_complete(run)
    if checkpoint is None:
        return f"Stopped before the first checkpoint. Metrics so far are in {run.dir}."
    return (
        f"Stopped. The last complete checkpoint is {checkpoint}.\n"
        f"  Go on from it: qlora train {run.recipe_file} --resume {run.dir}"
    )


def _tell_result(
    screen: Screen,
    run: Run,
    recipe: Recipe,
    result: dict[str, Any],
    before: tuple[float | None, Answered | None],
    after: tuple[float | None, Answered | None],
) -> None:
    base, tuned = before[1], after[1]
    if base is not None and tuned is not None:
        table = Table(title="The same held-out rows, asked before and after", show_lines=True)
        for heading in ("expected", "base", "tuned"):
            table.add_column(heading, overflow="fold", ratio=1)
        for example, was, now in list(
            zip(tuned.examples, base.answers, tuned.answers, strict=True)
        )[:3]:
            wanted = example.record.turns[-1].content
            table.add_row(*(Text(cell[:400]) for cell in (wanted, was.text, now.text)))
        screen.console.print(table)
        what = " + ".join(recipe.eval.exact_match) or "whole answer"
        screen.say(
            "score",
            f"exact match ({what}) on {len(tuned.right)} held-out rows: "
            f"{base.exact_match:.1%} before, {tuned.exact_match:.1%} after",
        )
    if before[0] is not None and after[0] is not None:
        screen.say("loss", f"held out: {before[0]:.4f} before, {after[0]:.4f} after")
    screen.say(
        "time",
        f"{duration(result['train_seconds'])} of training, {duration(result['total_seconds'])} in all",
    )
    screen.say("run", str(run.dir))
    screen.say("next", f"qlora chat {run.dir}")
