"""The bytes of one micro-batch beyond what stands: kept, at work, and for the loss.

Layers, loss and the gradients' arrival peak at different moments of a step. Here each moment is counted;
what of them is highest decides the plan (:mod:`qlora.memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora.cards import Card, compute_dtype
from qlora.fused import FusedLayer, applies, levels_of
from qlora.layer import Layer
from qlora.settings import Recipe
from qlora.shape import Shape, adapter_parameters, target_names
from qlora.speed import checkpointed_layers

CHUNK_BYTES = 64 * 2**20  # of logits that the loss of qlora.kernels holds at a time
HEAD_TILE_BYTES = 32 * 2**20  # of an 8-bit head that are unpacked at a time
LOSS_TILE = (4096, 32768)  # (tokens, vocabulary entries) trl 1.16 projects at a time


@dataclass(frozen=True)
class Step:
    """The worst micro-batch of a recipe, in bytes.

    Attributes:
        activations: Kept from the forward to the backward pass, on the card.
        forward: At the highest point of the forward pass, beside them.
        backward: At the highest point of the layers' backward pass, beside them.
        loss: At the highest point of the loss and of the last norm, beside them.
        gradients: Of the adapter, standing at the highest of these moments.
        table: The copied embedding, where rows of it train.
        unpacked: The largest matrix in the compute dtype.
        host: Kept in the host's memory instead.
    """

    activations: int
    forward: int
    backward: int
    loss: int
    gradients: int
    table: int
    unpacked: int
    host: int

    @property
    def working(self) -> int:
        """Beside the activations, at the highest point of the layers."""
        return max(self.forward, self.backward)

    @property
    def beyond(self) -> int:
        """Beside the activations, at the highest point of all."""
        return max(self.working, self.loss)

    @classmethod
    def of(cls, recipe: Recipe, shape: Shape, card: Card) -> Step:
        """Count it.

        Raises:
            HardwareError: As :func:`qlora.cards.compute_dtype`.
            ModelError: As :func:`qlora.shape.target_names`.
        """
        if applies(recipe, shape):
            return cls._of_fused(recipe, shape, card)
        element = 4 if compute_dtype(recipe, card) == "float32" else 2
        trainable = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
        layer = layer_of(recipe, shape, card, element)
        tokens, h = layer.tokens, shape.hidden
        again = checkpointed_layers(recipe, shape)  # the first ones
        whole = shape.layers - again
        rotary = tokens * 2 * shape.head_dim * element

        # Of a recomputed layer its input stays, on the card or with the host but for the one in work;
        # of another everything, in the first less: its input needs no gradient.
        offloads = (
            recipe.train.activation_offload and card.kind == "cuda"
        )  # else the host is the card
        inputs = min(again, 2) if offloads else again
        kept = whole * layer.kept - (layer.spared if whole == shape.layers else 0)
        # A recomputed layer keeps the mask of booleans, which all layers share.
        mask = layer.square if layer.masked and again and whole else 0
        activations = inputs * tokens * h * element + (kept + rotary + mask if whole else 0)
        # Autocast's 16-bit copies of the adapter live until the forward pass ends, masks till the end.
        copies = 2 * trainable * again // shape.layers if element == 2 else 0
        shared = 0 if whole else rotary + (layer.square if layer.masked else 0)
        backward = max(
            layer.busy if whole else 0,
            layer.remade - mask - whole * layer.kept if again else 0,  # once the others are gone
        )
        table = element * shape.vocab * h if recipe.lora.train_new_tokens else 0
        step = cls(
            activations,
            forward=0 if whole else layer.passing + copies,
            backward=backward,
            loss=_loss(shape, tokens, element, copies, shared, table, card),
            gradients=4 * trainable,
            table=table,
            unpacked=layer.largest_unpacked,
            host=(again - inputs) * tokens * h * element,
        )
        if recipe.train.gradient_accumulation_steps > 1:
            return step
        # The only pass of a step: gradients come as activations go.
        first = activations // shape.layers + backward + step.gradients
        last = activations + backward + step.gradients // shape.layers
        highest = max(first, last, activations + step.beyond)
        return replace(step, gradients=highest - activations - step.beyond)

    @classmethod
    def _of_fused(cls, recipe: Recipe, shape: Shape, card: Card) -> Step:
        """The same for layers of :mod:`qlora.kernels`, each at its own level."""
        element = 4 if compute_dtype(recipe, card) == "float32" else 2
        trainable = adapter_parameters(shape, recipe.lora.r, recipe.lora.target_modules)
        layer = fused_layer_of(recipe, shape, card, element)
        levels = levels_of(recipe, shape)
        tokens, h = layer.tokens, shape.hidden
        width = tokens * h * element
        shared = tokens * 2 * shape.head_dim * element + (layer.square if layer.masked else 0)
        offloads = recipe.train.activation_offload and card.kind == "cuda"
        away = max(0, shape.layers - 2) * width if offloads else 0
        kept = sum(layer.keeps(level) for level in levels) + shared - away
        # A layer goes backwards when those after it are gone: of each level the last one matters.
        rest, highest = kept, 0
        for number in range(shape.layers - 1, -1, -1):
            if number == shape.layers - 1 or levels[number] != levels[number + 1]:
                highest = max(highest, rest + layer.again(levels[number]))
            rest -= layer.keeps(levels[number]) - (width if offloads else 0)
        last = levels[-1]
        table = element * shape.vocab * h if recipe.lora.train_new_tokens else 0
        step = cls(
            kept,
            forward=layer.passing_at(last),
            backward=highest - kept,
            loss=_fused_loss(recipe, shape, tokens, element, table),
            gradients=4 * trainable,
            table=table,
            unpacked=layer.largest_unpacked,
            host=away,
        )
        if recipe.train.gradient_accumulation_steps > 1:
            return step
        first = kept - rest
        at_first = kept - first + layer.keeps(levels[0]) + layer.again(levels[0]) + step.gradients
        at_last = highest + step.gradients // shape.layers
        peak = max(at_first, at_last, kept + step.beyond)
        return replace(step, gradients=peak - kept - step.beyond)


def layer_of(recipe: Recipe, shape: Shape, card: Card, element: int) -> Layer:
    """One layer of a base at work on the worst micro-batch of a recipe."""
    rows, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    asked, nf4 = recipe.model.attn_implementation, recipe.quant.quant_type == "nf4"
    return Layer(
        shape,
        element,
        tokens=rows * length,
        square=rows * length**2,
        r=recipe.lora.r,
        targets=frozenset(target_names(shape, recipe.lora.target_modules)),
        # CUDA's kernel keeps a byte an element, the CPU's a float.
        dropped=0 if not recipe.lora.lora_dropout else 1 if card.kind == "cuda" else 4,
        nf4=nf4,
        own_inputs=element == 2 and not (nf4 and card.kind == "cuda"),
        masked=asked != "flash_attention_2",
        scores=asked == "eager" or shape.model_type.startswith("gemma2"),
    )


def fused_layer_of(recipe: Recipe, shape: Shape, card: Card, element: int) -> FusedLayer:
    """One fused layer of a base at work on the worst micro-batch of a recipe."""
    plain = layer_of(recipe, shape, card, element)
    bounded = card.kind == "cuda" and not plain.scores and recipe.data.packing is not False
    recent = card.kind == "cuda" and (card.capability is None or card.capability >= (8, 0))
    return FusedLayer(
        shape,
        element,
        tokens=plain.tokens,
        square=plain.square,
        r=plain.r,
        targets=plain.targets,
        dropped=plain.dropped,
        nf4=plain.nf4,
        masked=not bounded,
        scores=plain.scores,
        shares_heads=recent and element == 2 and bounded,
        sequences=recipe.train.per_device_train_batch_size
        * (card.kind == "cuda" and not plain.scores),
        tile=recipe.train.mlp_tile or 0,
    )


def _fused_loss(recipe: Recipe, shape: Shape, tokens: int, element: int, table: int) -> int:
    """Bytes of the last norm and of the loss, at the highest point: one chunk of logits and no more."""
    width = tokens * shape.hidden * element
    norm = width + 4 * tokens  # its input, kept until it goes backwards
    if table:
        return norm + width + max(12 * tokens * shape.vocab, 6 * tokens * shape.vocab + table)
    chunk = max(element * shape.vocab, min(CHUNK_BYTES, element * shape.vocab * tokens))
    if recipe.quant.head == "8bit":  # a tile of the head, and its part of the logits once more
        rows = HEAD_TILE_BYTES // (element * shape.hidden)
        chunk += HEAD_TILE_BYTES + chunk * min(rows, shape.vocab) // shape.vocab
    # Its output, the supervised rows of it, and their gradient; then that one scaled, scattered among all
    # rows and passed through the norm.
    return norm + max(3 * width + chunk, 5 * width)


def _loss(
    shape: Shape, tokens: int, element: int, copies: int, shared: int, table: int, card: Card
) -> int:
    """Bytes of the last norm, the loss and what they leave standing, at the highest point."""
    h = shape.hidden
    norm = 4 * tokens * (h + 1)  # kept from its forward pass to its backward pass
    if card.kind == "cpu" or table:
        # The logits are held (sft.py): themselves, their log-softmax and its gradient.
        logits = max(12 * tokens * shape.vocab, 6 * tokens * shape.vocab + table)
        return norm + tokens * h * element + logits
    # trl 1.16 never holds them: it projects, folds and reuses one tile, beside the supervised rows of
    # the last hidden state and their fp32 gradient.
    tile = min(tokens, LOSS_TILE[0]) * LOSS_TILE[1] * element
    tiled = norm + tile + max(tokens * h * 2 * element + copies, tokens * h * (element + 4))
    # The last norm goes backwards beside everything kept, in five fp32 tensors.
    return shared + max(tiled, norm + 5 * 4 * tokens * h)
