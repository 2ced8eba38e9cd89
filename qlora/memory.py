"""Bytes a recipe needs on a card, term by term, and the cheapest ways to need fewer.

Every figure here is a prediction from shapes. What is alive at the peak of a step: the frozen base,
the adapter with its gradients and optimizer state, the activations kept for the backward pass, the
working set of the one layer that is busy, and the CUDA context. The loss, the evaluation and the
optimizer's step peak at other moments than the layers do (:mod:`qlora.step`), so only what they need
*beyond* the layers counts.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qlora import fused
from qlora.cards import GIB, Card, DType, compute_dtype, optimizer
from qlora.errors import DoesNotFit
from qlora.settings import Recipe
from qlora.shape import Shape, adapter_parameters, nf4_bytes, target_names
from qlora.step import Step, layer_of

CONTEXT_BYTES = 450_000_000  # CUDA context with cuBLAS and kernels
SLACK_BYTES = 450_000_000  # the caching allocator's fragmentation, and what a desktop takes


def state_bytes(optim: str, weights: int) -> tuple[int, int]:
    """(resident, paged) bytes of optimizer state for one trained matrix.

    bitsandbytes 0.50 keeps 8 bits a weight and a scale for each block of 256, but fp32 below 4,096
    weights; it pages the state of matrices with 100,000 weights or more.

    >>> state_bytes("paged_adamw_8bit", 16 * 4096), state_bytes("paged_adamw_8bit", 16 * 14336)
    ((133120, 0), (7168, 458752))
    """
    moments = (
        0
        if "sgd" in optim or "adafactor" in optim
        else 1
        if "lion" in optim or "rms" in optim
        else 2
    )
    in_8_bits = "8bit" in optim and weights >= 4096
    state = moments * weights * (1 if in_8_bits else 4)
    scales = moments * 4 * math.ceil(weights / 256) if in_8_bits else 0
    if "paged" in optim and weights >= 100_000:
        return scales, state
    return state + scales, 0


@dataclass(frozen=True)
class Change:
    """One way down: set ``key`` from ``old`` to ``new``, save bytes, at a cost told in words."""

    key: str
    old: Any
    new: Any
    saves_bytes: int
    cost: str


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one recipe on one card. ``terms`` are bytes and sum to ``total_bytes``."""

    card: Card
    dtype: DType
    optimizer: str
    tokens: int  # of the worst micro-batch
    trainable_parameters: int
    terms: dict[str, int]
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    changed_bytes: int = 0  # needed when every change is made
    host_bytes: int = 0  # of pinned host memory, where inputs are offloaded
    method: Literal["predicted", "traced"] = "predicted"

    @property
    def total_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.card.free_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``plan.json``; ``predicted`` says that no card has measured these bytes."""
        totals = {"total_bytes": self.total_bytes, "fits": self.fits}
        return {"predicted": True, **totals, **json.loads(json.dumps(asdict(self)))}


def plan(recipe: Recipe, shape: Shape, card: Card) -> Plan:
    """Predict the peak of training and evaluating this recipe on this card.

    The worst micro-batch is taken: ``per_device_train_batch_size`` rows of ``data.max_length`` tokens.

    Raises:
        HardwareError: As :func:`compute_dtype`.
        ModelError: As :func:`adapter_parameters`.
    """
    first = predict(recipe, shape, card)
    changes, everything = [], recipe
    for key, values, cost in _candidates(recipe, shape, card):
        for new in values:
            changed = predict(_write(recipe, key, new), shape, card)
            if changed.fits:
                break
        saves = first.total_bytes - changed.total_bytes
        if saves > first.total_bytes // 200:  # half a percent is noise
            changes.append(Change(key, _read(recipe, key), new, saves, cost))
            everything = _write(everything, key, new)
    changed_bytes = predict(everything, shape, card).total_bytes
    return replace(first, changes=tuple(changes), changed_bytes=changed_bytes)


def predict(recipe: Recipe, shape: Shape, card: Card) -> Plan:
    """:func:`plan` without its changes, for whoever asks for many.

    Raises:
        HardwareError: As :func:`plan`.
        ModelError: As :func:`plan`.
    """
    dtype, optim = compute_dtype(recipe, card), optimizer(recipe, card)
    element = 4 if dtype == "float32" else 2
    trainable = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
    nf4, linear = recipe.quant.quant_type == "nf4", shape.linear_parameters
    step = Step.of(recipe, shape, card)
    states = _adapter_states(recipe, shape, optim)
    resident, paged = sum(r for r, _ in states), sum(p for _, p in states)
    # Paged state comes in for the optimizer's step, when no activation is left, and may go out after it;
    # torch's AdamW makes one temporary as large as the adapter.
    stepping = paged + (4 * trainable if optim == "adamw_torch" else 0)
    answering = _answering_bytes(recipe, shape, card, element) + step.unpacked
    highest = step.activations + step.beyond
    # What leaves the card: the embedding, or half of the head, whose rows then have scales.
    table = element * shape.table_parameters if _table_is_away(recipe, card) else 0
    head = 0
    if recipe.quant.head == "8bit":
        head = (element - 1) * shape.table_parameters - (0 if shape.tied else 4 * shape.vocab)
    terms = {
        "base_nf4" if nf4 else "base": (
            nf4_bytes(linear, double_quant=recipe.quant.double_quant) if nf4 else element * linear
        ),
        "unquantized": element * shape.unquantized_parameters - table - head,
        "adapters": 4 * trainable,
        "gradients": step.gradients,
        "optimizer": resident,
        "activations": step.activations,
        "working_set": step.working,
        "logits": step.beyond - step.working,
        "evaluation": max(0, answering - highest),
        "optimizer_step": max(0, stepping - max(highest, answering)),
    }
    if step.table:
        terms["new_tokens"] = step.table  # peft 0.21 copies the whole table for every pass
    if card.kind == "cuda":
        terms["overhead"] = CONTEXT_BYTES + SLACK_BYTES
    tokens = recipe.train.per_device_train_batch_size * recipe.data.max_length
    host = step.host + table
    return Plan(card, dtype, optim, tokens, trainable, terms, shape.notes, host_bytes=host)


def _table_is_away(recipe: Recipe, card: Card) -> bool:
    return recipe.train.embedding_offload and card.kind == "cuda"  # else the host is the card


def _adapter_states(recipe: Recipe, shape: Shape, optim: str) -> list[tuple[int, int]]:
    """(resident, paged) bytes of each trained matrix's optimizer state, a layer's times the layers."""
    r, found = recipe.lora.r, []
    for name in target_names(shape, recipe.lora.target_modules):
        for width in shape.linears[name]:
            resident, paged = state_bytes(optim, r * width)
            found.append((resident * shape.layers, paged * shape.layers))
    return found


def _answering_bytes(recipe: Recipe, shape: Shape, card: Card, element: int) -> int:
    """Bytes that answers need: keys and values of a batch, while it reads its questions.

    The held-out loss is not counted: it takes as many rows as a training pass, in tiles if that does, and
    keeps less.
    """
    scores = shape.heads if layer_of(recipe, shape, card, element).scores else 0
    asked = max(recipe.eval.generate, recipe.eval.samples)
    rows, length = min(recipe.eval.batch_size, asked), recipe.data.max_length
    cache = 2 * shape.kv_heads * shape.head_dim * shape.layers * element
    # One layer at a time: the residual and its fp32 norm, gate, up and their product, the mask.
    layer = 4 * shape.hidden + element * (2 * shape.hidden + 3 * shape.intermediate)
    layer += length * (1 + element + scores * (4 + element))
    return rows * (length * layer + (length + recipe.eval.max_new_tokens) * cache)


def _candidates(recipe: Recipe, shape: Shape, card: Card) -> list[tuple[str, list[Any], str]]:
    """Keys worth changing, cheapest first, each with its gentler values before the harsher ones."""
    rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    shorter = [length * 3 // 4 >> n for n in range(8)] + [length // 2 >> n for n in range(8)]
    shorter = sorted((n // 16 * 16 for n in shorter), reverse=True)
    found: list[tuple[str, list[Any], str]] = [
        ("eval.batch_size", _halves(recipe.eval.batch_size), "answering takes longer"),
        (
            "train.per_device_train_batch_size",
            _halves(rows),
            "raise gradient_accumulation_steps as much",
        ),
        ("data.max_length", [n for n in shorter if n >= 128], "drops the rows that are longer"),
        ("lora.r", [r for r in _halves(recipe.lora.r) if r >= 8], "a smaller update"),
    ]
    fuses = fused.applies(recipe, shape)
    if fuses and not shape.tied and not recipe.lora.train_new_tokens:
        if recipe.quant.head == "16bit":
            cost = "rounds the head to 8 bits; its cost in loss: tests/measurements/head-8bit.json"
            found.insert(2, ("quant.head", ["8bit"], cost))
        if not recipe.train.embedding_offload and card.kind == "cuda":
            cost = "the ids of each pass come to the host"
            found.insert(2, ("train.embedding_offload", [True], cost))
    if fuses and recipe.train.mlp_tile is None and recipe.train.activation_checkpointing is True:
        found.insert(2, ("train.mlp_tile", [1024], "more, smaller products"))
    if recipe.train.levels is not None:
        pass  # they are the user's word on what is computed again
    elif recipe.train.activation_checkpointing is not True:
        cost = f"up to {33 if fuses else 45} % more arithmetic"
        found.insert(2, ("train.activation_checkpointing", [True], cost))
    elif not recipe.train.activation_offload and card.kind == "cuda":
        cost = "a copy of each layer's input crosses the bus and comes back"
        found.insert(2, ("train.activation_offload", [True], cost))
    if recipe.quant.quant_type == "none":
        found.insert(2, ("quant.quant_type", ["nf4"], "rounds the base to 4 bits"))
    elif not recipe.quant.double_quant:
        found.insert(2, ("quant.double_quant", [True], "rounds the scales to 8 bits"))
    if card.kind == "cuda" and state_bytes(optimizer(recipe, card), 4096)[0] > 9000:
        found.insert(2, ("train.optim", ["paged_adamw_8bit"], "8-bit optimizer state"))
    return [entry for entry in found if entry[1]]


def _halves(value: int) -> list[int]:
    return [value >> n for n in range(1, value.bit_length())]


def _read(recipe: Recipe, address: str) -> Any:
    section, key = address.split(".")
    return getattr(getattr(recipe, section), key)


def _write(recipe: Recipe, address: str, value: object) -> Recipe:
    section, key = address.split(".")
    changed = getattr(recipe, section).model_copy(update={key: value})
    return recipe.model_copy(update={section: changed})


def require_fit(plan: Plan) -> None:
    """Return in silence when the plan fits its card.

    Raises:
        DoesNotFit: It does not; the message itemizes the need and lists the cheapest ways down.
    """
    if plan.fits:
        return
    free, sizes = plan.card.free_bytes, dict(plan.terms)
    grouped = {
        "base": sum(sizes.pop(k, 0) for k in ("base_nf4", "scales", "base")),
        "unquantized": sizes.pop("unquantized", 0),
        "adapters+grads+optimizer": sum(
            sizes.pop(k, 0) for k in ("adapters", "gradients", "optimizer")
        ),
        "activations": sizes.pop("activations", 0) + sizes.pop("working_set", 0),
        **sizes,
    }
    where = "this machine" if plan.card.kind == "cpu" else f"the {plan.card.name}"
    others = plan.card.total_bytes - free
    taken = ""
    if plan.card.kind == "cuda" and others > GIB:
        # The context of this very process is in it, half a gigabyte.
        taken = (
            f" {_gib(others)} of its {_gib(plan.card.total_bytes)} are taken, by other processes."
        )
    lines = [
        f"This recipe needs {_gib(plan.total_bytes)} ({plan.method}); "
        f"{where} has {_gib(free)} free.{taken}",
        "  " + " | ".join(f"{n} {size / GIB:.1f}" for n, size in grouped.items() if size),
    ]
    if plan.changes:
        lines.append("Cheapest ways down:")
    ways = [(c.key, f"{c.old} -> {c.new}", c) for c in plan.changes]
    key_width = max((len(key) for key, _, _ in ways), default=0)
    value_width = max((len(values) for _, values, _ in ways), default=0)
    for key, values, c in ways:
        enough = "; enough" if plan.total_bytes - c.saves_bytes <= free else ""
        saves = f"saves {_gib(c.saves_bytes)}{enough} ({c.cost})"
        lines.append(f"  {key:<{key_width}}  {values:>{value_width}}  {saves}")
    if plan.changed_bytes > free:
        least = (
            f"With all of them it still needs {_gib(plan.changed_bytes)}: c"
            if plan.changes
            else "C"
        )
        lines.append(f"{least}hoose a smaller base model or a card with more memory.")
    elif all(plan.total_bytes - c.saves_bytes > free for c in plan.changes):
        lines.append(f"None is enough alone; all together need {_gib(plan.changed_bytes)}.")
    raise DoesNotFit("\n".join(lines))


def explain_out_of_memory(plan: Plan, when: str = "") -> str:
    """What to tell somebody whose card ran out although the plan fitted: the plan, and ways down.

    Args:
        plan: What was predicted.
        when: What was going on, such as " in the rehearsal".
    """
    lines = [
        f"The {plan.card.name} ran out of memory{when}. {_gib(plan.total_bytes)} were predicted of the "
        f"{_gib(plan.card.free_bytes)} that were free at the start; something else may use the card.",
    ]
    ways = [
        f"  {c.key}  {c.old} -> {c.new}  saves {_gib(c.saves_bytes)} ({c.cost})"
        for c in plan.changes
    ]
    return "\n".join([*lines, *(["Cheapest ways down:", *ways] if ways else [])])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
