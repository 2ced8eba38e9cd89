"""Linears whose weights bitsandbytes has packed as NF4: found, counted, prepared, and tried."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from qlora import hardware
from qlora.bnb import bnb
from qlora.cards import Card
from qlora.errors import HardwareError, ModelError

# NF4 with blocks of 64 leaves 0.0085 of the variance of normal weights (QLoRA, section 3). A kernel
# that leaves more than this does not compute NF4.
MAX_ERROR = 0.02


def linears(model: nn.Module) -> Any:
    """(name, module) of every linear that bitsandbytes packed."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    )


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear's weight is unpacked, or packed as NF4 in bytes that no kernel has reordered."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return bool(linear.weight.is_floating_point())  # type: ignore[operator,union-attr]
    reordered = getattr(state, "packing_format_for_cpu", False)
    return state.quant_type == "nf4" and linear.weight.dtype == torch.uint8 and not reordered


def unpacked(linear: Any) -> torch.Tensor:
    """The matrix (out_features, in_features) that a packed linear multiplies with, in its own dtype."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    return bnb.functional.dequantize_4bit(weight.data, state).detach()


def unpacked_numel(parameter: nn.Parameter) -> int:
    """Weights a parameter stands for. A packed ``Params4bit`` has half as many elements, or fewer."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def error(in_features: int, device: torch.device) -> float:
    """Share of a normal weight's variance that a round trip through this machine's NF4 loses.

    0.0085 where the kernel is right (QLoRA, section 3); bitsandbytes 0.50 on AVX512 CPUs gives
    several times that when ``in_features`` is a multiple of 16 but not of 64.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, in_features, generator=generator).to(device)
    linear = bnb.nn.Linear4bit(in_features, 64, bias=False, quant_type="nf4", device=device)
    linear.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    linear = linear.to(device)
    linear.compute_dtype = torch.float32
    linear.support_avx512bf16_for_cpu = False
    lost = 0.0
    with torch.no_grad():
        for start in range(0, in_features, 1024):  # the whole identity of a wide layer takes 1 GB
            ones = torch.eye(min(1024, in_features - start), in_features, device=device)
            # Through the layer, not dequantize_4bit: the wrong path is chosen inside the forward.
            restored = linear(ones.roll(start, dims=1)).T
            lost += float((restored - weight[:, start : start + 1024]).square().sum())
    return lost / float(weight.square().sum())


def unfit(model: nn.Module) -> list[str]:
    """Which packed linears hold another matrix than theirs, or not all of it, in words.

    The libraries look at no shape of a weight that they pack or find packed: the kernel would read
    past its end.
    """
    found = []
    for name, module in linears(model):
        weight, ours = module.weight, (module.out_features, module.in_features)
        state = getattr(weight, "quant_state", None)
        if state is None:
            found.append(f"{name}.weight is packed, and its scales are missing from the files")
        elif tuple(state.shape) != ours:
            found.append(
                f"{name}.weight is {tuple(state.shape)} in its files where the model has {ours}"
            )
        elif not _is_whole(weight, state):
            found.append(f"{name}.weight is packed, and a part of it is missing from the files")
    return found


def _is_whole(weight: Any, state: Any) -> bool:
    """Whether there are as many packed bytes and scales as a weight's shape says, and of their kind.

    Scales that were quantized again, and lack the scales of that, would pass for numbers of up to 255.
    """
    numel, storage = state.shape.numel(), weight.element_size()
    blocks = -(-numel // state.blocksize)
    if state.nested:
        scaled = state.state2.absmax.numel() == -(-blocks // state.state2.blocksize)
    else:
        scaled = state.absmax.is_floating_point()
    packed = (numel + 1) // (2 * storage) * storage
    return weight.nbytes == packed and state.absmax.numel() == blocks and scaled


def require_every_linear(model: Any) -> None:
    """Refuse linears that were meant to be 4-bit and are not, with what they weigh.

    Raises:
        ModelError: Some did.
    """
    head = model.get_output_embeddings()
    left = Counter[str]()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear) and not isinstance(module, bnb.nn.Linear4bit):
            if module is not head:
                left[name.rpartition(".")[2]] += module.weight.nbytes
        else:  # stacked experts are bare parameters, which the libraries do not quantize
            for key, value in own.items():
                if value.ndim >= 3 and not isinstance(value, bnb.nn.Params4bit):
                    left[f"{type(module).__name__}.{key}"] += value.nbytes
    if left:
        listed = ", ".join(
            f"{name} ({size / 2**20:,.1f} MiB)" for name, size in left.most_common(6)
        )
        raise ModelError(
            f"quant.quant_type is nf4, but {type(model).__name__} keeps these weights in 16 bits: "
            f"{listed}. Mixture-of-experts layers are not quantized by the libraries; choose a dense "
            "model, or write quant.quant_type: none if the card can hold them."
        )
    if not any(True for _ in linears(model)):
        raise ModelError(
            f"quant.quant_type is nf4, but {type(model).__name__} has no linear layer."
        )


def prepare(model: nn.Module, card: Card, dtype: torch.dtype) -> None:
    """Set what the packed linears compute in, and try each of their widths on this machine.

    Raises:
        HardwareError: bitsandbytes computes a width wrongly here.
    """
    widths = set()
    for _, module in linears(model):
        # bitsandbytes 0.50 repacks the weight in place at the first evaluation on an AVX512-BF16 CPU
        # and never unpacks it: every later gradient is wrong. Off until it unpacks on train().
        module.support_avx512bf16_for_cpu = False
        module.compute_dtype = dtype  # a prequantized checkpoint brings another card's
        module.compute_type_is_set = True
        widths.add(module.in_features)
    for width in sorted(widths):
        lost = error(width, hardware.device(card))
        if lost > MAX_ERROR:
            raise HardwareError(
                f"quant.quant_type is nf4, but bitsandbytes {bnb.__version__} computes layers of "
                f"{width} inputs wrongly on this {card.kind.upper()}: {lost:.3f} of the variance is "
                f"lost, where NF4 loses 0.0085. Widths that are multiples of 64 are right; choose such "
                "a model, another machine, or quant.quant_type: none."
            )
