"""Several adapters of one base made into one, with what each of them still does in it.

What is written is a run like any other: its ``adapter`` is the combination, its recipe is the first run's
with the new rank, and ``result.json`` says under ``combination`` what it was made of. Runs are only read.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from qlora import adapter, hardware, hub, probing, rundir, trained
from qlora.combining import deltas, interference, mixing
from qlora.combining.deltas import PREFIX, Deltas
from qlora.combining.interference import Task
from qlora.combining.mixing import Asked
from qlora.errors import CheckpointError, ExportError, RecipeError
from qlora.rundir import Run
from qlora.screen import Screen
from qlora.settings import Recipe
from qlora.trained import Trained

ROWS = 500  # held-out rows of each run that are scored
ROUNDING = 1e-12  # of a squared norm: less than this is what fp32 leaves of x - x
TOO_MUCH = 0.3  # of the norm cut off by a rank: told
COMBINED = "combined"  # the new adapter's name in the model, and the default of the run's
PROVEN, PROVEN_16 = 1e-3, 5e-2  # how far logits may differ, as a share of the largest; in 16 bits


def combine(
    runs: Sequence[str | Path],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    scale: float = 1.0,
    seed: int = 42,
    name: str = COMBINED,
    out: str | Path | None = None,
    rows: int = ROWS,
    min_kept: float | None = None,
    console: Console | None = None,
) -> Run:
    """Make one adapter of several of the same base, and measure what each of them still does in it.

    Args:
        runs: Two or more finished runs. The combination is asked as they are.
        method, weights, density, rank, scale, seed: As :func:`qlora.combining.mixing.ask`.
        name: Of the new run: ``<out>/<name>/<now>/``.
        out: A folder of runs; where the first run lies by default.
        rows: Held-out rows of each run that are scored at most; 0 scores none.
        min_kept: Write nothing if a run that was scored keeps less than this share of its gain in loss.
        console: Where progress is shown; standard output by default.

    Returns:
        The new run. Its adapter was read back from disk; of a sum without loss it was proven that it
        computes what the adapters do when they are on together, each times its weight.

    Raises:
        RecipeError: A setting makes no sense.
        CheckpointError: A run has not finished, is of another base, or is asked with other tokens.
        ExportError: Less is left of a run than was asked for.
    """
    began = time.monotonic()
    screen = Screen(console or Console())
    _require_sense(runs, name, rows, min_kept)
    parts = [trained.find(run, finished=True) for run in runs]
    _require_kin(parts)
    sources = [deltas.read(part.source, part.name) for part in parts if part.source is not None]
    _require_one_with_tokens(sources)
    asked = mixing.ask(
        [source.rank for source in sources], method=method, weights=weights, density=density,
        rank=rank, scale=scale, seed=seed,
    )  # fmt: skip
    first = parts[0]
    assert first.run is not None
    folder = Path(out) if out is not None else first.run.dir.parent.parent
    for part, weight in zip(parts, asked.weights, strict=True):
        screen.say("part", f"{weight:g} x {part.name}")
    run = rundir.create(folder, name)
    try:
        with hub.door(first.recipe) as said, rundir.writing_aside(run.dir, replace=True) as aside:
            if said:
                screen.say("hub", said)
            facts = _fill(Run(aside), run, parts, sources, asked, rows, min_kept, screen)
            facts["total_seconds"] = round(time.monotonic() - began, 2)
            rundir.write_json(aside / "result.json", facts)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{run.dir}: cannot be written: {getattr(error, 'strerror', None) or error}."
        ) from None
    finally:
        if not run.is_complete:
            with suppress(OSError):  # not empty: other runs are in it
                run.dir.rmdir()
                run.dir.parent.rmdir()
    screen.say("run", str(run.dir))
    screen.say("next", shlex.join(["qlora", "chat", str(run.dir)]))
    return run


def _fill(
    into: Run,
    final: Run,
    parts: Sequence[Trained],
    sources: Sequence[Deltas],
    asked: Asked,
    rows: int,
    min_kept: float | None,
    screen: Screen,
) -> dict[str, Any]:
    """Everything of the new run but ``result.json``, whose content is returned."""
    first = parts[0]
    assert first.run is not None
    device = hardware.device(first.card)
    matrices, error, worst = _add_up(sources, asked, device, screen)
    pairs = _likeness(sources, device, screen)
    into.adapter.mkdir()
    deltas.write(into.adapter, matrices, asked.rank, sources)
    first.tok.save_pretrained(into.adapter)
    for kept in ("data.json", "environment.json", "before.json"):
        if (first.run.dir / kept).is_file():
            shutil.copy(first.run.dir / kept, into.dir / kept)
    recipe = _recipe(parts, sources, asked, final)
    rundir.write_text(into.recipe_file, recipe.dump())
    hardware.let_go()  # of the matrices: the base needs the card
    model = trained.load_base(first, bars=screen.live)
    named = [(f"part{number}", part) for number, part in enumerate(parts)]
    for part_name, part in named:
        model = trained.put_on(model, part, part_name)
    model = adapter.load(model, into.adapter, COMBINED)
    exact = asked.rank >= sum(source.rank for source in sources) and not asked.density
    weights = {n: w * asked.scale for (n, _), w in zip(named, asked.weights, strict=True)}
    proof = _prove(model, into, first, weights if exact else None, screen)
    tasks = interference.measure(model, named, COMBINED, rows, screen)
    interference.tell(tasks, screen)
    _require_enough(tasks, min_kept)
    return {
        "recipe": recipe.run.name,
        "steps": 0,
        "combination": asdict(asked) | {
            "runs": [
                {"name": part.name, "dir": str(part.run and part.run.dir.resolve()), "rank": source.rank,
                 "weight": weight, "adapter_sha256": rundir.sha256(source.folder / deltas.FILE)}
                for part, source, weight in zip(parts, sources, asked.weights, strict=True)
            ],
            "error": error, "worst": {"linear": worst[0], "error": worst[1]}, "pairs": pairs,
            "proof": proof, "tasks": [task.to_json() for task in tasks],
        },
        # As in the result of a run, of the rows that the recipe names: those of the first.
        "before": asdict(tasks[0].base),
        "after": asdict(tasks[0].combined),
        "held_out_rows": tasks[0].rows,
        "trainable_parameters": sum(t.numel() for t in adapter.tensors(model, COMBINED).values()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def _add_up(
    sources: Sequence[Deltas], asked: Asked, device: torch.device, screen: Screen
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float, tuple[str, float]]:
    """A and B of each linear; what the rank cut off, as a share of the norm; the worst linear and its."""
    generator = torch.Generator().manual_seed(asked.seed)
    matrices, lost, whole, worst = {}, 0.0, 0.0, ("", 0.0)
    linears = sorted({linear for source in sources for linear in source.shapes})
    for linear in screen.track(linears, "combining"):
        those = [
            (source, weight)
            for source, weight in zip(sources, asked.weights, strict=True)
            if linear in source.shapes
        ]
        mixed = mixing.mix(
            asked,
            [source.factors(linear, device) for source, _ in those],
            [weight for _, weight in those],
            generator,
        )
        matrices[linear] = mixed.a.cpu(), mixed.b.cpu()
        lost, whole = lost + mixed.lost, whole + mixed.whole
        worst = max(worst, (linear.removeprefix(PREFIX), mixed.error), key=lambda one: one[1])
    parts = zip(sources, asked.weights, strict=True)
    most = max(
        (weight * asked.scale) ** 2 * deltas.norm_squared(one, device) for one, weight in parts
    )
    if not whole > ROUNDING * most:
        raise CheckpointError(
            "The adapters cancel each other: nothing is left of them with these weights. Write others."
        )
    error = math.sqrt(lost / whole)
    count = f"{asked.method}, rank {asked.rank} in {len(linears)} linears"
    if error == 0:
        screen.say("sum", f"{count}: nothing is cut off")
    else:
        screen.say(
            "sum",
            f"{count}: the rank cuts off {error:.1%} of the norm, at worst {worst[1]:.1%} ({worst[0]})",
        )
    if error > TOO_MUCH:
        screen.say("rank", f"--rank {asked.rank} is low for this; more keeps more of the norm")
    return matrices, error, worst


def _likeness(
    sources: Sequence[Deltas], device: torch.device, screen: Screen
) -> list[dict[str, Any]]:
    """How far each two of the adapters pull the same way; said in a line each."""
    pairs = list(combinations(range(len(sources)), 2))
    found = []
    for one, other in screen.track(pairs, "comparing"):
        seen = deltas.agreement(sources[one], sources[other], device)
        found.append({"of": [sources[one].name, sources[other].name]} | asdict(seen))
        strong = "" if seen.strong is None else f", {seen.strong:.0%} among the largest of both"
        screen.say(
            "pair",
            f"{sources[one].name} and {sources[other].name}: cosine {seen.cosine:.3f}, opposite signs in "
            f"{seen.conflicts:.0%} of the entries{strong}",
        )
    return found


def _recipe(
    parts: Sequence[Trained], sources: Sequence[Deltas], asked: Asked, final: Run
) -> Recipe:
    """The first run's recipe with the new adapter's shape and name."""
    first = parts[0].recipe
    trains_tokens = any(source.tokens for source in sources)
    lora = first.lora.model_copy(
        update={
            "r": asked.rank, "lora_alpha": float(asked.rank), "lora_dropout": 0.0,
            "use_rslora": False, "target_modules": tuple(deltas.targets(sources)),
            "train_new_tokens": trains_tokens,
        }
    )  # fmt: skip
    where = {"name": final.dir.parent.name, "dir": str(final.dir.parent.parent), "mirror": None}
    run = first.run.model_copy(update=where)
    # A table with the host is frozen; the one that some part trained rows of is not.
    offload = first.train.embedding_offload and not trains_tokens
    train = first.train.model_copy(update={"embedding_offload": offload})
    return first.model_copy(update={"lora": lora, "run": run, "train": train})


def _prove(
    model: Any, into: Run, first: Trained, weights: dict[str, float] | None, screen: Screen
) -> dict[str, Any]:
    """The adapter on disk, loaded again: it is what was written, does something, and is the sum.

    Args:
        model: With all adapters on it.
        into: Whose adapter was loaded as the combination.
        first: Gives the rows.
        weights: Of the parts whose weighted sum it must be; None if it is not meant to be one.
    """
    deltas.require_same(into.adapter, adapter.tensors(model, COMBINED))
    probes = probing.probes(first)
    with adapter.disabled(model):
        of_base = probes.logits(model)
    adapter.use(model, COMBINED)
    combined = probes.logits(model)
    if not bool(combined.isfinite().all()):
        raise CheckpointError(
            "With the combination the logits are not finite any more; it is not kept. Write smaller "
            "--weights."
        )
    effect = float((combined - of_base).abs().max())
    if effect == 0:
        raise CheckpointError("The combination is dead: the logits are the same without it.")
    proof: dict[str, Any] = {"rows": probes.origin, "combined_against_base": effect}
    if weights is None:
        screen.say("proof", f"read back from disk; it moves logits by up to {effect:.3g}")
        return proof
    with adapter.stacked(model, weights):
        summed = probes.logits(model)
    differ = float((combined - summed).abs().max())
    share = PROVEN if model.dtype == torch.float32 else PROVEN_16
    if not differ <= share * max(1.0, float(summed.abs().max())):
        raise CheckpointError(
            f"The combination computes something else than its adapters do together: logits differ by "
            f"{differ:.3g}. It is not kept."
        )
    screen.say(
        "proof",
        f"read back from disk; its logits are those of the weighted adapters together, within {differ:.2g} "
        f"(it moves them by up to {effect:.3g})",
    )
    return proof | {"combined_against_sum": differ}


def _require_enough(tasks: Sequence[Task], min_kept: float | None) -> None:
    if min_kept is None:
        return
    for task in tasks:
        if task.kept is not None and task.kept < min_kept:
            raise ExportError(
                f"{task.run} keeps {task.kept:.1%} of its gain, and --min-kept asks for {min_kept:.1%}: "
                "nothing was written. Try another --method or other --weights, or ask for less."
            )
        if not task.rows:
            raise ExportError(
                f"{task.run} was not scored ({task.note}), so what it keeps is not known, and --min-kept "
                f"asks for {min_kept:.1%}: nothing was written. Mend that, or leave --min-kept out."
            )


def _require_sense(
    runs: Sequence[str | Path], name: str, rows: int, min_kept: float | None
) -> None:
    if len(runs) < 2:
        raise RecipeError(
            f"{len(runs)} run was named, and combining takes two or more. Name others of the same base, "
            "such as qlora combine runs/one runs/other."
        )
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise RecipeError(
            f"--name is {name!r}. Write letters, digits, . _ and -, not beginning with a dot."
        )
    if rows < 0:
        raise RecipeError(f"--rows is {rows}. Write how many, or 0 to score none.")
    if min_kept is not None and not (math.isfinite(min_kept) and rows):
        raise RecipeError(
            f"--min-kept is {min_kept:g} with --rows {rows}. Write a share such as 0.5, and score some "
            "rows."
        )


def _require_kin(parts: Sequence[Trained]) -> None:
    """Refuse runs that are one and the same, of several bases, or asked in several ways.

    Raises:
        CheckpointError: Names the two and what differs.
    """
    for one, other in combinations(parts, 2):
        if one.source is None or other.source is None:
            alone = one.name if one.source is None else other.name
            raise CheckpointError(f"{alone}: a model without an adapter. Name finished runs.")
        if one.source.resolve() == other.source.resolve():
            raise CheckpointError(
                f"{one.name} is named twice. Name different runs; to have more of one, give it a "
                "larger weight."
            )
        trained.require_one_base(one, other)
        for what, ours, theirs in (
            ("rendering", _way(one), _way(other)),
            ("the chat template", one.tok.chat_template, other.tok.chat_template),
        ):
            if ours != theirs and (what == "rendering" or one.renderer.chat):
                shown = f": {ours} and {theirs}" if what == "rendering" else ""
                raise CheckpointError(
                    f"{one.name} and {other.name} are asked in different ways: {what} differs{shown}. One "
                    "adapter can only be asked in one; train them alike (data.rendering, "
                    "data.chat_template)."
                )


def _way(found: Trained) -> str:
    if found.renderer.chat:
        return "through the chat template"
    return "as Alpaca's plain text" if found.form == "alpaca" else "as plain text"


def _require_one_with_tokens(sources: Sequence[Deltas]) -> None:
    trained_rows = [source.name for source in sources if source.tokens]
    if len(trained_rows) > 1:
        raise CheckpointError(
            f"{' and '.join(trained_rows)} have each trained rows of the embedding for new tokens "
            "(lora.train_new_tokens). Such a row is replaced, not added to, so there is no sum of two. "
            "Combine at most one of these with runs that trained none."
        )
