"""What a checkpoint costs, against the plain Trainer's, and what our guards add to a step.

    python scripts/bench_checkpoint.py [--rounds 7] [--json tests/measurements/checkpoint-cost.json]

**Saves.** One training of a random base is at one step, with its optimizer's state. Then it is saved in
turns: as a checkpoint of ours (safetensors and JSON, hashed, synced, renamed), as transformers' own Trainer
saves it (pickles, neither hashed nor synced), and so with every file synced at the end. Each goes to a new
folder of the same disk. Ratios are taken round by round, and the disk is synced between saves, so that none
pays for another's pages.

**Steps.** The quickstart's steps, in turns with their guards and without: the random state taken, the step
judged, the callbacks that watch clock, budget and signals. On a shared machine steps differ by more than
that, so the guards' own seconds are summed, too, and their share of the guarded steps is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console

from qlora import randomness, rundir, store, trainer
from qlora.recipe import load_recipe, recipe_from

BASE = measure.ROOT / "qlora" / "embedded" / "base"
WIDTHS = {"r=64": 64, "r=384": 384}  # ranks: 10 and 60 MB of adapter
OPTIMIZERS = ("adamw_torch", "adamw_8bit")
WARM_UP = 10  # steps
HEADINGS = ("what", "ratio", "range", "ours", "other")


class Halted(BaseException):
    """The training is where it is to be measured."""


def wide(folder: Path) -> Path:
    """A random Llama of four layers, width 512, that speaks through the embedded tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=4, vocab_size=2048,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def saves(folder: Path, base: Path, rank: int, optim: str, rounds: int) -> dict[str, Any]:
    """Seconds of both kinds of save, in turns, of one training that has taken a few steps."""
    from transformers import Trainer

    from qlora.sft import RowTrainer

    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"What is {n} plus 1?", "completion": f"It is {n + 1}."}) + "\n"
            for n in range(64)
        )
    )
    recipe = recipe_from(
        {
            "model": {"name": str(base)}, "data": {"train": str(rows), "max_length": 64},
            "lora": {"r": rank},
            "train": {"max_steps": 3, "optim": optim, "save_steps": 3, "learning_rate": 1e-3,
                      "warmup_steps": 0, "per_device_train_batch_size": 2,
                      "gradient_accumulation_steps": 1},
            "run": {"dir": str(folder / "runs"), "name": "bench"},
        }
    )  # fmt: skip
    found: dict[str, Any] = {}

    def ours(one: Any, at: Path) -> Path:
        return store.write(at, one.state.global_step, lambda to: one.keeper._fill(to, 3, one))

    def plain(one: Any, at: Path) -> Path:
        one.args.output_dir = str(at)
        Trainer._save_checkpoint(one, one.model, trial=None)
        return at / f"checkpoint-{one.state.global_step}"

    def synced(one: Any, at: Path) -> Path:
        kept = plain(one, at)
        for path in kept.rglob("*"):
            rundir.sync_file(path)
        return kept

    def measured(one: Any, model: Any, trial: Any) -> None:
        disk, output = folder / "saves", one.args.output_dir
        kinds = {"ours": ours, "plain": plain, "synced": synced}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        ours(one, disk / "first")  # with the read-back of a run's first save
        for number in range(rounds + 1):
            order = list(kinds) if number % 2 else list(reversed(kinds))
            for name in order:
                os.sync()
                began = time.perf_counter()
                kept = kinds[name](one, disk / name)
                seconds[name].append(time.perf_counter() - began)
                found[f"{name}_bytes"] = sum(p.stat().st_size for p in kept.rglob("*"))
                shutil.rmtree(disk / name)
        one.args.output_dir = output
        found["seconds"] = {name: some[1:] for name, some in seconds.items()}  # the first warms up
        raise Halted

    saved, RowTrainer._save_checkpoint = RowTrainer._save_checkpoint, measured  # type: ignore[method-assign]
    try:
        trainer.train(recipe, console=Console(quiet=True))
    except Halted:
        pass
    finally:
        RowTrainer._save_checkpoint = saved  # type: ignore[method-assign]
    found["ratios"] = {
        name: measure.ratios(found["seconds"]["ours"], found["seconds"][name])
        for name in ("plain", "synced")
    }
    return {"rank": rank, "optim": optim} | found


def steps(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of the quickstart's steps, in turns with and without what guards them, and of the guards."""
    from transformers import TrainerCallback

    from qlora import sft
    from qlora.budget import Budget
    from qlora.guard import StepGuard
    from qlora.keeping import Keeper
    from qlora.stopping import Stopping

    plan = [on for order in measure.turns(rounds) for on in order]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    on, spent, began = [True], [0.0], [0.0]

    class Clock(TrainerCallback):
        """Times every step, and switches the guards. The first steps warm up."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now, at = time.perf_counter(), state.global_step - WARM_UP
            if at > 0:
                seconds[on[0]].append(now - began[0])
            on[0] = plan[at % len(plan)] if at >= 0 else True
            if at <= 0:
                spent[0] = 0.0
            began[0] = time.perf_counter()

    undo: list[tuple[Any, str, Any]] = []

    def guard(owner: Any, name: str, instead: Any = None) -> None:
        function = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            if not on[0]:
                return instead
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[0] += time.perf_counter() - start

        setattr(owner, name, timed)
        undo.append((owner, name, function))

    guard(randomness, "take", {})
    for owner, name in (
        (StepGuard, "on_pre_optimizer_step"), (StepGuard, "saw"), (Budget, "on_step_end"),
        (Stopping, "on_step_end"), (Keeper, "on_step_end"), (Keeper, "on_step_begin"),
    ):  # fmt: skip
        guard(owner, name)
    build = sft.build

    def built(*given: Any, **named: Any) -> Any:
        made = build(*given, **named)
        made.add_callback(Clock())
        return made

    sft.build = built
    count = WARM_UP + len(plan) + 2
    asked = [
        f"train.max_steps={count}", f"train.save_steps={count}", f"train.logging_steps={count}",
        "eval.generate=0", "data.held_out=null", "data.held_out_fraction=0", f"run.dir={folder}/steps",
    ]  # fmt: skip
    try:
        trainer.train(load_recipe("quickstart", asked), console=Console(quiet=True))
    finally:
        sft.build = build
        for owner, name, function in undo:
            setattr(owner, name, function)
    pairs = min(map(len, seconds.values()))
    ratios = measure.ratios(seconds[True][:pairs], seconds[False][:pairs])
    share = spent[0] / sum(seconds[True])
    return {"guards_share": share, "pairs": pairs, "ratio": measure.summary(ratios), "ratios": ratios,
            "step_seconds": statistics.median(seconds[True])}  # fmt: skip


def percent(share: float) -> str:
    """A share.

    >>> percent(0.00312)
    '0.31 %'
    """
    return f"{100 * share:.2f} %"


def main() -> None:
    made = argparse.ArgumentParser(description="What a checkpoint and the guards cost.")
    made.add_argument("--rounds", type=measure.positive, default=7, help="pairs of each")
    made.add_argument("--only", choices=("saves", "steps"), help="one half")
    made.add_argument(
        "--dir", type=Path, help="whose disk is written to; default: the temporary one"
    )
    measure.add_json(made)
    asked = made.parse_args()
    if asked.dir is not None and not asked.dir.is_dir():
        made.error(f"--dir: {asked.dir} is no folder")
    result: dict[str, Any] = measure.circumstances() | {"threads": torch.get_num_threads()}
    rows = []
    with tempfile.TemporaryDirectory(dir=asked.dir) as name:
        folder = Path(name)
        os.environ["QLORA_CACHE"] = str(folder / "cache")
        if asked.only != "steps":
            base = wide(folder / "base")
            result["saves"] = []
            for label, rank in WIDTHS.items():
                for optim in OPTIMIZERS:
                    one = saves(folder, base, rank, optim, asked.rounds)
                    result["saves"].append(one)
                    size = f"{one['ours_bytes'] / 2**20:.0f} MiB, {label}, {optim}"
                    for other in ("plain", "synced"):
                        fastest = (f"{min(one['seconds'][k]):.3f} s" for k in ("ours", other))
                        label_and_ratio = measure.ratio_row(
                            f"save of {size}, by {other}", one["ratios"][other]
                        )
                        rows.append((*label_and_ratio, *fastest))
                        print("  ".join(rows[-1]), flush=True)
        if asked.only != "saves":
            result["steps"] = found = steps(folder, 20 * asked.rounds)
            rows.append(
                (*measure.ratio_row("step, guarded by not", found["ratios"]),
                 f"{found['step_seconds']:.4f} s", "")
            )  # fmt: skip
            rows.append(("guards' share of a step", percent(found["guards_share"]), "", "", ""))
    print(measure.table(HEADINGS, rows))
    measure.report(result, asked.json)


if __name__ == "__main__":
    main()
