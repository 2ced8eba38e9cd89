"""A conversation in the terminal with a tuned model, its base, and adapters that share one base."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora import adapter, generation, trained
from qlora.errors import QLoRAError
from qlora.generation import Answer, Sampling
from qlora.records import Turn
from qlora.trained import Trained

COMMANDS = """\
/base           let the base answer beside the tuned model, or no longer
/adapter RUN    switch to another run's adapter on the same base; alone it lists those that are loaded
/system TEXT    begin anew with a system turn; alone it drops it
/new            begin anew
/help           this list
an empty line or Ctrl-D ends"""


@dataclass
class Speaker:
    """A loaded base with one adapter or several, or a model without any; one of them speaks."""

    model: Any
    adapters: dict[str, Trained]
    now: str

    @property
    def found(self) -> Trained:
        """Whose tokens ask."""
        return self.adapters[self.now]

    @property
    def has_base(self) -> bool:
        return self.found.source is not None

    def answer(
        self, turns: list[Turn], sampling: Sampling, say: Any, *, as_base: bool = False
    ) -> Answer:
        """Stream the answer to the last user turn through ``say``."""
        found = self.found
        prompt = found.prompt_ids(turns)
        if as_base:
            with adapter.disabled(self.model):
                return generation.stream(self.model, found.tok, prompt, sampling, say)
        return generation.stream(self.model, found.tok, prompt, sampling, say)

    def switch(self, where: str) -> None:
        """Let another adapter speak, by its name or the path of its run; it is loaded if it is not there.

        Raises:
            CheckpointError: It is no run, or one of another base.
        """
        if where not in self.adapters:
            found = trained.find(where)
            trained.require_one_base(self.found, found)
            if found.name not in self.adapters:
                trained.put_on(self.model, found, found.slot)
                self.adapters[found.name] = found
            where = found.name
        if self.has_base:
            adapter.use(self.model, self.adapters[where].slot)
        self.now = where


def load_speaker(where: str | Path) -> Speaker:
    """The model of a run (its finished adapter, or its newest whole checkpoint), or a model's folder.

    Raises:
        CheckpointError: No run there, nothing in it to load, or the base is not the one it was trained on.
    """
    found = trained.find(where)
    return Speaker(trained.load(found, name=found.slot), {found.name: found}, found.name)


@dataclass
class Conversation:
    """What has been said so far, and how it goes on."""

    speaker: Speaker
    console: Console
    sampling: Sampling
    compare: bool = False
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def start(self) -> None:
        self.turns = [Turn("system", self.system)] if self.system else []

    def ask(self, question: str) -> None:
        """Answer a question; the tuned model's answers are what the conversation remembers.

        Without a chat template (rows trained as plain text) each question stands alone.
        """
        alone = not self.speaker.found.renderer.chat
        asked = Turn("user", question)
        turns = [asked] if alone else [*self.turns, asked]
        if self.compare:
            self._speak("base ", turns, as_base=True)
        spoken = self._speak("tuned" if self.speaker.has_base else "model", turns, as_base=False)
        self.turns = [*turns, Turn("assistant", spoken.text)]

    def obey(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match word:
            case "/new":
                self.start()
                self._note("begun anew")
            case "/base" if self.speaker.has_base:
                self.compare = not self.compare
                self._note(f"the base answers {'first' if self.compare else 'no longer'}")
            case "/base":
                self._note("a model without an adapter has no base to compare with")
            case "/system":
                self.system = rest or None
                self.start()
                self._note(f"begun anew {'with' if rest else 'without'} a system turn")
            case "/adapter" if not self.speaker.has_base:
                self._note(
                    f"{self.speaker.now} is a model without an adapter and takes none; `qlora chat RUN` "
                    "talks to a run"
                )
            case "/adapter" if rest:
                self.speaker.switch(_first(rest))
                self.start()
                self._note(f"begun anew with {self.speaker.now}")
            case "/adapter":
                for name in self.speaker.adapters:
                    self._note(f"{'*' if name == self.speaker.now else ' '} {name}")
            case "/help":
                self._note(COMMANDS)
            case _:
                self._note(f"{word} is no command here; /help lists them")

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _speak(self, label: str, turns: list[Turn], *, as_base: bool) -> Answer:
        self.console.print(f"[bold]{label}[/bold] ", end="")

        def say(piece: str) -> None:
            self.console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

        spoken = self.speaker.answer(turns, self.sampling, say, as_base=as_base)
        self.console.print("" if spoken.stopped else " [dim](cut at --max-new-tokens)[/dim]")
        return spoken


def _first(text: str) -> str:
    """The first word as a shell reads it; all of it where a quote has no end."""
    try:
        return (shlex.split(text) or [text])[0]
    except ValueError:
        return text


def converse(
    where: str | Path,
    console: Console,
    questions: Iterator[str],
    sampling: Sampling,
    *,
    compare: bool = False,
    system: str | None = None,
) -> None:
    """Answer questions until there are none. With ``compare`` the base answers each one first.

    A line that begins with a slash is a command; what goes wrong in one, or in an answer, is told, and the
    conversation goes on.
    """
    console.print("[dim]loading ...[/dim]", end="\r")
    speaker = load_speaker(where)
    console.print(
        f"[dim]{_name(speaker.found)}; /help lists commands, an empty line or Ctrl-D ends[/dim]",
        highlight=False,
    )
    talk = Conversation(speaker, console, sampling, compare and speaker.has_base, system)
    talk.start()
    for question in questions:
        if not question.strip():
            break
        try:
            if question.lstrip().startswith("/"):
                talk.obey(question)
            else:
                talk.ask(question)
        except QLoRAError as error:
            console.print(f"{error}", markup=False, highlight=False, soft_wrap=True)


def _name(found: Trained) -> str:
    if found.source is None:
        return found.name
    what = "finished adapter" if found.source.name == "adapter" else found.source.name
    return f"{found.name}, {what}"
