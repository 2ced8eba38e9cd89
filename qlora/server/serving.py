"""Runs opened to be served: one base, every run's adapter beside it, and each request to its own.

A request is asked with the tokens of training (:meth:`qlora.trained.Trained.prompt_ids`), and before the
first one is taken each adapter's logits, as they are served, are held against peft's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora import adapter, trained
from qlora.engine import Ending, Engine, Question
from qlora.engine.slots import Slots
from qlora.engine.stacked import Stacked
from qlora.errors import CheckpointError, ModelError, QLoRAError
from qlora.generation import Sampling
from qlora.records import Turn
from qlora.server.protocol import Asked, BadRequest
from qlora.trained import Trained

BASE = "base"  # the name of the base without any adapter
PROBE = "What is two plus two? Say it in one word, and why."
PROBE_TOKENS, PROBE_STEPS = 24, 3
# Of the range of the logits: what other sums of the same terms may differ by.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Limits:
    """What one server does at most."""

    slots: int = 8  # requests that are answered at once
    waiting: int = 8  # that wait besides
    seconds: float = 120.0  # for one request, waiting included
    max_new_tokens: int = 1024  # an answer, and what one gets that asks for no other length
    max_length: int | None = None  # prompt and answer; None: as many as the model has positions
    body_bytes: int = 2**20


USUAL = Limits()


@dataclass(frozen=True)
class Voice:
    """A name that requests may give as ``model``, and who answers to it."""

    name: str
    found: Trained
    adapter: str | None  # None: the base, or a model without an adapter


class Unknown(BadRequest):
    """A request for a model that is not served."""


class Serving:
    """A loaded base with its adapters, its names, and the engine that answers."""

    def __init__(
        self,
        founds: Sequence[Trained],
        limits: Limits = USUAL,
        heard: Callable[[Question, Ending], None] = lambda question, ending: None,
    ) -> None:
        self.limits = limits
        self.began = int(time.time())
        self.voices, self.aliases = names(founds)
        for other in founds[1:]:
            trained.require_one_base(founds[0], other)
        model, adapters, expected = _together(founds)
        self.positions = positions(model, limits)
        stacked = Stacked(model, adapters)
        _prove(model, stacked, expected)
        self.engine = Engine(
            model, founds[0].tok, stacked, slots=limits.slots, waiting=limits.waiting,
            seconds=limits.seconds, heard=heard,
        )  # fmt: skip
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self._asking = threading.Lock()  # a tokenizer is for one thread at a time

    def voice(self, name: str) -> Voice:
        """Who answers to a name.

        Raises:
            Unknown: Nobody does; lists who would.
        """
        found = self.voices.get(self.aliases.get(name, name))
        if found is None:
            known = ", ".join([*self.aliases, *self.voices])
            shown = name if len(name) <= 64 else f"{name[:64]}..."
            raise Unknown(f"there is no model {shown!r} here. There are: {known}.", "model")
        return found

    def questions(self, asked: Asked) -> list[Question]:
        """A request as questions to the engine, one for each of its prompts.

        Raises:
            BadRequest: The model is unknown, was not trained on what is asked, or has not the room.
        """
        voice = self.voice(asked.model)
        with self._asking:
            prompts = [self._prompt(voice, asked)] if asked.turns else self._texts(voice, asked)
        cap, wanted = self.limits.max_new_tokens, asked.max_tokens
        if wanted is not None and wanted > cap:
            raise BadRequest(
                f"max_tokens is {wanted:,}; this server gives at most {cap:,} (--max-new-tokens).",
                "max_tokens",
            )
        found = []
        for ids in prompts:
            room = self.positions - len(ids)
            if room < (wanted or 1):
                more = f" and max_tokens {wanted:,}" if wanted else ""
                raise BadRequest(
                    f"the prompt has {len(ids):,} tokens{more}; the model has {self.positions:,} positions "
                    "for both prompt and answer. Shorten one of them.",
                    "messages" if asked.turns else "prompt",
                )
            length = wanted or min(cap, room)
            sampling = Sampling(asked.temperature, asked.top_p, length)
            found.append(Question(tuple(ids), voice.adapter, sampling, asked.seed, asked.stop))
        return found

    def _prompt(self, voice: Voice, asked: Asked) -> list[int]:
        found, turns = voice.found, asked.turns
        if not found.renderer.chat and (len(turns) > 1 or turns[0].role != "user"):
            raise BadRequest(
                f"{voice.name!r} was trained on plain text, a question and its answer: messages may hold "
                "one message, the user's. Ask /v1/completions for anything else.",
                "messages",
            )
        try:
            ids = found.prompt_ids(turns, asked.tools)
            if asked.tools and ids == found.prompt_ids(turns):
                raise BadRequest(f"the chat template of {voice.name!r} shows no tools.", "tools")
        except QLoRAError as error:
            raise BadRequest(f"{error}", "messages") from None
        return ids

    def _texts(self, voice: Voice, asked: Asked) -> list[list[int]]:
        room = self.limits.slots + self.limits.waiting
        if len(asked.prompts) > room:  # told before all of them are cut into tokens
            raise BadRequest(
                f"prompt holds {len(asked.prompts):,} prompts; this server takes at most {room} at once.",
                "prompt",
            )
        found = []
        for prompt in asked.prompts:
            if isinstance(prompt, str):
                ids = list(voice.found.tok(prompt, verbose=False)["input_ids"])
            else:
                ids = list(prompt)
            if not ids or max(ids) >= self.vocabulary:
                what = "no tokens" if not ids else f"the token {max(ids)}"
                raise BadRequest(
                    f"prompt holds {what}; the model has {self.vocabulary:,} tokens, from 0 on.",
                    "prompt",
                )
            found.append(ids)
        return found


def names(founds: Sequence[Trained]) -> tuple[dict[str, Voice], dict[str, str]]:
    """Who is served by which name, and shorter names for some: a run's recipe means its newest run here.

    Raises:
        CheckpointError: Two have one name, or a model without an adapter is not alone.
    """
    voices: dict[str, Voice] = {}
    newest: dict[str, str] = {}
    for found in founds:
        if found.run is None:
            if len(founds) > 1:
                raise CheckpointError(
                    f"{found.name}: a model without an adapter, and it shares its base with no other. "
                    "Serve it alone."
                )
            return {found.name: Voice(found.name, found, None)}, {}
        name = found.name
        if found.source is not None and found.source.resolve() != found.run.adapter.resolve():
            name = f"{name}/{found.source.name}"
        if name in voices:
            raise CheckpointError(
                f"{name}: named twice. Name each run once, or rename a folder: it is the model's name."
            )
        voices[name] = Voice(name, found, name)
        recipe = found.run.dir.parent.name
        newest[recipe] = max(name, newest.get(recipe, name))
    voices[BASE] = Voice(BASE, founds[0], None)
    return voices, {recipe: name for recipe, name in newest.items() if recipe not in voices}


def positions(model: Any, limits: Limits) -> int:
    """How many tokens prompt and answer may have together.

    Raises:
        ModelError: More are asked for than the model has.
    """
    config = model.config.get_text_config()
    own = getattr(config, "max_position_embeddings", None) or 2**20
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond them one long row turns the frequencies of all (transformers 5.23), whose keys are kept.
        short = rope.get("original_max_position_embeddings")
        own = min(own, short or getattr(config, "original_max_position_embeddings", None) or own)
    if limits.max_length is not None and limits.max_length > own:
        raise ModelError(
            f"--max-length is {limits.max_length:,}, and the model has {own:,} positions. Ask for at most "
            "these."
        )
    return int(limits.max_length or own)


def _together(
    founds: Sequence[Trained],
) -> tuple[Any, dict[str, adapter.Matrices], dict[str | None, _Probe]]:
    """The bare base, the matrices of each run, and what each has to answer to a probe."""
    model = trained.load_base(founds[0])
    for other in founds[1:]:
        trained.require_same_weights(other, model)
    probe = founds[0].tok(PROBE)["input_ids"][:PROBE_TOKENS]
    adapters: dict[str, adapter.Matrices] = {}
    expected: dict[str | None, _Probe] = {}
    for voice in names(founds)[0].values():
        if voice.adapter is None:
            continue
        on = trained.put_on(model, voice.found, "default")
        expected[voice.adapter] = _Probe.of(on, probe)
        model, adapters[voice.adapter] = adapter.take_off(on, "default", voice.name)
    expected[None] = _Probe.of(model, probe)
    return model, adapters, expected


@dataclass(frozen=True)
class _Probe:
    """Some tokens, and a model's logits behind the last few of them."""

    ids: list[int]
    logits: torch.Tensor  # (PROBE_STEPS, V), fp32

    @classmethod
    def of(cls, model: Any, ids: list[int]) -> _Probe:
        tokens = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            return cls(ids, model(tokens, use_cache=False).logits[0, -PROBE_STEPS:].float())


def _prove(model: Any, stacked: Stacked, expected: dict[str | None, _Probe]) -> None:
    """Compare what will be served, step by step and in a batch, with the libraries' own whole pass.

    Raises:
        ModelError: They are not the same model.
    """
    slots = Slots(model, stacked, len(expected))
    for slot, (name, probe) in enumerate(expected.items()):
        slots.fill(slot, probe.ids[: 1 - PROBE_STEPS], name)
    for step in range(1, PROBE_STEPS):
        logits = slots.step([probe.ids[step - PROBE_STEPS] for probe in expected.values()])
        for slot, (name, probe) in enumerate(expected.items()):
            wanted = probe.logits[step]
            off = float((logits[slot] - wanted).abs().max())
            allowed = TOLERANCE.get(model.dtype, 0.1) * float(wanted.max() - wanted.min())
            if not off <= allowed:
                raise ModelError(
                    f"{name or BASE}: its logits as they would be served are {off:.3g} off those of a "
                    f"whole pass ({allowed:.3g} would be rounding), so {type(model).__name__} cannot be "
                    "served here. Export it and serve it with another program."
                )


def ask(
    serving: Serving, name: str, turns: Sequence[Turn], sampling: Sampling
) -> tuple[str, Ending]:
    """One conversation's answer, as a request would get it, waited for."""
    asked = Asked(
        name, turns=tuple(turns), temperature=sampling.temperature, top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
    )  # fmt: skip
    (question,) = serving.questions(asked)
    return serving.engine.answer(question)
