"""Runs that are killed, damaged, starved of disk and signalled, and what becomes of each.

    python scripts/torture_checkpoints.py [--only kills] [--trials 300] [--out FILE]

A random two-layer base of width 64 trains with dropout, a checkpoint every two steps, two of them kept.
Whatever is done to the run, once it has been resumed to its end its adapter must be that of a run that
nobody disturbed, bit for bit, and so must the losses in its metrics, one a step and in order.

    disks    what a death before each operation on a file leaves, of a start, a resume and a mirror; with
             it parts of writes, and what a power cut takes: data, or names, that were not synced
    points   processes that really die there, before every fourth operation
    kills    SIGKILL at random moments, up to four times in a run
    processes    the same to `qlora train` itself, which takes seconds to start: five runs
    damage   files of the newest checkpoint and of the run: flipped, zeroed, cut, emptied, gone, swapped
    full     a disk that is full or fails at many moments (mounts small disks, so needs root)
    signals  SIGTERM or SIGINT at random moments, a fifth of them twice

The first lines of what went wrong are printed, and the exit code is 1. Needs fork, /proc and half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure

if str(measure.ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(measure.ROOT / "tests"))

PARTS = ("disks", "points", "kills", "processes", "damage", "full", "signals")
TRIALS = {"kills": 300, "damage": 500, "signals": 50}
REAL = 5  # of the kills, through the command line: each start takes seconds
HEADINGS = ("what", "right", "how")
STEPS = {"train__max_steps": 10, "train__eval_steps": 3}
LONG = {
    "train__max_steps": 20,
    "train__save_steps": 4,
}  # and no evaluation meanwhile, which a signal would leave out
STRIDE = 4  # operations
SHOWN = 12


def left(seconds: float) -> str:
    """A time that is left.

    >>> left(200)
    '3m20s left'
    """
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s left"


class Tally:
    """Counts what trials came to, and tells how far they are."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.came_to: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._began = self._told = time.monotonic()

    def add(self, came_to: str, wrong: str = "") -> None:
        self.came_to[came_to] += 1
        if wrong:
            self.wrong.append(wrong)
            print(f"WRONG {self.what}: {wrong[:600]}", flush=True)
        now, done = time.monotonic(), self.came_to.total()
        if now - self._told > 10 or done == self.total:
            self._told = now
            pace = (now - self._began) / done
            print(
                f"{self.what}: {done}/{self.total}, {left(pace * (self.total - done))}", flush=True
            )

    @property
    def row(self) -> tuple[str, str, str]:
        count = self.came_to.total()
        how = ", ".join(f"{number} {name}" for name, number in self.came_to.most_common())
        return self.what, f"{count - len(self.wrong)}/{count}", how

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "trials": self.came_to.total(), "wrong": self.wrong,
            "came_to": dict(self.came_to), "seconds": round(time.monotonic() - self._began),
        }  # fmt: skip


# --- crash points


def points(stage: Any, trials: int | None) -> Iterator[Tally]:
    """A process that really dies before its n-th operation."""
    import torture

    def made(resume: bool) -> Path:
        folder = stage.folder()
        (folder / "runs").mkdir()
        if resume:
            torture.wreck(torture.broken_off(stage, folder))
        return folder

    for what, resume, changes in (
        ("deaths in a run", False, {}),
        ("deaths in a resume", True, {}),
        ("deaths in a mirror", False, {"run__mirror": "mirror"}),
    ):
        below = "mirror" if changes else "runs"
        folder = made(resume)
        (folder / below).mkdir(exist_ok=True)
        total = _operations(stage, folder, below, resume, changes)
        shutil.rmtree(folder)
        numbers = range(1, total + 1, STRIDE)
        tally = Tally(f"{what}, of {total} operations", len(numbers))
        for number in numbers:
            folder = made(resume)
            (folder / below).mkdir(exist_ok=True)

            def last(operation: Any, number: int = number) -> bool:
                return bool(operation.number == number)

            dying = torture.dying(folder / below, last)
            done = stage.start(folder, dying, "newest" if resume else None, **changes).wait()
            if done.code == 0:  # a mirror's thread may come to fewer
                tally.add("ended before")
            else:
                if changes:
                    shutil.rmtree(folder / "runs")  # the machine is lost
                tally.add(*_gone_on(stage, folder, **changes))
            shutil.rmtree(folder)
        yield tally


def _operations(stage: Any, folder: Path, below: str, resume: bool, changes: dict[str, Any]) -> int:
    """How many operations a run comes to."""
    import torture

    count = folder / "count"

    def act() -> None:
        watch = torture.Watch(folder / below, lambda operation: None)
        watch.begin()
        torture.train(stage.recipe(**changes), "newest" if resume else None)
        watch.end()
        count.write_text(str(watch.count))

    done = torture.Child(folder, act).wait()
    assert done.code == 0, done.said
    return int(count.read_text())


def disks(stage: Any, trials: int | None) -> Iterator[Tally]:
    """What a crash or a power cut leaves before every operation; each distinct disk is gone on from."""
    import torture

    for what in ("a run", "a resume", "a mirror"):
        folder, changes, extra = stage.folder(), {}, {}
        below = "runs"
        if what == "a resume":
            torture.wreck(torture.broken_off(stage, folder))
            extra = {"resume": "newest", "at_least": 2}
        elif what == "a mirror":
            below, changes = "mirror", {"run__mirror": "mirror"}
        found = torture.record(stage, folder, below, **extra, **changes)
        if what == "a mirror":
            shutil.rmtree(folder)
        wrong = torture.problems(stage, found, **changes)
        tally = Tally(f"disks of {what}", len(found))
        tally.wrong = wrong
        tally.came_to = Counter(point.kind for point in found)
        for line in wrong[:SHOWN]:
            print(f"WRONG {tally.what}: {line[:600]}", flush=True)
        yield tally


def _gone_on(stage: Any, folder: Path, **changes: Any) -> tuple[str, str]:
    """Resume as a user would, and start anew if there is nothing to; what it came to, and what is wrong."""
    import torture

    done = stage.resumed(folder, **changes)
    came_to = f"from step {done.from_step}"
    if done.code == 2 and "has finished" in done.message:
        came_to = "had finished"
    elif done.code == 2 and "no run to resume" in done.message:
        came_to = "nothing to resume"
        done = stage.start(folder, **changes).wait()
    if done.code and came_to != "had finished":
        return "failed", done.said[-1500:]
    where = "runs" if (folder / "runs").is_dir() else "mirror"
    return came_to, torture.differs(torture.run_in(folder, where), stage.straight)


# --- kills


def kills(stage: Any, trials: int | None) -> Iterator[Tally]:
    count = trials or TRIALS["kills"]
    random_kills = Tally("SIGKILL at random", count)
    seconds = _typical(stage)
    for trial in range(count):
        chance = random.Random(trial)
        folder = stage.folder()
        changes = STEPS | ({"run__mirror": "mirror"} if trial % 4 == 0 else {})
        killed = 0
        for _ in range(chance.randint(1, 4)):
            begun = bool(list(folder.glob("runs/tiny/*/checkpoints/checkpoint-*")))
            child = stage.start(folder, resume="newest" if begun else None, **changes)
            time.sleep(chance.uniform(0.0 if begun else 0.2, 1.0) * seconds)
            child.kill()
            killed += child.wait().code == -signal.SIGKILL
        came_to, wrong = _gone_on(stage, folder, **changes)
        random_kills.add(f"killed {killed} times", wrong and f"seed {trial}: {came_to}: {wrong}")
        if not wrong:
            shutil.rmtree(folder)
    yield random_kills


def _typical(stage: Any) -> float:
    """Seconds that a run takes in a child here."""
    folder = stage.folder()
    began = time.monotonic()
    done = stage.start(folder).wait()
    assert done.code == 0, done.said
    return time.monotonic() - began


def processes(stage: Any, trials: int | None) -> Iterator[Tally]:
    """The same to ``qlora train``: killed after its first checkpoint, and at random in its resume."""
    import torture

    count = min(trials or REAL, REAL)
    tally = Tally("SIGKILL of qlora train", count)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for trial in range(count):
        chance = random.Random(1000 + trial)
        folder = stage.folder()
        (folder / "mine.yaml").write_text(stage.recipe(**STEPS).dump())
        typed = [*measure.qlora_command(), "train", "mine.yaml"]

        def start(*more: str, folder: Path = folder, typed: list[str] = typed) -> Any:
            return subprocess.Popen(
                [*typed, *more], cwd=folder, env=environment, text=True,
                stdout=(folder / "out.txt").open("w"), stderr=subprocess.STDOUT,
            )  # fmt: skip

        for more in ((), ("--resume",)):
            process = start(*more)
            end = time.monotonic() + 100
            pattern = "runs/tiny/*/checkpoints/checkpoint-" + ("[4-9]" if more else "*")
            while process.poll() is None and not list(folder.glob(pattern)):
                assert time.monotonic() < end, "no checkpoint in 100 s"
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.15))
            process.kill()
            process.wait()
        code = start("--resume").wait(100)
        run = torture.run_in(folder)
        wrong = torture.differs(run, stage.straight)
        said = (folder / "out.txt").read_text()[-800:]
        tally.add("resumed" if code == 0 else "had finished", wrong and f"{wrong}\n{said}")
    yield tally


# --- damage


def damage(stage: Any, trials: int | None) -> Iterator[Tally]:
    """Mutate one file, resume by the command that the run printed, and see whether it is noticed."""
    import torture

    count = trials or TRIALS["damage"]
    tally = Tally("files damaged", count)
    homes = {}
    for fit in ("as_written", "auto"):
        folder = stage.folder()
        torture.broken_off(stage, folder, train__fit=fit)
        homes[fit] = folder, _finished(stage, folder, fit)
    for trial in range(count):
        chance = random.Random(trial)
        fit = chance.choice(list(homes))
        original, straight = homes[fit]
        folder = stage.folder()
        shutil.copytree(original / "runs", folder / "runs")
        run = torture.run_in(folder)
        told = mutate(run.dir, chance)
        done = _as_printed(stage, folder, run)
        came_to, wrong = _judged(done, folder, straight)
        tally.add(came_to, wrong and f"seed {trial}, {told}: {wrong}")
        if not wrong:
            shutil.rmtree(folder)
    yield tally


def _finished(stage: Any, folder: Path, fit: str) -> Any:
    """What the broken off run comes to when nothing is damaged."""
    import torture

    whole = stage.folder()
    shutil.copytree(folder / "runs", whole / "runs")
    done = stage.resumed(whole, train__fit=fit)
    assert done.code == 0, done.said
    return torture.learned(torture.run_in(whole))


def _as_printed(stage: Any, folder: Path, run: Any) -> Any:
    """``qlora train RUN/recipe.yaml --resume RUN``, in a child."""
    import torture

    def act() -> None:
        from qlora.recipe import load_recipe

        torture.train(load_recipe(run.recipe_file), str(run.dir))

    return torture.Child(folder, act).wait()


def mutate(run: Path, chance: random.Random) -> str:
    """Damage one thing in a run; says what. Most of it to its newest checkpoint."""
    newest, older = run / "checkpoints" / "checkpoint-4", run / "checkpoints" / "checkpoint-2"
    state = (
        "plan.json",
        "before.json",
        "metrics.jsonl",
        "recipe.yaml",
        "data.json",
        "environment.json",
    )
    if chance.random() < 0.6:
        path = chance.choice(sorted(newest.iterdir()))
    else:
        path = run / chance.choice(state)
    kind = chance.choice(
        (
            "flip",
            "flip",
            "flip",
            "digit",
            "zeroes",
            "cut",
            "gone",
            "empty",
            "extra",
            "swap",
            "line",
            "edit",
        )
    )
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "digit":  # still JSON or YAML, and another value
        places = [i for i, byte in enumerate(data) if chr(byte).isdigit()] or [at]
        place = chance.choice(places)
        data[place] = ord("1") + (data[place] - ord("0")) % 9
    elif kind == "zeroes":
        at = at // 512 * 512
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "cut":
        del data[at:]
    elif kind == "line":
        lines = data.split(b"\n")
        del lines[chance.randrange(len(lines))]
        data = bytearray(b"\n".join(lines))
    elif kind == "empty":
        data.clear()
    if kind == "gone":
        path.unlink()
    elif kind == "extra":
        (path.parent / f"extra-{path.name}").write_bytes(data)
    elif kind == "swap" and path.parent == newest:
        if chance.random() < 0.3:  # the folders themselves
            newest.rename(older.with_name("x"))
            older.rename(newest)
            older.with_name("x").rename(older)
            return "swap of the two checkpoints"
        path.write_bytes((older / path.name).read_bytes())
    elif kind == "edit" and path.parent == newest:
        return _edit_manifest(newest, path, chance)
    else:
        path.write_bytes(data)
    return f"{kind} of {path.relative_to(run)}"


def _edit_manifest(newest: Path, path: Path, chance: random.Random) -> str:
    manifest = json.loads((newest / "manifest.json").read_text())
    names = sorted(manifest["files"])
    name = path.name if path.name in names else names[0]
    how = chance.choice(("unlist", "outside", "size", "hash", "nothing", "unlist and delete"))
    if how == "outside":
        manifest["files"]["../checkpoint-2/manifest.json"] = manifest["files"].pop(name)
    elif how == "size":
        manifest["files"][name]["bytes"] += 1
    elif how == "hash":
        manifest["files"][name]["sha256"] = "0" * 64
    elif how == "nothing":
        manifest["files"] = {}
    else:
        del manifest["files"][name]
        if how == "unlist and delete":
            (newest / name).unlink()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return f"{how} {name} in the manifest"


def _judged(done: Any, folder: Path, straight: Any) -> tuple[str, str]:
    import torture

    if done.code == 2 and done.message:
        return "refused", ""
    if done.code:
        return "crashed", done.said[-800:]
    # What is measured again, because the file with it is gone, is one more line in the metrics.
    different = torture.differs(torture.run_in(folder), straight, evaluations=False)
    words = (
        "is damaged",
        "not as it was",
        "changed  ",
        "is not of its run",
        "not of the one in its",
    )
    named = any(line for line in done.said.splitlines() if any(word in line for word in words))
    if not different:
        return ("named, and the older used" if done.from_step == 2 else
                "named, and right" if named else "harmless"), ""  # fmt: skip
    if named:
        return f"told, and {different}".partition(" (")[0], ""
    return "silent", different


# --- a full disk, and signals


def full(stage: Any, trials: int | None) -> Iterator[Tally]:
    import test_disk_full

    tally = Tally("disk full or failing", len(test_disk_full.CASES))
    for case in test_disk_full.CASES:
        with test_disk_full.small_disk(stage.folder()) as disk:
            wrong = test_disk_full.problem(case, stage, disk)
        tally.add(
            "stopped, and resumed" if case.code else "went on", wrong and f"{case.name}: {wrong}"
        )
    yield tally


def signals(stage: Any, trials: int | None) -> Iterator[Tally]:
    import torture

    from qlora import store

    count = trials or TRIALS["signals"]
    tally = Tally("SIGTERM or SIGINT at random", count)
    seconds = _typical(stage)
    trial = 0
    while tally.came_to.total() < count:
        trial += 1
        chance = random.Random(trial)
        number = chance.choice((signal.SIGTERM, signal.SIGINT))
        twice = trial % 5 == 0
        folder = stage.folder()
        (folder / "mine.yaml").write_text(stage.recipe(**LONG).dump())

        def act(folder: Path = folder) -> None:
            torture.command(folder / "mine.yaml")

        child = torture.Child(folder, act)
        time.sleep(chance.uniform(0.0, 0.95) * seconds)
        child.kill(number)
        if twice:
            time.sleep(chance.uniform(0.0, 0.05))
            child.kill(number)
        done = child.wait()
        if done.code == 0:
            continue  # it came too late
        # A process that a signal ends shows it as -15, and a shell shows that as 143.
        codes = {143, -15} if number == signal.SIGTERM else {130}
        wrong, came_to = "", "at once"
        if done.code not in codes:
            wrong = f"exit code {done.code}"
        elif "stopping when" in done.said and not twice:
            came_to = "saved"
            run = torture.run_in(folder)
            last = max(line["step"] for line in run.metrics())
            newest = store.newest(run.checkpoints)
            if newest is None or store.step_of(newest) != last:
                wrong = f"step {last} was the last, and {newest} is the newest"
        if "Traceback" in done.said:
            wrong += " a traceback"
        then, different = _gone_on(stage, folder, **LONG)
        wrong = "; ".join(filter(None, [wrong, different and f"{then}: {different}"]))
        tally.add(came_to, wrong and f"seed {trial}, {number.name}: {wrong}\n{done.said[-800:]}")
        if not wrong:
            shutil.rmtree(folder)
    yield tally


def together(tallies: list[Tally], out: Path) -> list[dict[str, Any]]:
    """These parts, each with where and when, and what a file has of others."""
    new = [tally.to_json() | measure.circumstances() for tally in tallies]
    old = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.is_file() else []
    names = {part["what"] for part in new}
    return [part for part in old if part["what"] not in names] + new


def main() -> None:
    made = argparse.ArgumentParser(description="Torture runs and their checkpoints.")
    made.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts")
    made.add_argument("--trials", type=measure.positive, help="of kills, damage and signals")
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the table there, as JSON; its other parts stay",
    )
    asked = made.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    import torch
    import torture

    if not torture.HAS_FORK:
        made.error("children are forked, and watched through /proc: this needs Linux")
    torch.set_num_threads(1)
    root = torture.quick_folder()
    os.environ["QLORA_CACHE"] = str(root / "cache")
    stage = torture.warm(root)
    acts: dict[str, Callable[[Any, int | None], Iterator[Tally]]] = {
        "disks": disks, "points": points, "kills": kills, "processes": processes,
        "damage": damage, "full": full, "signals": signals,
    }  # fmt: skip
    tallies = []
    try:
        for part in asked.only:
            steps = {"kills": STEPS, "processes": STEPS, "signals": LONG}.get(part)
            kept = torture.Stage(stage.root / part, **steps) if steps else stage
            for tally in acts[part](kept, asked.trials):
                print(" ".join(tally.row), flush=True)
                tallies.append(tally)
    finally:
        if any(tally.wrong for tally in tallies):
            print(f"what went wrong lies in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(measure.table(HEADINGS, [tally.row for tally in tallies]))
    if asked.out is not None:
        measure.report({"parts": together(tallies, asked.out)}, asked.out)
    raise SystemExit(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    main()
