"""Our preparation of chat rows beside TRL's own: time, memory, disk, and whether the same tokens train.

    python scripts/bench_data.py --rows 100000 --tokens 200 --num-proc 2

writes seeded chat rows to a temporary folder and prepares that one file in turns (A B B A), each time in
a process of its own and from an empty cache:

    qlora      qlora.data.tokenize, and best-fit packing of all rows
    TRL        datasets.load_dataset and SFTTrainer's preparation, with assistant_only_loss and packing.
               Its constructor is called as a script would, around a model of a few weights; only what
               loads and prepares is timed
    TRL, N     the same with dataset_num_proc=N, where --num-proc asks for it (the default is None: one
               process)
    again      the first once more, from its cache: what a second start costs

Imports are timed apart. Both sides have the machine's default threads: TRL tokenizes row by row in each
of its processes; qlora in one process, whose tokenizer works on chunks of rows beside it, on the threads
that the tokenizers library takes. TRL writes packed rows to disk; qlora packs when a step is laid out, so
that its packing here is the plan of all sequences and its table holds the rows.

``processor seconds`` are those of the work on all threads and processes: on a shared machine they say
more than the wall. ``peak`` is the process's largest resident set and ``growth`` what the work added to
it (with N processes both are the first one's; the largest of its workers is told beside it). They hold
mapped pages of the files written and read, which the system takes back when it needs to; ``private
growth`` leaves them out (seen ten times a second).

Every row's tokens and labels are compared by a hash, wherever it was packed; a label at a row's first
position is left out, for no trainer can use it. Exit code 1 where the sides differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure

BASE = measure.ROOT / "qlora" / "embedded" / "base"
TICKETS = measure.ROOT / "qlora" / "embedded" / "tickets" / "train.jsonl"
MAX_LENGTH = 1024
LONGEST = 800  # tokens aimed at, so that no row is too long
SEED = 20
TURN_TOKENS = 5  # what the template puts around a turn
WARM_ROWS = 200
MIB = 2**20
IGNORED = -100
OURS, TRL, AGAIN = "qlora", "TRL", "again"


# --- the rows


def sentences() -> tuple[list[str], list[str]]:
    """What people say in the embedded tickets, sentence by sentence; and the answers they get."""
    asked: dict[str, None] = {}
    answers: dict[str, None] = {}
    with TICKETS.open(encoding="utf-8") as lines:
        for line in lines:
            question, answer = json.loads(line)["messages"]
            asked.update(dict.fromkeys(re.split(r"(?<=[.?!]) ", question["content"])))
            answers[answer["content"]] = None
    return list(asked), list(answers)


def conversations(rows: int, tokens: int) -> Iterator[list[dict[str, str]]]:
    """Chats of one to three exchanges, ``tokens`` long on average; one in four has a system turn."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    said, answers = sentences()
    length = {text: len(tok.encode(" " + text).ids) for text in (*said, *answers)}
    draw = random.Random(SEED)

    def text(budget: float, begun: str = "") -> str:
        words = [begun or draw.choice(said)]
        budget -= length[words[0]]
        while (more := draw.choice(said)) and length[more] / 2 < budget:
            words.append(more)
            budget -= length[more]
        return " ".join(words)

    for _ in range(rows):
        aim = min(max(tokens * draw.gammavariate(4, 1 / 4), 40), LONGEST)
        exchanges = min(draw.randint(1, 3), max(1, int(aim) // 60))
        roles = ["system"] * (draw.random() < 0.25) + ["user", "assistant"] * exchanges
        shares = [draw.uniform(0.5, 1.5) for _ in roles]
        room = (aim - TURN_TOKENS * len(roles)) / sum(shares)
        yield [
            {
                "role": role,
                "content": text(
                    room * share,
                    draw.choice(answers) if role == "assistant" and draw.random() < 0.3 else "",
                ),
            }
            for role, share in zip(roles, shares, strict=True)
        ]


def write_rows(path: Path, rows: int, tokens: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations(rows, tokens):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


# --- what a process of either side finds out about itself


def peak_bytes(children: bool = False) -> int:
    """The largest resident set of this process, or of the largest of its finished children."""
    import resource  # POSIX only

    peak = resource.getrusage(
        resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    ).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Usage:
    """What the work between here and :meth:`end` takes: processor time, and resident memory added."""

    def __init__(self) -> None:
        import psutil  # comes with accelerate

        self._process = psutil.Process()
        self._over = threading.Event()
        self._processor = self._spent()
        self._before, self._private = self._process.memory_info().rss, self._seen()
        self._most = self._private
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def end(self) -> dict[str, float]:
        spent = self._spent() - self._processor
        peak, worker = peak_bytes(), peak_bytes(children=True)
        self._over.set()
        self._watcher.join()
        return {
            "processor_seconds": spent,
            "before_bytes": self._before,
            "peak_bytes": peak,
            "growth_bytes": peak - self._before,
            "private_growth_bytes": self._most - self._private,
            "worker_bytes": worker,
        }

    @staticmethod
    def _spent() -> float:
        """Of all threads, and of the processes that have ended."""
        return sum(os.times()[:4])

    def _seen(self) -> int:
        info = self._process.memory_info()
        return int(
            info.rss - getattr(info, "shared", 0)
        )  # shared: mapped files; told on Linux only

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._most = max(self._most, self._seen())


def contents(ids: Any, labels: Any, lengths: Any) -> dict[str, Any]:
    """Rows laid end to end, summed up so that their order does not matter.

    A label at a row's first position counts under its own name and not in the hash.

    >>> import numpy as np
    >>> one = contents(np.array([5, 6, 7, 8]), np.array([5, 6, -100, 8]), np.array([2, 2]))
    >>> one["tokens"], one["supervised"], one["first_positions"]
    (4, 2, 1)
    >>> other = contents(np.array([7, 8, 5, 6]), np.array([-100, 8, -100, 6]), np.array([2, 2]))
    >>> one["hash"] == other["hash"]
    True
    """
    import numpy as np

    ids, labels = ids.astype(np.int32), labels.astype(np.int32)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first = int((labels[starts] != IGNORED).sum())
    labels[starts] = IGNORED
    total = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        row = hashlib.blake2b(ids[start:end].tobytes(), digest_size=8)
        row.update(labels[start:end].tobytes())
        total += int.from_bytes(row.digest(), "big")
    return {
        "rows": len(lengths),
        "tokens": len(ids),
        "supervised": int((labels != IGNORED).sum()),
        "first_positions": first,
        "hash": f"{total % 2**64:016x}",
    }


def flat(table: Any, *columns: str) -> list[Any]:
    """Columns of an Arrow table as arrays of numbers, their lists laid end to end."""
    import numpy as np

    parts = [table.data[name].chunks for name in columns]
    return [
        np.concatenate([(c.flatten() if hasattr(c, "flatten") else c).to_numpy() for c in chunks])
        for chunks in parts
    ]


def size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def prepare_ours(path: Path, folder: Path) -> dict[str, Any]:
    """qlora's preparation, in this process."""
    began = time.perf_counter()

    from qlora import data, packing, tokenizer
    from qlora.recipe import load_recipe

    imported = time.perf_counter() - began
    os.environ["QLORA_CACHE"] = str(folder)
    asked = [
        f"data.train={path}", f"data.max_length={MAX_LENGTH}", "data.held_out=null",
        "data.held_out_fraction=0",
    ]  # fmt: skip
    recipe = load_recipe("quickstart", asked)
    tok, _ = tokenizer.load(recipe)
    vocab_size = json.loads((BASE / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    usage = Usage()
    began = time.perf_counter()
    prepared = data.tokenize(recipe, tok, vocab_size)
    read = time.perf_counter()
    (lengths,) = flat(prepared.train, "length")  # a column read through datasets takes row by row
    packed = packing.best_fit(lengths.tolist(), MAX_LENGTH)
    ended = time.perf_counter()
    held = usage.end()
    ids, labels = flat(prepared.train, "input_ids", "labels")
    return {
        "import_seconds": imported,
        "seconds": ended - began,
        "parts": {"tokenize": read - began, "packing": ended - read},
        **held,
        "arrow_bytes": size(folder, "*.arrow"),
        "disk_bytes": size(folder),
        "from_cache": prepared.from_cache,
        "sequences": len(packed),
        **contents(ids, labels, lengths),
    }


def prepare_trl(path: Path, folder: Path, processes: int | None) -> dict[str, Any]:
    """TRL's preparation, in this process and those that it asks for."""
    began = time.perf_counter()
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    imported = time.perf_counter() - began
    took: dict[str, float] = {}
    held: dict[str, float] = {}
    prepared: list[Any] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            prepared.append(super()._prepare_dataset(*args, **kwargs))
            took["prepare"] = time.perf_counter() - began
            held.update(usage.end())
            return prepared[-1]

    tok = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tok), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1,
        )
    )  # fmt: skip
    settings = SFTConfig(
        output_dir=str(folder / "out"), assistant_only_loss=True, packing=True,
        max_length=MAX_LENGTH, dataset_num_proc=processes, use_cpu=True, bf16=False, report_to=[],
    )  # fmt: skip
    usage = Usage()
    began = time.perf_counter()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
    took["load"] = time.perf_counter() - began
    Timed(model=model, args=settings, train_dataset=rows, processing_class=tok)
    (table,) = prepared
    ids, labels, lengths = flat(table, "input_ids", "labels", "seq_lengths")
    return {
        "import_seconds": imported,
        "seconds": took["load"] + took["prepare"],
        "parts": took,
        **held,
        "arrow_bytes": sum(Path(f["filename"]).stat().st_size for f in table.cache_files),
        "disk_bytes": size(folder),
        "from_cache": False,
        "sequences": len(table),
        **contents(ids, labels, lengths),
    }


# --- the comparison


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def run(asked: Sequence[str], path: Path, folder: Path) -> dict[str, Any]:
    """One side, in its own process."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)}
    command = [sys.executable, str(Path(__file__).resolve()), *asked]
    done = measure.timed([*command, "--file", str(path), "--folder", str(folder)], environment)
    found: dict[str, Any] = json.loads(done.output.strip().splitlines()[-1])
    return {**found, "process_seconds": done.seconds}


def compare(
    rows: int, tokens: int, pairs: int, processes: int, tell: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Everything measured, by side and in the order of the runs."""
    sides = {OURS: ["--side", OURS], TRL: ["--side", TRL]}
    if processes:
        sides[f"{TRL}, {processes}"] = ["--side", TRL, "--num-proc", str(processes)]
    order: list[str] = []
    for swapped, _ in measure.turns(pairs):
        order += reversed(sides) if swapped else sides
    order += [AGAIN] * pairs
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*sides, AGAIN)}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as place:
        path, ours, theirs = (Path(place) / name for name in ("rows.jsonl", "ours", "theirs"))

        def measured(side: str) -> dict[str, Any]:
            if side == AGAIN:
                return run(sides[OURS], path, ours)
            if side == OURS:
                return run(sides[OURS], path, emptied(ours))
            done = run(sides[side], path, emptied(theirs))
            emptied(theirs)  # they are many times the rows
            return done

        tell("warming up")
        write_rows(path, WARM_ROWS, tokens)
        for side in found:
            measured(side)
        tell(f"writing {rows:,} rows")
        write_rows(path, rows, tokens)
        tell(f"{path.stat().st_size / MIB:.0f} MiB of rows")
        for number, side in enumerate(order, start=1):
            told = f"run {number} of {len(order)}, {side}"
            tell(told)
            found[side].append(measured(side))
            tell(f"{told}: {found[side][-1]['seconds']:.1f} s")
    assert all(run["from_cache"] for run in found[AGAIN])
    assert not any(run["from_cache"] for run in found[OURS])
    return found


def differences(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """In what the sides differ that should be equal.

    >>> run = {"rows": 1, "tokens": 9, "supervised": 4, "hash": "aa"}
    >>> differences({"qlora": [run], "TRL": [{**run, "supervised": 5}]})
    ['supervised: 4 (qlora), 5 (TRL)']
    """
    said = []
    for what in ("rows", "tokens", "supervised", "hash"):
        values = {side: sorted({run[what] for run in runs}) for side, runs in found.items()}
        if len({value for listed in values.values() for value in listed}) > 1:
            listed = ", ".join(f"{v[0]} ({side})" for side, v in values.items())
            said.append(f"{what}: {listed}")
    return said


def by_trl(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Our seconds by those of each way to run TRL, run by run."""
    ours = [run["seconds"] for run in found[OURS]]
    return {
        side: measure.ratios(ours, [run["seconds"] for run in runs])
        for side, runs in found.items()
        if side not in (OURS, AGAIN)
    }


def summed_up(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of times and the largest of what was held."""
    last = runs[-1]
    median = {
        name: statistics.median(run[name] for run in runs)
        for name in ("seconds", "processor_seconds", "import_seconds", "process_seconds")
    }
    most = {
        name: max(run[name] for run in runs)
        for name in (
            "before_bytes", "peak_bytes", "growth_bytes", "private_growth_bytes", "worker_bytes",
        )
    }  # fmt: skip
    return {
        **median,
        "parts": {
            name: statistics.median(run["parts"][name] for run in runs) for name in last["parts"]
        },
        "rows_per_second": last["rows"] / median["seconds"],
        "tokens_per_second": last["tokens"] / median["seconds"],
        **most,
        "arrow_bytes": last["arrow_bytes"],
        "disk_bytes": last["disk_bytes"],
        "growth_by_arrow": most["growth_bytes"] / last["arrow_bytes"],
        "private_growth_by_arrow": most["private_growth_bytes"] / last["arrow_bytes"],
        "sequences": last["sequences"],
        "fill": last["tokens"] / (last["sequences"] * MAX_LENGTH),
        **{name: last[name] for name in ("rows", "tokens", "supervised", "first_positions")},
    }


def lines(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """The table: a column for each side."""
    sides = {side: summed_up(runs) for side, runs in found.items()}
    ratios = by_trl(found)

    def row(label: str, name: str, shape: str, scale: int | None = None) -> list[str]:
        values = [side[name] / scale if scale else side[name] for side in sides.values()]
        return [label, *(format(value, shape) for value in values)]

    def parts(side: dict[str, Any]) -> str:
        return " + ".join(f"{name} {seconds:.1f}" for name, seconds in side["parts"].items())

    compared = ["qlora by it (median)"], ["  range"]
    for side in sides:
        said = measure.ratio_row("", ratios[side]) if side in ratios else ("", "", "")
        compared[0].append(said[1])
        compared[1].append(said[2])
    return [
        row("seconds (median)", "seconds", ".1f"),
        ["  of which", *map(parts, sides.values())],
        row("processor seconds", "processor_seconds", ".1f"),
        row("rows/s", "rows_per_second", ",.0f"),
        row("tokens/s", "tokens_per_second", ",.0f"),
        *compared,
        row("imports, s", "import_seconds", ".1f"),
        row("whole process, s", "process_seconds", ".1f"),
        row("peak RSS, MiB", "peak_bytes", ",.0f", MIB),
        row("  largest worker, MiB", "worker_bytes", ",.0f", MIB),
        row("RSS before, MiB", "before_bytes", ",.0f", MIB),
        row("growth, MiB", "growth_bytes", ",.0f", MIB),
        row("private growth, MiB", "private_growth_bytes", ",.0f", MIB),
        row("Arrow table, MiB", "arrow_bytes", ",.0f", MIB),
        row("growth / Arrow", "growth_by_arrow", ".2f"),
        row("private growth / Arrow", "private_growth_by_arrow", ".2f"),
        row("on disk in all, MiB", "disk_bytes", ",.0f", MIB),
        row("rows", "rows", ","),
        row("tokens", "tokens", ","),
        row("supervised tokens", "supervised", ","),
        row("  at position 0", "first_positions", ","),
        row("packed sequences", "sequences", ","),
        row("fill", "fill", ".2%"),
    ]


def tokens_a_row(text: str) -> int:
    """An argparse type: what a row can be on average without ever passing the limit."""
    value = measure.positive(text)
    if not 60 <= value <= 400:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 60 and 400")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Preparation of chat rows, ours beside TRL's.")
    made.add_argument("--rows", type=measure.positive, default=100_000, help="default: 100000")
    made.add_argument(
        "--tokens", type=tokens_a_row, default=200, help="of a row on average (default: 200)"
    )
    made.add_argument("--pairs", type=measure.positive, default=2, help="default: 2 (A B B A)")
    made.add_argument(
        "--num-proc", type=measure.positive, metavar="N",
        help="compare with TRL in N processes, too (default: only its own default of one)",
    )  # fmt: skip
    made.add_argument("--side", choices=(OURS, TRL), help=argparse.SUPPRESS)  # one process of it
    made.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.side:
        if arguments.side == OURS:
            told = prepare_ours(arguments.file, arguments.folder)
        else:
            told = prepare_trl(arguments.file, arguments.folder, arguments.num_proc)
        print(json.dumps(told))
        return
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", file=sys.stderr, flush=True)

    processes = arguments.num_proc or 0
    try:
        found = compare(arguments.rows, arguments.tokens, arguments.pairs, processes, tell)
    except measure.CommandFailed as error:
        raise SystemExit(str(error)) from None
    unequal = differences(found)
    ratios = {side: measure.summary(values) for side, values in by_trl(found).items()}
    result = {
        **measure.circumstances(),
        "asked": {"rows": arguments.rows, "tokens": arguments.tokens, "max_length": MAX_LENGTH},
        "cores": os.cpu_count(),
        "qlora_by": ratios,
        "sides": {side: summed_up(runs) for side, runs in found.items()},
        "differences": unequal,
        "runs": found,
    }
    if arguments.json is not None:
        measure.report(result, arguments.json)
    print(measure.table(("what", *found), lines(found)))
    if unequal:
        raise SystemExit("\n".join(["The sides did not prepare the same rows:", *unequal]))


if __name__ == "__main__":
    main()
