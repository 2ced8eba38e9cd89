"""A whole training step before the first one: on fake tensors, without a card or a weight."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora import cards, fitting, fused, loader, memory, packing, phantom, sft
from qlora.attention import BOUNDED, bounded
from qlora.cards import Card
from qlora.fitting import Fitted
from qlora.kernels import attached
from qlora.kernels.attention import Bounds, in_options
from qlora.memory import Plan
from qlora.offload import InputsOnHost
from qlora.settings import Recipe
from qlora.shape import Shape
from qlora.step import LOSS_TILE
from qlora.tracing import HOST, MemoryTracer


def trace(recipe: Recipe, config: Any, card: Card, attention: str = "sdpa") -> MemoryTracer:
    """Run the worst micro-batch of this recipe on a phantom of its base, and follow every byte.

    The second micro-batch of a step is what is measured: gradients and optimizer state are there.

    Args:
        recipe: ``per_device_train_batch_size`` sequences of ``data.max_length`` tokens are run.
        config: The transformers configuration of its base.
        card: Decides dtype, loss and kernels.
        attention: The implementation that would run.
    """
    mode = FakeTensorMode()
    dtype = getattr(torch, cards.compute_dtype(recipe, card))
    shape = Shape.from_config(config.to_dict())
    fuses = fused.applies(recipe, shape)
    if fuses and card.kind == "cuda" and attention == "sdpa":
        attention = bounded()
    if attention == "flash_attention_2":
        attention = phantom.unmasked_attention()
    model = phantom.build(
        config, recipe, dtype, attention, phantom.fakes_of(mode), as_on_card=card.kind == "cuda"
    )
    if fuses:
        tile = recipe.train.mlp_tile
        attached.attach(model, card, levels=fused.levels_of(recipe, shape), tile=tile)
    with mode:
        return step(model, batch(recipe, attention), recipe, card)


def batch(recipe: Recipe, attention: str) -> dict[str, Any]:
    """The worst micro-batch: every sequence full of tokens that train, laid out as the recipe says."""
    shape = recipe.train.per_device_train_batch_size, recipe.data.max_length
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.arange(shape[1]).repeat(shape[0], 1)
    flat = attention in ("flash_attention_2", phantom.UNMASKED, BOUNDED)
    if flat:
        ids, positions = ids.flatten()[None], positions.flatten()[None]
    at = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
    laid_out = {"input_ids": ids, "labels": ids.clone(), "supervised_at": at}
    if recipe.data.packing is False:
        return laid_out | {"attention_mask": torch.ones_like(ids)}
    bounds: dict[str, Any] = {}
    if flat:
        offsets = torch.arange(0, ids.numel() + 1, shape[1], dtype=torch.int32)
        bounds = in_options(Bounds(offsets, shape[1]))
        if attention == BOUNDED:
            bounds["attention_mask"] = torch.empty(0, 0, 0, 0, dtype=torch.bool)
    return laid_out | {"position_ids": positions} | bounds


def step(model: Any, inputs: dict[str, Any], recipe: Recipe, card: Card) -> MemoryTracer:
    """Follow the memory of one micro-batch of a model, on real tensors or on fake ones.

    Returns:
        The tracer, with ``base_nf4``, ``scales``, ``unquantized``, ``adapters``, ``gradients``,
        ``optimizer``, ``activations``, ``working_set`` and ``logits`` at the peak.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    tracer = MemoryTracer(scale_copies=2 if card.kind == "cuda" else 1)
    for category, tensor in phantom.frozen(model):
        tracer.own(category, [tensor])
    tracer.own("adapters", trained)
    tracer.own("batch", (value for value in inputs.values() if isinstance(value, torch.Tensor)))
    passes = 1 + (recipe.train.gradient_accumulation_steps > 1)
    name = cards.optimizer(recipe, card)
    offloads = recipe.train.activation_offload and card.kind == "cuda"  # else the host is the card
    for number in range(passes):
        if number == passes - 1:
            tracer.own("gradients", [p.grad for p in trained if p.grad is not None])
            sizes = [memory.state_bytes(name, p.numel()) for p in trained]
            state = [torch.empty(size, dtype=torch.uint8) for size, _ in sizes]
            tracer.own("optimizer", state)
            tracer.forget_peaks()
        away = InputsOnHost(lambda tensor: tracer.own(HOST, [tensor]))
        with tracer.watching(), away if offloads else nullcontext():
            loss = forward(model, inputs, recipe, card, tracer)
            loss.backward()
        del loss
    del state
    return tracer


def forward(
    model: Any, inputs: dict[str, Any], recipe: Recipe, card: Card, tracer: MemoryTracer
) -> torch.Tensor:
    """The loss of a micro-batch, under autocast as accelerate sets it up; phases are marked."""
    dtype = getattr(torch, cards.compute_dtype(recipe, card))
    backbone = model.get_base_model().base_model

    def loss_begins(module: nn.Module, args: Any, output: Any) -> None:
        tracer.phase("loss", "logits")
        output.last_hidden_state.register_hook(lambda grad: tracer.phase("backward"))

    tracer.phase("forward")
    hook = backbone.register_forward_hook(loss_begins)
    in_16_bits = dtype != torch.float32
    autocast = torch.autocast("cpu", dtype, enabled=in_16_bits)
    try:
        head = attached.head_of(model) if attached.is_attached(model) else None
        if head is not None:
            return sft.loss_of(model, inputs, 1, materialize=False, head=head)
        if not tiled(recipe, card):
            run = convert_outputs_to_fp32(autocast(model.__call__)) if in_16_bits else model
            return sft.loss_of(run, inputs, 1, materialize=True)
        asked = packing.for_model(inputs)
        with autocast:
            hidden = backbone(**asked, use_cache=False).last_hidden_state[:, :-1]
            weight = model.get_base_model().get_output_embeddings().weight
            return TiledLoss.apply(hidden, weight, dtype)
    finally:
        hook.remove()


def tiled(recipe: Recipe, card: Card) -> bool:
    """Whether the loss is TRL's fused one, which never holds the logits: see :mod:`qlora.sft`."""
    return card.kind == "cuda" and not recipe.lora.train_new_tokens


class TiledLoss(torch.autograd.Function):
    """What TRL 1.16's fused loss allocates on a card, and none of its arithmetic.

    On a card a Triton kernel works in place on the tile of logits. Its stand-in for machines without
    Triton makes a dozen copies of the tile, so a trace of that would say nothing about a card.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        rows = hidden.flatten(0, 1).clone()  # the supervised ones: in the worst batch all are
        statistics = [torch.empty(len(rows)) for _ in range(7)]
        tile = torch.empty((min(len(rows), LOSS_TILE[0]), LOSS_TILE[1]), dtype=dtype)
        del tile
        ctx.save_for_backward(rows, weight, statistics[0])
        ctx.given = hidden.shape
        return statistics[1].sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        rows = ctx.saved_tensors[0]
        summed = torch.empty(rows.shape, dtype=torch.float32)
        tile = torch.empty((min(len(rows), LOSS_TILE[0]), LOSS_TILE[1]), dtype=rows.dtype)
        del tile
        rounded = summed.to(rows.dtype)
        del summed
        back = torch.empty(ctx.given, dtype=rows.dtype)  # from the supervised rows to all of them
        del rounded
        return back, None, None


def fit(recipe: Recipe, shape: Shape, card: Card) -> Fitted:
    """The settings that run: :func:`qlora.fitting.fit`, but a family it does not know is traced.

    Such a family runs as it is written: a search by numbers that may be wrong would be a guess.

    Raises:
        DoesNotFit: It does not.
        ModelError: transformers does not know the family either.
    """
    if shape.known or card.kind == "cpu":
        return fitting.fit(recipe, shape, card)
    fused.require(recipe, shape)
    plan = memory.plan(recipe, shape, card)
    traced = exact(recipe, card, plan)
    notes = tuple(note for note in plan.notes if "counted as if" not in note)
    plan = dataclasses.replace(
        plan, terms=traced["terms"], notes=notes, changes=(), method="traced"
    )
    memory.require_fit(plan)
    why = f"its step is traced: {shape.model_type!r} is no family that the quick plan knows"
    if recipe.train.fit == "auto":
        why += "; so train.fit: auto chooses nothing, and the recipe runs as it is written"
    return Fitted(recipe, plan, (why,))


def exact(recipe: Recipe, card: Card, plan: Plan) -> dict[str, Any]:
    """The bytes of a plan, traced rather than predicted, where a training step decides them.

    Args:
        recipe: What would run.
        card: Where.
        plan: Its quick plan: what lies beyond a step (CUDA context, answering) is taken from it.

    Returns:
        ``terms`` and ``total_bytes`` as a plan's, ``at_peak``, the operator that reached the highest
        point, and the ``seconds`` that it took.

    Raises:
        ModelError: transformers does not know the base either.
    """
    began = time.perf_counter()
    config = loader.read_config(recipe)
    attention = recipe.model.attn_implementation
    if attention != "flash_attention_2":  # which may be installed where it will run
        attention = loader.attention_on(card, recipe, config)
    tracer = trace(recipe, config.config, card, attention)
    beyond = {name: plan.terms[name] for name in ("evaluation", "overhead") if plan.terms.get(name)}
    terms = {name: size for name, size in tracer.peak.items() if size} | beyond
    return {
        "terms": terms,
        "total_bytes": sum(terms.values()),
        "at_peak": tracer.at_peak,
        "seconds": round(time.perf_counter() - began, 1),
    }
