"""Tokens out of a model: many answers at a time, or one as it is spoken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from qlora import tokenizer


@dataclass(frozen=True)
class Answer:
    """Generated text, and whether the model ended it by itself rather than at the length limit."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else sampled."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def config(self, model: Any, tok: Any) -> GenerationConfig:
        """A configuration of its own, so that nothing of the base's ``generation_config`` leaks in."""
        greedy = self.temperature == 0.0
        chosen = {} if greedy else {"temperature": self.temperature, "top_p": self.top_p}
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=tok.pad_token_id,
            eos_token_id=tokenizer.stop_ids(tok, model.generation_config),
            **chosen,
        )


def answer_all(
    model: Any,
    tok: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda starts, _: starts,
) -> list[Answer]:
    """One answer per prompt, in order. Prompts of like length share a batch, padded on the left.

    The model's mode and the random state are left as they were.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    config = sampling.config(model, tok)
    was_training = model.training
    device = model.device
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for start in progress(range(0, len(order), batch_size), "answering"):
                chosen = order[start : start + batch_size]
                ids, mask = left_padded([prompts[index] for index in chosen], tok.pad_token_id)
                with torch.inference_mode():
                    output = model.generate(
                        input_ids=ids.to(device),
                        attention_mask=mask.to(device),
                        generation_config=config,
                    )
                for index, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                    answers[index] = _cut(row, tok, set(config.eos_token_id))
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def stream(
    model: Any, tok: Any, prompt: Sequence[int], sampling: Sampling, say: Callable[[str], None]
) -> Answer:
    """Generate one answer and call ``say`` with each piece of text as soon as it is certain."""
    config = sampling.config(model, tok)
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=_Speaker(tok, say),
        )
    return _cut(output[0, ids.shape[1] :].tolist(), tok, set(config.eos_token_id))


class _Speaker(TextStreamer):
    """transformers' streamer, speaking to a function instead of standard output."""

    def __init__(self, tok: Any, say: Callable[[str], None]) -> None:
        super().__init__(tok, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.say(text)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask, int64; the prompts end together, so that the last column goes on."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[index, width - len(prompt) :] = 1
    return ids, mask


def _cut(row: list[int], tok: Any, stops: set[int]) -> Answer:
    end = next((position for position, token in enumerate(row) if token in stops), None)
    text = tok.decode(row if end is None else row[:end], skip_special_tokens=True)
    return Answer(text.strip(), end is not None)
