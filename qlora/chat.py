"""A conversation in the terminal with a tuned model, and beside it, if asked, with its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora import adapter, generation, hardware, loader, records, rundir, store, tokenizer
from qlora.errors import CheckpointError
from qlora.generation import Answer, Sampling
from qlora.preparation import vocabulary_digest
from qlora.recipe import load_recipe
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.rundir import Run
from qlora.settings import Recipe


@dataclass
class Speaker:
    """A loaded model that answers turns; ``as_base`` switches its adapter off for one answer."""

    model: Any
    renderer: Renderer
    source: Path
    form: str

    def answer(
        self, turns: list[Turn], sampling: Sampling, say: Any, *, as_base: bool = False
    ) -> Answer:
        """Stream the answer to the last user turn through ``say``."""
        question = turns[-1].content
        plain = records.alpaca_prompt(question) if self.form == "alpaca" else question
        record = Record((*turns, Turn("assistant", "")), plain_prompt=plain)
        prompt = self.renderer.prompt_ids(record)
        if as_base:
            with adapter.disabled(self.model):
                return generation.stream(self.model, self.renderer.tok, prompt, sampling, say)
        return generation.stream(self.model, self.renderer.tok, prompt, sampling, say)


def load_speaker(where: str | Path) -> Speaker:
    """The model of a run: its finished adapter, or the newest whole checkpoint of an unfinished run.

    Raises:
        CheckpointError: No run there, nothing in it to load, or the base is not the one it was trained on.
    """
    run = rundir.open_run(where)
    source = run.adapter if run.is_complete else store.newest(run.checkpoints)
    if source is None:
        raise CheckpointError(
            f"{run.dir}: the run has no finished adapter and no whole checkpoint."
        )
    recipe = load_recipe(run.recipe_file)
    card = hardware.card()
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe, config.commit)
    ledger = rundir.read_json(run.dir / "data.json")
    try:
        rendering, form = ledger["rendering"], ledger["sources"][0]["format"]
    except (LookupError, TypeError):
        raise CheckpointError(
            f"{run.dir / 'data.json'}: does not say how the run's rows were rendered; it is damaged or of "
            "another version of qlora. Copy the run again, or train again."
        ) from None
    _require_same_tokenizer(run, recipe, ledger, tok)
    base = loader.load_base(recipe, card, config, bars=False)
    renderer = Renderer(tok, chat=rendering == "chat")
    try:
        model = adapter.load(base.model, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n  {_other_base(run, recipe)}") from None
    return Speaker(model, renderer, source, form)


def _require_same_tokenizer(run: Run, recipe: Recipe, ledger: dict[str, Any], tok: Any) -> None:
    """Refuse a tokenizer that gives other ids than the one of the run: each word would be another.

    Raises:
        CheckpointError: It is another one. Runs that kept no digest are let through.
    """
    if ledger.get("vocabulary", "") in ("", vocabulary_digest(tok)):
        return
    raise CheckpointError(
        f"{run.dir}: the run was trained with another tokenizer than {recipe.model.name!r} has now: its "
        f"{len(tok):,} tokens are not those of the run.\n  {_other_base(run, recipe)}"
    )


def _other_base(run: Run, recipe: Recipe) -> str:
    return (
        f"model.name in {run.recipe_file} is {recipe.model.name!r}. If another model lies there by now, "
        "name the one that the run was trained on; else train again."
    )


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

    The tuned model's answers are what the conversation remembers. ``/new`` forgets it. Without a chat
    template (rows trained as plain text) each question stands alone.
    """
    console.print("[dim]loading ...[/dim]", end="\r")
    speaker = load_speaker(where)
    name = _name(speaker.source)
    console.print(
        f"[dim]{name}; /new starts over, an empty line or Ctrl-D ends[/dim]", highlight=False
    )
    opening = [Turn("system", system)] if system else []
    turns = list(opening)
    for question in questions:
        if question.strip() == "/new":
            turns = list(opening)
            continue
        if not question.strip():
            break
        turns = (
            [*turns, Turn("user", question)] if speaker.renderer.chat else [Turn("user", question)]
        )
        if compare:
            _speak(console, "base ", speaker, turns, sampling, as_base=True)
        spoken = _speak(console, "tuned", speaker, turns, sampling, as_base=False)
        turns.append(Turn("assistant", spoken.text))


def _speak(
    console: Console,
    label: str,
    speaker: Speaker,
    turns: list[Turn],
    sampling: Sampling,
    *,
    as_base: bool,
) -> Answer:
    console.print(f"[bold]{label}[/bold] ", end="")

    def say(piece: str) -> None:
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    spoken = speaker.answer(turns, sampling, say, as_base=as_base)
    console.print("" if spoken.stopped else " [dim](cut at --max-new-tokens)[/dim]")
    return spoken


def _name(source: Path) -> str:
    run = Run(source.parent if source.name == "adapter" else source.parent.parent)
    what = "finished adapter" if source.name == "adapter" else source.name
    return f"{run.dir.parent.name}/{run.dir.name}, {what}"
