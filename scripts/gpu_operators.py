"""Operator by operator on a card: our kernels beside the libraries' way, and attention kernels in turns.

Not a command: :mod:`gpu_suite` runs it. The same code runs on small shapes on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
from gpu_step import Work, recipe_of
from gpu_weights import Weights, config_of, dtype_on, rows_of

Way = Callable[[], Any]


def side_by_side(ways: dict[str, Way], device: Any, *, rounds: int, calls: int) -> dict[str, Any]:
    """Milliseconds of each way, taken in turns, and by those of the first way, turn by turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first one compiles and warms up
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            taken = milliseconds(ways[name], device, calls)
            if number:
                times[name].append(taken)
    mine = next(iter(times.values()))
    return {
        name: {
            "milliseconds": round(statistics.median(taken), 4),
            "by_first": round(statistics.median(measure.ratios(taken, mine)), 3),
        }
        for name, taken in times.items()
    }


def milliseconds(work: Way, device: Any, calls: int) -> float:
    """Of one call, on the device's own clock where it has one."""
    import torch

    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - began) / calls * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / calls


def operators(model: str, tokens: int, *, rounds: int = 7, calls: int = 20) -> dict[str, Any]:
    """Each operator, forward and backward, beside the libraries' way to do the same.

    Args:
        model: Whose widths.
        tokens: Rows.
        rounds: Turns of each way.
        calls: Of a turn.
    """
    from qlora import hardware

    card = hardware.card()
    place = _Place(config_of(model), tokens, hardware.device(card), dtype_on(card))
    found = {
        name: side_by_side(ways(place), place.device, rounds=rounds, calls=calls)
        for name, ways in OPERATORS.items()
    }
    return {"model": model, "tokens": tokens, "dtype": str(place.dtype), "operators": found}


@dataclass(frozen=True)
class _Place:
    """Whose widths, how many rows, where and in which dtype operators are tried."""

    config: Any
    tokens: int
    device: Any
    dtype: Any

    def random(self, *shape: int) -> Any:
        import torch

        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def passes(self, forward: Callable[..., Any], upstream: Any, *leaves: Any) -> Way:
        """A function through autograd, forward and backward."""
        import torch

        own = [x.detach().clone().requires_grad_() for x in leaves]
        return lambda: torch.autograd.grad(forward(*own), own, upstream)


def _unpack(at: _Place) -> dict[str, Way]:
    from qlora.bnb import bnb
    from qlora.kernels import ops

    matrix = at.random(at.config.intermediate_size, at.config.hidden_size)
    packed, state = bnb.functional.quantize_4bit(
        matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return {
        "ours": lambda: ops.unpack(packed, state, at.dtype),
        "bitsandbytes": lambda: bnb.functional.dequantize_4bit(packed, state),
    }


def _rms_norm(at: _Place) -> dict[str, Way]:
    import torch
    from torch.nn import functional
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from qlora.kernels import ops

    h, eps = at.config.hidden_size, 1e-5
    x, dy = at.random(at.tokens, h), at.random(at.tokens, h)
    weight = torch.ones(h, dtype=at.dtype, device=at.device)
    module = LlamaRMSNorm(h, eps).to(at.device, at.dtype).requires_grad_(False)

    def ours() -> Any:
        _, rstd = ops.rms_norm(x, weight, eps)
        return ops.rms_norm_backward(dy, x, weight, rstd)

    ways = {
        "ours": ours,
        "torch": at.passes(lambda x: functional.rms_norm(x, (h,), weight, eps), dy, x),
        "transformers": at.passes(module, dy, x),
    }
    if (liger := _liger()) is not None:
        ways["Liger"] = at.passes(lambda x: liger.rms_norm(x, weight, eps), dy, x)
    return ways


def _gated(at: _Place) -> dict[str, Way]:
    from torch.nn import functional

    from qlora.kernels import ops

    gate, up, dy = (at.random(at.tokens, at.config.intermediate_size) for _ in range(3))

    def ours() -> Any:  # in place: what it reads is not needed again
        ops.gated(gate, up, ops.SILU)
        ops.gated_backward_(dy, gate, up, ops.SILU)

    upstream = dy.clone()
    ways = {
        "ours": ours,
        "torch": at.passes(lambda gate, up: functional.silu(gate) * up, upstream, gate, up),
    }
    if (liger := _liger()) is not None:
        ways["Liger"] = at.passes(liger.gated, upstream, gate, up)
    return ways


def _rotary(at: _Place) -> dict[str, Way]:
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from qlora.kernels import ops

    config = at.config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k = at.random(at.tokens, heads, width), at.random(at.tokens, kv, width)
    half = torch.rand(at.tokens, width // 2, device=at.device).mul(6.28)
    cos, sin = (f(torch.cat([half, half], 1)).to(at.dtype) for f in (torch.cos, torch.sin))

    def ours() -> Any:
        ops.rotary_(q, k, cos, sin)
        ops.rotary_(q, k, cos, sin, inverse=True)

    def theirs(q: Any, k: Any) -> Any:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        return apply_rotary_pos_emb(*heads_first, cos[None], sin[None])

    upstream = at.random(1, heads, at.tokens, width), at.random(1, kv, at.tokens, width)
    return {"ours": ours, "transformers": at.passes(theirs, upstream, q, k)}


def _loss(at: _Place) -> dict[str, Way]:
    import torch
    from torch.nn import functional
    from trl.kernels import ChunkedLogProbFunction

    from qlora.kernels.loss import Dense, linear_cross_entropy

    vocab, x = at.config.vocab_size, at.random(at.tokens, at.config.hidden_size)
    head = at.random(vocab, at.config.hidden_size).mul_(0.02)
    labels = torch.randint(0, vocab, (at.tokens,), device=at.device)

    def trl(x: Any) -> Any:  # with what its SFTTrainer asks for
        asked = ("log_probs", "entropy", "is_top1")
        scored = ChunkedLogProbFunction.apply(x, head, None, labels, 1.0, 32768, None, 1.0, asked)
        return -scored[0].sum()

    def materialized(x: Any) -> Any:
        return functional.cross_entropy((x @ head.T).float(), labels, reduction="sum")

    one = torch.ones((), device=at.device)
    return {
        "ours": at.passes(lambda x: linear_cross_entropy(x, labels, Dense(head)), one, x),
        "TRL": at.passes(trl, one, x),
        "materialized": at.passes(materialized, one, x),
    }


def _one_layer(at: _Place) -> tuple[Any, Any, Any]:
    """(a decoder layer with adapters and the fused layer on it, hidden states, cos and sin)."""
    import torch

    from qlora import adapter, hardware
    from qlora.kernels import attached

    config = type(at.config)(**(at.config.to_dict() | {"num_hidden_layers": 1}))
    work = Work(Weights(config, at.device, at.dtype), hardware.card(), at.tokens, [], Path())
    recipe = recipe_of(work)
    model = adapter.attach(work.weights.base(recipe, "sdpa"), recipe).train()
    attached.attach(model, work.card, levels=[1])
    base = model.get_base_model()
    x = at.random(1, at.tokens, config.hidden_size)
    rotary = base.model.rotary_emb(x, torch.arange(at.tokens, device=at.device)[None])
    return base.model.layers[0], x, rotary


def _trains(at: _Place, forward: Callable[[Any], Any], x: Any, module: Any) -> Way:
    """Forward and backward of a module with adapters, under autocast as training has it."""
    import torch

    leaves = [x.clone().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]

    def both() -> Any:
        with torch.autocast(at.device.type, at.dtype, enabled=at.dtype != torch.float32):
            y = forward(leaves[0])
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def _linear(at: _Place) -> dict[str, Way]:
    import torch

    from qlora.kernels.projection import Pair

    layer, x, _ = _one_layer(at)
    wrapper = layer.mlp.gate_proj
    (mine,) = (p for p in layer.forward.parts.projections if p.wrapper is wrapper)

    def ours() -> Any:
        pair = Pair(*(p.detach().to(at.dtype) for p in mine.parameters))
        y, inner = mine.forward(x[0], pair, None)
        dy = torch.ones_like(y)
        _, dinner = mine.input_gradient(dy, pair, None)
        return mine.weight_gradients(x[0], dy, inner, dinner, None)

    return {"ours": ours, "peft": _trains(at, wrapper, x, wrapper)}


def _layer(at: _Place) -> dict[str, Way]:
    layer, x, rotary = _one_layer(at)

    def theirs(x: Any) -> Any:
        return type(layer).forward(layer, x, position_embeddings=rotary)

    return {
        "ours": _trains(at, lambda x: layer(x, position_embeddings=rotary), x, layer),
        "transformers and peft": _trains(at, theirs, x, layer),
    }


OPERATORS: dict[str, Callable[[_Place], dict[str, Way]]] = {
    "unpack": _unpack, "rms_norm": _rms_norm, "gated": _gated, "rotary": _rotary, "loss": _loss,
    "linear with its adapter": _linear, "decoder layer, level 1": _layer,
}  # fmt: skip


def _liger() -> Any:
    """Liger's functions for a norm and a gate, or None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return SimpleNamespace(
        rms_norm=lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps),
        gated=lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
    )


def attention(
    model: str, lengths: Sequence[int], *, rounds: int = 7, calls: int = 5
) -> dict[str, Any]:
    """Packed rows through each kernel, forward and backward: by their bounds, and by a mask of T x T."""
    import torch
    from torch.nn import functional

    from qlora import hardware
    from qlora.kernels.attention import Bounds, CpuFlash, Efficient, Flash, Scores, attend_with

    card = hardware.card()
    device, config = hardware.device(card), config_of(model)
    cuda = card.kind == "cuda"
    dtype = dtype_on(card)
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found = {}
    for length in lengths:
        rows = [len(row) for row in rows_of(min(length, 4096), -(-length // 4096), 100)]
        offsets = torch.tensor([0, *rows], device=device).cumsum(0).to(torch.int32)
        row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(device)
        at = torch.arange(length, device=device)
        mask = ((row[:, None] == row[None]) & (at[:, None] >= at[None]))[None, None]
        leaves = [
            torch.randn(1, length, n, width, dtype=dtype, device=device).requires_grad_()
            for n in (heads, kv, kv)
        ]
        upstream = torch.randn(1, length, heads, width, dtype=dtype, device=device)

        def by(kernel: Any, scores: Any, leaves: Any = leaves, upstream: Any = upstream) -> Way:
            return lambda: torch.autograd.grad(
                attend_with(kernel, *leaves, scores), leaves, upstream
            )

        def sdpa(leaves: Any = leaves, mask: Any = mask, upstream: Any = upstream) -> Any:
            q, k, v = (x.transpose(1, 2) for x in leaves)
            k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out, leaves, upstream.transpose(1, 2))

        scale, bounds = width**-0.5, Bounds(offsets, max(rows))
        ways: dict[str, Way] = {}
        if cuda and (card.capability or (0, 0)) >= (8, 0):
            ways["flash by bounds"] = by(Flash(), Scores(scale, bounds=bounds))
        if cuda:
            ways["efficient by bounds"] = by(Efficient(), Scores(scale, bounds=bounds))
        else:
            ways["flash of the CPU by a mask"] = by(CpuFlash(), Scores(scale, mask=mask))
        ways["SDPA by a mask"] = sdpa
        found[f"{length:,} tokens, {len(rows)} rows"] = side_by_side(
            ways, device, rounds=rounds, calls=calls
        )
    return {"model": model, "dtype": str(dtype), "operators": found}


def told_operators(found: dict[str, Any]) -> str:
    """A table of operators: each way's milliseconds and how many times the first one's."""
    rows = [
        (name, way, f"{told['milliseconds']:.3f}", f"{told['by_first']:.2f}")
        for name, ways in found["operators"].items()
        for way, told in ways.items()
    ]
    return measure.table(("operator", "way", "ms", "by the first"), rows)
