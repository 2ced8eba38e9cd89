"""What a layer of :mod:`qlora.kernels` keeps and needs, level by level, and where those layers run.

The counterpart of :mod:`qlora.layer` for the fused layer, whose levels are told there: 1 keeps everything
that a product would have to make again, 5 the layer's input alone. Bytes of one micro-batch; held to
traces by ``scripts/bench_plan.py``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qlora.cards import Card
from qlora.errors import ModelError, RecipeError
from qlora.layer import FUSED_MLP, FUSED_QKV, Layer
from qlora.settings import Recipe
from qlora.shape import Shape

LEVELS = (1, 2, 3, 4, 5)
# Of transformers' model types, those whose layers were compared with the fused one in a test.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "phi3",
    "smollm3",
)


def applies(recipe: Recipe, shape: Shape) -> bool:
    """Whether this recipe's layers are fused, as far as can be told without the loaded model."""
    return knows(recipe, shape.model_type) and not shape.experts


def knows(recipe: Recipe, model_type: str) -> bool:
    """Whether the recipe lets layers be fused and their family is one that can."""
    return recipe.train.kernels == "auto" and model_type in FAMILIES


def on_card(recipe: Recipe, card: Card) -> Recipe:
    """The recipe with kernels off if the card is too old for them: Triton begins at capability 7.0."""
    if card.capability is None or card.capability >= (7, 0):
        return recipe
    train = recipe.train.model_copy(update={"kernels": "off", "levels": None, "mlp_tile": None})
    return recipe.model_copy(update={"train": train})


def require(recipe: Recipe, shape: Shape) -> None:
    """Refuse settings that this model has no use for, as far as its config.json shows.

    Raises:
        RecipeError: They are of fused layers, and its family is not known to them.
        ModelError: They are about a head or an embedding of its own, and it has one matrix for both.
    """
    asked = {
        "train.levels": recipe.train.levels is not None,
        "train.mlp_tile": recipe.train.mlp_tile is not None,
        "quant.head: 8bit": recipe.quant.head == "8bit",
    }
    if not applies(recipe, shape):
        unknown = f"do not know this model's family ({shape.model_type!r})"
        why = unknown if recipe.train.kernels == "auto" else "are off here"
        for setting in (name for name, wanted in asked.items() if wanted):
            raise RecipeError(
                f"{setting} is about qlora.kernels, which {why}. Leave that setting out."
            )
    asked = {
        "quant.head: 8bit": recipe.quant.head == "8bit",
        "train.embedding_offload: true": recipe.train.embedding_offload,
    }
    for setting in (name for name, wanted in asked.items() if wanted and shape.tied):
        raise ModelError(
            f"{setting} needs a model whose head is a matrix of its own, and in this one it is the "
            "embedding. Leave that setting out."
        )


def levels_of(recipe: Recipe, shape: Shape) -> tuple[int, ...]:
    """The level of each layer, first to last: the higher ones come first.

    Raises:
        RecipeError: ``train.levels`` names another number of layers than there are.

    >>> from qlora.recipe import recipe_from
    >>> recipe = recipe_from({"model": {"name": "a/b"}, "data": {"train": "hub:a/b"}, "run": {"name": "x"},
    ...                       "train": {"levels": [1, 2, 0, 0, 1]}})
    >>> levels_of(recipe, Shape("llama", 64, 128, 4, 2, 1, 32, 256, False))
    (5, 2, 2, 1)
    """
    counts = recipe.train.levels
    if counts is None:
        asked = recipe.train.activation_checkpointing
        again = shape.layers if asked is True else min(shape.layers, int(asked))
        counts = (shape.layers - again, 0, 0, 0, again)
    if sum(counts) != shape.layers:
        raise RecipeError(
            f"train.levels names {sum(counts)} layers ({', '.join(map(str, counts))} at levels 1 to 5), "
            f"but the model has {shape.layers}. Make them add up, or leave train.levels out."
        )
    return tuple(level for level in reversed(LEVELS) for _ in range(counts[level - 1]))


_IN_WORDS = {
    1: "keep all they need",
    2: "compute gate and up again",
    3: "compute gate, up, q, k and v again",
    4: "compute all but attention again",
    5: "compute everything again",
}


def in_words(recipe: Recipe, shape: Shape) -> str:
    """What the layers keep: ``30 of 32 keep all they need, 2 compute gate and up again``."""
    counts = sorted(Counter(levels_of(recipe, shape)).items())
    first, *others = [f"{count} {_IN_WORDS[level]}" for level, count in counts]
    total, _, rest = first.partition(" ")
    return ", ".join([f"{total} of {shape.layers} {rest}", *others])


@dataclass(frozen=True)
class FusedLayer(Layer):
    """One fused layer at work on a micro-batch; what :class:`qlora.layer.Layer` says holds.

    Attributes:
        tile: Rows of the MLP at a time where gate and up are made again; 0 for all.
        shares_heads: Whether attention's kernel shares key heads without a copy: flash on a card.
        sequences: Rows that a card's kernel is told the bounds of; 0 where it is not a card's.
    """

    tile: int = 0
    shares_heads: bool = True
    sequences: int = 0

    def keeps(self, level: int) -> int:
        """Bytes kept for the backward pass at a level."""
        shape, e = self.shape, self.element
        q, kv = self._q, self._kv
        per_token = e * (shape.hidden + self.r * len(self.targets))
        if self._gemma:
            per_token += 4 + e * (shape.hidden if level <= 4 else 0) + 4
        if shape.has_qk_norm:
            per_token += 4 * (shape.heads + shape.kv_heads)
        if level <= 4:
            per_token += e * q + (0 if self.scores else 4 * shape.heads)
        if level <= 3:
            per_token += e * shape.hidden
        if level <= 2:
            per_token += e * (q + 2 * kv)
        if level <= 1:
            per_token += e * 2 * shape.intermediate
        return self.tokens * per_token

    def again(self, level: int) -> int:
        """Bytes beside everything kept that a layer needs in its backward pass, at the most."""
        shape, e, n = self.shape, self.element, self.tokens
        h, i = shape.hidden, shape.intermediate
        q, kv = self._q, self._kv
        remade = level == 5 and self._gemma  # its last norm wants the output of down_proj
        halves = 1 if level == 1 or remade else 2
        standing = e * h  # the gradient that arrives
        standing += e * (q + 2 * kv) if level >= 3 else 0
        standing += e * (q + kv) if shape.has_qk_norm else 0
        standing += e * h if level >= 4 or self._gemma else 0
        standing += e * q + (0 if self.scores else 4 * shape.heads) if level == 5 else 0
        returned = e * h * (1 + (level >= 4) + remade) if self._gemma else 0  # beyond its norms
        wide = 0 if level == 1 else 2 * e * i
        gate, down = self._widest("gate_proj"), self._unpacked("down_proj")
        if self.tile and level >= 2 and self.tile < n:
            mlp = (
                n * (standing + returned + e * 2 * h) + self._held + self.tile * e * (3 * i + 2 * h)
            )
        else:
            moments = [
                n * (standing + returned + wide + e * i) + down // halves,
                n * (standing + returned + wide + 2 * e * h) + gate // halves,
            ]
            if level >= 2:
                moments.append(n * (standing + returned + wide + e * h) + gate)
            if remade:
                moments.append(n * (standing + wide + e * (i + h)) + down)
            if (
                self.dropped and "down_proj" in self.targets
            ):  # two copies of its adapter's input gradient
                moments.append(n * (standing + returned + wide + 3 * e * i))
            mlp = max(moments)
        gathered = e * (h + q + q + 2 * kv)  # dmiddle, do, and the gradients of q, k and v
        gathered += 0 if self.shares_heads or q == kv else e * 4 * q
        buffers = self._buffers
        square = self._softmax if self.scores else self.square * e if self.masked else 0
        return max(mlp, n * (standing + gathered) + square + buffers) + self._copies

    def passing_at(self, level: int) -> int:
        """Bytes at the highest point of a layer's forward pass, beside what it and others keep."""
        shape, e, n = self.shape, self.element, self.tokens
        h, i = shape.hidden, shape.intermediate
        middle = e * h if level >= 4 or self._gemma else 0
        gate, down = self._widest("gate_proj"), self._unpacked("down_proj")
        if self.tile and level >= 2 and self.tile < n:
            held = sum(
                self._unpacked(name) for name in ("gate_proj", "up_proj", FUSED_MLP, "down_proj")
            )
            mlp = n * (middle + e * 2 * h) + held + self.tile * e * (3 * i + h)
        else:
            wide = 0 if level == 1 else 2 * e * i
            mlp = max(
                n * (middle + e * h + wide) + gate,
                n * (middle + wide + e * i),
                n * (middle + e * i + e * h) + down,
            )
        q, kv = self._q, self._kv
        attention = n * e * (q + (q + 2 * kv if level >= 3 else 0))
        attention += 0 if self.shares_heads or q == kv else n * e * 2 * q
        attention += self.square * e if self.masked else 0
        if self.scores:
            attention += self.square * shape.heads * (4 + e + self._squashed)
        return max(mlp, attention) + self._copies

    @property
    def _q(self) -> int:
        return self.shape.heads * self.shape.head_dim

    @property
    def _kv(self) -> int:
        return self.shape.kv_heads * self.shape.head_dim

    @property
    def _gemma(self) -> bool:
        return self.shape.norms == 4

    @property
    def _buffers(self) -> int:
        """What a card's attention allocates inside; see :func:`qlora.tracing.inside_attention`."""
        heads, dim = self.shape.heads, self.shape.head_dim
        if not self.sequences:
            return 0
        sums = 4 * self.tokens * heads
        if not self.shares_heads:
            return sums + 4 * self.tokens * self._q
        wide = heads * -(-dim // 32) * 32
        expanded = 2 * self.element * self.tokens * self._q if self._kv < self._q else 0
        return sums + 4 * (self.tokens + 128 * self.sequences) * wide + expanded

    @property
    def _softmax(self) -> int:
        """The probabilities in fp32, their gradient and its product, and what a soft cap keeps."""
        return self.square * (self.shape.heads * (12 + self._squashed) + self.element)

    @property
    def _held(self) -> int:
        """The MLP's matrices, unpacked together."""
        return sum(
            self._unpacked(name) for name in ("gate_proj", "up_proj", FUSED_MLP, "down_proj")
        )

    def _widest(self, name: str) -> int:
        fused = {"gate_proj": FUSED_MLP, "q_proj": FUSED_QKV}[name]
        return self._unpacked(fused if fused in self.shape.linears else name)
