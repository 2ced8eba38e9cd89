"""What loading a base costs the host: memory beside plain from_pretrained, and time from the cache.

    python scripts/bench_load.py [--pairs 2]

writes a random bf16 Llama of 1B parameters in several files, loads it plainly (``from_pretrained`` with
a ``BitsAndBytesConfig``), with qlora for the first time (it is quantized and kept), and with qlora again
(from the cache). Each load is a process of its own, in turns. Exit code 1 where a limit is passed. Linux
only: peaks are the kernel's own, of resident memory, maps of files included, until every weight has been
read once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

MIB = 2**20
MAX_PEAK, MAX_SECONDS = 0.6, 0.4  # ours by plain; from the cache by the first start
ALLOWED_BYTES = (
    600 * MIB
)  # beside the 4-bit model and two of its largest 16-bit tensors; imports mostly


def resident(name: str) -> int:
    """Bytes of this process, as ``VmRSS`` (now) or ``VmHWM`` (at most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status does not say what is resident; this needs Linux")


def load(how: str, folder: Path) -> dict[str, Any]:
    """Load a base in this process, and return its seconds and bytes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora import loader
    from qlora.cards import Card
    from qlora.recipe import load_recipe

    recipe = load_recipe("quickstart", [f"model.name={folder}", "quant.compute_dtype=bfloat16"])
    card = Card("CPU", "cpu", 2**36, 2**36)
    imported, began = resident("VmRSS"), time.perf_counter()
    from_cache = False
    if how == "plain":
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )
    else:
        base = loader.load_base(recipe, card, loader.read_config(recipe), bars=False)
        model, from_cache = base.model, base.facts["from_cache"]
    seconds = time.perf_counter() - began
    loaded = resident("VmHWM")
    for parameter in model.parameters():  # one element of each page: a map is not resident unread
        parameter.data.flatten()[::1024].clone()
    return {
        "seconds": round(seconds, 2),
        "imports_bytes": imported,
        "peak_while_loading_bytes": loaded,
        "peak_bytes": resident("VmHWM"),
        "model_bytes": model.get_memory_footprint(),
        "from_cache": from_cache,
    }


def in_its_own_process(how: str, folder: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", how, "--base", str(folder)]
    environment = {"QLORA_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = json.loads(
        measure.timed(command, environment).output.strip().splitlines()[-1]
    )
    return found


def compare(folder: Path, work: Path, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Every load of every pair: ``plain``, ``first`` and, right after that one, ``again``."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "first": [], "again": []}
    for number, order in enumerate(measure.turns(pairs)):
        cache = work / f"cache-{number}"
        for ours in order:
            if not ours:
                found["plain"].append(in_its_own_process("plain", folder, cache))
                continue
            for name in ("first", "again"):
                found[name].append(in_its_own_process("ours", folder, cache))
                if found[name][-1]["from_cache"] is not (name == "again"):
                    raise SystemExit(
                        f"the {name} start was to come from the cache or not; it did not"
                    )
    return found


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a checkpoint, in 16 bits."""
    from safetensors import safe_open

    largest = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                size = 1
                for extent in opened.get_slice(name).get_shape():
                    size *= extent
                largest = max(largest, 2 * size)
    return largest


def told(found: dict[str, list[dict[str, Any]]], largest: int) -> dict[str, Any]:
    """The ratios, and the bytes that stand behind them.

    >>> one = {"seconds": 1.0, "peak_bytes": 9, "imports_bytes": 1, "model_bytes": 2}
    >>> two = one | {"seconds": 4.0, "peak_bytes": 17}
    >>> result = told({"plain": [two], "first": [one], "again": [one]}, 3)
    >>> result["peak_by_plain"]["median"], result["allowed_bytes"] - ALLOWED_BYTES
    (0.5294, 8)
    >>> result["peak_beyond_imports_by_plain"]["median"]
    0.5
    """

    def of(name: str, what: str, less: str | None = None) -> list[float]:
        return [load[what] - (load[less] if less else 0) for load in found[name]]

    def ratio(what: str, ours: str, theirs: str, less: str | None = None) -> dict[str, Any]:
        return measure.summary(measure.ratios(of(ours, what, less), of(theirs, what, less)))

    return {
        "peak_by_plain": ratio("peak_bytes", "first", "plain"),
        "peak_beyond_imports_by_plain": ratio("peak_bytes", "first", "plain", "imports_bytes"),
        "peak_from_cache_by_plain": ratio("peak_bytes", "again", "plain"),
        "first_start_by_plain": ratio("seconds", "first", "plain"),
        "from_cache_by_first_start": ratio("seconds", "again", "first"),
        "allowed_bytes": found["first"][0]["model_bytes"] + 2 * largest + ALLOWED_BYTES,
        "largest_tensor_bytes": largest,
        "loads": found,
    }


def verdicts(result: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, limit, kept) for each promise."""
    plain = max(load["peak_bytes"] for load in result["loads"]["plain"])
    peak = max(load["peak_bytes"] for load in result["loads"]["first"])
    limit = max(result["allowed_bytes"], int(MAX_PEAK * plain))
    speed = result["from_cache_by_first_start"]["median"]
    return [
        ("host peak, MiB", f"{peak / MIB:,.0f}", f"{limit / MIB:,.0f}", peak <= limit),
        ("from cache by first start", f"{speed:.3f}", f"{MAX_SECONDS:g}", speed <= MAX_SECONDS),
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Host memory and time of loading a base.")
    made.add_argument("--pairs", type=measure.positive, default=2, help="default: 2")
    made.add_argument("--base", type=Path, metavar="FOLDER", help="load this one, 256 MB or more")
    made.add_argument("--load", choices=("plain", "ours"), help="load once here; print JSON")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.base is not None and not (arguments.base / "config.json").is_file():
        parser().error(
            f"--base {arguments.base}: not a model folder, there is no config.json in it"
        )
    if arguments.load:
        if arguments.base is None:
            parser().error("--load needs --base")
        print(json.dumps(load(arguments.load, arguments.base.resolve())))
        return
    with tempfile.TemporaryDirectory() as name:
        work, base = Path(name), arguments.base
        if base is None:
            import gpu_suite

            site = gpu_suite.Site(work=work, models=work / "models", small=False)
            base = gpu_suite.random_model(site, gpu_suite.LLAMA_1B)
        try:
            found = compare(base.resolve(), work, arguments.pairs)
        except measure.CommandFailed as error:
            raise SystemExit(str(error)) from None
        result = told(found, largest_tensor(base))
    judged = verdicts(result)
    measure.report({**measure.circumstances(), **result}, arguments.json)
    measure.conclude(result, judged)


if __name__ == "__main__":
    main()
