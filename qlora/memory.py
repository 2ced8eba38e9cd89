"""Bytes a recipe needs on a card, term by term, and the cheapest ways to need fewer.

Every figure here is a prediction from shapes. What is alive at the peak of a step: the frozen base,
the adapter with its gradients and optimizer state, the activations kept for the backward pass, the
working set of the one layer that is busy, and the CUDA context. The loss and the evaluation peak at
other moments than the layers do, so only what they need *beyond* the layers counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora.cards import GIB, Card, DType, compute_dtype, optimizer
from qlora.errors import DoesNotFit
from qlora.settings import Recipe
from qlora.shape import Shape, adapter_parameters, nf4_bytes

CONTEXT_BYTES = 450_000_000  # CUDA context with cuBLAS and kernels
SLACK_BYTES = 450_000_000  # the caching allocator's fragmentation, and what a desktop takes
LOSS_TILE = (4096, 32768)  # (tokens, vocabulary entries) trl 1.16 projects at most at a time


def _state_bytes(name: str) -> int:
    """Optimizer state per trainable weight. bitsandbytes keeps tensors below 4,096 elements in fp32:
    too little to count. Paged states count in full, since they are on the card when they are used."""
    moments = (
        0 if "sgd" in name or "adafactor" in name else 1 if "lion" in name or "rms" in name else 2
    )
    return moments * (1 if "8bit" in name else 4)


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

    @property
    def total_bytes(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.card.free_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``plan.json``; ``predicted`` says that nobody measured these bytes."""
        totals = {"total_bytes": self.total_bytes, "fits": self.fits}
        return {"predicted": True, **totals, **json.loads(json.dumps(asdict(self)))}


def plan(recipe: Recipe, shape: Shape, card: Card) -> Plan:
    """Predict the peak of training and evaluating this recipe on this card.

    The worst micro-batch is taken: ``per_device_train_batch_size`` rows of ``data.max_length`` tokens.

    Raises:
        HardwareError: As :func:`compute_dtype`.
        ModelError: As :func:`adapter_parameters`.
    """
    first = _predict(recipe, shape, card)
    changes, everything = [], recipe
    for key, values, cost in _candidates(recipe, card):
        for new in values:
            changed = _predict(_write(recipe, key, new), shape, card)
            if changed.fits:
                break
        saves = first.total_bytes - changed.total_bytes
        if saves > first.total_bytes // 200:  # half a percent is noise
            changes.append(Change(key, _read(recipe, key), new, saves, cost))
            everything = _write(everything, key, new)
    changed_bytes = _predict(everything, shape, card).total_bytes
    return replace(first, changes=tuple(changes), changed_bytes=changed_bytes)


def _predict(recipe: Recipe, shape: Shape, card: Card) -> Plan:
    dtype, optim = compute_dtype(recipe, card), optimizer(recipe, card)
    element = 4 if dtype == "float32" else 2
    rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    tokens, h = rows * length, shape.hidden
    trainable = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
    nf4, linear = recipe.quant.quant_type == "nf4", shape.linear_parameters
    # The 4-bit matmul unpacks one matrix at a time into the compute dtype (bitsandbytes 0.50).
    unpacked = element * max(a * b for a, b in shape.linears.values()) if nf4 else 0

    # Padded rows hand attention a (rows, 1, length, length) mask: once as bool, in each layer as a
    # bias. Flash and memory-efficient attention keep no scores. Eager attention does, and so may SDPA
    # before capability 8, where only its math kernel serves grouped keys, in fp32: probabilities
    # are kept (and cast), scores and their gradient are at work.
    eager = recipe.model.attn_implementation == "eager" or shape.model_type.startswith("gemma2")
    scores = shape.heads if eager or (card.kind == "cuda" and not card.supports_bf16) else 0
    square = rows * length**2
    kept = tokens * shape.kept_bytes(element, recipe.lora.r) + square * (
        element + scores * (4 + element)
    )
    working = tokens * element * shape.intermediate + unpacked + square * (1 + scores * 8)
    if recipe.train.activation_checkpointing:
        # Each layer's input stays, and the last one's output; one layer's rest is made again.
        activations, working = tokens * (shape.layers + 1) * h * element, working + kept
    else:
        activations = shape.layers * kept

    # trl 1.16 never holds the logits: it projects, folds and reuses one tile of LOSS_TILE, beside
    # copies of the last hidden state and its fp32 gradient. On a CPU the logits are held (sft.py):
    # themselves, their log-softmax and its gradient.
    tile = min(tokens, LOSS_TILE[0]) * min(shape.vocab, LOSS_TILE[1])
    if card.kind == "cpu" or recipe.lora.train_new_tokens:
        loss = 12 * tokens * shape.vocab
    else:
        loss = tokens * h * (4 + 3 * element) + tile * element
    answering = _answering_bytes(recipe, shape, element, scores) + unpacked

    double_quant = recipe.quant.double_quant
    terms = {
        "base_nf4" if nf4 else "base": (
            nf4_bytes(linear, double_quant=double_quant) if nf4 else element * linear
        ),
        "unquantized": element * shape.unquantized_parameters,
        # fp32 weights, and the 16-bit copies that autocast keeps through a step.
        "adapters": trainable * (4 + (2 if element == 2 else 0)),
        "gradients": 4 * trainable,
        "optimizer": _state_bytes(optim) * trainable,
        "activations": activations,
        "working_set": working,
        "logits": max(0, loss - working),
        "evaluation": max(0, answering - activations - max(working, loss)),
    }
    if recipe.lora.train_new_tokens:
        # peft 0.21 copies the whole table for every pass, and its gradient is as large.
        terms["new_tokens"] = 2 * element * shape.embedding_parameters
    if card.kind == "cuda":
        terms["overhead"] = CONTEXT_BYTES + SLACK_BYTES
    return Plan(card, dtype, optim, tokens, trainable, terms, shape.notes)


def _answering_bytes(recipe: Recipe, shape: Shape, element: int, scores: int) -> int:
    """Bytes that ``eval.generate`` needs: keys and values of a batch, while it reads its questions.

    The held-out loss is not counted: it takes as many rows as a training pass and keeps less.
    """
    rows, length = min(recipe.eval.batch_size, recipe.eval.generate), recipe.data.max_length
    cache = 2 * shape.kv_heads * shape.head_dim * shape.layers * element
    # One layer at a time: the residual and its fp32 norm, gate, up and their product, the mask.
    layer = 4 * shape.hidden + element * (2 * shape.hidden + 3 * shape.intermediate)
    layer += length * (1 + element + scores * (4 + element))
    return rows * (length * layer + (length + recipe.eval.max_new_tokens) * cache)


def _candidates(recipe: Recipe, card: Card) -> list[tuple[str, list[Any], str]]:
    """Keys worth changing, cheapest first, each with its gentler values before the harsher ones."""
    rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    shorter = [length * part // 64 * 16 for part in (3, 2, 1)]
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
    if not recipe.train.activation_checkpointing:
        found.insert(2, ("train.activation_checkpointing", [True], "a third slower"))
    if recipe.quant.quant_type == "none":
        found.insert(2, ("quant.quant_type", ["nf4"], "rounds the base to 4 bits"))
    elif not recipe.quant.double_quant:
        found.insert(2, ("quant.double_quant", [True], "rounds the scales to 8 bits"))
    if card.kind == "cuda" and _state_bytes(optimizer(recipe, card)) > 2:
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
        "base": sizes.pop("base_nf4", 0) + sizes.pop("base", 0),
        "unquantized": sizes.pop("unquantized"),
        "adapters+grads+optimizer": sum(
            sizes.pop(k) for k in ("adapters", "gradients", "optimizer")
        ),
        "activations": sizes.pop("activations") + sizes.pop("working_set"),
        **sizes,
    }
    where = "this machine" if plan.card.kind == "cpu" else f"the {plan.card.name}"
    lines = [
        f"This recipe needs {_gib(plan.total_bytes)} (predicted); {where} has {_gib(free)} free.",
        "  " + " | ".join(f"{n} {size / GIB:.1f}" for n, size in grouped.items() if size),
    ]
    if plan.changes:
        lines.append("Cheapest ways down:")
    ways = [(c.key, f"{c.old} -> {c.new}", c) for c in plan.changes]
    key_width = max((len(key) for key, _, _ in ways), default=0)
    value_width = max((len(values) for _, values, _ in ways), default=0)
    for key, values, c in ways:
        saves = f"saves {_gib(c.saves_bytes)} ({c.cost})"
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


def explain_out_of_memory(plan: Plan) -> str:
    """What to tell somebody whose card ran out although the plan fitted: the plan, and ways down."""
    lines = [
        f"The {plan.card.name} ran out of memory. {_gib(plan.total_bytes)} were predicted of the "
        f"{_gib(plan.card.free_bytes)} that were free at the start; something else may use the card.",
    ]
    ways = [
        f"  {c.key}  {c.old} -> {c.new}  saves {_gib(c.saves_bytes)} ({c.cost})"
        for c in plan.changes
    ]
    return "\n".join([*lines, *(["Cheapest ways down:", *ways] if ways else [])])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
