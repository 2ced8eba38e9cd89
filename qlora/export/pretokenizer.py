"""Which of llama.cpp's ways to cut a text into words gives a tokenizer's own tokens, found by trying.

A GGUF file names its pre-tokenizer, and a wrong one is the quiet reason of a model that was good in
training and talks gibberish in a server. llama.cpp's converter knows the names of published tokenizers
by a hash. For any other, each way is put into a copy of the tokenizer here, and must give the same
tokens of every text.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHED}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# llama.cpp's expressions (llama-vocab.cpp at 0c1e570), each cutting what those before left; and whether a
# word that is a token is taken as it is. Of several names for the same the first is here.
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "qwen2": ((_QWEN2,), False),
    "qwen35": ((_QWEN35,), False),
    "smaug-bpe": ((_LLAMA3,), False),
    "llama-bpe": ((_LLAMA3,), True),
    "tekken": ((_TEKKEN,), True),
    "gpt-4o": ((_GPT4O,), False),
    "deepseek-v3": (_DEEPSEEK3, False),
    "falcon": ((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), False),
}
# What tells the ways apart: numbers, endings, spaces before letters, lines, signs, scripts, marks.
HARD = (
    "What is 12345678 plus 3.14159? It's 12,345,681.14 - I'LL say we've, they're and we'd; don't!",
    "  two spaces,   three\tand a tab\t\tand two\n\n\nthree lines \n \n  x = y*2;\n\n    return (a[0], "
    "'b')\r\n",
    "Überall grüßen Écoles Ärzte. Ελληνικά, Привет, МИР! 東京は大きい。",
    "你好，世界 한국어 हिन्दी ไทย עברית العربية",
    "CamelCaseWords HTTPServer iPhone15 x86_64 v2.0-rc1 a_b__c --flag=on http://a.b/c?d=e&f=1#g ^~| $5 "
    "+1 <=>",
    "1 12 123 1234 12345 ²³ ½ Ⅷ ３４ no1 2nd 3-4 5/6 7:08 100% #9",
    "...!!!??? ---=== ***bold*** `code` \"quoted\" “curly” ‘single’ {'a': [1, 2]} </b> ¿qué? … – —",
    "🚀😶\u200d🌫️✅ e\u0301 n\u0303 \u00a0nbsp\u3000wide\u200bzero",
    " leading space", "trailing space ", "\n", "",
)  # fmt: skip


TOLERATED = 0.01  # of hard and drawn texts
RANDOM = (
    300  # texts of tokens drawn from the vocabulary: they show merges that no sentence of ours has
)
_CALM = (None, "NFC")  # normalizers that leave usual text alone; llama.cpp applies none


@dataclass(frozen=True)
class Match:
    """A way to cut words held against a tokenizer's own.

    Attributes:
        name: llama.cpp's name for it.
        asked: How many of the texts that will be asked get other tokens.
        different: How many of all texts do.
        compared: How many there are: those, hard and drawn ones.
    """

    name: str
    asked: int
    different: int
    compared: int

    @property
    def is_near(self) -> bool:
        """Whether all that will be asked has its own tokens, and nearly all else."""
        return not self.asked and self.different <= TOLERATED * self.compared


def match(tok: Any, texts: Sequence[str]) -> Match | None:
    """The nearest of the ways that give a fast tokenizer's own tokens, or None where none does.

    All of ``texts`` must have the same tokens. Of hard and drawn texts, 1% may not: an apostrophe in the
    middle of a random word is no reason to refuse a model, but it is told. Texts are compared as Unicode
    composes them (NFC) where the tokenizer would compose them itself.

    Args:
        tok: A tokenizer of transformers.
        texts: What will be asked.
    """
    found = [one for name in KINDS if (one := compare(tok, name, texts)) is not None]
    return min((one for one in found if one.is_near), key=lambda one: one.different, default=None)


def compare(tok: Any, name: str, texts: Sequence[str]) -> Match | None:
    """One of the ways held against a tokenizer; None if it is unknown, or the tokenizer cuts no words."""
    own = json.loads(tok.backend_tokenizer.to_str())
    normalizer = (own["normalizer"] or {}).get("type")
    cuts_words = own["model"].get("type") == "BPE" and not own["model"].get("byte_fallback")
    if name not in KINDS or not cuts_words or normalizer not in _CALM:
        return None
    every = [*texts, *HARD, *_drawn(tok)]
    if normalizer == "NFC":
        every = [unicodedata.normalize("NFC", text) for text in every]
    wanted, found = _ids(tok.backend_tokenizer, every), _ids(copy(own, name), every)
    other = [ours != theirs for ours, theirs in zip(wanted, found, strict=True)]
    return Match(name, sum(other[: len(texts)]), sum(other), len(every))


def _drawn(tok: Any) -> list[str]:
    """Texts of random tokens, without what is no whole character."""
    draw = random.Random(0)
    special = set(tok.all_special_ids) | set(tok.added_tokens_decoder)
    usual = [token for token in range(len(tok)) if token not in special]
    rows = [draw.choices(usual, k=24) for _ in range(RANDOM)]
    return [tok.decode(row).replace("\ufffd", "") for row in rows]


def copy(tokenizer: dict[str, Any], name: str) -> Tokenizer:
    """A tokenizer as llama.cpp would run it: the vocabulary and merges, cut in one of its ways."""
    cuts, whole_words = KINDS[name]
    model = {**tokenizer["model"], "ignore_merges": whole_words}
    made = Tokenizer.from_str(
        json.dumps({**tokenizer, "model": model, "normalizer": None, "pre_tokenizer": None})
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
