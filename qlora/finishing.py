"""What ``qlora train --finish`` does when training has ended, and what of it was proven."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from qlora import export, hardware, merging
from qlora.errors import ExportError, Interrupted, QLoRAError, RecipeError
from qlora.export import gguf
from qlora.places import shown
from qlora.rundir import Run
from qlora.screen import Screen

NAMES = ("merge", "gguf", "ollama", "vllm")


@dataclass(frozen=True)
class Step:
    """One thing to do with a finished run; ``quant`` is of a GGUF file."""

    name: str
    quant: str = export.QUANT

    def command(self, run: Run) -> str:
        """What to type to do it later."""
        words = ["qlora", "merge", shown(run.dir)]
        if self.name != "merge":
            words = ["qlora", "export", shown(run.dir), "--to", self.name]
            words += ["--quant", self.quant] if self.name != "vllm" else []
        return shlex.join(words)


def steps(text: str) -> tuple[Step, ...]:
    """Read ``--finish``: names with commas between, of a GGUF file with its type.

    What can be refused is refused here, before anything is trained.

    >>> steps("merge,gguf:f16")
    (Step(name='merge', quant='q8_0'), Step(name='gguf', quant='f16'))

    Raises:
        RecipeError: A name, or a type, that is not known.
        ExportError: A type that this machine cannot make.
    """
    found = []
    for word in text.split(","):
        name, colon, quant = word.strip().partition(":")
        if name not in NAMES or (colon and name not in ("gguf", "ollama")):
            raise RecipeError(
                f"--finish names {word.strip()!r}. Write some of {', '.join(NAMES)} with commas between, "
                "of a GGUF file with its type: merge,gguf:q8_0."
            )
        step = Step(name, quant or export.QUANT)
        if name in ("gguf", "ollama"):
            gguf.require(step.quant)
        found.append(step)
    return tuple(found)


def finish(run: Run, wanted: Sequence[Step], console: Console | None = None) -> None:
    """Do each step with a finished run, and say at the end what was proven on the way.

    Raises:
        ExportError: A step failed. The run is whole, and the message says how to go on.
    """
    screen = Screen(console or Console())
    result = run.result
    before, after = result["before"]["held_out_loss"], result["after"]["held_out_loss"]
    proven = [
        "the base is bit for bit what it was, and the adapter on disk computes what the one in memory did "
        f"(logits within {result['alive']['disk_against_memory']:.2g})"
    ]
    if before is not None and after is not None:
        proven.append(f"held-out loss {before:.4f} before, {after:.4f} after")
    for number, step in enumerate(wanted):
        hardware.let_go()
        try:
            if step.name == "merge":
                merged = merging.merge(run.dir, console=screen.console)
                proven.append(
                    f"merged onto {merged.onto}, against the trained model: {merged.verdict}"
                )
                continue
            made = export.export(
                run.dir,
                step.name,
                quants=(step.quant,),
                console=screen.console,  # type: ignore[arg-type]
            )
            proven += [_said(one) for one in made.written]
        except QLoRAError as error:
            raise ExportError(f"{error}\n{_left(run, wanted[number:])}") from None
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped. {_left(run, wanted[number:])}") from None
    for line in proven:
        screen.say("proven", line)
    if any(step.name != "vllm" for step in wanted):
        screen.say("next", shlex.join(["qlora", "chat", shown(run.dir / "merged")]))


def _left(run: Run, steps: Sequence[Step]) -> str:
    commands = "\n".join(f"  {step.command(run)}" for step in steps)
    return (
        f"The run itself is finished and whole: {shown(run.dir)}. What is left to do:\n{commands}"
    )


def _said(one: gguf.Written) -> str:
    if one.agreement is not None:
        return (
            f"{one.file.name}, run by llama.cpp: the tokens of training in {one.tokens} texts; against the "
            f"merged model {one.agreement}"
        )
    right, of = one.matrices
    return (
        f"{one.file.name} was not run; {right} of its {of} matrices were read back and are the merged "
        "model's"
    )
