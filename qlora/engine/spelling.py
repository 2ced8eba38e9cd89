"""Tokens as text, piece by piece: a piece is out when no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what a tokenizer gives for the first bytes of a letter


class Spelling:
    """One answer's text as its tokens come, up to the first of some stop strings, which is left out.

    The pieces together are what the tokenizer makes of all tokens at once, special ones left out (but for
    bytes that are no letters, which some tokenizers judge by what comes after them).
    """

    def __init__(self, tok: Any, stop: Sequence[str] = ()) -> None:
        self.tok = tok
        self.stop = tuple(stop)
        self.ended = False  # a stop string was found
        self._ids: list[int] = []
        self._begin = self._read = (
            0  # tokens before `_read` are out; those from `_begin` lead on to them
        )
        self._held = ""  # what might be the beginning of a stop string

    def feed(self, token: int) -> str:
        """The text that has become certain with one more token; often none."""
        self._ids.append(token)
        said = self._decoded(self._begin, self._read)
        now = self._decoded(self._begin, len(self._ids))
        if now.endswith(_HALF) or len(now) <= len(said):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._until_stop(now[len(said) :], last=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        said = self._decoded(self._begin, self._read)
        rest = self._decoded(self._begin, len(self._ids))[len(said) :]
        self._begin = self._read = len(self._ids)
        return "" if self.ended else self._until_stop(rest, last=True)

    def _decoded(self, start: int, end: int) -> str:
        return str(
            self.tok.decode(
                self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _until_stop(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        self._held = ""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        keep = 0 if last else max((_begun(text, stop) for stop in self.stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text begin a stop string.

    >>> _begun("one two \\n#", "\\n###")
    2
    """
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
