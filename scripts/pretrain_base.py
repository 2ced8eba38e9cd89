"""Make the embedded base: a 3.5M-parameter Llama and its tokenizer, from nothing, on two cores.

    python scripts/pretrain_base.py

writes ``qlora/embedded/base/``: weights in bf16, tokenizer with a ChatML template, SOURCE.md. About
a quarter of an hour on two idle cores with bf16 instructions, several times that without. On one
machine the same arguments give the same bytes; another CPU may round differently and give a slightly
other model. Beside other work set ``OMP_WAIT_POLICY=passive``: threads that spin for a busy core make
it far slower.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from make_corpus import PLAIN_WORDS, documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE = Path(__file__).resolve().parent.parent / "qlora" / "embedded" / "base"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCABULARY, SEQUENCE, BATCH, THREADS = 2048, 256, 16, 2
TOKENIZER_DOCUMENTS = 20_000

# {% generation %} brackets what the assistant says *and* its end of turn, so that a trainer which
# masks by these marks also teaches the model to stop.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{{- '\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

SOURCE = """\
# The embedded base

A {parameters:,}-parameter Llama trained from nothing by `scripts/pretrain_base.py` ({steps:,} steps,
{tokens:,} tokens, seed {seed}) on text that `scripts/make_corpus.py` invents. Licence: Apache-2.0, like
the rest of the repository. No text, weights or tokenizer of anybody else went into it.

It exists so that the quickstart and the tests need no download. It is fluent in a tiny English
about people, shops and things, and useless for anything else.

**What the corpus contains.** Letters to a shop answered in prose (whose letter, which thing, what
kind of matter, whether it hurries), single questions about such letters, stories in which invented
names recur, sentences that put two wordings of one meaning side by side, lists of names and words to
quote, repeat or look up, and small talk about what a lamp is for. So the base has been taught, in
prose, the *skills* the ticket task needs: what people mean, what presses, which of two things is in
trouble, and copying a name it never saw. Given a ticket it answers with such prose, often rightly.

**What it shares with the tickets.** The key words. For each complaint of either split the corpus
holds clauses in other words or another order ("the bank statement had two debits where one was
due"), and for the ways to press or not to press likewise; the words that later serve as labels
("It is a question of delivery", "The hurry is low", or among some two hundred words to be put in
quotes); the English nouns (kettle, fridge); and the
syllables brands are made of.

**What it does not contain.** No ticket of either split and no held-out sentence about what went wrong;
no JSON object and no line of the ticket format; no product name of either split as a word, and no
listed person or company of the tickets. `make_corpus.py` refuses to run if one of its phrases holds a
whole sentence of `ticket_wordings.py`, and `tests/test_embedded.py` searches a sample.

**How the task was fitted to the base.** Product names are three letters long because a model of this
size copies one or two tokens it never saw in a ticket, not five. The patterns that training tickets
are made of (`ticket_grammar.py`), the held-out ways to press, and the recipe's learning rate were chosen
while looking at held-out scores, so the score shows that the pieces work together; it is no estimate of
how well LoRA does on a task that nobody tuned.

So the held-out score measures whether tuning taught the *format and the labels* and carried them to
wordings and names that the tuning never showed. It does not measure whether a model can learn English
from tickets: the wordings' vocabulary was met in pretraining, as it is with any real base.
"""


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus; every digit is one token, and no special token is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # " Velmor" and '"Velmor' must be the same pieces, or quoting a name is a translation:
            # the space before a capital stands alone.
            pre_tokenizers.Split(Regex(r"\p{N}| (?=\p{Lu})"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)
        for document in documents(TOKENIZER_DOCUMENTS, seed)
    )
    # Seen often enough here, a plain word is one token in quotes as it is in a sentence.
    quoted = [f'"{word}"' for word in PLAIN_WORDS] * 200
    tokenizer.train_from_iterator(itertools.chain(texts, quoted), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def render(document: str | list[dict[str, str]]) -> str:
    """A document as the model reads it: chat in ChatML, then the end-of-text mark."""
    if isinstance(document, str):
        return document + "<|endoftext|>"
    said = (f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in document)
    return "".join(said) + "<|endoftext|>"


def pack(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int) -> np.ndarray:
    """At least ``tokens`` token ids of fresh documents, end to end, as uint16."""
    backend = tokenizer.backend_tokenizer
    chunk: list[str] = []
    packed: list[np.ndarray] = []
    have = 0
    for document in documents(10**9, seed + 1):
        chunk.append(render(document))
        if len(chunk) == 4096:
            for encoding in backend.encode_batch(chunk, add_special_tokens=False):
                packed.append(np.array(encoding.ids, dtype=np.uint16))
                have += len(encoding.ids)
            chunk = []
            if have >= tokens:
                break
    return np.concatenate(packed)[:tokens]


def batches(stream: np.ndarray) -> Iterator[torch.Tensor]:
    """(BATCH, SEQUENCE) int64 blocks of the stream in reading order."""
    block = BATCH * SEQUENCE
    for start in range(0, len(stream) - block + 1, block):
        ids = stream[start : start + block].astype(np.int64)
        yield torch.from_numpy(ids).view(BATCH, SEQUENCE)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Fresh fp32 weights. Every in_features is a multiple of 64.

    bitsandbytes 0.50 dequantizes other widths wrongly on AVX512 CPUs.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, stream: np.ndarray, steps: int, peak_lr: float) -> None:
    """Train in place: AdamW, short warmup, cosine to a twentieth; prints loss and time left."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)
    warmup = min(150, steps // 4 + 1)
    model.train()
    started = time.monotonic()
    for step, ids in zip(range(1, steps + 1), batches(stream), strict=False):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        scale = min(step / warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            spent = time.monotonic() - started
            left = spent / step * (steps - step)
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  "
                f"{step * BATCH * SEQUENCE / spent:,.0f} tokens/s  {left / 60:.1f} min left",
                flush=True,
            )


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, source: str
) -> None:
    """Write weights as bf16, tokenizer, generation config and SOURCE.md into ``out``."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "SOURCE.md").write_text(source, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Build the base; 0 when done, 2 when the arguments make no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps of 4,096 tokens")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 < args.learning_rate < 1:
        print("pretrain_base: need --steps >= 1 and 0 < --learning-rate < 1", file=sys.stderr)
        return 2
    if args.out.exists() and not args.out.is_dir():
        print(f"pretrain_base: {args.out} is a file; --out must be a folder", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)  # another count sums in another order: other last bits
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(args.seed)
    tokens = args.steps * BATCH * SEQUENCE
    stream = pack(tokenizer, tokens, args.seed)
    print(f"{tokens:,} tokens ready after {time.monotonic() - started:.0f} s", flush=True)
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    pretrain(model, stream, args.steps, args.learning_rate)
    args.out.mkdir(parents=True, exist_ok=True)
    source = SOURCE.format(parameters=parameters, steps=args.steps, tokens=tokens, seed=args.seed)
    save(model, tokenizer, args.out, source)
    weights = (args.out / "model.safetensors").read_bytes()
    print(f"{len(weights):,} bytes, sha256 {hashlib.sha256(weights).hexdigest()}")
    print(f"{args.out}: done in {(time.monotonic() - started) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
