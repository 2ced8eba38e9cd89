"""llama.cpp's converter, told what it cannot know of a model; runs in the process that the converter has.

It names a pre-tokenizer by a list of hashes of published tokenizers: any other's name is handed in. It
wants the sentencepiece file of tokenizers that were once made of one, which a merged model no longer
has: the order of the merges says the same as that file's scores. And it reads from a tokenizer whether
a BOS comes before a text, which is not always what training saw.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def main() -> None:
    """Run the script of the first argument with those after the second, which is JSON: what is told."""
    script, told = sys.argv[1], json.loads(sys.argv[2])
    sys.argv = [script, *sys.argv[3:]]
    folder = Path(script).parent
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    _tell(told)
    runpy.run_path(script, run_name="__main__")


def _tell(told: dict[str, Any]) -> None:
    import conversion
    import gguf
    import transformers
    from conversion import base

    model = base.TextModel
    load, recognize = transformers.AutoTokenizer.from_pretrained, model.get_vocab_base_pre
    create, add = model._create_vocab_sentencepiece, gguf.SpecialVocab.add_to_gguf
    find = conversion.get_model_class

    def without_code(*args: Any, **settings: Any) -> Any:
        return load(*args, **{**settings, "trust_remote_code": False})

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(recognize(self, tokenizer))
        except NotImplementedError:
            if told["pre"] is None:
                raise
            return str(told["pre"])

    def pieces(self: Any) -> tuple[list[bytes], list[float], list[int]]:
        if (self.dir_model / "tokenizer.model").is_file():
            found: tuple[list[bytes], list[float], list[int]] = create(self)
            return found
        self.gguf_writer.add_add_space_prefix(told["space_prefix"])
        values = json.loads((self.dir_model / "tokenizer.json").read_text(encoding="utf-8"))
        return from_merges(values, self.hparams["vocab_size"])

    def ends(self: Any, *args: Any, **settings: Any) -> Any:
        self.add_special_token["bos"] = told["add_bos"]
        self.special_token_ids |= told["tokens"]
        self.chat_template = told["chat_template"]
        return add(self, *args, **settings)

    def phi3_vocab(self: Any) -> None:
        try:
            self._set_vocab_sentencepiece()
        except FileNotFoundError:
            self._set_vocab_gpt2()

    def model_class(*args: Any, **settings: Any) -> Any:
        found = find(*args, **settings)
        if found.__name__ == "Phi3MiniModel":  # it asks for the sentencepiece file in its own way
            found.set_vocab = phi3_vocab
        return found

    transformers.AutoTokenizer.from_pretrained = without_code
    model.get_vocab_base_pre = pre_tokenizer
    model._create_vocab_sentencepiece = pieces
    gguf.SpecialVocab.add_to_gguf = ends
    conversion.get_model_class = model_class


def from_merges(tokenizer: dict[str, Any], size: int) -> tuple[list[bytes], list[float], list[int]]:
    """Tokens, scores and types of a tokenizer that was once sentencepiece's, from its ``tokenizer.json``.

    The sooner two pieces are merged, the higher the score of what they become.

    Raises:
        FileNotFoundError: It is none of these. The converter then takes it for another kind.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise FileNotFoundError("no sentencepiece tokenizer")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    normal, unknown, control, user, unused, byte = 1, 2, 3, 4, 5, 6
    tokens = [f"[PAD{number}]".encode() for number in range(size)]
    scores, types = [-10000.0] * size, [unused] * size
    for text, token in model["vocab"].items():
        tokens[token] = text.encode()
        scores[token] = -float(ranks[text]) if text in ranks else -1e6
        types[token] = byte if _BYTE.fullmatch(text) else normal
    for added in tokenizer["added_tokens"]:
        token = added["id"]
        tokens[token] = added["content"].encode()
        scores[token], types[token] = -1000.0, control if added["special"] else user
    if (token := model["vocab"].get(model.get("unk_token"))) is not None:
        types[token] = unknown
    return tokens, scores, types
