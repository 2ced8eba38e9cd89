"""What the GPU checks of the fused layers train: models of published shapes, and rows to train them on.

Not a command. Weights are random, quantized once by bitsandbytes layer by layer on the device, and shared
by every side that is compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_plan

GIB = 2**30
MODELS = {
    "1b": "meta-llama/Llama-3.2-1B", "3b": "meta-llama/Llama-3.2-3B", "8b": "meta-llama/Llama-3.1-8B",
    "14b": "Qwen/Qwen2.5-14B",
}  # fmt: skip
TINY = "tiny"  # the 8B's family, two layers
ROWS = 8  # of an optimizer step: TRL's default batch
LONGEST_ROW = 1024  # what TRL's default max_length would not cut
RANK = 16
ADAPTER = {"lora_alpha": 16.0, "lora_dropout": 0.0}
RATE = 1e-4


def config_of(model: str) -> Any:
    """The configuration of one of the models."""
    if model == TINY:
        return gpu_plan.config_of(MODELS["8b"], small=True)
    return gpu_plan.config_of(MODELS[model])


class Weights:
    """Random weights of a shape: linears quantized once, on the device; the rest with the host.

    Args:
        config: A transformers configuration.
        device: Where models of them compute.
        dtype: Of what is not quantized, and of the 4-bit products.
    """

    def __init__(self, config: Any, device: Any, dtype: Any) -> None:
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        from qlora.bnb import bnb

        self.config, self.device, self.dtype = config, device, dtype
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = shapes.get_output_embeddings()
        linears = {
            f"{name}.weight"
            for name, module in shapes.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.packed: dict[str, Any] = {}
        self.dense: dict[str, Any] = {}
        self.shapes = {name: tuple(p.shape) for name, p in shapes.named_parameters()}
        for name in self.shapes:
            if name in linears:
                self.packed[name] = bnb.functional.quantize_4bit(
                    self.made(name), blocksize=64, compress_statistics=True, quant_type="nf4"
                )
            else:
                self.dense[name] = self.made(name).cpu()

    def made(self, name: str) -> Any:
        """A tensor before it is quantized: the same one whenever it is asked for."""
        import torch

        shape = self.shapes[name]
        found = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return found.fill_(float("norm" in name))  # norms are one, biases zero
        generator = torch.Generator(device=self.device).manual_seed(zlib.crc32(name.encode()))
        return found.normal_(0.0, 0.02, generator=generator)

    def base(self, recipe: Any, attention: str, *, wide: bool = False) -> Any:
        """A base as the loader would leave it.

        Args:
            recipe: Its head's bits and the place of its embedding are obeyed.
            attention: An implementation that transformers knows.
            wide: What is not quantized in fp32: what a model that is given by name gets.
        """
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        from qlora import loader
        from qlora.bnb import bnb

        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, attn_implementation=attention
            )
            replace_with_bnb_linear(base, get_keys_to_not_convert(base), asked)
        for name, (packed, state) in self.packed.items():
            module = base.get_submodule(name.rpartition(".")[0])
            module.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True,
                compress_statistics=True, quant_type="nf4", module=module,
            )  # fmt: skip
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = self.dtype, True
        dtype = torch.float32 if wide else self.dtype
        for name, tensor in self.dense.items():
            parent, _, leaf = name.rpartition(".")
            there = nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
            setattr(base.get_submodule(parent), leaf, there)
        base.tie_weights()
        for module in base.modules():
            if hasattr(module, "inv_freq"):  # its buffers follow from the configuration
                for name, buffer in type(module)(self.config).named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
        base.is_loaded_in_4bit = True  # what peft and trl look for
        base.requires_grad_(False)
        loader.spare_tables(base, recipe)
        return base

    def save(self, folder: Path) -> None:
        """The weights before they were quantized, as transformers reads them, a file a layer."""
        from safetensors.torch import save_file

        where: dict[str, str] = {}
        groups: dict[str, list[str]] = {}
        for name in self.shapes:
            groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
        for number, names in enumerate(groups.values()):
            file = f"model-{number:05d}.safetensors"
            tensors = {name: self.made(name).cpu().contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
        self.config.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def rows_of(tokens: int, steps: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Token ids of the rows of some steps: of lengths like real ones, together ``tokens`` long a step.

    >>> rows = rows_of(2048, 2, 1000)
    >>> len(rows), sum(map(len, rows[:ROWS])), sum(map(len, rows[ROWS:]))
    (16, 2048, 2048)
    """
    import numpy as np

    drawn = np.random.default_rng(seed)
    rows = []
    for _ in range(steps):
        while True:  # log-normal lengths, as those of instructions are
            shares = drawn.lognormal(0.0, 0.6, ROWS)
            lengths = np.maximum((shares / shares.sum() * tokens).astype(int), 2)
            lengths[lengths.argmax()] += tokens - lengths.sum()
            if lengths.max() <= max(LONGEST_ROW, tokens // 2):
                break
        rows += [drawn.integers(4, vocab, length).tolist() for length in lengths]
    return rows


def useful(rows: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are no padding when each step's rows are padded to its longest."""
    steps = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    computed = sum(len(step) * max(map(len, step)) for step in steps)
    return sum(map(len, rows)) / computed


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries print of every trainer."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def dtype_on(card: Any) -> Any:
    """What is multiplied in on a card."""
    import torch

    if card.kind == "cpu":
        return torch.float32
    return torch.bfloat16 if card.supports_bf16 else torch.float16


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from qlora.recipe import local_path

    return AutoTokenizer.from_pretrained(local_path("embedded:base"))
