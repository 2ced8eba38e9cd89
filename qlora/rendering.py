"""One record as tokens and labels: which of them the model is given and which it learns.

No generation markers are needed: where an assistant turn begins and ends is found by rendering the turns
before it, as characters of the whole text, and carried to tokens by the tokenizer's offsets. What would
train is decoded again and held against what was said. A row for which any of this fails is an error.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora import tokenizer
from qlora.errors import DataError
from qlora.records import Record
from qlora.tokenizer import Asked

IGNORED = -100  # the label that every loss of the field skips
AHEAD_CHARS = 2**22  # of texts that are made at once, before they are needed


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a turn says, as a half-open range of characters or tokens, and whether it trains."""

    start: int
    end: int
    turn: int
    trains: bool
    spoken: bool = True  # by the assistant; else a turn that must not train where everything does


@dataclass(frozen=True, slots=True)
class Spelled:
    """A record as text: ``answers`` are its assistant turns, each with the token that ends it."""

    text: str
    answers: tuple[Stretch, ...]
    plain: bool  # no template wrote it: the tokenizer adds its BOS, and an eos follows
    everything: bool  # all of it trains, but for turns that must not


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it: ``trained`` are the token ranges that are learned.

    Position 0 is in none of them: no token before it could predict it.
    """

    input_ids: list[int]
    trained: tuple[tuple[int, int], ...]
    answers: tuple[Stretch, ...] = ()

    @property
    def labels(self) -> list[int]:
        """``input_ids`` where they train, -100 elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.trained:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def supervised(self) -> int:
        return sum(end - start for start, end in self.trained)


class Renderer:
    """Turns records into tokens one way: through the chat template, or as plain text.

    Training, held-out loss and generation share one renderer, so what is asked later is what was
    trained. ``loss_on`` is the recipe's ``data.loss_on``.
    """

    def __init__(self, tok: Any, *, chat: bool, loss_on: str = "completions") -> None:
        self.tok = tok
        self.chat = chat
        self.loss_on = loss_on
        self.closing = tokenizer.end_of_turn(tok) if chat else tok.eos_token_id
        if self.closing is None:
            raise DataError(
                "the chat template closes an assistant turn with no special token, so the model could "
                "never learn to stop. Name another template in data.chat_template."
            )
        self.closing_text: str = tok.convert_ids_to_tokens(self.closing)
        self._expected: deque[Record] = deque()
        self._ahead: dict[int, Record] = {}  # records whose texts are there, by id
        self._texts: dict[tuple[int, int | None, bool], str | DataError] = {}
        self._opens = False  # whether prompts were seen to end with what answers lack

    # --- what the model is asked

    def prompt(self, record: Record) -> str:
        """What the model is given before it has to answer the record's last turn."""
        if self.chat:
            return self._render(record, len(record.turns) - 1, reply=True)
        assert record.plain_prompt is not None, "the reader of rows lets only such records through"
        return record.plain_prompt

    def prompt_ids(self, record: Record) -> list[int]:
        """:meth:`prompt` as tokens; a template writes its own BOS, plain text gets the tokenizer's."""
        text = self.prompt(record)
        return list(self.tok(text, add_special_tokens=not self.chat, verbose=False)["input_ids"])

    # --- what the model learns

    def encode(self, record: Record) -> Encoded:
        """Tokens and trained ranges of one record.

        Through a chat template an assistant turn trains with the token that ends it; otherwise the
        completion and an end-of-text token. A plain text trains as a whole.

        Raises:
            DataError: The template hides a turn or rewrites earlier ones, nothing in the row would
                train, or what would train does not decode to what was said.
        """
        (row,) = self.tokenize([self.spell(record)])
        if isinstance(row, DataError):
            raise row
        return row

    def expect(self, records: Sequence[Record]) -> None:
        """Say which records are spelled next, and in this order: their texts are made many at once."""
        self._expected = deque(records)

    def spell(self, record: Record) -> Spelled:
        """The record's text and where its answers stand in it: all that needs the template.

        Raises:
            DataError: As :meth:`encode`.
        """
        if self.chat and record.turns:
            return self._spell_chat(record)
        question = record.plain_prompt or ""
        text = question + (record.turns[-1].content if record.turns else record.text)
        answer = Stretch(len(question), len(text), len(record.turns) - 1, True)
        return Spelled(
            text,
            (answer,) if record.turns else (),
            plain=True,
            everything=self.loss_on == "all" or not record.turns,
        )

    def tokenize(self, spelled: Sequence[Spelled]) -> list[Encoded | DataError]:
        """Many spelled records as tokens, in parallel inside the tokenizer; errors in their places."""
        rows: list[Any] = [None] * len(spelled)
        checks: list[tuple[int, str, list[int]]] = []
        for plain in (False, True):
            chosen = [i for i, one in enumerate(spelled) if one.plain is plain]
            if not chosen:
                continue
            batch = self.tok(
                [spelled[i].text for i in chosen],
                add_special_tokens=plain,  # a template writes its own
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # rows longer than the model are our business
            )
            for i, ids, encoding in zip(chosen, batch["input_ids"], batch.encodings, strict=True):
                try:
                    rows[i] = self._place(spelled[i], ids, encoding)
                except DataError as error:
                    rows[i] = error
                    continue
                for meant, said in zip(spelled[i].answers, rows[i].answers, strict=True):
                    if said.trains:  # from its first whole token on
                        first = encoding.token_to_chars(said.start)
                        start = first[0] if first else meant.end
                        eos = self.closing_text if plain and len(ids) < said.end else ""
                        words = spelled[i].text[start : meant.end] + eos
                        checks.append((i, words, rows[i].input_ids[said.start : said.end]))
        decoded = self.tok.backend_tokenizer.decode_batch(
            [ids for _, _, ids in checks], skip_special_tokens=False
        )
        for (i, meant, _), said in zip(checks, decoded, strict=True):
            if said != meant and not self._same(meant, said):
                rows[i] = DataError("what would train decodes to something else than the answer")
        return rows

    def _place(self, spelled: Spelled, ids: list[int], encoding: Any) -> Encoded:
        """Character ranges as token ranges. A token that straddles a start does not train."""
        answers = []
        for answer in spelled.answers:
            first = _token_at(encoding, range(answer.start, answer.end))
            last = _token_at(encoding, range(answer.end - 1, answer.start - 1, -1))
            if first is None or last is None:
                raise DataError("the tokenizer leaves nothing of an answer")
            while (after := encoding.token_to_chars(last + 1)) and after[0] < answer.end:
                last += 1  # more bytes of the last character
            if encoding.token_to_chars(first)[0] < answer.start:
                first += 1
                after = encoding.token_to_chars(first)
                left = spelled.text[after[0] if after else answer.end : answer.end]
                if answer.trains and left in ("", self.closing_text):
                    raise DataError(
                        "the tokenizer makes one token of the answer and what stands before it, so "
                        "nothing of it would train; begin it with a space, or end the prompt with a line"
                    )
            answers.append(replace(answer, start=first, end=last + 1))
        if spelled.plain:
            ids = ids if ids and ids[-1] == self.closing else [*ids, self.closing]
            answers = [replace(answer, end=len(ids)) for answer in answers]
        if spelled.everything:
            masked = [(a.start, a.end) for a in answers if not a.trains]
            edges = [1, *(edge for pair in masked for edge in pair), len(ids)]
            trained = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
        else:
            trained = [(max(a.start, 1), a.end) for a in answers if a.trains]
        trained = [(start, end) for start, end in trained if start < end]
        if not trained:
            raise DataError("no token of it would train")
        return Encoded(ids, tuple(trained), tuple(answers))

    def _same(self, meant: str, decoded: str) -> bool:
        """Whether two texts are one to the tokenizer, which may normalize or drop spaces."""
        if "".join(meant.split()) == "".join(decoded.split()):
            return True
        again = self.tok.decode(
            self.tok(meant, add_special_tokens=False, verbose=False)["input_ids"]
        )
        return "".join(again.split()) == "".join(decoded.split())

    # --- the chat template

    def _spell_chat(self, record: Record) -> Spelled:
        self._look_ahead(record)
        text = self._render(record)
        last = max(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
        stretches = []
        for index, turn in enumerate(record.turns):
            if turn.role == "assistant":
                stretches.append(
                    self._answer(record, index, text, self._trains(record, index, last))
                )
            elif not _shown(turn.content, text):
                raise DataError(
                    f"the chat template does not show turn {index + 1} ({turn.role}) to the model"
                )
            elif self.loss_on == "all" and turn.train is False:
                spoken = stretches[-1].end if stretches else 0
                stretches.append(self._masked(record, index, text, spoken))
        return Spelled(text, tuple(stretches), plain=False, everything=self.loss_on == "all")

    def _trains(self, record: Record, index: int, last: int) -> bool:
        said = record.turns[index].train
        if said is not None:
            return said
        if self.loss_on == "last_assistant":
            return index == last
        return self.loss_on != "completions" or index >= record.prompt_turns

    def _answer(self, record: Record, index: int, text: str, trains: bool) -> Stretch:
        """From where an assistant turn begins to speak to the end of the token that ends it.

        An empty thinking block that the template puts before the answer is part of the answer.
        """
        turn = record.turns[index]
        words = turn.content.strip()
        calls = turn.fields.get("tool_calls") or ()
        start = self._start(record, index, text)
        close = text.find(self.closing_text, start)
        if close >= 0 and not calls and text[start:close].strip() == words:
            return Stretch(start, close + len(self.closing_text), index, trains)
        # Thoughts, tool calls, or an answer that holds the end of turn as text: its last one ends it.
        limit = self._limit(record, index, text)
        closes = [m.start() for m in re.finditer(re.escape(self.closing_text), text[:limit])]
        closes = [close for close in reversed(closes) if close >= start]
        visible = words.rpartition("</think>")[2].strip() or words  # a template may strip thoughts
        for call in calls:
            if self._render(_with_call_renamed(record, index, call)) == text:
                raise DataError(
                    f"the chat template drops the tool call in turn {index + 1}; name one that knows "
                    "tools in data.chat_template"
                )
        for wanted in (words, visible):
            for close in closes:
                said = text[start:close].rstrip()
                if wanted in said if calls else said.endswith(wanted):
                    return Stretch(start, close + len(self.closing_text), index, trains)
        at = text.find(visible, start, limit)
        if at < 0:
            raise DataError(f"the chat template drops or rewrites the answer in turn {index + 1}")
        if trains:
            raise DataError(
                f"the end-of-turn token is not where the answer in turn {index + 1} ends, so the model "
                "would not learn to stop there"
            )
        return Stretch(start, at + len(visible), index, False)

    def _start(self, record: Record, index: int, text: str) -> int:
        """Where an assistant turn begins to speak."""
        before = self._render(record, index, reply=True)
        if text.startswith(before):
            return len(before)
        # Some prompts end with an opened thinking block that a given answer does not have.
        if not self._opens:
            self._opens = True
            coming = self._ahead.values()
            self._have([(one, turn, False) for one in coming for turn in _answers(one)])
        turns = self._render(record, index)
        if not text.startswith(turns):
            raise DataError(
                f"the chat template renders the turns before turn {index + 1} differently once it "
                "is there, so what trains cannot be told; use one question and one answer a row"
            )
        common = _common(before, text)
        words = record.turns[index].content.strip()
        at = text.rfind(words, len(turns), common + len(words))  # it may begin like the block: "<"
        return at if at + len(words) >= common else common

    def _limit(self, record: Record, index: int, text: str) -> int:
        """Where the turn after an answer says its first word, so that the answer has ended before."""
        if index + 1 == len(record.turns):
            return len(text)
        before, following = record.turns[: index + 1], record.turns[index + 1]
        other = replace(following, content="1" if following.content.strip()[:1] == "0" else "0")
        turns = (*before, other, *record.turns[index + 2 :])
        return _common(text, self._render(replace(record, turns=turns)))

    def _masked(self, record: Record, index: int, text: str, spoken: int) -> Stretch:
        """All of a turn that is not an answer; ``spoken`` is where the answer before it ends."""
        start, end = (self._render(record, turns) if turns else "" for turns in (index, index + 1))
        first = len(start) if text.startswith(start) else spoken
        last = len(end) if text.startswith(end) else self._limit(record, index, text)
        if record.turns[index].content.strip() not in text[first:last]:
            raise DataError(
                f"turn {index + 1} says train: false, but where it stands cannot be told"
            )
        return Stretch(first, last, index, False)

    def _look_ahead(self, record: Record) -> None:
        """Have ready what spelling this record asks for, and the ones that are expected after it."""
        if id(record) in self._ahead:
            return
        self._ahead, self._texts, chars = {id(record): record}, {}, _cost(record)
        if chars > AHEAD_CHARS:
            self._ahead = {}  # its texts are made when they are needed
        if self._expected and self._expected[0] is record:
            self._expected.popleft()
            while self._expected and (chars := chars + _cost(self._expected[0])) <= AHEAD_CHARS:
                one = self._expected.popleft()
                self._ahead[id(one)] = one
        coming = self._ahead.values()
        wanted: list[tuple[Record, int | None, bool]] = [(one, None, False) for one in coming]
        wanted += [(one, turn, True) for one in coming for turn in _answers(one)]
        if self._opens:
            wanted += [(one, turn, False) for one in coming for turn in _answers(one)]
        self._have(wanted)

    def _have(self, wanted: Sequence[tuple[Record, int | None, bool]]) -> None:
        asked = [Asked(one.turns[:turns], one.tools, reply) for one, turns, reply in wanted]
        for (one, *rest), text in zip(wanted, tokenizer.render_all(self.tok, asked), strict=True):
            self._texts[(id(one), *rest)] = text

    def _render(self, record: Record, turns: int | None = None, *, reply: bool = False) -> str:
        text = None
        if id(record) in self._ahead:
            text = self._texts.get((id(record), turns, reply))
        if text is None:
            return tokenizer.render(self.tok, record.turns[:turns], record.tools, reply=reply)
        if isinstance(text, DataError):
            raise text
        return text


def _answers(record: Record) -> list[int]:
    return [index for index, turn in enumerate(record.turns) if turn.role == "assistant"]


def _cost(record: Record) -> int:
    """Characters, about, of all the texts that spelling a record asks for."""
    return sum(len(turn.content) for turn in record.turns) * (len(_answers(record)) + 1)


def _token_at(encoding: Any, characters: range) -> int | None:
    """The token of the first of these characters that has one: a normalizer may drop some."""
    return next(
        (t for c in characters if (t := encoding.char_to_token(c)) is not None),
        None,
    )


_RUN = re.compile(r"\w+")


def _shown(content: str, text: str) -> bool:
    """Whether a turn's words are in the text: as they are, or at least their longest word."""
    words = content.strip()
    if words in text:
        return True
    return max(_RUN.findall(words), key=len, default=words) in text


def _with_call_renamed(record: Record, index: int, call: Any) -> Record:
    """The record with another function's name in one of a turn's tool calls."""
    turn = record.turns[index]
    other = {**call, "function": {**call["function"], "name": f"{call['function']['name']}_"}}
    calls = [other if one is call else one for one in turn.fields["tool_calls"]]
    turn = replace(turn, fields={**turn.fields, "tool_calls": calls})
    return replace(record, turns=(*record.turns[:index], turn, *record.turns[index + 1 :]))


def _common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
