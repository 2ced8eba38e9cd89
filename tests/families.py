"""Eight families of chat templates and tokenizers, built here: no network, nothing downloaded.

The templates are written in the grammar of the published ones, with ``{% generation %}`` marks round what
the assistant says. Renderers get them without the marks; transformers' own mask, made from the marks, is
the independent reference of the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.records import Record

MARK = re.compile(r"\{% (?:end)?generation %\}")
TEXT = (
    "What is two plus two? It makes 4, not 5. The user asks and the assistant answers; the model learns.",
    "system\n\nYou are a helpful assistant.\n\nassistant\n\nuser\n\n### Response:\n\n### Instruction:\n\n",
    "Überall grüßen schöne Bäume. 東京は大きい。 Привет, мир! {'a': [1, 2]}  <b>x</b>\n\n\n    return 0\n",
    "get_weather arguments name city Paris 20 degrees; Tell me more. And one more? Then it is 5, not 4.",
)

QWEN_25 = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{%- else %}{{ 'You are helpful.' }}{%- endif %}"
    "{{ '\n\n# Tools\n\nFunctions, one a line:\n<tools>' }}"
    "{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{%- endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\n' ~ messages[0]['content'] ~ '<|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if m.content or not loop.first %}{{ '\n' }}{%- endif %}"
    '{{ \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)

QWEN_3 = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content ~ '\n\n' }}{%- endif %}"
    "{{ '# Tools\n\nFunctions, one a line:\n<tools>' }}"
    "{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{%- endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' ~ messages[0].content ~ '<|im_end|>\n' }}{%- endif %}"
    "{%- set asked = namespace(last=messages | length - 1) %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' and not (m.content.startswith('<tool_response>')"
    " and m.content.endswith('</tool_response>')) %}{%- set asked.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set said = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{%- if loop.index0 > asked.last and (loop.last or thought) %}"
    "{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') }}"
    "{%- else %}{{ said }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if said or not loop.first %}{{ '\n' }}{%- endif %}"
    '{{ \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim ~ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim ~ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# SPACE and ANSWER differ between the versions of this family.
MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST]SPACE' ~ (system if loop.first else '') ~ m.content ~ 'SPACE[/INST]' }}"
    "{% elif m.role == 'assistant' %}{% generation %}{{ ANSWER ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "{% generation %}{{ m.content | trim ~ '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>' ~ m.role ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

PHI = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<|system|>\n' ~ m.content ~ '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' ~ m.content ~ '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m.content ~ '<|end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% elif m.role in ('user', 'system') %}"
    "{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

ALPACA = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content ~ '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' ~ m.content ~ '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ '### Response:\n' }}"
    "{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and the tokenizer it belongs to."""

    marked: str
    closing: str
    eos: str
    pad: str
    specials: tuple[str, ...]  # beside eos and pad
    bos: str | None = None
    kind: str = "bytes"
    system: bool = True
    tools: bool = False
    trims: bool = False
    header: str = ""  # what stands before an answer

    @property
    def template(self) -> str:
        return MARK.sub("", self.marked)


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _mistral(space: str, answer: str) -> str:
    return MISTRAL.replace("SPACE", space).replace("ANSWER", answer)


FAMILIES = {
    "qwen2.5": Family(
        QWEN_25, "<|im_end|>", "<|im_end|>", "<|endoftext|>", CHATML_TOKENS,
        kind="nfc bytes", tools=True, header="<|im_start|>assistant\n",
    ),
    "qwen3": Family(
        QWEN_3, "<|im_end|>", "<|im_end|>", "<|endoftext|>", CHATML_TOKENS,
        kind="nfc bytes", tools=True, header="<|im_start|>assistant\n",
    ),
    "llama3": Family(
        LLAMA_3, "<|eot_id|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), bos="<|begin_of_text|>",
        trims=True, header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": Family(
        _mistral(" ", "' ' ~ m.content"), "</s>", "</s>", "<unk>", ("[INST]", "[/INST]"), bos="<s>",
        header="[/INST]",
    ),
    "gemma": Family(
        GEMMA, "<end_of_turn>", "<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>"), bos="<bos>",
        kind="pieces", system=False, trims=True, header="<start_of_turn>model\n",
    ),
    "phi": Family(
        PHI, "<|end|>", "<|endoftext|>", "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), header="<|assistant|>\n",
    ),
    "zephyr": Family(ZEPHYR, "</s>", "</s>", "</s>", ("<unk>",), bos="<s>", header="<|assistant|>\n"),
    "alpaca": Family(ALPACA, "</s>", "</s>", "</s>", ("<unk>",), bos="<s>", header="### Response:\n"),
}  # fmt: skip

# Other versions of a family, whose spaces and tokenizers differ.
VARIANTS = {
    "mistral, pieces": Family(
        _mistral(" ", "' ' ~ m.content"), "</s>", "</s>", "</s>", (), bos="<s>", kind="metaspace",
        header="[/INST]",
    ),
    "mistral, no spaces": Family(
        _mistral("", "m.content"), "</s>", "</s>", "<unk>", ("[INST]", "[/INST]"), bos="<s>",
        header="[/INST]",
    ),
    "mistral, trimmed": Family(
        _mistral(" ", "m.content | trim"), "</s>", "</s>", "</s>", (), bos="<s>", kind="metaspace",
        trims=True, header="[/INST]",
    ),
}  # fmt: skip
EVERY = FAMILIES | VARIANTS


@cache
def tokenizer_of(name: str) -> Any:
    """The family's tokenizer with its template. It is shared: whoever changes it takes a copy."""
    family = EVERY[name]
    kinds = {"bytes": _bytes, "nfc bytes": _bytes, "pieces": _pieces, "metaspace": _pieces}
    tok = kinds[family.kind](family.kind)
    named = [family.bos, family.eos, family.pad, *family.specials]
    if family.kind == "nfc bytes":
        tok.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    known = dict.fromkeys(text for text in named if text is not None)
    tok.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known])
    if family.bos is not None:
        bos = tok.token_to_id(family.bos)
        tok.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bos)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad
    )
    wrapped.chat_template = family.template
    wrapped.padding_side = "right"
    return wrapped


@cache
def _learned(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and its merges, learned from ``TEXT``."""
    tok = Tokenizer(models.BPE())
    if kind == "bytes":
        tok.pre_tokenizer = _words_then_bytes()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tok.normalizer = normalizers.Replace(" ", "▁")
        tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(TEXT * 3, trainer)
    model = json.loads(tok.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _words_then_bytes() -> Any:
    """Today's way to cut words: lines stay together, and so do letters with what stands before them."""
    cut = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    words = pre_tokenizers.Split(Regex(cut), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, letters])


def _bytes(kind: str) -> Tokenizer:
    vocabulary, merges = _learned("bytes")
    tok = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if kind == "nfc bytes":
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = _words_then_bytes()
    tok.decoder = decoders.ByteLevel()
    return tok


def _pieces(kind: str) -> Tokenizer:
    """As sentencepiece makes them: spaces are letters, and an unknown letter falls apart into bytes."""
    vocabulary, merges = _learned("pieces")
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    both = {text: i for i, text in enumerate([*texts, *vocabulary])}
    tok = Tokenizer(
        models.BPE(vocab=both, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if kind == "metaspace":
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tok


@dataclass(frozen=True)
class Reference:
    """What transformers and the marks say of a record."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]  # characters of the assistant's turns, in order
    offsets: list[tuple[int, int]]

    def tokens(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Which tokens lie wholly in one of these spans."""
        return [any(a <= start and end <= b for a, b in spans) for start, end in self.offsets]

    @property
    def straddles(self) -> bool:
        """Whether a token holds both the end of what stands before an answer and its beginning."""
        return any(start < a < end for a, _ in self.spans for start, end in self.offsets)


def reference(name: str, record: Record) -> Reference:
    """The record through transformers' own template code, with the family's marks."""
    tok = tokenizer_of(name)
    (text,), (spans,) = render_jinja_template(
        [[turn.message() for turn in record.turns]],
        tools=list(record.tools) or None,
        chat_template=EVERY[name].marked,
        return_assistant_tokens_mask=True,
        **tok.special_tokens_map,
    )
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return Reference(
        text, encoded["input_ids"], [tuple(s) for s in spans], encoded["offset_mapping"]
    )
