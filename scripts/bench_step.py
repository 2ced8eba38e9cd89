"""A training step side by side: the fused layers, plain TRL, TRL tuned by hand, Unsloth where it is.

    python scripts/bench_step.py --model 8b --tokens 2048 [--card-gb 12] [--unsloth PYTHON]
    python scripts/bench_step.py --trace          no card needed: what a step of an 8B does
    python scripts/bench_step.py --quickstart     on a CPU: the step of the shipped quickstart

The first trains each side in one process, in turns, on the same random weights, rows and order, and
prints tokens per second, how many times slower each is than ours, and peaks; the losses must agree
(:mod:`gpu_step` has the sides). It has not been run on CUDA yet; ``--model tiny`` runs it on a CPU. The
second follows a whole step on fake tensors: arithmetic, launches, bytes kept and peaks, beside the
figures that the fused layers are held to. The third is the small step that most people try first, by
``train.kernels: auto``, ``off`` and plain TRL. A table is printed last; ``--json`` keeps everything. The
exit code is 1 where a figure is missed, a side breaks or losses differ.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_plan
import gpu_plan
import gpu_step
import gpu_weights
import measure

GIB = 2**30
CARD = "A100-80GB"  # of a trace: its capability decides the kernels, its memory nothing
LENGTHS = (2048, 8192)
TILE = 1024
PLAIN, KEPT = "TRL bf16, recomputed", "TRL bf16, kept"
LEVELS = (1, 2, 3, 4, 5)
TILED = f"level 5, tiles of {TILE}"
# (what, ways it is about, tokens, attribute, the most that it may be)
LIMITS = (
    ("GFLOP a token, level 1", "level 1", 2048, "gflops", 32.5),
    ("launches, level 1", "level 1", 2048, "launches", 3700),
    ("bytes kept a token and layer, level 1", "level 1", 2048, "kept", 95_000),
    ("peak GiB, level 5", "level 5", 2048, "gib", 6.45),
    ("peak GiB, level 5", "level 5", 8192, "gib", 8.8),
)
CLOSED_FORM = 0.002  # how far a trace may be from qlora.speed.flops_per_token
SIDES = ("kernels auto", "kernels off", "plain TRL")


# --- a step on fake tensors


@dataclass(frozen=True)
class Work:
    """What one micro-batch does, forward and backward, when the gradients of an earlier one stand.

    Attributes:
        gflops: A token.
        launches: Kernels that a card would start.
        unpacked: Weights unpacked from 4 bits.
        kept: Bytes that all layers and the last norm keep for the backward pass.
        host_reads: Times that the host would wait for a value.
        peaks: Bytes by category at the highest point of each phase. Optimizer state is not among them:
            by default it is paged, and it is the same for every way to compute a step.
    """

    gflops: float
    launches: int
    unpacked: float
    kept: float
    host_reads: int
    peaks: dict[str, dict[str, int]]

    @property
    def gib(self) -> float:
        """The highest point of all, as it is told: with two decimals."""
        return round(max(sum(peak.values()) for peak in self.peaks.values()) / GIB, 2)


def recipe_of(way: str, length: int, layers: int) -> Any:
    """The recipe whose step goes this way."""
    train: dict[str, Any] = {"gradient_accumulation_steps": 2}
    if way in (PLAIN, KEPT):
        train |= {"kernels": "off", "activation_checkpointing": way == PLAIN}
    else:
        level = int(way.split(",")[0].removeprefix("level "))
        # Levels decide alone: input gradients, which recomputation asks for, belong to no first layer.
        train |= {"activation_checkpointing": False}
        train["levels"] = [layers if n == level else 0 for n in LEVELS]
        if way == TILED:
            train["mlp_tile"] = TILE
    return gpu_plan.recipe_of(length, **train)


def traced(way: str, length: int, layers: int) -> Work:
    """Follow a micro-batch of a Llama-3-8B with so many layers, on fake tensors.

    The products of TRL's fused loss are added by formula (two of the head forward, one backward), and
    its launches (trl 1.16: two a tile forward, three backward): its stand-in for machines without Triton
    does other work.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qlora import cards, fused, phantom, rehearsal
    from qlora.attention import bounded
    from qlora.counting import WorkCounter
    from qlora.kernels import attached
    from qlora.shape import Shape
    from qlora.step import LOSS_TILE
    from qlora.tracing import KEPT as KEPT_BYTES
    from qlora.tracing import MemoryTracer

    config = gpu_plan.config_of(gpu_weights.MODELS["8b"])
    config.num_hidden_layers = layers
    recipe, card, mode = recipe_of(way, length, layers), cards.named_card(CARD), FakeTensorMode()
    fuses = way not in (PLAIN, KEPT)
    attention = bounded() if fuses else phantom.unmasked_attention()
    model = phantom.build(
        config, recipe, torch.bfloat16, attention, phantom.fakes_of(mode), as_on_card=True
    )
    if fuses:
        levels = fused.levels_of(recipe, Shape.from_config(config.to_dict()))
        attached.attach(model, card, levels=levels, tile=recipe.train.mlp_tile)
    counter, tracer = WorkCounter(), MemoryTracer(scale_copies=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    for category, tensor in phantom.frozen(model):
        tracer.own(category, [tensor])
    tracer.own("adapters", trained)
    with mode:
        inputs = rehearsal.batch(recipe, attention)
        tracer.own("batch", (v for v in inputs.values() if isinstance(v, torch.Tensor)))
        for second in (False, True):
            if second:
                tracer.own("gradients", [p.grad for p in trained if p.grad is not None])
                tracer.forget_peaks()
            with tracer.watching(), counter if second else nullcontext():
                loss = rehearsal.forward(model, inputs, recipe, card, tracer)
                loss.backward()
            del loss
    flops, launches = counter.flops, sum(counter.launches.values())
    if not fuses:
        head = config.vocab_size * config.hidden_size
        tiles = -(-(length - 1) // LOSS_TILE[0]) * -(-config.vocab_size // LOSS_TILE[1])
        flops, launches = flops + 6 * head * length, launches + 5 * tiles
    return Work(
        flops / length / 1e9,
        launches,
        counter.unpacked,
        tracer.peaks["loss"][KEPT_BYTES],
        counter.host_reads,
        tracer.peaks,
    )


def on_line(two: Work, four: Work, layers: int) -> Work:
    """The work of so many layers, from that of two and of four."""

    def line(name: str) -> Any:
        first, second = getattr(two, name), getattr(four, name)
        return first + (second - first) / 2 * (layers - 2)

    peaks = {p: bench_plan.on_line(two.peaks[p], four.peaks[p], layers) for p in two.peaks}
    more = {name: line(name) for name in ("gflops", "unpacked", "kept")}
    launches, reads = round(line("launches")), round(line("host_reads"))
    return Work(launches=launches, host_reads=reads, peaks=peaks, **more)


def kept_a_layer(two: Work, four: Work, length: int) -> float:
    """Bytes that one layer keeps of one token."""
    return (four.kept - two.kept) / 2 / length


def closed_form(way: str, length: int, layers: int) -> float:
    """GFLOP a token by :func:`qlora.speed.flops_per_token`."""
    from qlora import speed
    from qlora.shape import Shape

    shape = Shape.from_config(gpu_plan.config_of(gpu_weights.MODELS["8b"]).to_dict())
    return speed.flops_per_token(recipe_of(way, length, layers), shape) / 1e9


def ways() -> list[str]:
    return [PLAIN, KEPT, *(f"level {n}" for n in LEVELS), TILED]


def every_trace(
    lengths: tuple[int, ...] = LENGTHS, *, extrapolate: bool = False, asked: list[str] | None = None
) -> list[dict[str, Any]]:
    """A row for each way and length, of all 32 layers; ``extrapolate``: from two and four of them."""
    layers = gpu_plan.config_of(gpu_weights.MODELS["8b"]).num_hidden_layers
    found = []
    for length in lengths:
        for way in asked or ways():
            two, four = (traced(way, length, n) for n in (2, 4))
            work = on_line(two, four, layers) if extrapolate else traced(way, length, layers)
            found.append(
                {
                    "way": way,
                    "tokens": length,
                    "gflops": round(work.gflops, 3),
                    "by_closed_form": round(work.gflops / closed_form(way, length, layers), 5),
                    "launches": work.launches,
                    "unpacked": work.unpacked,
                    "kept": round(kept_a_layer(two, four, length)),
                    "host_reads": work.host_reads,
                    "gib": work.gib,
                }
            )
            print(f"\r{way}, {length} tokens        ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure of the limits beside what was found, and whether it is kept.

    >>> row = {"way": "level 5", "tokens": 2048, "gib": 6.5, "host_reads": 0, "by_closed_form": 1.0}
    >>> figures([row])[0]
    {'what': 'peak GiB, level 5', 'tokens': 2048, 'most': 6.45, 'found': 6.5, 'kept': False}
    """
    found = []
    for what, way, length, name, most in LIMITS:
        for row in rows:
            if (row["way"], row["tokens"]) == (way, length) and name in row:
                found.append(_figure(what, length, most, row[name]))
    fused = [row for row in rows if row["way"].startswith("level")]
    reads = max((row["host_reads"] for row in fused), default=0)
    found.append(_figure("host reads of fused layers and loss", "all", 0, reads))
    off = max((abs(row["by_closed_form"] - 1) for row in fused), default=0.0)
    found.append(_figure("GFLOP off the closed form", "all", CLOSED_FORM, round(off, 5)))
    return found


def _figure(what: str, tokens: Any, most: float, found: float) -> dict[str, Any]:
    return {"what": what, "tokens": tokens, "most": most, "found": found, "kept": found <= most}


def told_trace(rows: list[dict[str, Any]], held: list[dict[str, Any]]) -> str:
    """Two tables: what each way does, and the figures."""
    headings = (
        "way", "tokens", "GFLOP/token", "launches", "unpacked, G", "bytes/token/layer", "peak GiB",
    )  # fmt: skip
    shown = [
        (r["way"], str(r["tokens"]), f"{r['gflops']:.1f}", f"{r['launches']:,}",
         f"{r['unpacked'] / 1e9:.1f}", f"{r['kept']:,}", f"{r['gib']:.2f}")
        for r in rows
    ]  # fmt: skip
    limits = []
    for f in held:
        verdict = "kept" if f["kept"] else "MISSED"
        limits.append((f["what"], str(f["tokens"]), f"{f['most']:,}", f"{f['found']:,}", verdict))
    return (
        f"Llama-3-8B, r {gpu_weights.RANK}, one micro-batch forward and backward, without optimizer state\n"
        + measure.table(headings, shown)
        + "\n\n"
        + measure.table(("figure", "tokens", "at most", "found", "verdict"), limits)
    )


# --- the quickstart's step


def quickstart_run(side: str, steps: int) -> dict[str, Any]:
    """A short training of the quickstart in this process: its steps' seconds, tokens and losses."""
    import bench_plain_trl
    import bench_train

    if side == "plain TRL":
        from qlora.recipe import load_recipe

        recipe = load_recipe("quickstart", bench_train.overrides(steps, None))
        flags = bench_plain_trl.parser().parse_args(bench_train.plain_flags(recipe, None))
        said = bench_plain_trl.train(flags)
        times, losses, tokens = said["times"], said["losses"], said["tokens"]
    else:
        from rich.console import Console

        from qlora import trainer
        from qlora.recipe import load_recipe

        with tempfile.TemporaryDirectory() as folder:
            kernels = side.removeprefix("kernels ")
            asked = [
                *bench_train.overrides(steps, None),
                f"run.dir={folder}",
                f"train.kernels={kernels}",
            ]
            run = trainer.train(
                load_recipe("quickstart", asked), console=Console(file=io.StringIO())
            )
            lines = [line for line in run.metrics() if "loss" in line]
        times, losses = [line["time"] for line in lines], [line["loss"] for line in lines]
        tokens = lines[-1]["tokens"]
    return {"seconds": times[-1] - times[0], "tokens": tokens, "losses": losses}


def quickstart(steps: int, rounds: int, sides: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """Each side in turns, in one process: tokens a second between the first log line and the last.

    The first round is thrown away: it fills caches.
    """
    import torch

    turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 == 0 else reversed(sides):
            done = quickstart_run(side, steps if number else 2)
            if number:
                turns[side].append(done)
    found: dict[str, Any] = {"steps": steps, "threads": torch.get_num_threads(), "sides": {}}
    mine = [turn["seconds"] for turn in turns[sides[0]]]
    first = turns[sides[0]][0]
    for side, done in turns.items():
        seconds = [turn["seconds"] for turn in done]
        # of all steps but the first, whose end is the first log line
        speeds = [turn["tokens"] * (steps - 1) / steps / turn["seconds"] for turn in done]
        low, middle, high = gpu_step.quartiles(speeds)
        ratios = measure.ratios(seconds, mine)
        early = zip(first["losses"][:10], done[0]["losses"][:10], strict=True)
        found["sides"][side] = {
            "tokens_per_second": round(middle, 1),
            "quartiles": [round(low, 1), round(high, 1)],
            "ours_by_theirs": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "early_loss_difference": max(abs(a - b) for a, b in early),
        }
    found["same_tokens"] = len({turn["tokens"] for done in turns.values() for turn in done}) == 1
    return found


def told_quickstart(found: dict[str, Any]) -> str:
    rows = [
        (
            side,
            f"{told['tokens_per_second']:,.0f}",
            f"{told['quartiles'][0]:,.0f} - {told['quartiles'][1]:,.0f}",
            f"{told['ours_by_theirs']:.3f}",
            f"{min(told['ratios']):.3f} - {max(told['ratios']):.3f}",
            f"{told['early_loss_difference']:.1e}",
        )
        for side, told in found["sides"].items()
    ]
    headings = (
        "side", "tokens/s", "quartiles", "kernels auto by it", "range", "loss, first steps",
    )  # fmt: skip
    return measure.table(headings, rows)


# --- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="A training step beside the libraries' own.")
    made.add_argument(
        "--model", choices=[*list(gpu_weights.MODELS)[:3], gpu_weights.TINY], default="8b"
    )
    made.add_argument("--tokens", type=measure.positive, default=2048, help="of a step")
    made.add_argument("--rounds", type=measure.positive, default=4, help="turns of each side")
    made.add_argument("--steps", type=measure.positive, help="timed steps of a turn")
    made.add_argument("--card-gb", type=float, metavar="GB", help="emulate a card of that size")
    made.add_argument("--unsloth", metavar="PYTHON", help="an interpreter that has Unsloth")
    made.add_argument("--trace", action="store_true", help="count on fake tensors; no card needed")
    made.add_argument(
        "--extrapolate", action="store_true", help="trace two and four layers, and not all"
    )
    made.add_argument("--quickstart", action="store_true", help="the quickstart's step, on a CPU")
    made.add_argument("--as-unsloth", type=Path, help=argparse.SUPPRESS)
    measure.add_json(made)
    return made


def checked(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, or None.

    >>> checked(parser().parse_args(["--trace", "--quickstart"]))
    '--trace and --quickstart are two commands: give one'
    """
    if arguments.trace and arguments.quickstart:
        return "--trace and --quickstart are two commands: give one"
    if arguments.card_gb is not None and not arguments.card_gb > 0:
        return "--card-gb: must be more than 0"
    if arguments.quickstart and arguments.steps is not None and arguments.steps < 2:
        return "--steps: at least 2, to have a time between two log lines"
    if arguments.tokens < 2 * gpu_weights.ROWS:
        return f"--tokens: at least {2 * gpu_weights.ROWS}, two for each row of a step"
    return None


def main() -> None:
    arguments = parser().parse_args()
    problem = checked(arguments)
    if problem:
        parser().error(problem)
    if arguments.as_unsloth:
        job = json.loads(arguments.as_unsloth.read_text(encoding="utf-8"))
        print(json.dumps(gpu_step.as_unsloth(job)))
        return
    wrong: list[str] = []
    if arguments.trace:
        rows = every_trace(extrapolate=arguments.extrapolate)
        held = figures(rows)
        found: dict[str, Any] = {
            "r": gpu_weights.RANK,
            "extrapolated": arguments.extrapolate,
            "ways": rows,
        }
        found["figures"], text = held, told_trace(rows, held)
        wrong = [f"{f['what']}: {f['found']} of at most {f['most']}" for f in held if not f["kept"]]
    elif arguments.quickstart:
        found = quickstart(arguments.steps or 20, arguments.rounds)
        found["load"], text = os.getloadavg(), told_quickstart(found)
        if not found["same_tokens"]:
            wrong = ["the sides did not train on the same tokens: the ratios mean nothing"]
    else:
        import torch

        if not torch.cuda.is_available() and arguments.model != gpu_weights.TINY:
            raise SystemExit(
                "There is no CUDA card here. --model tiny, --trace and --quickstart run without."
            )
        found = gpu_step.compare(
            arguments.model, arguments.tokens, rounds=arguments.rounds,
            timed=arguments.steps or gpu_step.TIMED, card_gb=arguments.card_gb,
            unsloth=arguments.unsloth,
        )  # fmt: skip
        text, wrong = gpu_step.table_of(found), found["wrong"]
    measure.report({**measure.circumstances(), **found}, arguments.json)
    print(text)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
