"""Eight clients over four adapters for a minute: failures, differences from serial answers, and speed.

    python scripts/bench_serve.py [--seconds 60] [--json FILE]

trains a short quickstart, makes three more adapters of it by moving its weights, and serves the four with
one base over HTTP. First each question is answered alone, by transformers and peft (``qlora chat``'s way);
then the clients ask for a while, and every answer is held against that. Throughput is compared within the
same process: the clients' tokens a second by those of one question at a time, in turns, both through the
server. Exit code 1 where a request failed or an answer differs, or the ratio is below 2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure

CLIENTS, ADAPTERS, WANTED = 8, 4, 2.0
LENGTH = 64
Job = tuple[str, str]  # model, question


def runs(folder: Path, steps: int) -> list[Path]:
    """A quickstart of some steps and copies of it, each with weights of its own."""
    import torch
    from rich.console import Console
    from safetensors.torch import load_file, save_file

    import qlora
    from qlora import trainer

    asked = [f"train.max_steps={steps}", "eval.generate=0", f"run.dir={folder}"]
    recipe = qlora.load_recipe("quickstart", asked)
    first = trainer.train(recipe, console=Console(quiet=True)).dir
    found = [first]
    for number in range(1, ADAPTERS):
        other = folder / f"other{number}" / first.name
        shutil.copytree(first, other)
        file = other / "adapter" / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(number)
        moved = {
            name: weight + 0.02 * torch.randn(weight.shape, generator=noise)
            for name, weight in load_file(file).items()
        }
        save_file(moved, file)
        found.append(other)
    return found


def questions(count: int) -> list[str]:
    """Some of the embedded held-out tickets."""
    import qlora

    file = Path(qlora.__file__).parent / "embedded" / "tickets" / "heldout.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    turns = [row["messages"] for row in rows[:count]]
    return [next(turn["content"] for turn in one if turn["role"] == "user") for one in turns]


def serial(where: Sequence[Path], asked: Sequence[str]) -> dict[Job, str]:
    """What each run answers to each question by transformers and peft, one at a time."""
    from qlora import generation, trained
    from qlora.records import Turn

    said = {}
    for run in where:
        found = trained.find(run)
        model = trained.load(found)
        for question in asked:
            prompt = found.prompt_ids([Turn("user", question)])
            sampling = generation.Sampling(max_new_tokens=LENGTH)
            answer = generation.stream(model, found.tok, prompt, sampling, lambda piece: None)
            said[found.name, question] = answer.text
    return said


@contextlib.contextmanager
def served(where: Sequence[Path]) -> Iterator[str]:
    """The address of a server on a port of this machine."""
    from qlora import address, server, trained
    from qlora.server import serving
    from qlora.server.meter import Meter

    opened = serving.Serving([trained.find(run) for run in where])
    opened.engine.start()
    sock = address.listen("127.0.0.1", 0)
    made = server.make(server.create(opened, Meter()))
    thread = threading.Thread(target=lambda: asyncio.run(made._serve(sockets=[sock])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        made.should_exit = True
        thread.join()
        opened.engine.close()


def ask(client: Any, job: Job) -> tuple[str, int]:
    """An answer and how many tokens it took; an error's name and none where there is no answer."""
    import openai

    try:
        said = client.chat.completions.create(
            model=job[0], messages=[{"role": "user", "content": job[1]}], max_tokens=LENGTH
        )
    except openai.OpenAIError as error:
        return f"{type(error).__name__}", 0
    return said.choices[0].message.content.strip(), said.usage.completion_tokens


def rush(
    url: str, jobs: Sequence[Job], clients: int, seconds: float
) -> tuple[list[tuple[Job, str, int]], float]:
    """Let some clients ask one question after another for a while: (job, answer, tokens), and how long."""
    import openai

    end, began = time.perf_counter() + seconds, time.perf_counter()

    def one(number: int) -> list[tuple[Job, str, int]]:
        order = random.Random(number).sample(list(jobs), len(jobs))
        found = []
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for job in itertools.cycle(order):
                if time.perf_counter() > end:
                    return found
                found.append((job, *ask(client, job)))
        return found

    with ThreadPoolExecutor(clients) as pool:
        answers = [row for rows in pool.map(one, range(clients)) for row in rows]
    return answers, time.perf_counter() - began


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_CACHE"] = str(Path(folder) / "cache")
        where = runs(Path(folder), arguments.steps)
        asked = questions(arguments.questions)
        wanted = serial(where, asked)
        jobs = list(wanted)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        answers: list[tuple[Job, str, int]] = []
        seconds = arguments.seconds / arguments.pairs
        with served(where) as url:
            rush(url, jobs, 1, 1.0)  # warm
            for order in measure.turns(arguments.pairs):
                for together in order:
                    clients = CLIENTS if together else 1
                    found, took = rush(url, jobs, clients, seconds)
                    speeds[together].append(sum(tokens for *_, tokens in found) / took)
                    answers += found
    failed = [said for _, said, tokens in answers if not tokens]
    different = [job for job, said, tokens in answers if tokens and said != wanted[job]]
    return {
        "clients": CLIENTS, "adapters": ADAPTERS, "seconds_together": arguments.seconds,
        "requests": len(answers), "failed": len(failed), "different": len(different),
        "distinct_answers": len(set(wanted.values())), "questions": len(wanted),
        "tokens_per_second_together": round(statistics.median(speeds[True]), 1),
        "tokens_per_second_alone": round(statistics.median(speeds[False]), 1),
        "together_by_alone": measure.summary(measure.ratios(speeds[True], speeds[False])),
    }  # fmt: skip


def is_good(found: dict[str, Any]) -> bool:
    """Whether nothing failed, nothing differs, and together is fast enough.

    >>> is_good({"failed": 0, "different": 0, "together_by_alone": {"median": 1.9}})
    False
    """
    fast = found["together_by_alone"]["median"] >= WANTED
    return bool(fast and not found["failed"] and not found["different"])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="A server under eight clients over four adapters.")
    made.add_argument("--seconds", type=measure.positive, default=60, help="default: 60")
    made.add_argument("--pairs", type=measure.positive, default=4, help="default: 4")
    made.add_argument("--steps", type=measure.positive, default=40, help="of training; default: 40")
    made.add_argument("--questions", type=measure.positive, default=12, help="default: 12")
    made.add_argument("--threads", type=measure.positive, help="of torch; default: its own")
    measure.add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("httpx").setLevel(logging.WARNING)
    found = compare(arguments)
    measure.report({**measure.circumstances(), **found}, arguments.json)
    told = found["together_by_alone"]
    rows = [
        ("requests", str(found["requests"]), ""),
        ("failed", str(found["failed"]), "0"),
        ("other than serial", str(found["different"]), "0"),
        ("together by alone", f"{told['median']:.2f}", f">= {WANTED:g}"),
    ]
    print(measure.table(("what", "measured", "wanted"), rows))
    raise SystemExit(0 if is_good(found) else 1)


if __name__ == "__main__":
    main()
