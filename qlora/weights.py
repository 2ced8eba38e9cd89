"""A checkpoint's safetensors: which files, and a model assembled from them a tensor at a time.

``from_pretrained`` maps every file of a checkpoint into memory and keeps the maps while it loads; on a CPU
for as long as the model lives, because its norms are views of them. The host then holds the 16-bit
checkpoint beside the 4-bit model. A tensor that opens its file by itself lets go of it again.
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

LARGE_BYTES = 2**20


class Stored:
    """A tensor on disk. Indexing reads it; the file is closed when nothing uses the tensor any more.

    It has what transformers asks of the slices that safetensors gives, and is handed to
    ``from_pretrained(state_dict=...)`` in their place (transformers 5.23; its own lazy loading is such a
    dictionary of slices).
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_slice(self.name)[index]
        if tensor.nbytes >= LARGE_BYTES:
            _give_back_freed_memory()
        return tensor

    def get_dtype(self) -> str:
        """The dtype as the file calls it, such as ``BF16``."""
        with safe_open(self.file, framework="pt") as opened:
            return str(opened.get_slice(self.name).get_dtype())


def _give_back_freed_memory() -> None:
    """Have glibc return what was freed since the last tensor.

    Quantizing on a CPU takes and frees a few times the tensor. Between 4-bit weights that stay, glibc keeps
    those holes, and a 1B model was seen to leave up to 650 MB of them, some times and other times not.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and no need
        if trim is not None:
            trim(0)


def files(where: str, revision: str | None) -> list[Path]:
    """The files that hold a model's weights, downloaded if ``where`` is a hub id.

    Raises:
        FileNotFoundError: The index names a file that is not there.
        OSError: There are none, or the hub cannot be asked; transformers' own words.
    """
    try:
        found = [cached_file(where, SAFE_WEIGHTS_NAME, revision=revision)]
    except OSError:  # not there, or not reached: which of the two, the index will say
        index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
        found, _ = get_checkpoint_shard_files(where, index, revision=revision)
    named = [Path(path) for path in found]
    for path in named:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "the index names it", str(path))
    return named


def tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some files by name; nothing but their headers is read.

    Raises:
        SafetensorError: A file is torn; says which.
    """
    named: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                named |= {name: Stored(file, name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise SafetensorError(f"{file.name} is damaged: {error}") from None
    return named


def assemble(
    config: Any,
    files: Sequence[Path],
    place: int | str,
    dtype: torch.dtype,
    attention: str,
    quantization: Any = None,
) -> Any:
    """The model of a configuration from the tensors of some files, each read, placed and dropped.

    Renaming, fusing and quantizing are from_pretrained's own. It is given tensors and no name, so no
    adapter that happens to lie beside the weights is loaded, and nothing else is looked for.

    Args:
        config: What ``AutoConfig`` read; one with a ``quantization_config`` is of a 4-bit checkpoint.
        files: What :func:`files` found.
        place: The device, as a ``device_map`` names it.
        dtype: Of what is not quantized.
        attention: The implementation.
        quantization: How to quantize what is read; None leaves it as it is.

    Raises:
        ValueError: transformers has no such model.
        SafetensorError: A file is torn.
    """
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise ValueError(f"transformers has no causal language model for {type(config).__name__}")
    if architecture.config_class is config.sub_configs.get("text_config"):
        # As AutoModelForCausalLM does (transformers 5.23), which insists on a name.
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    return architecture.from_pretrained(
        None,
        config=config,
        state_dict=tensors(files),
        dtype=dtype,
        device_map={"": place},
        attn_implementation=attention,
        **({} if quantization is None else {"quantization_config": quantization}),
    )


def generation_config(where: str, revision: str | None, model: Any) -> Any:
    """What ends an answer, as the checkpoint says it, or else as the model's configuration implies."""
    try:
        return GenerationConfig.from_pretrained(where, revision=revision)
    except OSError:
        return model.generation_config
