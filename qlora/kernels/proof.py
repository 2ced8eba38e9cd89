"""Is what the fused code computes, on this machine and this model, what the libraries compute?

Asked before every run, because no test elsewhere can answer it: a card, a driver, a compiler and a model
meet for the first time. Layers, last norm, loss, dropout and attention's windows are tried on a few rows;
adapter weights, modes and random state are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora.kernels import ops
from qlora.kernels.attention import Bounds, OnCuda, Scores
from qlora.kernels.family import NotFused
from qlora.kernels.loss import Head, linear_cross_entropy
from qlora.kernels.parts import Parts

# Of a tensor's norm, by dtype: what two orders of the same sums may differ by.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
TILE, WINDOW, LABELS = 16, 8, 32  # rows of the MLP, positions of a window, supervised tokens


@dataclass(frozen=True)
class Proof:
    """How far the fused code was from the libraries' on this machine: the largest relative error.

    Relative to the norm of each tensor: outputs, gradients of inputs and of adapters.
    """

    error: float
    compared: int

    def __str__(self) -> str:
        return f"{self.compared} tensors within {self.error:.1g} of the libraries' own"


def prove(model: Any, attached: Sequence[Any], head: Head | None, asked: dict[str, Any]) -> Proof:
    """Compare everything that is fused with the libraries' own code.

    One layer of each kind is passed forward and backward with the hidden states that the model gives it, at
    the outermost levels and at those in use, in tiles if it will compute in tiles.

    Args:
        model: PEFT's, with fused layers on it.
        attached: What :func:`qlora.kernels.attached.attach` returned.
        head: Of the fused loss, or None.
        asked: Arguments of the model: a short batch, laid out as in training.

    Raises:
        NotFused: Something differs, or fails; says by how much, or how.
    """
    *layers, last = attached
    dtype = layers[0].input_layernorm.weight.dtype
    devices = [asked["input_ids"].device] if asked["input_ids"].is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), _modes_kept(model):
            given = _inputs(model, layers, last, asked)
            found: dict[str, list[float]] = {}
            for layer, levels in _kinds(layers):
                found.setdefault("layers", []).extend(_of_layer(layer, levels, *given[id(layer)]))
            hidden = given[id(last)][0][0]
            found["last norm"] = list(_of_norm(last, hidden))
            if head is not None:
                found["loss"] = list(_of_loss(head, hidden, model))
            parts = layers[0].forward.parts
            if any(p.drops for p in parts.projections):
                found["dropout"] = list(_of_dropout(hidden))
            if any(layer.forward.parts.scores.window for layer in layers):
                found["window"] = list(_of_window(parts, hidden))
    except Exception as error:  # noqa: BLE001 - Triton and its compilers have errors of their own
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise NotFused(f"they fail on this machine: {type(error).__name__}: {said}") from None
    named = [(error, name) for name, errors in found.items() for error in errors]
    worst, name = max(named, key=lambda pair: (math.isnan(pair[0]), pair[0]))
    if not worst <= TOLERANCE[dtype]:
        raise NotFused(
            f"they compute something else on this machine ({name}): a relative error of {worst:.2g}, where "
            f"rounding explains {TOLERANCE[dtype]}"
        )
    return Proof(worst, len(named))


def _inputs(model: Any, layers: Sequence[Any], last: Any, asked: dict[str, Any]) -> dict[int, Any]:
    """(args, kwargs) that the model gives to each layer and to its last norm; by id."""
    given: dict[int, Any] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: given.__setitem__(id(module), (args, kwargs)),
            with_kwargs=True,
        )
        for module in (*layers, last)
    ]
    try:
        model.eval()
        with torch.no_grad():
            model.get_base_model().base_model(**asked, use_cache=False)
        model.train()
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _kinds(layers: Sequence[Any]) -> Iterator[tuple[Any, list[int]]]:
    """The first layer of each kind, with the levels to try on it."""
    kinds: dict[Any, tuple[Any, set[int]]] = {}
    for layer in layers:
        parts: Parts = layer.forward.parts
        on = (bool(p.parameters) for p in parts.projections)
        kind = parts.rotates, parts.scores.window, *on
        kinds.setdefault(kind, (layer, {1, 5}))[1].add(parts.level)
    for layer, levels in kinds.values():
        yield layer, sorted(levels)


def _of_layer(layer: Any, levels: Sequence[int], args: Any, kwargs: Any) -> Iterator[float]:
    hidden, *rest = args if args else (kwargs["hidden_states"],)
    kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    kind, parts = type(layer.forward), layer.forward.parts
    trained = parts.parameters
    upstream = torch.randn_like(hidden)

    def passed(forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        x = hidden.detach().clone().requires_grad_()
        wide = hidden.dtype == torch.float32
        with torch.autocast(hidden.device.type, hidden.dtype, enabled=not wide):
            y = forward(x, *rest, **kwargs)
        return [y.detach(), *torch.autograd.grad(y, [x, *trained], upstream)]

    with _stirred(layer, trained):
        own = passed(lambda *a, **k: type(layer).forward(layer, *a, **k))
        for level in levels:
            tile = TILE if parts.tile else None
            again = passed(kind(layer, replace(parts, level=level, tile=tile)))
            yield from (_apart(b, a) for a, b in zip(own, again, strict=True))


def _of_norm(last: Any, hidden: torch.Tensor) -> Iterator[float]:
    upstream = torch.randn_like(hidden)
    found = []
    for forward in (lambda x: type(last).forward(last, x), last.forward):
        x = hidden.detach().clone().requires_grad_()
        y = forward(x)
        found.append([y.detach(), *torch.autograd.grad(y, [x], upstream)])
    yield from (_apart(b, a) for a, b in zip(*found, strict=True))


def _of_loss(head: Head, hidden: torch.Tensor, model: Any) -> Iterator[float]:
    """The fused loss, beside autograd's over the logits that the head itself gives."""
    config = model.get_base_model().config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    rows = hidden.detach().flatten(0, 1)[:LABELS].to(head.dtype)
    labels = torch.randint(head.width, (len(rows),), device=rows.device)
    found = []
    for fused in (False, True):
        x = rows.clone().requires_grad_()
        if fused:
            total = linear_cross_entropy(x, labels, head, softcap=softcap)
            found.append([total.detach(), *torch.autograd.grad(total, [x])])
            continue
        with torch.no_grad():
            logits = head.logits(x).float()
        logits.requires_grad_()
        capped = softcap * torch.tanh(logits / softcap) if softcap else logits
        total = functional.cross_entropy(capped, labels, reduction="sum")
        (slope,) = torch.autograd.grad(total, [logits])
        with torch.no_grad():
            found.append([total.detach(), head.back(slope.to(head.dtype))])
    yield from (_apart(b, a) for a, b in zip(*found, strict=True))


def _of_dropout(hidden: torch.Tensor) -> Iterator[float]:
    """0 where a seed gives one mask, another seed another, and the share and the scale are right."""
    ones, seed = torch.ones_like(hidden.flatten(0, 1)), torch.tensor([11])
    first, again = ops.dropout(ones, 0.25, seed), ops.dropout(ones, 0.25, seed)
    other = ops.dropout(ones, 0.25, seed + 1)
    share = float((first == 0).float().mean())
    near = abs(share - 0.25) < 6 * math.sqrt(0.25 * 0.75 / first.numel())
    scaled = _apart(first[first != 0], torch.full_like(first[first != 0], 4 / 3))
    yield 0.0 if torch.equal(first, again) and not torch.equal(first, other) and near else 1.0
    yield scaled


def _of_window(parts: Parts, hidden: torch.Tensor) -> Iterator[float]:
    """A card's kernel with a window shorter than its rows, beside the scores written out."""
    if not isinstance(parts.attention, OnCuda) or hidden.dtype == torch.float32:
        return  # elsewhere a window comes as a mask, which the layers were tried with
    length, dim = 2 * LABELS, parts.head_dim
    offsets = torch.tensor([0, LABELS, length], dtype=torch.int32, device=hidden.device)
    scores = Scores(dim**-0.5, WINDOW, None, Bounds(offsets, LABELS))
    shapes = (parts.heads, parts.kv_heads, parts.kv_heads, parts.heads)
    q, k, v, do = (hidden.new_empty(1, length, n, dim).normal_() for n in shapes)
    o, saved = parts.attention.forward(q, k, v, scores)
    found = [o, *parts.attention.backward(do, q, k, v, o, saved, scores)]
    at = torch.arange(length, device=hidden.device)
    near = (
        (at[:, None] >= at) & (at[:, None] - at < WINDOW) & (at[:, None] // LABELS == at // LABELS)
    )
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in leaves]
    groups = parts.heads // parts.kv_heads
    keys, values = (x.repeat_interleave(groups, 1) for x in heads[1:])
    logits = (heads[0] @ keys.transpose(2, 3)) * dim**-0.5
    plain = (logits.masked_fill(~near, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    own = [plain.detach(), *torch.autograd.grad(plain, leaves, do.float())]
    yield from (_apart(b, a) for a, b in zip(own, found, strict=True))


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).norm()
    return float(difference / expected.float().norm().clamp(min=1e-30))


@contextmanager
def _stirred(layer: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Adapters that do something, and no dropout: B is zero before the first step, and would hide A."""
    before = [p.detach().clone() for p in trained]
    drops = [m for m in layer.modules() if isinstance(m, nn.Dropout)]
    rates = [m.p for m in drops]
    try:
        with torch.no_grad():
            for m in drops:
                m.p = 0.0
            for p in trained:
                p.add_(torch.randn_like(p) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
            for m, rate in zip(drops, rates, strict=True):
                m.p = rate


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
