"""Text to tokens and back: padding, end of turn and chat template, checked and not assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from qlora.errors import DataError, ModelError
from qlora.recipe import is_local, local_path
from qlora.records import Turn
from qlora.settings import Recipe

MAX_TEMPLATE_CHARS = 64 * 1024

# Tokens that model families reserve for padding, in the order of preference. Never a new token: the
# embedding would have to grow.
_PAD_NAMES = (
    "<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|dummy_0|>",
    "<|endoftext|>", "<unk>",
)  # fmt: skip


def load(recipe: Recipe, commit: str | None = None) -> tuple[Any, str]:
    """The base's fast tokenizer with a pad token from its own vocabulary.

    Returns:
        The tokenizer, and a sentence about a pad token that had to be chosen (or nothing).

    Raises:
        ModelError: No fast tokenizer, no end-of-text token, or an unreadable chat template.
    """
    name = recipe.model.name
    where = str(local_path(name)) if is_local(name) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=commit or recipe.model.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "backend tokenizer" in first:  # a list of what to install follows; it is not that
            first = "there is no tokenizer.json beside it. Fetch the whole model again."
        raise ModelError(
            f"model.name is {name!r}, whose tokenizer cannot be loaded: {first}"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.name is {name!r}, which has no fast tokenizer (tokenizer.json). Masks are placed by "
            "character offsets, which only fast tokenizers report. Convert it with save_pretrained."
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.name is {name!r}, whose tokenizer has no end-of-text token, so the model could "
            "never learn to stop. Set eos_token in its tokenizer_config.json."
        )
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = _read_template(local_path(recipe.data.chat_template))
    note = _choose_pad(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer, note


def render(
    tokenizer: Any,
    turns: Sequence[Turn],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    reply: bool = False,
) -> str:
    """The chat template's text of some turns; with ``reply``, up to where the assistant speaks.

    Raises:
        DataError: The template refuses these turns (many refuse a system turn).
    """
    try:
        text = tokenizer.apply_chat_template(
            [turn.message() for turn in turns],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=reply,
        )
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"the chat template refuses the turns {[turn.role for turn in turns]}: {error}"
        ) from None
    assert isinstance(text, str)
    return text


def require_template(tokenizer: Any, why: str) -> None:
    """Refuse to go on without a chat template.

    Raises:
        ModelError: The tokenizer has none; says what can be done.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{why}, but the tokenizer has no chat template. Name a Jinja file in data.chat_template, "
            "choose the instruction-tuned variant of the model, or bring prompt/completion rows, "
            "which train as plain text."
        )


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that closes an assistant turn in the chat template, or None without a template.

    It need not be the tokenizer's eos: Llama 3's base tokenizer ends texts with one token and turns with
    another.
    """
    if not tokenizer.chat_template:
        return None
    text = render(tokenizer, [Turn("user", "hi"), Turn("assistant", "qlora")])
    tail = text[text.rindex("qlora") + len("qlora") :]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in ids if token in special), None)


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Every token that ends a generation: eos, end of turn, and what the model itself declares."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    declared = getattr(generation_config, "eos_token_id", None)
    ids |= {declared} if isinstance(declared, int) else set(declared or ())
    return sorted(ids)


def _choose_pad(tokenizer: Any) -> str:
    if tokenizer.pad_token_id is not None:
        return ""
    vocabulary = tokenizer.get_vocab()
    for name in _PAD_NAMES:
        if name in vocabulary and name != tokenizer.eos_token:
            tokenizer.pad_token = name
            return f"The tokenizer names no pad token; {name!r} of its vocabulary is used."
    tokenizer.pad_token = tokenizer.eos_token
    return (
        f"The tokenizer names no pad token; {tokenizer.eos_token!r} is used. Labels are masked by "
        "position, so the end of text is still learned."
    )


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"data.chat_template is {str(path)!r}, which cannot be read: {error}"
        ) from None
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ModelError(
            f"data.chat_template: {len(text):,} characters; at most {MAX_TEMPLATE_CHARS:,}."
        )
    if not re.search(r"{[{%]", text):
        raise ModelError(f"data.chat_template is {str(path)!r}, which holds no Jinja expression.")
    return text
