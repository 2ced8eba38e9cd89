"""A checkpoint's safetensors: which files, and a model assembled from them, tensor by tensor.

``from_pretrained`` maps every file of a checkpoint into memory and keeps the maps while it loads; on a CPU
for as long as the model lives, because its norms are views of them. The host then holds the 16-bit
checkpoint beside the 4-bit model. A tensor that opens its file by itself lets go of it again.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from qlora import hardware, nf4
from qlora.cards import Card

LARGE_BYTES = 2**20


class Incomplete(ValueError):
    """The files do not hold the model; says which of its tensors lack, or do not fit it."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        with safe_open(self.file, framework="pt") as opened:
            return tuple(opened.get_slice(self.name).get_shape())

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


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """A logger of another package says nothing but errors in the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Keep transformers' bars off in the block, unless they may be shown."""
    had = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had:
            transformers_logging.enable_progress_bar()


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
    """The model of a configuration from the tensors of some files, every one of them from there.

    Renaming, fusing and quantizing are from_pretrained's own. It is given tensors and no name, so no
    adapter that happens to lie beside the weights is loaded, and nothing else is looked for. Tensors
    of the files that the model has no place for are left out. Each tensor is read, placed and dropped:
    one at a time while quantizing, else by up to four threads at once (transformers 5.23).

    Args:
        config: What ``AutoConfig`` read; one with a ``quantization_config`` is of a 4-bit checkpoint.
        files: What :func:`files` found.
        place: The device, as a ``device_map`` names it.
        dtype: Of what is not quantized.
        attention: The implementation.
        quantization: How to quantize what is read; None leaves it as it is.

    Raises:
        ValueError: transformers has no such model.
        Incomplete: Tensors of the model are missing from the files, or have another shape there.
            transformers alone would make random ones and train them.
        SafetensorError: A file is torn.
        OutOfMemoryError: The place has no memory left.
    """
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None:
        raise ValueError(f"transformers has no causal language model for {type(config).__name__}")
    if architecture.config_class is config.sub_configs.get("text_config"):
        # As AutoModelForCausalLM does (transformers 5.23), which insists on a name.
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    try:
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=tensors(files),
            dtype=dtype,
            device_map={"": place},
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # refused below, with both shapes
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except RuntimeError as error:
        _explain(error)
        raise
    _require_all(info["missing_keys"], info["mismatched_keys"])
    if unfit := nf4.unfit(model):
        raise Incomplete(_listed(unfit, "; "))
    return model


def reopened(folder: Path, card: Card, dtype: torch.dtype, attention: str) -> Any:
    """A 16-bit model from its folder alone, whose weights come from disk when their layer computes.

    It takes one layer's memory, however large the model. ``from_pretrained(device_map="disk")`` would first
    touch every page of every file (transformers 5.23).

    Raises:
        Incomplete: Not every tensor of the model is in the files with its shape, or more than those.
        OSError, ValueError, SafetensorError: The folder is no model.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stored = tensors(files(str(folder), None))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    wanted = dict(model.named_parameters())
    kept = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    mismatched = [
        (name, stored[name].shape, tensor.shape)
        for name, tensor in (wanted | kept).items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    _require_all(wanted.keys() - stored.keys(), mismatched)
    if more := stored.keys() - wanted.keys() - kept.keys():
        raise Incomplete(f"the model has no place for {_listed(sorted(more))}")
    for name, buffer in kept.items():
        buffer.copy_(stored[name][:])
    names = {id(tensor): name for name, tensor in wanted.items()}  # a tied head has the embedding's
    index = {
        name: {
            "safetensors_file": str(stored[names[id(tensor)]].file),
            "weight_name": names[id(tensor)],
            "dtype": str(dtype).removeprefix("torch."),
        }
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    place = 0 if card.kind == "cuda" else "cpu"
    with _silent("accelerate.big_modeling"), tempfile.TemporaryDirectory() as spare:
        dispatch_model(  # nothing goes into the spare folder: safetensors are read in place
            model, {"": "disk"}, main_device=place, offload_dir=spare, offload_index=index
        )
    return model.eval()


def _require_all(missing: Collection[str], mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Return in silence if every tensor came from the files. Tied ones are not among the missing."""
    # Rotary frequencies follow from the configuration. Some models list them as weights.
    lost = sorted(name for name in missing if not name.endswith("inv_freq"))
    if lost:
        raise Incomplete(
            f"{len(lost)} of its tensors {'is' if len(lost) == 1 else 'are'} missing from its files and "
            f"would start as random numbers: {_listed(lost)}"
        )
    if mismatched:
        shapes = [
            f"{name} is {tuple(theirs)} in its files where the model has {tuple(ours)}"
            for name, theirs, ours in sorted(mismatched, key=lambda one: str(one[0]))
        ]
        raise Incomplete(_listed(shapes, "; "))


def _explain(error: RuntimeError) -> None:
    """Raise what lies behind an error of ``from_pretrained``, or return if that is not known.

    transformers 5.23 puts what it knows into its log alone ("for details look at the above report"), and a
    packed linear that is missing as a whole ends in an initialization that has no kernel. Both times
    its account of the tensors is a variable of the frame that gave up. Drop this when the error has it.
    """
    if hardware.ran_out_of_memory(error):
        return
    # The first frame is the caller's: its variables hold the error, and looking at them keeps them.
    for frame, _ in traceback.walk_tb(error.__traceback__ and error.__traceback__.tb_next):
        info = frame.f_locals.get("loading_info")
        if info is None or not hasattr(info, "conversion_errors"):
            continue
        for said in info.conversion_errors.values():  # each with its traceback, as text
            if "OutOfMemoryError" in said or hardware.ran_out_of_memory(RuntimeError(said)):
                raise torch.OutOfMemoryError("out of memory while a weight was unpacked") from None
        if unread := sorted(info.conversion_errors):
            raise Incomplete(f"its files do not hold all parts of {_listed(unread)}")
        tied = getattr(frame.f_locals.get("model"), "all_tied_weights_keys", {})
        _require_all(info.missing_keys - tied.keys(), info.mismatched_keys)


def _listed(what: Sequence[str], between: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = f"{between}and {len(what) - 4:,} more" if len(what) > 4 else ""
    return between.join(what[:4]) + more


def generation_config(where: str, revision: str | None, model: Any) -> Any:
    """What ends an answer, as the checkpoint says it, or else as the model's configuration implies."""
    try:
        return GenerationConfig.from_pretrained(where, revision=revision)
    except OSError:
        return model.generation_config
