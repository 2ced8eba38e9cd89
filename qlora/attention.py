"""Two ways to attend that transformers does not have, registered beside its own.

For cards older than Ampere: PyTorch's SDPA over as many key heads as query heads. Where a model has fewer
key heads and a pass has no mask, transformers 5.23 leaves the sharing of heads to PyTorch
(``enable_gqa=True``). Of torch 2.13's kernels FlashAttention can do that, and needs compute capability 8.0;
the memory-efficient one cannot. A T4 is left with the math kernel, which holds the scores of every head,
T x T, and keeps them for the backward pass. With heads of equal number the memory-efficient kernel takes
over, with and without a mask, and no score is kept. Drop this when transformers asks for the capability
before it asks for ``enable_gqa``.

For packed rows: the kernels below SDPA take the rows' bounds, and then no mask of T x T is built. SDPA
itself has no argument for them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora.cards import Card
from qlora.errors import ModelError
from qlora.kernels.attention import Scores, attend_with, bounds_in, kernel_on

# With "sdpa" in it: transformers then asks the architecture whether it supports SDPA, as for "sdpa".
WITHOUT_GQA = "sdpa_without_gqa"
BOUNDED = "sdpa_bounded"


def sdpa_on(card: Card) -> str:
    """The implementation that is SDPA on a card: transformers' own, or ours below capability 8.0.

    Ours is registered with transformers, with SDPA's masks; what "sdpa" means is left as it is.
    """
    if card.capability is None or card.capability >= (8, 0):
        return "sdpa"
    AttentionInterface.register(WITHOUT_GQA, attend)
    AttentionMaskInterface.register(WITHOUT_GQA, sdpa_mask)
    return WITHOUT_GQA


def bounded() -> str:
    """The name of an attention that is told where packed rows end, and so builds no mask of T x T for them.

    Registered with transformers beside its own. Batches that are not packed are SDPA's.
    """
    AttentionInterface.register(BOUNDED, attend_within_bounds)
    AttentionMaskInterface.register(BOUNDED, mask_unless_packed)
    return BOUNDED


def mask_unless_packed(*args: Any, **options: Any) -> torch.Tensor | None:
    """SDPA's mask; for packed rows an empty one, which stands for the bounds that come another way."""
    packed = options.get("attention_mask") is None and not options.get("allow_is_causal_skip", True)
    if packed and options["q_length"] == options["kv_length"]:
        return torch.empty(0, dtype=torch.bool, device=options["device"])
    return sdpa_mask(*args, **options)


def attend_within_bounds(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As :func:`attend`; packed rows by their bounds, which must then be among the options.

    Raises:
        ModelError: Rows are packed and nobody said where they end: they would see each other.
    """
    bounds = bounds_in(options)
    if bounds is None:
        if attention_mask is not None and not attention_mask.numel():
            raise ModelError(
                "packed rows came to attention without their bounds (cu_seq_lens_q, max_length_q). Pass "
                "what qlora.packing.Collator gives, or load the model with attn_implementation 'sdpa'."
            )
        shares = not query.is_cuda or torch.cuda.get_device_capability(query.device) >= (8, 0)
        plain: Any = sdpa_attention_forward if shares else attend
        return plain(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    kernel = getattr(module, "kernel_for_packed_rows", None) or kernel_on(
        capability, query.shape[-1]
    )
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    scores = Scores(scale, options.get("sliding_window"), None, bounds)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return attend_with(kernel, *heads, scores), None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' own SDPA gives, computed over keys and values that are repeated per query head.

    Args:
        module: The layer's attention; only its ``is_causal`` is read.
        query: Shape (B, H, T, D).
        key: Shape (B, K, S, D); H is a multiple of K, and each key head serves H / K query heads in turn.
        value: Shape (B, K, S, D).
        attention_mask: Of SDPA's kind, (B, 1 or H, T, S), or None for causal attention.
        options: ``dropout``, ``scaling`` and whatever else the layer passes on.

    Returns:
        Shape (B, T, H, D), and None in place of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    # Without num_key_value_groups: nothing is left to share.
    ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(
        ungrouped, query, _expand(key, groups), _expand(value, groups), attention_mask, **options
    )


def _expand(heads: torch.Tensor, groups: int) -> torch.Tensor:
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
