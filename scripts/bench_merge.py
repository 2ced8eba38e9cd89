"""What merging costs the host: memory beside the 4-bit base, and time beside copying the same bytes.

    python scripts/bench_merge.py [--pairs 2]

writes a random bf16 Llama of 1B parameters in several files, trains an adapter on it for one step (its
4-bit base is then kept), and merges the run in a process of its own, in turns with a process that reads the
checkpoint's bytes and writes them again until the disk has them. Exit code 1 where a limit is passed. Linux
only: peaks are the kernel's own, of resident memory.

The time held to the limit is that of writing the merged model: unpacking, adding, rounding, the files. What
goes before and after (loading the base, the forward passes of the verdict) stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from bench_load import MIB, resident

MAX_SECONDS = 1.5  # of writing, by reading and writing the same bytes
ALLOWED_BYTES = (
    300 * MIB
)  # beside the 4-bit base and twice the largest file: the probes' activations and logits


def copy(folder: Path, work: Path) -> dict[str, Any]:
    """Read a checkpoint's files and write the same bytes."""
    target = work / "copy"
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        (target / file.name).write_bytes(file.read_bytes())
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in target.iterdir())
    shutil.rmtree(target)
    return {"seconds": round(seconds, 2), "bytes": size}


def merge(run: Path, work: Path, onto: str) -> dict[str, Any]:
    """Merge a run in this process, and return seconds and bytes."""
    from rich.console import Console

    from qlora import merging, trained

    packed: list[int] = []
    load = trained.load_base

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        packed.append(model.get_memory_footprint())
        return model

    trained.load_base = loaded
    imported = resident("VmRSS")
    out = work / "merged"
    began = time.perf_counter()
    merged = merging.merge(run, out, onto=onto, console=Console(stderr=True, quiet=True))  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    files = [file.stat().st_size for file in out.glob("*.safetensors")]
    shutil.rmtree(out)
    return {
        "seconds": round(seconds, 2),
        "parts": merged.seconds,
        "imports_bytes": imported,
        "peak_bytes": resident("VmHWM"),
        "base_bytes": packed[0],
        "largest_file_bytes": max(files),
        "bytes": sum(files),
        "kl": merged.verdict.kl,
        "onto": merged.onto,
    }


def in_its_own_process(how: str, place: Path, work: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--do", how, "--place", str(place), "--work", str(work)]
    environment = {"QLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = json.loads(
        measure.timed(command, environment).output.strip().splitlines()[-1]
    )
    return found


def train(base: Path, work: Path, cache: Path) -> Path:
    """A run of one step; its warmup is over, so that B is not zero."""
    rows = work / "rows.jsonl"
    lines = [{"prompt": f"Say {n}.", "completion": f"{n}."} for n in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "one.yaml").write_text(
        f"model: {{name: {base}}}\ndata: {{train: {rows}, max_length: 64, held_out_fraction: 0.5}}\n"
        "train: {max_steps: 1, warmup_steps: 0, gradient_accumulation_steps: 1, learning_rate: 1.0e-3}\n"
        f"run: {{dir: {work / 'runs'}}}\n"
    )
    code = "import sys; from qlora import load_recipe, train; print(train(load_recipe(sys.argv[1])).dir)"
    command = [sys.executable, "-c", code, str(work / "one.yaml")]
    environment = {"QLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return Path(measure.timed(command, environment).output.strip().splitlines()[-1])


def told(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ratios, and the bytes that stand behind them.

    >>> ours = {"parts": {"written": 3.0}, "seconds": 9.0, "peak_bytes": 9, "imports_bytes": 1,
    ...         "base_bytes": 2, "largest_file_bytes": 3}
    >>> result = told({"copy": [{"seconds": 2.0}], "auto": [ours], "nf4": [ours]})
    >>> result["writing_by_copying"]["median"], result["allowed_bytes"] - ALLOWED_BYTES
    (1.5, 8)
    """
    copies = [one["seconds"] for one in found["copy"]]
    ours = [*found["nf4"], *found["auto"]]
    written = [one["parts"]["written"] for one in found["nf4"]]
    return {
        "writing_by_copying": measure.summary(measure.ratios(written, copies)),
        "all_of_nf4_by_copying": measure.summary(
            measure.ratios([one["seconds"] for one in found["nf4"]], copies)
        ),
        "all_of_auto_by_copying": measure.summary(
            measure.ratios([one["seconds"] for one in found["auto"]], copies)
        ),
        "peak_beyond_imports_bytes": max(one["peak_bytes"] - one["imports_bytes"] for one in ours),
        "allowed_bytes": max(one["base_bytes"] + 2 * one["largest_file_bytes"] for one in ours)
        + ALLOWED_BYTES,
        "merges": found,
    }


def verdicts(result: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, limit, kept) for each promise."""
    peak, limit = result["peak_beyond_imports_bytes"], result["allowed_bytes"]
    speed = result["writing_by_copying"]["median"]
    return [
        ("peak beyond imports, MiB", f"{peak / MIB:,.0f}", f"{limit / MIB:,.0f}", peak <= limit),
        ("writing by copying", f"{speed:.2f}", f"{MAX_SECONDS:g}", speed <= MAX_SECONDS),
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Host memory and time of merging a run.")
    made.add_argument("--pairs", type=measure.positive, default=2, help="default: 2")
    made.add_argument("--base", type=Path, metavar="FOLDER", help="train and merge on this one")
    made.add_argument(
        "--run", type=Path, metavar="RUN", help="merge this one of it; none is trained"
    )
    made.add_argument("--do", choices=("copy", "nf4", "auto"), help="one of them here; print JSON")
    made.add_argument("--place", type=Path, help="for --do: a checkpoint, or a run")
    made.add_argument("--work", type=Path, help="for --do: where to write")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.base is not None and not (arguments.base / "config.json").is_file():
        parser().error(
            f"--base {arguments.base}: not a model folder, there is no config.json in it"
        )
    if arguments.run is not None and (arguments.base is None or not arguments.run.is_dir()):
        parser().error(
            "--run names a run, and --base the folder of the base that it was trained on"
        )
    if arguments.do:
        if arguments.place is None or arguments.work is None:
            parser().error("--do needs --place and --work")
        if arguments.do == "copy":
            print(json.dumps(copy(arguments.place, arguments.work)))
        else:
            print(json.dumps(merge(arguments.place, arguments.work, arguments.do)))
        return
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), arguments.base
        if base is None:
            import gpu_suite

            site = gpu_suite.Site(work=work, models=work / "models", small=False)
            base = gpu_suite.random_model(site, gpu_suite.LLAMA_1B)
        try:
            cache = work / "cache"
            if arguments.run is not None and "QLORA_CACHE" in os.environ:
                cache = Path(os.environ["QLORA_CACHE"])
            run = (arguments.run or train(base.resolve(), work, cache)).resolve()
            found: dict[str, list[dict[str, Any]]] = {"copy": [], "nf4": [], "auto": []}
            for order in measure.turns(arguments.pairs):
                for ours in order:
                    for how in ("nf4", "auto") if ours else ("copy",):
                        place = run if ours else base.resolve()
                        found[how].append(in_its_own_process(how, place, work, cache))
        except measure.CommandFailed as error:
            raise SystemExit(str(error)) from None
        result = told(found)
    judged = verdicts(result)
    measure.report({**measure.circumstances(), **result}, arguments.json)
    measure.conclude(result, judged)


if __name__ == "__main__":
    main()
