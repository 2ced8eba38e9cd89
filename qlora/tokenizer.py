"""Text to tokens and back: padding, end of turn and chat template, checked and not assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora import templates
from qlora.errors import DataError, ModelError
from qlora.recipe import is_local, local_path
from qlora.records import Turn
from qlora.settings import Recipe

_ORIGIN = "chat_template_origin"  # an attribute of ours: what the template is called in an error

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "backend tokenizer" in first:  # a list of what to install follows; it is not that
            first = "there is no tokenizer.json beside it. Fetch the whole model again."
        if "custom code" in first or "trust_remote_code" in first:
            first = (
                "auto_map in its tokenizer_config.json names Python files of the repository. That would be "
                "somebody's code with your rights, and such code is never run here. Name a model whose "
                "tokenizer transformers knows, or convert this one elsewhere, where you trust it, with "
                "save_pretrained and name that folder."
            )
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
    for own in _templates(tokenizer):
        templates.require_small(own, f"model.name is {name!r}: its chat template")
    if recipe.data.chat_template is not None:
        file = local_path(recipe.data.chat_template)
        tokenizer.chat_template = _read_template(file)
        setattr(tokenizer, _ORIGIN, f"data.chat_template is {str(file)!r}")
    note = _choose_pad(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer, note


@dataclass(frozen=True, slots=True)
class Asked:
    """A rendering: some turns, what tools the template shows, and whether the assistant speaks next."""

    turns: Sequence[Turn]
    tools: Sequence[Mapping[str, Any]] = ()
    reply: bool = False


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
        ModelError: As :func:`render_all`.
    """
    (text,) = render_all(tokenizer, [Asked(turns, tools, reply)])
    if isinstance(text, DataError):
        raise text
    return text


def render_all(tokenizer: Any, asked: Sequence[Asked]) -> list[str | DataError]:
    """Many renderings at once, which is several times faster; refusals in their places.

    Raises:
        ModelError: The template is unreadable or too large, or went beyond the limits of
            :mod:`qlora.templates` on one of them.
    """
    texts: list[str | DataError] = [""] * len(asked)
    special = dict(tokenizer.special_tokens_map)
    turns = {id(turn): turn for one in asked for turn in one.turns}  # many share them
    said = {key: turn.message() for key, turn in turns.items()}
    for tools in (False, True):  # some tokenizers have a template of its own for tools
        chosen = [i for i, one in enumerate(asked) if bool(one.tools) is tools]
        if not chosen:
            continue
        variables = [
            {
                **special,
                "messages": [said[id(turn)] for turn in asked[i].turns],
                "tools": list(asked[i].tools) or None,
                "documents": None,
                "add_generation_prompt": asked[i].reply,
            }
            for i in chosen
        ]
        try:
            template = tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:  # several, and none of them the default
            raise ModelError(f"{_origin(tokenizer)}: {error}") from None
        found = templates.render(template, variables, _origin(tokenizer))
        for i, text in zip(chosen, found, strict=True):
            if isinstance(text, templates.Refused):
                roles = [turn.role for turn in asked[i].turns]
                texts[i] = DataError(f"the chat template refuses the turns {roles}: {text}")
            else:
                texts[i] = text
    return texts


def _templates(tokenizer: Any) -> list[str]:
    """The templates that came with a tokenizer: none, one, or several by name."""
    found = tokenizer.chat_template
    return [text for text in (found.values() if isinstance(found, dict) else [found]) if text]


def _origin(tokenizer: Any) -> str:
    """What an error calls the chat template."""
    return getattr(tokenizer, _ORIGIN, None) or f"the chat template of {tokenizer.name_or_path!r}"


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
    templates.require_small(text, f"data.chat_template is {str(path)!r}")
    if not re.search(r"{[{%]", text):
        raise ModelError(f"data.chat_template is {str(path)!r}, which holds no Jinja expression.")
    return text
