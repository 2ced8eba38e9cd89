"""One record as tokens and labels: which of them the model is given and which it learns.

Spans are placed by character offsets in the rendered text, so any chat template works whose text of
the first turns is the beginning of its text of all turns; no generation markers are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora import tokenizer
from qlora.errors import DataError
from qlora.records import Record

IGNORED = -100  # the label that every loss of the field skips


@dataclass(frozen=True)
class Encoded:
    """One row as the model sees it: ``labels[i]`` is ``input_ids[i]`` where it trains, else -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)


class Renderer:
    """Turns records into tokens one way: through the chat template, or as plain text.

    Training, held-out loss and generation share one renderer, so what is asked later is what was
    trained.
    """

    def __init__(self, tok: Any, *, chat: bool, completion_only: bool = True) -> None:
        self.tok = tok
        self.chat = chat
        self.completion_only = completion_only
        self.closing = tokenizer.end_of_turn(tok) if chat else tok.eos_token_id
        if self.closing is None:
            raise DataError(
                "the chat template closes an assistant turn with no special token, so the model could "
                "never learn to stop. Name another template in data.chat_template."
            )

    def prompt(self, record: Record) -> str:
        """What the model is given before it has to answer the record's last turn."""
        if self.chat:
            return tokenizer.render(self.tok, record.turns[:-1], reply=True)
        assert record.plain_prompt is not None, "data.renderer_for lets only such records through"
        return record.plain_prompt

    def prompt_ids(self, record: Record) -> list[int]:
        """:meth:`prompt` as tokens; a template writes its own BOS, plain text gets the tokenizer's."""
        return list(self.tok(self.prompt(record), add_special_tokens=not self.chat)["input_ids"])

    def encode(self, record: Record) -> Encoded:
        """Tokens and labels of one record.

        Through a chat template every assistant turn trains, with the token that ends it; otherwise
        the completion and an end-of-text token. A plain text trains as a whole.

        Raises:
            DataError: The template rewrites earlier turns, or nothing in the row would train.
        """
        if self.chat and record.turns:
            row = self._encode_chat(record)
        else:
            row = self._encode_plain(record)
        if not self.completion_only:
            return Encoded(row.input_ids, list(row.input_ids))
        if not row.supervised:
            raise DataError("no token of it would train")
        return row

    def _encode_chat(self, record: Record) -> Encoded:
        text = tokenizer.render(self.tok, record.turns)
        encoding = self.tok(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        row = _label(encoding, self._assistant_spans(record, text))
        self._include_end_of_turn(row)
        return row

    def _encode_plain(self, record: Record) -> Encoded:
        question = self.prompt(record) if record.turns else ""
        text = question + (record.turns[-1].content if record.turns else record.text)
        encoding = self.tok(text, return_offsets_mapping=True, verbose=False)
        row = _label(encoding, [(len(question), len(text))])
        eos = self.tok.eos_token_id
        if row.input_ids[-1] != eos:
            row.input_ids.append(eos)
            row.labels.append(IGNORED)
        row.labels[-1] = eos
        return row

    def _assistant_spans(self, record: Record, text: str) -> list[tuple[int, int]]:
        """Where each assistant turn stands in the rendered text, as character spans."""
        spans = []
        for index, turn in enumerate(record.turns):
            if turn.role != "assistant":
                continue
            before = tokenizer.render(self.tok, record.turns[:index], reply=True)
            if not text.startswith(before):
                raise DataError(
                    f"the chat template renders the turns before turn {index + 1} differently once it "
                    "is there, so what trains cannot be told; use one question and one answer a row"
                )
            content = turn.content.strip()
            start = text.find(content, len(before))
            if start < 0:
                raise DataError(
                    f"the chat template drops or rewrites the answer in turn {index + 1}"
                )
            # From where the assistant begins to speak: an empty thinking block is part of the answer.
            spans.append((len(before), start + len(content)))
        return spans

    def _include_end_of_turn(self, row: Encoded) -> None:
        """Supervise the token that closes each trained span: without it the model never stops."""
        ended = False
        for index in range(1, len(row.labels)):
            if row.labels[index - 1] == IGNORED or row.labels[index] != IGNORED:
                continue
            # Some templates put a space or a line break between the answer and the token that ends it.
            window = row.input_ids[index : index + 3]
            if self.closing in window:
                for step in range(index, index + window.index(self.closing) + 1):
                    row.labels[step] = row.input_ids[step]
                ended = True
        if not ended:
            raise DataError("the end-of-turn token is not where the answer ends")


def _label(encoding: Any, spans: Sequence[tuple[int, int]]) -> Encoded:
    """Label the tokens that begin inside a span; a token that straddles its start does not train."""
    ids = list(encoding["input_ids"])
    labels = [IGNORED] * len(ids)
    for index, (start, end) in enumerate(encoding["offset_mapping"]):
        if end > start and any(low <= start and end <= high for low, high in spans):
            labels[index] = ids[index]
    return Encoded(ids, labels)
