"""What a step costs in arithmetic, and what a card was measured to do of it.

A prediction of tokens per second needs a measurement: how much of this arithmetic the same card did in a
second, in an earlier run on this machine. Without one there is only a ranking, which needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import places, rundir
from qlora.cards import Card, DType, plain
from qlora.errors import CheckpointError
from qlora.fused import applies, levels_of
from qlora.settings import Recipe
from qlora.shape import Shape, adapter_parameters

# Arithmetic that a card does while it moves one byte, for what moves bytes and computes nothing. From
# datasheets, with the efficiency of large products: 94 (T4) to 163 (H200) for its own memory. Over the
# bus to the host it is about 5,000 (24 GB cards on PCIe 4). It ranks plans; no time follows from it.
FLOPS_PER_BYTE = 120
FLOPS_PER_HOST_BYTE = 5_000


@dataclass(frozen=True)
class Measured:
    """What a run on this machine has shown: operations a second, and where it was seen."""

    flops_per_second: float
    tokens_per_second: float
    model: str
    date: str

    @property
    def cost(self) -> float:
        """:func:`cost_per_token` of what was measured."""
        return self.flops_per_second / self.tokens_per_second


def checkpointed_layers(recipe: Recipe, shape: Shape) -> int:
    """How many layers, counted from the first, compute their activations again."""
    asked = recipe.train.activation_checkpointing
    return shape.layers if asked is True else min(shape.layers, int(asked))


def flops_per_token(recipe: Recipe, shape: Shape) -> float:
    """Floating-point operations of a training step per token, multiplications and additions apart.

    A frozen matrix takes part in two products, forward and backward, and in a third where its layer is
    computed again; an adapter in six. Attention is causal; its backward pass takes two and a half times
    its forward pass. The head of TRL 1.16's fused loss is projected twice and passed backwards once.

    >>> from qlora.recipe import recipe_from
    >>> from qlora.shape import Shape
    >>> llama = Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
    >>> def recipe(**train):
    ...     return recipe_from({"model": {"name": "a/b"}, "data": {"train": "hub:a/b", "max_length": 2048},
    ...                         "run": {"name": "x"}, "train": train})
    >>> round(flops_per_token(recipe(kernels="off"), llama) / 1e9, 1)  # 47.8 in a traced step
    47.8
    >>> round(flops_per_token(recipe(activation_checkpointing=False), llama) / 1e9, 1)  # 32.1
    32.1
    """
    if applies(recipe, shape):
        return _fused_flops_per_token(recipe, shape)
    again = checkpointed_layers(recipe, shape) / shape.layers
    linear = shape.layers * shape.linear_per_layer
    adapter = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
    scores = 2 * recipe.data.max_length * shape.heads * shape.head_dim * shape.layers
    return (
        linear * (4 + 2 * again)
        + adapter * (6 + 2 * again)
        + scores * (3.5 + again)
        + 6 * shape.vocab * shape.hidden
    )


def _fused_flops_per_token(recipe: Recipe, shape: Shape) -> float:
    """The same for the layers and the loss of :mod:`qlora.kernels`.

    Products that a level makes again come on top of two for each frozen matrix, and of four and six for
    the head and the adapters. ``down_proj`` is made again by Gemma alone, whose norm needs its output.
    """
    linears, scores = shape.linears, 2 * recipe.data.max_length * shape.heads * shape.head_dim
    sizes = {name: inputs * outputs for name, (inputs, outputs) in linears.items()}

    def of(*names: str) -> int:
        return 2 * sum(sizes.get(name, 0) for name in names)

    more = {
        2: of("gate_proj", "up_proj", "gate_up_proj"),
        3: of("q_proj", "k_proj", "v_proj", "qkv_proj"),
        4: of("o_proj"),
        5: scores + (of("down_proj") if shape.norms == 4 else 0),
    }
    adapter = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
    again = sum(more[n] for level in levels_of(recipe, shape) for n in more if n <= level)
    # The first layer's input needs no gradient: q, k and v are not passed backwards.
    spared = of("q_proj", "k_proj", "v_proj", "qkv_proj")
    linear = 4 * shape.layers * shape.linear_per_layer - spared
    head = 4 * shape.vocab * shape.hidden
    return linear + 6 * adapter + 3.5 * scores * shape.layers + head + again


def unpacked_per_step(recipe: Recipe, shape: Shape) -> float:
    """Times that a packed matrix is unpacked in a micro-batch, on average over all of them."""
    if not applies(recipe, shape):
        return 2 + checkpointed_layers(recipe, shape) / shape.layers
    made_again = [("gate_proj", "up_proj", "gate_up_proj"), ("q_proj", "k_proj", "v_proj", "qkv_proj"),
                  ("o_proj",), ("down_proj",) if shape.norms == 4 else ()]  # fmt: skip
    sizes = {name: inputs * outputs for name, (inputs, outputs) in shape.linears.items()}
    more = 0
    for level in levels_of(recipe, shape):
        names = [name for group in made_again[: level - 1] for name in group]
        more += sum(sizes.get(name, 0) for name in names)
    return 2 + more / (shape.layers * shape.linear_per_layer)


def cost_per_token(recipe: Recipe, shape: Shape) -> float:
    """:func:`flops_per_token`, with moved bytes as the arithmetic that would take as long.

    The packed base is unpacked once for each product and micro-batch: a larger one shares it among more
    tokens. Offloaded activations cross the bus twice.
    """
    again = checkpointed_layers(recipe, shape) / shape.layers
    tokens = recipe.train.per_device_train_batch_size * recipe.data.max_length
    moved = 0.0
    if recipe.quant.quant_type == "nf4":
        moved = (
            unpacked_per_step(recipe, shape) * 2.5 * shape.layers * shape.linear_per_layer / tokens
        )
    crossing = 0.0
    if recipe.train.activation_offload:
        crossing = 2 * 2 * shape.layers * shape.hidden * again
    if recipe.train.embedding_offload:
        crossing += 2 * shape.hidden
    return flops_per_token(recipe, shape) + FLOPS_PER_BYTE * moved + FLOPS_PER_HOST_BYTE * crossing


def remember(
    card: Card, dtype: DType, recipe: Recipe, shape: Shape, tokens_per_second: float, date: str
) -> None:
    """Keep what a run has shown of a card, for later plans on this machine; never fatal."""
    known = _known()
    known[_key(card, dtype)] = {
        "flops_per_second": cost_per_token(recipe, shape) * tokens_per_second,
        "tokens_per_second": tokens_per_second,
        "model": recipe.model.name,
        "date": date,
    }
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        rundir.write_json(_file(), known)
    except OSError:
        return  # a plan without a prediction of time is the only loss


def recall(card: Card, dtype: DType) -> Measured | None:
    """What was last measured of this card in this dtype on this machine, or None."""
    try:
        found = Measured(**_known()[_key(card, dtype)])
        usable = 0 < found.flops_per_second < math.inf and 0 < found.tokens_per_second < math.inf
    except (KeyError, TypeError):
        return None
    return found if usable else None


def tokens_per_second(recipe: Recipe, shape: Shape, measured: Measured) -> float:
    """Tokens of full rows that the measured card would train on in a second, predicted."""
    return measured.flops_per_second / cost_per_token(recipe, shape)


def _known() -> dict[str, Any]:
    try:
        return rundir.read_json(_file())
    except CheckpointError:  # none yet, or torn
        return {}


def _file() -> Path:
    return places.cache() / "speeds.json"


def _key(card: Card, dtype: DType) -> str:
    return f"{plain(card.name)}, {dtype}"
