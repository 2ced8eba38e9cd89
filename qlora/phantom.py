"""A base of a published shape whose tensors have sizes and no contents.

The model that transformers builds from a ``config.json``, with bitsandbytes' 4-bit linears and PEFT's
adapters in it, on fake tensors that claim to be on a CPU: a whole training step of an 8B runs on it in
seconds, in the memory of its Python objects. (Fake tensors that claim to be on CUDA fail in autograd:
torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora import (  # before transformers' integration: ours imports bitsandbytes quietly
    adapter,
    loader,
)

# isort: split
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.quantizers.base import get_keys_to_not_convert

from qlora.bnb import bnb
from qlora.offload import EmbeddingOnHost
from qlora.settings import Recipe
from qlora.tracing import HOST

UNMASKED = "sdpa_unmasked"
_OF_PARAMS4BIT = (
    "compress_statistics",
    "quant_type",
    "blocksize",
    "quant_storage",
    "bnb_quantized",
)


Make = Callable[[torch.Tensor], torch.Tensor]  # a tensor of this shape and dtype


def build(
    config: Any,
    recipe: Recipe,
    dtype: torch.dtype,
    attention: str,
    make: Make,
    *,
    as_on_card: bool,
) -> Any:
    """The model of ``config`` as the loader and the adapter would leave it, with tensors that are made.

    Args:
        config: A transformers configuration.
        recipe: Its ``quant``, ``lora`` and ``train.activation_checkpointing`` are obeyed.
        dtype: Of what is not quantized, and of the 4-bit products.
        attention: An implementation that transformers knows.
        make: What gives a tensor's stand-in; see :func:`fakes_of`.
        as_on_card: Follow the libraries' paths for CUDA where they ask for the device.

    Raises:
        RecipeError: As :func:`qlora.adapter.attach`.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if recipe.quant.quant_type == "nf4":
            _quantize(base, recipe.quant.double_quant, dtype)
        base.requires_grad_(False)
        loader.spare_tables(base, recipe)
        # One new token stands for all: what it costs is a copy of the whole table.
        model = adapter.attach(base, recipe, [0] if recipe.lora.train_new_tokens else ())
    if as_on_card:
        for module in model.modules():
            if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear4bit):
                # Under CUDA's autocast peft 0.21 leaves the input of a 4-bit layer in 16 bits; under
                # the CPU's, which it does not ask about, it makes an fp32 copy first.
                module.cast_input_dtype_enabled = False
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout) and child.p:
                    setattr(module, name, CardDropout(child.p))
    _replace(model, make)
    return model.train()


def fakes_of(mode: FakeTensorMode) -> Make:
    """Fake tensors of this mode, which claim to be on a CPU."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    return fake


class CardDropout(nn.Module):
    """Dropout as CUDA's kernel does it: a mask of a byte an element, where a CPU's is a float."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def unmasked_attention() -> str:
    """The name of an attention without masks, as FlashAttention is, that runs on fake CPU tensors."""
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
    return UNMASKED


def frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(category of a plan, tensor) of everything that the base holds, scales and codes included."""
    modules = model.modules()
    away = {id(m.weight) for m in modules if isinstance(m.__dict__.get("forward"), EmbeddingOnHost)}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield "base_nf4", parameter
            yield from (("scales", tensor) for tensor in _state_tensors(state))
        elif not parameter.requires_grad:
            yield "unquantized", parameter
    for buffer in model.buffers():
        yield HOST if id(buffer) in away else "unquantized", buffer


def _quantize(base: Any, double_quant: bool, dtype: torch.dtype) -> None:
    """Bitsandbytes' linears where transformers would put them, with packed weights on meta."""
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(base, get_keys_to_not_convert(base), asked)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shape = torch.Size((module.out_features, module.in_features))
            weights, blocks = shape.numel(), -(-shape.numel() // 64)
            nested = None
            if double_quant:
                nested = bnb.functional.QuantState(
                    absmax=torch.empty(-(-blocks // 256)),
                    blocksize=256,
                    code=torch.empty(256),
                    dtype=torch.float32,
                )
            state = bnb.functional.QuantState(
                absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
                shape=shape,
                code=torch.empty(16),
                blocksize=64,
                quant_type="nf4",
                dtype=dtype,
                offset=torch.empty(()) if double_quant else None,
                state2=nested,
            )
            module.weight = bnb.nn.Params4bit(
                torch.empty((-(-weights // 2), 1), dtype=torch.uint8),
                requires_grad=False,
                quant_state=state,
                bnb_quantized=True,
                compress_statistics=double_quant,
                quant_type="nf4",
                module=module,
            )
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    base.is_loaded_in_4bit = True  # what peft looks for


def _replace(model: nn.Module, make: Make) -> None:
    """Put another tensor in the place of every parameter, buffer and quantization state."""
    made: dict[int, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:  # tied weights stay tied
            empty = make(tensor)
            new: Any = empty
            if isinstance(tensor, nn.Parameter):
                # A plain parameter: Params4bit cannot wrap a fake tensor, and nothing needs it to.
                new = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                for name in _OF_PARAMS4BIT:
                    if hasattr(tensor, name):
                        setattr(new, name, getattr(tensor, name))
                if (state := getattr(tensor, "quant_state", None)) is not None:
                    _replace_state(state, stand_in)
                    new.quant_state = state
            made[id(tensor)] = new
        return made[id(tensor)]

    kept = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = stand_in(tensor)  # type: ignore[assignment]
    del kept  # until here no id could be given away twice


def _replace_state(state: Any, stand_in: Make) -> None:
    for holder in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            if holder is not None and getattr(holder, name, None) is not None:
                setattr(holder, name, stand_in(getattr(holder, name)))


def _state_tensors(state: Any) -> Iterator[torch.Tensor]:
    for holder in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            if holder is not None and isinstance(getattr(holder, name, None), torch.Tensor):
                yield getattr(holder, name)
