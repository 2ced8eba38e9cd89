"""The frozen base, as NF4. The only module that uses bitsandbytes.

What is promised about a loaded base: its linears are really 4-bit, its weights are finite, nothing in
it is trainable, no code of the model's repository was run, no pickle was opened, and on a CPU an
evaluation does not change what a later training step computes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora import cards, configfile, fused, hardware, nf4, rundir, vault, weights
from qlora.attention import bounded, sdpa_on
from qlora.cards import Card
from qlora.errors import HardwareError, ModelError
from qlora.kernels.head import pack_head
from qlora.offload import leave_embedding_with_host
from qlora.recipe import is_local, local_path
from qlora.settings import Recipe

MIN_KEPT_BYTES = 256 * 2**20  # of a checkpoint; a smaller one is quantized in a moment
# Of a kept base: on its way from a card to the disk a whole file passes through the host's memory.
FILE_SIZE = "400MB"
UNREADABLE = (OSError, ValueError, SafetensorError)
# Of a kept base: whatever it is, the original is there. A ModelError would blame the model.
UNUSABLE = (*UNREADABLE, RuntimeError, KeyError, StrictDataclassError)


@dataclass(frozen=True)
class BaseConfig:
    """What is known of a model before its weights are read."""

    config: Any
    values: dict[str, Any]
    commit: str | None

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def is_prequantized(self) -> bool:
        return self.values.get("quantization_config") is not None


@dataclass(frozen=True)
class Base:
    """A loaded, frozen base, the facts of its loading for the run's record, and what to tell of it."""

    model: Any
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_config(recipe: Recipe) -> BaseConfig:
    """The model's configuration: a small file, so that plan and data can be checked before weights.

    Raises:
        ModelError: Not a model folder, not on the hub, gated, the hub cannot be reached, its
            configuration contradicts itself, or rows may be longer than the model has positions.
    """
    name, revision = recipe.model.name, recipe.model.revision
    where = configfile.locate(recipe)
    keep_telemetry_off()
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ArithmeticError, StrictDataclassError) as error:
        if code := _own_code(recipe, error):
            raise ModelError(code) from None
        raise ModelError(_explain(name, revision, error)) from None
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            # Which code computes is not for a downloaded file to say: these take the name of a kernel
            # on the hub, and transformers before 5.3 fetched and ran it (CVE-2026-4372).
            part._attn_implementation_internal = part._experts_implementation_internal = None
            vars(part).pop("auto_map", None)
    read = BaseConfig(config, config.to_dict(), getattr(config, "_commit_hash", None))
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    configfile.require_positions(recipe, known)
    return read


def load_base(recipe: Recipe, card: Card, config: BaseConfig, *, bars: bool = True) -> Base:
    """Quantize the base to NF4 on the card, tensor by tensor, and freeze it.

    While it quantizes, the host holds one 16-bit tensor at a time; what is not quantized here (a kept
    base, a 4-bit checkpoint, plain LoRA) is read by up to four threads, a tensor each. A checkpoint that
    is already bitsandbytes 4-bit is loaded as it is; only its compute dtype is set to what this card has.
    Unquantized parts (embeddings, norms, head) are kept in the compute dtype. With ``quant.cache`` the
    quantized base of a checkpoint of 256 MB or more is kept on disk and found again; it is used if every
    byte is as it was written and nothing of the model is missing, and what was done is in
    ``facts["from_cache"]`` and ``notes``. No trouble with what is kept ends a run: it is told, and the
    original is quantized.

    Args:
        recipe: Which base, and how it is stored.
        card: Where it goes.
        config: What :func:`read_config` gave for this recipe.
        bars: Whether transformers may show its bar while the weights are read.

    Returns:
        The model in eval mode, every parameter with ``requires_grad=False``.

    Raises:
        ModelError: No safetensors, torn ones, tensors that are missing from them or have another shape, a
            linear that stayed 16-bit, mixture-of-experts weights (the libraries leave them 16-bit), or a
            weight that is not finite.
        HardwareError: The card cannot compute what the recipe asks, or its NF4 kernel is wrong.
    """
    dtype = getattr(torch, cards.compute_dtype(recipe, card))
    wanted = recipe.quant.quant_type == "nf4"
    quantized = wanted or config.is_prequantized
    if config.is_prequantized:
        configfile.require_nf4(recipe, config.values["quantization_config"])
    attention = attention_on(card, recipe, config)
    where = _where(recipe)
    model, asked, size, notes = None, None, 0, ()
    place = 0 if card.kind == "cuda" else "cpu"
    try:
        key = _key(recipe, card, config, dtype)
        if key is not None:
            with weights.bars(bars):
                model, notes = _found(key, place, dtype, attention)
        from_cache = model is not None
        if model is None:
            revision = config.commit or recipe.model.revision
            files = weight_files(recipe, config)
            size = sum(file.stat().st_size for file in files)
            if wanted and not config.is_prequantized:
                asked = BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=recipe.quant.double_quant,
                    bnb_4bit_compute_dtype=dtype,
                )
            with weights.bars(bars):
                model = weights.assemble(config.config, files, place, dtype, attention, asked)
            model.generation_config = weights.generation_config(where, revision, model)
    except UNREADABLE as error:
        raise ModelError(_explain(recipe.model.name, recipe.model.revision, error)) from None
    model.name_or_path = model.config.name_or_path = where
    model.requires_grad_(False)
    model.eval()
    if quantized:
        nf4.require_every_linear(model)
        nf4.prepare(model, card, dtype)
    _require_finite(model)
    if key is not None and size >= MIN_KEPT_BYTES:
        with weights.bars(bars):
            notes += (_keep(key, recipe, card, dtype, model),)
    spare_tables(model, recipe)
    return Base(
        model,
        {
            "name": recipe.model.name,
            "revision": recipe.model.revision,
            "commit": config.commit,
            "architecture": type(model).__name__,
            "attention": attention,
            "compute_dtype": str(dtype).removeprefix("torch."),
            **shape_facts(config),
            "quantized_linears": sum(1 for _ in nf4.linears(model)),
            "prequantized": config.is_prequantized,
            "footprint_bytes": model.get_memory_footprint(),
            "from_cache": from_cache,
        },
        notes,
    )


def shape_facts(config: BaseConfig) -> dict[str, Any]:
    """What tells one base's configuration from another's: an adapter fits no other."""
    text = config.config.get_text_config()
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(text, name, None) for name in names}


def spare_tables(model: Any, recipe: Recipe) -> None:
    """Put the head in 8 bits and leave the embedding with the host, where the recipe says so.

    Raises:
        ModelError: Head and embedding are one matrix.
    """
    asked = {
        "quant.head: 8bit": recipe.quant.head == "8bit",
        "train.embedding_offload: true": recipe.train.embedding_offload,
    }
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for setting in (name for name, wanted in asked.items() if wanted and tied):
        raise ModelError(
            f"{setting} needs a model whose head is a matrix of its own, and in {type(model).__name__} it "
            "is the embedding. Leave that setting out."
        )
    if recipe.quant.head == "8bit":
        pack_head(model)
    if recipe.train.embedding_offload:
        leave_embedding_with_host(model)


def weight_files(recipe: Recipe, config: BaseConfig) -> list[Path]:
    """The files of a base's checkpoint, downloaded if it is of the hub.

    Raises:
        ModelError: Its index names a file outside of its folder.
        OSError: There are none, or the hub cannot be asked; transformers' own words.
    """
    where = _where(recipe)
    files = weights.files(where, config.commit or recipe.model.revision)
    _require_inside(where, files, recipe)
    return files


def _where(recipe: Recipe) -> str:
    name = recipe.model.name
    return str(local_path(name)) if is_local(name) else name


def _require_inside(where: str, files: Sequence[Path], recipe: Recipe) -> None:
    """Refuse an index that leads out of its folder. Links within the folder may lead anywhere.

    Raises:
        ModelError: Names the file.
    """
    folder = os.path.normpath(where)
    for file in files:
        # Of the hub: below the commit's folder in the cache.
        outside = ".." in Path(str(file).partition("snapshots")[2]).parts
        if is_local(recipe.model.name):
            outside = not Path(os.path.normpath(file)).is_relative_to(folder)
        if outside:
            raise ModelError(
                f"model.name is {recipe.model.name!r}, but its index names {file}, which lies outside its "
                "folder. Weights are taken from the model's own folder alone; fetch the model again."
            )


def _key(recipe: Recipe, card: Card, config: BaseConfig, dtype: torch.dtype) -> str | None:
    """The name in the cache of what quantizing this checkpoint gives, or None if it is not kept.

    A local folder is known by what lies in it and not by where it lies: it may be moved.
    """
    if recipe.quant.quant_type != "nf4" or config.is_prequantized or not recipe.quant.cache:
        return None
    if is_local(recipe.model.name):
        folder = local_path(recipe.model.name)
        stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors*"))}
        small = [folder / name for name in ("config.json", "generation_config.json")]
        source: list[Any] = [
            [rundir.sha256(path) for path in small if path.is_file()],
            [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()],
        ]
    elif config.commit is None:
        return None
    else:
        source = [recipe.model.name, config.commit]
    return vault.key(
        {
            "source": source,
            "double_quant": recipe.quant.double_quant,
            "compute_dtype": str(dtype),
            "device": card.kind,  # their kernels need not round alike
            "bitsandbytes": version("bitsandbytes"),
            "transformers": version("transformers"),
        }
    )


def _found(
    key: str, place: int | str, dtype: torch.dtype, attention: str
) -> tuple[Any | None, tuple[str, ...]]:
    """The kept base of a key, if it is there and whole, and what to tell.

    Raises:
        OutOfMemoryError: No fault of what is kept, and the original needs no less.
    """
    folder, notes = vault.find(key)
    if folder is None:
        return None, notes
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        files = weights.files(str(folder), None)
        model = weights.assemble(config, files, place, dtype, attention)
        model.generation_config = weights.generation_config(str(folder), None, model)
    except UNUSABLE as error:
        if hardware.ran_out_of_memory(error):
            raise
        return None, (*notes, vault.discard(folder, _first_line(error)))
    return model, notes


def _keep(key: str, recipe: Recipe, card: Card, dtype: torch.dtype, model: Any) -> str:
    def write(folder: Path) -> None:
        # Before any evaluation: what save_pretrained writes after one is not what was loaded on an
        # AVX512-BF16 CPU that repacks its weights (see qlora.nf4).
        model.save_pretrained(folder, max_shard_size=FILE_SIZE)

    double = ", double quant" if recipe.quant.double_quant else ""
    settings = f"nf4{double}, {str(dtype).removeprefix('torch.')}, {card.kind}"
    size = model.get_memory_footprint()
    failures = (ValueError, RuntimeError, SafetensorError)
    return vault.keep(key, recipe.model.name, settings, size, write, failures)


def attention_on(card: Card, recipe: Recipe, config: BaseConfig) -> str:
    """The attention implementation, by transformers' name, that this recipe gets on this card.

    Raises:
        HardwareError: FlashAttention is asked for and cannot run.
    """
    asked = recipe.model.attn_implementation
    if asked == "flash_attention_2" and not hardware.has_flash_attention(card):
        raise HardwareError(
            "model.attn_implementation is 'flash_attention_2', but it needs the package flash_attn and "
            f"a card of capability 8 or newer; this is {card.name}. Write 'auto' or 'sdpa'."
        )
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config.config), None)
    fuses = card.kind == "cuda" and fused.knows(recipe, config.config.model_type)
    if asked == "auto":
        # Fused layers call the same kernels, of PyTorch's own, for packed rows too.
        in_16_bits = cards.compute_dtype(recipe, card) != "float32"
        if not fuses and in_16_bits and hardware.has_flash_attention(card):
            return "flash_attention_2"
        asked = "sdpa" if getattr(architecture, "_supports_sdpa", True) else "eager"
    # Falcon has its own way to SDPA, past the registered ones; it never asks for shared heads.
    takes_ours = getattr(architecture, "_can_set_attn_implementation", lambda: True)()
    if fuses and asked == "sdpa" and takes_ours:
        return bounded()
    return sdpa_on(card) if asked == "sdpa" and takes_ours else asked


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        tensors = [parameter]
        if state is not None:
            # The scales carry a NaN of the packed weights; nested ones one level further down, where the
            # largest may pass over a NaN, but not the mean that was taken off them.
            tensors = [state.state2.absmax, state.offset] if state.nested else [state.absmax]
        # aminmax carries a NaN on and, unlike isfinite, makes no copies of a large embedding.
        if any(
            tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all()
            for tensor in tensors
        ):
            raise ModelError(
                f"{name} of the base holds values that are not finite. The download is damaged, or "
                "the weights overflow in this compute dtype (try quant.compute_dtype: float32)."
            )


def keep_telemetry_off() -> None:
    """Let the libraries of the hub count nobody: TRL would report each trainer, the hub each package.

    Their switch is read from the environment when huggingface_hub is imported, which may be long ago.
    """
    hub_constants.HF_HUB_DISABLE_TELEMETRY = True


def _own_code(recipe: Recipe, error: Exception) -> str | None:
    """What to say of a base that only code of its own repository could load; None of another."""
    text, name = str(error), recipe.model.name
    if "trust_remote_code" not in text and "does not recognize this architecture" not in text:
        return None
    values = configfile.read(recipe)
    kind, named = values.get("model_type"), values.get("auto_map")
    known = f"model.name is {name!r}, of the family {kind!r}, which transformers {version('transformers')}"
    if not isinstance(named, dict) or not named:
        return (
            f"{known} does not know. Correct model_type in its config.json if that is a slip, or name a "
            "model of another family."
        )
    wanted = ", ".join(sorted({str(where) for where in named.values()})[:2])
    return (
        f"{known} does not know: auto_map in its config.json names Python files of the repository "
        f"({wanted}). That would be somebody's code with your rights, and such code is never run here. "
        "Name a model of a family that transformers knows, or convert this one elsewhere, where you trust "
        "it, to such a family with save_pretrained and name that folder."
    )


def _explain(name: str, revision: str, error: Exception) -> str:
    """The library's error in our three parts; the usual causes are named."""
    text = str(error)
    if isinstance(error, weights.Incomplete):
        return (
            f"model.name is {name!r}, but {text}. Fetch it again, or save it again from a model that is "
            "whole."
        )
    if isinstance(error, StrictDataclassError | ArithmeticError):
        return (
            f"model.name is {name!r}, but its config.json is refused: "
            f"{_first_line(error.__cause__ or error).rstrip('.')}. Correct that file, or fetch the model "
            "again."
        )
    if said := configfile.refusal(error):
        return f"model.name is {name!r} (revision {revision}), {said}"
    if isinstance(error, FileNotFoundError) and error.filename:
        return (
            f"model.name is {name!r}, but {Path(error.filename).name} is missing from it: copying or "
            "downloading it was not finished. Fetch it again."
        )
    if "safetensors" in text and "does not appear to have" in text:
        return (
            f"model.name is {name!r}, but it holds no safetensors weights. Pickled .bin files are not "
            "opened, because loading them can run code. Convert it with save_pretrained first."
        )
    return f"model.name is {name!r} (revision {revision}), which cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KeyError):  # which says a name alone
        return f"KeyError {said}"
    return said or type(error).__name__
