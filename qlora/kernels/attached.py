"""The fused layers, hung on the decoder layers of one model, proven there, and taken off again.

The seam is the public one of a module's instance: its ``forward``. Neither a class nor a library is
changed, names and state dicts stay what they were, and without gradients, in evaluation, with the adapter
off, merged or exchanged, the layer's own code runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora import adapter
from qlora.cards import Card
from qlora.kernels import contest
from qlora.kernels.attention import (
    CpuFlash,
    Differentiated,
    Kernel,
    OnCuda,
    Scores,
    bounds_in,
    candidates_on,
    in_options,
    kernel_on,
)
from qlora.kernels.family import NotFused, last_norm, norm, parts_of, require_known
from qlora.kernels.head import PackedHead
from qlora.kernels.layer import FusedLayer
from qlora.kernels.loss import Dense, Head
from qlora.kernels.parts import Norm, Parts
from qlora.kernels.proof import Proof, prove

# Implementations of transformers, and ours registered with it, that are softmax attention and no more.
PLAIN_ATTENTION = ("sdpa", "sdpa_without_gqa", "sdpa_bounded", "sdpa_unmasked", "flash_attention_2")


class FusedForward:
    """What stands in a decoder layer's ``forward``."""

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        self.layer, self.parts = layer, parts

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        trains = self.layer.training and torch.is_grad_enabled()
        # Evaluation is the layer's own, but where it would not fit: a tile bounds what the MLP makes.
        long = self.parts.tile and hidden_states[..., 0].numel() > self.parts.tile
        fuses = trains or (long and not torch.is_grad_enabled())
        if args or not fuses or past_key_values is not None or not self._on():
            asked = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            own: Any = type(self.layer).forward
            return own(  # type: ignore[no-any-return]
                self.layer, hidden_states, *args, past_key_values=past_key_values, **asked, **kwargs
            )
        parts = self.parts
        bounds = bounds_in(kwargs)
        if attention_mask is not None and not attention_mask.numel():
            assert bounds is not None, "packed rows came without their bounds"
            attention_mask = None
        scores = replace(parts.scores, mask=attention_mask, bounds=bounds)
        drops = any(p.drops for p in parts.projections)
        seed = torch.randint(2**62, (1,)) if drops else None
        at_work = replace(parts, scores=scores)
        return FusedLayer.apply(  # type: ignore[no-any-return]
            at_work, hidden_states, position_embeddings, seed, *parts.parameters
        )

    def _on(self) -> bool:
        return all(p.is_on for p in self.parts.projections)


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        y, rstd = norm.forward(x.reshape(-1, x.shape[-1]))
        ctx.norm = norm
        ctx.save_for_backward(x, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, rstd = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        return None, ctx.norm.backward(grads[0].reshape(flat.shape), flat, rstd).view(x.shape)


class FusedNormForward:
    """What stands in the last norm's ``forward``: it keeps its input once, in the compute dtype."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.norm = module, norm(module)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.module.training and hidden_states.requires_grad:
            return _FinalNorm.apply(self.norm, hidden_states)  # type: ignore[no-any-return]
        own: Any = type(self.module).forward
        return own(self.module, hidden_states)  # type: ignore[no-any-return]


def attach(
    model: Any,
    card: Card,
    *,
    levels: Sequence[int],
    tile: int | None = None,
    unmasked: Kernel | None = None,
) -> list[nn.Module]:
    """Hang a fused layer on every decoder layer of a model with an adapter.

    Activation checkpointing by the libraries is switched off.

    Args:
        model: PEFT's model.
        card: Decides the attention's kernel.
        levels: Of each layer, first to last.
        tile: Rows of the MLP at a time; None for all.
        unmasked: The card's kernel for packed rows; None for the likeliest.

    Returns:
        The decoder layers, and the norm after them.

    Raises:
        NotFused: Something in it is not known here. Nothing is changed then.
    """
    base = model.get_base_model()
    found = require_known(base)
    hung = [
        (layer, parts_of(layer, attention_of(layer, card, unmasked), level, tile))
        for layer, level in zip(found, levels, strict=True)
    ]
    last = last_norm(base)
    # What is computed again is a layer's own affair now; and the libraries' way would have the first layer
    # compute a gradient of the embeddings that nobody wants.
    adapter.checkpoint_layers(base, False)
    for layer, parts in hung:
        layer.forward = FusedForward(layer, parts)
        if unmasked is not None:  # evaluation takes the same one; see qlora.attention
            layer.self_attn.kernel_for_packed_rows = parts.attention
    last.forward = FusedNormForward(last)
    return [*found, last]


def is_attached(model: Any) -> bool:
    """Whether fused layers hang on a model."""
    return any(isinstance(m.__dict__.get("forward"), FusedForward) for m in model.modules())


def detach(modules: Sequence[nn.Module]) -> None:
    """Take what was attached off again."""
    for module in modules:
        module.__dict__.pop("forward", None)


def attention_of(layer: Any, card: Card, unmasked: Kernel | None = None) -> Kernel:
    """How this layer's attention is computed on this card; ``unmasked`` as in :func:`attach`."""
    attn = layer.self_attn
    name = attn.config._attn_implementation
    softcap = getattr(attn, "attn_logit_softcapping", None)
    if name in PLAIN_ATTENTION and softcap is None:
        if card.kind == "cpu":
            return CpuFlash()
        likeliest = kernel_on(card.capability, attn.head_dim)
        return likeliest if unmasked is None else OnCuda(unmasked, likeliest.masked)
    eager = getattr(sys.modules[type(attn).__module__], "eager_attention_forward", None)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    window = getattr(attn, "sliding_window", None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        options = {} if softcap is None else {"softcap": softcap}
        if scores.bounds is not None:
            options |= in_options(scores.bounds)
        return function(  # type: ignore[no-any-return]
            attn,
            q,
            k,
            v,
            scores.mask,
            dropout=0.0,
            scaling=attn.scaling,
            sliding_window=window,
            **options,
        )[0]

    return Differentiated(attend)


@dataclass(frozen=True)
class Fused:
    """A model with fused layers, proven on this machine.

    Attributes:
        attached: Modules that have another ``forward``.
        head: Of the fused loss; None where rows of the head train.
        proof: How near they are to the libraries'.
        attention: What a card's kernels for packed rows took, the fastest first; None on a CPU.
    """

    attached: list[nn.Module]
    head: Head | None
    proof: Proof
    attention: str | None = None


def fuse(
    model: Any,
    card: Card,
    levels: Sequence[int],
    tile: int | None,
    tokens: int,
    asked: dict[str, Any],
) -> Fused:
    """Attach fused layers and prove them.

    Args:
        model: PEFT's, on its card.
        card: Where it is.
        levels: Of each layer.
        tile: Rows of the MLP at a time; None for all.
        tokens: Of a micro-batch, for which the fastest attention is looked for.
        asked: As :func:`prove`.

    Raises:
        NotFused: They cannot be attached or do not pass; the model is as it was.
    """
    unmasked, race = None, None
    if card.kind == "cuda":
        unmasked, race = race_on(model, card, tokens)
    modules = attach(model, card, levels=levels, tile=tile, unmasked=unmasked)
    head = head_of(model)
    try:
        proof = prove(model, modules, head, asked)
    except NotFused:
        detach(modules)
        raise
    return Fused(modules, head, proof, race)


def race_on(model: Any, card: Card, tokens: int) -> tuple[Kernel, str]:
    """The fastest of a card's kernels for packed rows of this model, and what each of them took.

    Raises:
        NotFused: None of them works, or the family is not known.
    """
    layer: Any = require_known(model.get_base_model())[0]
    attn, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
    shapes = attn.config.num_attention_heads, attn.config.num_key_value_heads, attn.head_dim
    candidates = candidates_on(card.capability, attn.head_dim)
    if dtype == torch.float32:  # which FlashAttention does not know
        candidates.pop("flash", None)
    device = layer.input_layernorm.weight.device
    try:
        race = contest.fastest(candidates, shapes, tokens, dtype, device)
    except RuntimeError as error:
        raise NotFused(f"no attention kernel works here: {error}") from None
    return race.winner, race.said


def head_of(model: Any) -> Head | None:
    """The head that the fused loss takes; None where rows of it train."""
    if adapter.trains_tokens(model):
        return None
    found = model.get_base_model().get_output_embeddings()
    return found if isinstance(found, PackedHead) else Dense(found.weight)
