"""The trainable part: LoRA on a frozen base. The only module that touches peft.

Attached in fp32, counted honestly, saved, read back, and proven alive. The base's weights are never
changed: not by training, and not by anything here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora import nf4, rundir  # before peft: both import bitsandbytes, and ours does it quietly

# isort: split
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper

from qlora.errors import CheckpointError, RecipeError
from qlora.settings import Recipe

ALL_LINEAR = "all-linear"
UNTRAINED = 0.25  # of the usual row's length: below it nothing was learned
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # A (r, in), B (out, r), scale
_TOKEN_ROWS = ".trainable_tokens_delta."  # peft's name for the trained rows of an embedding


@dataclass(frozen=True)
class Counts:
    """Parameters by what becomes of them. Packed 4-bit weights count as the weights they stand for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.2%})"


def untrained_tokens(base: Any, tokens: Sequence[int]) -> list[int]:
    """Those of some tokens whose rows of the embedding look as if the base never learned them.

    Reserved tokens keep what they were given before pretraining: rows far shorter than those of words,
    or one and the same row for several of them.
    """
    weight = base.get_input_embeddings().weight.detach()
    rows = weight[torch.tensor(list(tokens), dtype=torch.long, device=weight.device)].float()
    usual = float(torch.linalg.vector_norm(weight[::7].float(), dim=1).median())
    short = torch.linalg.vector_norm(rows, dim=1) < UNTRAINED * usual
    twins = (rows[:, None] == rows[None]).all(-1).sum(1) > 1
    return [token for token, new in zip(tokens, (short | twins).tolist(), strict=True) if new]


def trains_tokens(model: nn.Module) -> bool:
    """Whether rows of the embedding train beside the LoRA matrices."""
    return any(_TOKEN_ROWS in name for name, _ in model.named_parameters())


def attach(base: Any, recipe: Recipe, new_tokens: Sequence[int] = ()) -> PeftModel:
    """Hang fp32 LoRA matrices on the base's linears and set up activation checkpointing.

    A is random by ``train.seed`` and B is zero, so the logits do not change yet. The k-bit
    preparation of peft is not used: it would turn embeddings and head into fp32 (2 GiB for an 8B).
    The rows of ``new_tokens`` in the embedding, and in a head of its own, train beside it.

    Raises:
        RecipeError: A name in ``lora.target_modules`` matches no linear, or names the head.
    """
    targets = _targets(base, recipe.lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=targets,
        exclude_modules=_towers(base),
        use_rslora=recipe.lora.use_rslora,
        trainable_token_indices=_token_tables(base, new_tokens),
    )
    torch.manual_seed(recipe.train.seed)
    with quiet_peft():
        model = get_peft_model(base, config)
    restore_dtype(model)
    checkpoint_layers(base, recipe.train.activation_checkpointing)
    return model


def checkpoint_layers(base: Any, layers: bool | int) -> None:
    """Let all layers of a base, none, or the first so many compute their activations again.

    The first ones: when the last layer is passed backwards, at the peak, what is kept in full then is
    gone soonest.
    """
    if not layers:
        base.activation_checkpointing_disable()
        return
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if layers is not True:
        tower = _towers(base)
        own = [
            module
            for name, module in base.named_modules()
            if isinstance(module, GradientCheckpointingLayer)
            and not (tower and re.fullmatch(tower, f"{name}."))
        ]
        for layer in own[layers:]:
            layer.gradient_checkpointing = False


def plain_lora(module: nn.Module) -> tuple[nn.Module, LoraLayer | None, str, str]:
    """(its base, the LoRA around it or None, the adapter's name, why it is no plain LoRA or "")."""
    if not isinstance(module, BaseTunerLayer):
        return module, None, "", ""
    base = module.get_base_layer()
    if not isinstance(module, LoraLayer):
        return base, None, "", f"its adapter is a {type(module).__name__}"
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A:
        return base, None, "", f"{len(active)} adapters are on at once"
    name = active[0]
    if name in module.lora_variant:
        return base, None, "", f"its adapter is a {type(module.lora_variant[name]).__name__}"
    if module.lora_B[name].bias is not None:
        return base, None, "", "its adapter has a bias"
    return base, module, name, ""


def count(model: nn.Module) -> Counts:
    """Trainable and total parameters; tied weights count once, packed weights as what they stand for."""
    parameters = list(model.parameters())
    # An 8-bit head and a table with the host are buffers; the others hold no weights.
    tables = sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m._buffers.get("weight"), torch.Tensor)
    )
    return Counts(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(nf4.unpacked_numel(p) for p in parameters) + tables,
    )


def restore_dtype(model: nn.Module) -> int:
    """Give every trainable parameter fp32 storage; returns how many had lost it.

    TRL 1.16 casts them to bf16 in its constructor. At a learning rate of 2e-5 only 12 % of bf16
    LoRA elements ever move, and a T4 has no bf16. Drop this when trl lets the caller choose.
    """
    changed = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            changed += 1
    return changed


def census(model: nn.Module) -> dict[str, dict[str, int]]:
    """Tensors by role (trainable, packed, frozen) and dtype, as handed to the optimizer."""
    found: dict[str, Counter[str]] = {
        "trainable": Counter(),
        "packed": Counter(),
        "frozen": Counter(),
    }
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        role = "trainable" if parameter.requires_grad else "packed" if packed else "frozen"
        found[role][str(parameter.dtype).removeprefix("torch.")] += 1
    return {role: dict(dtypes) for role, dtypes in found.items()}


def assert_census(model: nn.Module) -> None:
    """Our own promise, checked at the last moment: only the adapter trains, and it is fp32."""
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name or _TOKEN_ROWS in name
        assert parameter.requires_grad == is_adapter, (
            f"{name}: requires_grad={parameter.requires_grad}"
        )
        assert not is_adapter or parameter.dtype == torch.float32, f"{name}: {parameter.dtype}"


def base_digest(model: nn.Module) -> str:
    """SHA-256 over every frozen tensor, scales included: equal before and after training."""
    digest = hashlib.sha256()
    frozen = {
        re.sub(r"base_model\.model\.|\.token_adapter|\.base_layer", "", name): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and _TOKEN_ROWS not in name
    }
    for name, tensor in sorted(frozen.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model: PeftModel, folder: Path, base_name: str) -> None:
    """Write the adapter as safetensors and its configuration; never a pickle.

    ``base_name`` is what the recipe calls the base: peft would write where it lies on this machine.
    """
    # peft 0.21 adds an empty card ("[More Information Needed]"), whose template takes longer than a small
    # adapter takes to be written.
    model.create_or_update_model_card = lambda folder: None
    try:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    finally:
        del model.create_or_update_model_card
    config = rundir.read_json(folder / "adapter_config.json")
    rundir.write_json(
        folder / "adapter_config.json", config | {"base_model_name_or_path": base_name}
    )


def restore(model: PeftModel, folder: Path) -> None:
    """Put a saved adapter's weights into the one in training, and compare every one of them.

    Raises:
        CheckpointError: The folder holds no adapter, or one with other matrices.
    """
    require_adapter(folder)
    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapter cannot be read: {error}.") from None
    wanted = {name: tensor.shape for name, tensor in tensors(model).items()}
    found = {name: tensor.shape for name, tensor in saved.items()}
    if found != wanted:
        other = min(
            name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)
        )
        raise CheckpointError(
            f"{folder}: the adapter is of another model or recipe: {other} is "
            f"{_shape(found.get(other))} in the file and {_shape(wanted.get(other))} in this run."
        )
    set_peft_model_state_dict(model, saved)
    for name, tensor in tensors(model).items():
        if not torch.equal(tensor.cpu(), saved[name]):
            raise CheckpointError(f"{folder}: {name} in memory is not what is on disk.")


def tensors(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """One of a model's adapters by the names that its file uses."""
    found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in found.items()}


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def load(base: Any, folder: Path, name: str = "default") -> PeftModel:
    """The base with a saved adapter on it, for inference; beside those that it has already.

    The one that was loaded first is on until :func:`use` says otherwise.

    Raises:
        CheckpointError: The folder holds no adapter, or one that does not fit this base.
    """
    require_adapter(folder)
    try:
        with quiet_peft():
            if not isinstance(base, PeftModel):
                model = PeftModel.from_pretrained(base, str(folder), name, is_trainable=False)
            else:
                base.load_adapter(str(folder), name, is_trainable=False)
                model = base
            return model.eval()
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: the adapter is damaged: {error}.") from None
    except (RuntimeError, ValueError, KeyError) as error:
        said = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        first = next((line for line in said if line.startswith("size mismatch")), said[0])
        raise CheckpointError(f"{folder}: the adapter does not fit this base: {first}") from None


def bare(model: nn.Module) -> nn.Module:
    """The base of a model with adapters, its linears still wrapped; a model without any as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def bare_name(name: str) -> str:
    """The name that a module of the bare base has in its checkpoint.

    >>> bare_name("model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    return re.sub(r"(\.token_adapter)?\.base_layer$", "", name)


def is_of_adapter(name: str) -> bool:
    """Whether a module of this name below a base is a part of an adapter on it."""
    return bool(re.search(r"\.lora_|\.token_adapter(\.trainable_tokens\w*)?$", f".{name}"))


def is_adapted(model: nn.Module, name: str) -> bool:
    """Whether the adapter that is on adds to the weight of this module.

    Raises:
        CheckpointError: It is no plain LoRA, so there is no matrix that it adds.
    """
    _, lora, _, why = plain_lora(bare(model).get_submodule(name))
    if why:
        raise CheckpointError(f"{name}: {why}; only plain LoRA can be merged.")
    return lora is not None


def delta(model: nn.Module, name: str) -> torch.Tensor:
    """What the adapter that is on adds to the weight of a linear: scale B A (out, in), in fp32."""
    _, lora, active, _ = plain_lora(bare(model).get_submodule(name))
    assert lora is not None, name
    return lora.get_delta_weight(active).detach().float()


def token_rows(model: nn.Module, name: str) -> torch.Tensor | None:
    """A table whose rows of new tokens were trained, with these rows in it; None for any other module."""
    module = bare(model).get_submodule(name)
    if not isinstance(module, TrainableTokensWrapper):
        return None
    return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters).detach()


def take_off(model: PeftModel, name: str, label: str) -> tuple[Any, Matrices]:
    """The base without peft, and an adapter's matrices by the names of the linears they belong to.

    Args:
        model: A base with this adapter alone on it. It is of no use afterwards.
        name: What peft calls the adapter.
        label: What people call it.

    Raises:
        CheckpointError: The adapter is more than a sum onto linears.
    """
    if any(_TOKEN_ROWS in path for path, _ in model.named_parameters()):
        raise CheckpointError(
            f"{label}: rows of the embedding were trained with it (lora.train_new_tokens), so it cannot "
            "share a base with others. Merge it with `qlora merge` and name the merged model."
        )
    own = model.get_base_model()
    found: Matrices = {}
    for path, module in own.named_modules():
        if isinstance(module, BaseTunerLayer):
            _, lora, _, why = plain_lora(module)
            if lora is None:
                raise CheckpointError(
                    f"{label}: {why or 'part of it is no LoRA'}, so it cannot share a base with others. "
                    "Merge it with `qlora merge` and name the merged model."
                )
            a, b = lora.lora_A[name].weight, lora.lora_B[name].weight
            found[path] = (a.detach(), b.detach(), float(lora.scaling[name]))
    return model.unload(), found


def use(model: PeftModel, name: str) -> None:
    """Switch to one of a model's adapters."""
    model.set_adapter(name, inference_mode=True)


@contextmanager
def stacked(model: PeftModel, weights: Mapping[str, float]) -> Iterator[None]:
    """Several of a model's adapters on at once, each times its weight, for as long as the block runs."""
    before = model.base_model.active_adapters
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    try:
        model.base_model.set_adapter(list(weights), inference_mode=True)
        for layer in layers:
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        yield
    finally:
        for layer in layers:
            for name in weights:
                layer.set_scale(name, 1.0)
        model.base_model.set_adapter(before, inference_mode=True)


@contextmanager
def disabled(model: PeftModel) -> Iterator[None]:
    """The bare base, for as long as the block runs."""
    with model.disable_adapter():
        yield


def _towers(base: Any) -> str | None:
    """A pattern for the linears of a vision or audio tower, which text never reaches; None without."""
    names = "vision_tower|vision_model|visual|audio_tower|multi_modal_projector"
    pattern = rf"(.*\.)?({names})\..*"
    found = any(re.fullmatch(pattern, name) for name, _ in base.named_modules())
    return pattern if found else None


def _token_tables(base: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """The rows that train, by the name of their table; a tied head shares the embedding's."""
    if not tokens:
        return None
    tables = [base.get_input_embeddings(), base.get_output_embeddings()]
    tied = tables[0].weight is tables[1].weight
    names = {id(module): name for name, module in base.named_modules()}
    return {
        names[id(table)].rpartition(".")[2]: sorted(tokens)
        for table in (tables[:1] if tied else tables)
    }


def _targets(base: Any, wanted: tuple[str, ...]) -> str | list[str]:
    if wanted == (ALL_LINEAR,):
        return ALL_LINEAR
    head = base.get_output_embeddings()
    linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({name.rpartition(".")[2] for name, m in linears.items() if m is not head})
    for target in wanted:
        hits = [m for name, m in linears.items() if name == target or name.endswith(f".{target}")]
        if not hits:
            raise RecipeError(
                f"lora.target_modules names {target!r}, which matches no linear of "
                f"{type(base).__name__}. Its linears are {', '.join(names)}; or write all-linear."
            )
        if any(m is head for m in hits):
            raise RecipeError(
                f"lora.target_modules names {target!r}, the output head, whose adapter the fused loss "
                f"would not train. Linears that can be trained: {', '.join(names)}."
            )
    return list(wanted)


def require_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter.

    Raises:
        CheckpointError: Names the file that is missing.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: not an adapter: {name} is missing.")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """In this block nothing warns of `is_gradient_checkpointing`, which peft 0.21 reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
        )
        yield
