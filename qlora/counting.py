"""The arithmetic and the launches of a step, counted operator by operator, on real tensors or fake ones.

What a card would do is counted: an operator that only looks at a tensor differently launches nothing, one
of bitsandbytes' launches several kernels, and causal attention computes half of its square.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Launches of an operator on CUDA, where it is not one (bitsandbytes 0.50, read off its source): nested
# scales are unpacked, their offset is added, the weight is unpacked, and the product is made.
SEVERAL = {"gemm_4bit": 4, "dequantize_4bit": 1, "dequantize_blockwise": 1}
# Products of an attention, and whether its heads come before its tokens.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": (2, True),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (5, True),
    "_flash_attention_forward": (2, False),
    "_flash_attention_backward": (5, False),
    "_efficient_attention_forward": (2, False),
    "efficient_attention_backward": (5, False),
}
SILENT = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "lift_fresh", "is_pinned", "record_stream", "set_", "resize_", "_local_scalar_dense", "_unsafe_view",
    "_reshape_alias", "device",
}  # fmt: skip


class WorkCounter(TorchDispatchMode):
    """Counts what is done while it is entered.

    Attributes:
        launches: Kernels that a card would start, by operator.
        flops: Floating-point operations of products and attention.
        unpacked: Weights that were unpacked from 4 bits.
        host_reads: Times the host waited for a value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.flops = 0.0
        self.unpacked = 0
        self.host_reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname if hasattr(func, "_opname") else str(func)
        if name == "_local_scalar_dense":
            self.host_reads += 1
        if name in SILENT or func.is_view or (name == "_to_copy" and _stays(args, out)):
            return out
        self.launches[name] += SEVERAL.get(name, 1)
        if name == "gemm_4bit":
            rows, columns = args[2]
            self.unpacked += rows * columns
            self.flops += 2 * args[0].numel() // columns * rows * columns
        elif name in ("unpack", "dequantize_4bit"):
            self.unpacked += out.numel()
        elif name in ATTENTION:
            products, heads_first = ATTENTION[name]
            shape = args[1 if products == 5 else 0].shape  # of the queries; the last is the head's
            length = shape[-2] if heads_first else shape[-3]
            self.flops += (
                products * shape.numel() * length
            )  # two a multiplication, half of the square
        elif name == "addmm_":
            self.flops += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _stays(args: tuple[Any, ...], out: Any) -> bool:
    """A copy between the host and itself, which no kernel makes: seeds."""
    return isinstance(out, torch.Tensor) and out.numel() == 1 and out.dtype == torch.int64
