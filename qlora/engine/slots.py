"""A fixed number of rows that are spoken at once; each is filled and freed while the others go on.

Every step has the same shape: all rows, idle ones too, and keys that begin in column 0 of each row and are
masked behind its last one. A prompt is read alone, as it is. So what a row gets does not depend on who else
is being answered, as it would if rows were padded on the left or taken together in batches of any size:
there other sums are rounded in other ways, and now and then another token wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qlora.engine.stacked import Stacked
from qlora.errors import ModelError

COLUMNS = 64  # keys are kept in multiples of it: the shapes of a step then seldom change


class Slots:
    """Rows of keys and values on one model. Not for several threads at once."""

    def __init__(self, model: Any, stacked: Stacked, count: int) -> None:
        self.model = model
        self.stacked = stacked
        self.count = count
        self.lengths = [0] * count  # tokens that a row holds; 0 is idle
        self.adapters: list[str | None] = [None] * count
        self._layers: list[_Layer] = []
        self._windows = windows(model.config.get_text_config())
        if "flash" in str(model.config._attn_implementation):
            model.set_attn_implementation("sdpa")  # FlashAttention takes no mask of each row's own

    def fill(self, slot: int, prompt: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Read a prompt into an idle row; the logits of what comes next, of shape (V,), in fp32."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        kept = DynamicCache()  # without the configuration: full keys for layers with a window, too
        with torch.inference_mode(), self.stacked.use(adapter):
            out = self.model(ids, past_key_values=kept, use_cache=True, logits_to_keep=1)
        if not self._layers:
            self._layers = [_Layer(self.count) for _ in kept.layers]
        try:
            self._make_room(len(prompt) + 1)
            for own, found in zip(self._layers, kept.layers, strict=True):
                own.fill(slot, found.keys, found.values)
        except RuntimeError:  # no memory for it: what some layers took already, the others need
            for own in self._layers:
                own.narrow(_width(max(self.lengths) + 1))
            raise
        self.lengths[slot], self.adapters[slot] = len(prompt), adapter
        return out.logits[0, -1].float()

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Give each row its next token, idle ones any; the logits of what comes next, (count, V), fp32."""
        width = self._make_room(max(self.lengths) + 1)
        device = self.model.device
        places = torch.tensor(self.lengths, device=device)
        ids = torch.tensor(list(tokens), device=device)[:, None]
        for layer in self._layers:
            layer.aim(places, width)
        with torch.inference_mode(), self.stacked.use(self.adapters):
            out = self.model(
                ids,
                attention_mask=self._masks(places, width),
                position_ids=places[:, None],
                past_key_values=Cache(layers=list(self._layers)),
                use_cache=True,
            )
        for slot, length in enumerate(self.lengths):
            self.lengths[slot] = length + 1 if length else 0
        return out.logits[:, -1].float()

    def free(self, slot: int) -> None:
        """Let a row be filled again. When all are idle their memory goes back."""
        self.lengths[slot], self.adapters[slot] = 0, None
        if not any(self.lengths):
            self._layers = []

    def _make_room(self, length: int) -> int:
        width = _width(length)
        for layer in self._layers:
            layer.widen(width)
        return width

    def _masks(self, places: torch.Tensor, width: int) -> Any:
        """Added to the scores, (count, 1, 1, width): by kind of layer, where a model has several."""
        columns = torch.arange(width, device=places.device)
        dtype = self.model.dtype
        made = {}
        for kind, window in self._windows.items():
            seen = columns <= places[:, None]
            if window is not None:
                seen &= columns > places[:, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=places.device)
            made[kind] = mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None, None]
        return made if len(made) > 1 else next(iter(made.values()))


def _width(length: int) -> int:
    return -(-length // COLUMNS) * COLUMNS


def windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of a model's layers looks, in tokens; None is all the way.

    Raises:
        ModelError: A kind of layer keeps something else than keys and values.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"all": window}
    known = {"full_attention": None, "sliding_attention": window}
    for kind in sorted(kinds - known.keys()):
        raise ModelError(
            f"the model has layers of the kind {kind!r}, and only layers that keep keys and values "
            f"({', '.join(known)}) can be served here. Export it and serve it with another program."
        )
    return {kind: known[kind] for kind in sorted(kinds)}


class _Layer(DynamicLayer):
    """One layer's keys and values, (count, heads, width, D), written at each row's own column."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.rows: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        self.width = self.seen = 0

    def fill(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                x.new_zeros(self.count, x.shape[1], self.width, x.shape[3]) for x in (keys, values)
            )
            self.rows = torch.arange(self.count, device=keys.device)
            self.is_initialized = True
        for own, new in ((self.keys, keys), (self.values, values)):
            own[slot].zero_()  # a NaN that was left behind the mask would pass it
            own[slot, :, : new.shape[2]] = new[0]

    def widen(self, width: int) -> None:
        if self.keys is not None and self.values is not None and width > self.keys.shape[2]:
            self.keys, self.values = (
                torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[2]))
                for x in (self.keys, self.values)
            )
        self.width = max(self.width, width)

    def narrow(self, width: int) -> None:
        if self.keys is not None and self.values is not None and width < self.keys.shape[2]:
            self.keys, self.values = (x[:, :, :width].clone() for x in (self.keys, self.values))
        self.width = min(self.width, width)

    def aim(self, places: torch.Tensor, width: int) -> None:
        self.places, self.seen = places, width

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys[self.rows, :, self.places] = key_states[:, :, 0]
        self.values[self.rows, :, self.places] = value_states[:, :, 0]
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]
