"""A plan as a person reads it: bytes term by term, the verdict, what would fit, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qlora import cards, fitting, fused, memory, siblings, speed
from qlora.cards import GIB, Card
from qlora.errors import DoesNotFit
from qlora.fitting import Fitted
from qlora.memory import Plan
from qlora.settings import Recipe
from qlora.shape import Shape

# What a term is called, and what is in it.
_WORDS = {
    "base_nf4": "base in NF4",
    "base": "base, 16 bits",
    "scales": "quantization state",
    "unquantized": "embeddings, head, norms",
    "adapters": "adapters, fp32",
    "gradients": "their gradients",
    "optimizer": "optimizer state",
    "activations": "kept activations",
    "working_set": "one layer at work",
    "logits": "loss, beyond that",
    "evaluation": "answering, beyond that",
    "optimizer_step": "optimizer step, beyond",
    "new_tokens": "new tokens' table",
    "overhead": "CUDA context, slack",
}
_SHOWN_BYTES = 2**19  # what rounds to nothing in a table of GiB with three decimals
LENGTHS = (512, 2048, 8192)
CARDS = ("8GB", "12GB", "T4", "24GB")


class Sheet:
    """Everything that ``qlora plan`` says of one recipe on one card."""

    def __init__(
        self,
        recipe: Recipe,
        shape: Shape,
        card: Card,
        positions: int | None,
        decide: Callable[[Recipe, Shape, Card], Fitted] = fitting.fit,
    ) -> None:
        """Plan it; ``positions`` is the longest sequence that the base knows, if it says so.

        Raises:
            HardwareError: As :func:`qlora.memory.plan`.
            ModelError: As :func:`qlora.memory.plan`.
        """
        self.card, self.shape = card, shape
        self.refusal: str | None = None
        try:
            self.fitted = decide(recipe, shape, card)
        except DoesNotFit as error:
            self.refusal = str(error)
            if recipe.train.fit == "auto":
                recipe = fitting.most_frugal(recipe, shape, card)
            self.fitted = Fitted(recipe, memory.plan(recipe, shape, card), ())
        self.sibling = siblings.instead(recipe, shape, card) if self.refusal else None
        self.anew = recipe.train.fit == "auto" and shape.known
        self.longest = fitting.longest(self.recipe, shape, card, anew=self.anew)
        if positions is not None:
            self.longest = min(self.longest, positions)
        self.rows = fitting.largest_micro_batch(self.recipe, shape, card)
        self.measured = speed.recall(card, self.plan.dtype)
        self.traced: dict[str, Any] | None = None
        self.note: str | None = None  # of where the shape was read

    @property
    def recipe(self) -> Recipe:
        """The recipe that would run."""
        return self.fitted.recipe

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return self.fitted.plan

    @property
    def fits(self) -> bool:
        """Whether a run would start."""
        return self.refusal is None

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted from what this card was measured to do, or None."""
        if self.measured is None:
            return None
        return speed.tokens_per_second(self.recipe, self.shape, self.measured)

    @property
    def step_seconds(self) -> float | None:
        """Predicted seconds of an optimizer step of full rows, or None."""
        if (rate := self.tokens_per_second) is None:
            return None
        train = self.recipe.train
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
        return rows * self.recipe.data.max_length / rate

    def to_json(self) -> dict[str, Any]:
        """Plain data of it all."""
        return self.fitted.to_json() | {
            "fits": self.fits,
            "refusal": self.refusal,
            "sibling": self.sibling,
            "longest_max_length": self.longest,
            "largest_micro_batch": self.rows,
            "gflop_per_token": round(speed.flops_per_token(self.recipe, self.shape) / 1e9, 3),
            "predicted_tokens_per_second": self.tokens_per_second,
            "predicted_step_seconds": self.step_seconds,
            "measured": None if self.measured is None else vars(self.measured),
            "traced": self.traced,
            "note": self.note,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__  # a notebook shows it

    def _lines(self) -> list[str]:
        plan, train, data = self.plan, self.recipe.train, self.recipe.data
        terms = _split_scales(plan.terms, self.shape, self.recipe)
        said = [
            f"{self.recipe.model.name} ({_count(self.shape.parameters)}) on {self.card.name}: "
            f"{_gib(self.card.free_bytes)} free",
            f"{plan.dtype}, {plan.optimizer}, {train.per_device_train_batch_size} x "
            f"{data.max_length:,} tokens a pass, {self._recomputed()}",
            "",
            *_table(terms, self.traced),
            "",
            self._verdict(),
        ]
        said += [f"note: {note}" for note in (*plan.notes, self.note) if note]
        said += [f"chosen: {reason}" for reason in self.fitted.reasons]
        if plan.host_bytes and not self.fitted.reasons:
            said.append(f"{_gib(plan.host_bytes)} wait in the host's memory")
        said.append(self._reach())
        said.append(self._speed())
        if self.refusal:
            said += ["", *self.refusal.splitlines()[2:]]
        if self.sibling:
            said.append(f"The largest sibling that would fit: {self.sibling}.")
        return said

    def _recomputed(self) -> str:
        """How many layers are, and where their inputs wait."""
        if fused.applies(self.recipe, self.shape):
            offloaded = ", inputs offloaded" if self.recipe.train.activation_offload else ""
            return f"fused layers: {fused.in_words(self.recipe, self.shape)}{offloaded}"
        again = speed.checkpointed_layers(self.recipe, self.shape)
        offloaded = ", inputs offloaded" if self.recipe.train.activation_offload else ""
        return f"{again} of {self.shape.layers} layers computed again{offloaded}"

    def _verdict(self) -> str:
        left = self.card.free_bytes - self.plan.total_bytes
        said = f"does not fit: {_gib(-left)} too much ({self.plan.method})"
        if self.fits:
            said = f"fits: {_gib(left)} to spare ({self.plan.method})"
        if self.traced and (left >= 0) != (self.traced["total_bytes"] <= self.card.free_bytes):
            said += "; the traced step says otherwise, a run goes by the prediction"
        return said

    def _reach(self) -> str:
        if not self.longest:
            return "with these settings no length fits"
        if self.anew:
            return f"chosen anew for each length: max_length to {self.longest:,}"
        rows = f"{self.rows}{' and more' if self.rows == fitting.MOST_ROWS else ''}"
        many = f", or {rows} x {self.recipe.data.max_length:,} tokens a pass" if self.rows else ""
        more = " and more" if self.longest == fitting.MOST_TOKENS else ""
        return f"with these settings: max_length to {self.longest:,}{more}{many}"

    def _speed(self) -> str:
        work = f"{speed.flops_per_token(self.recipe, self.shape) / 1e9:,.3g} GFLOP a token"
        if self.measured is None:
            return f"{work}; no time is predicted: no run of five steps here has measured this card yet"
        times = speed.cost_per_token(self.recipe, self.shape) / self.measured.cost
        guess = f"; a rough guess: that model is {times:,.0f} times cheaper" if times > 10 else ""
        return (
            f"{work}: about {_rate(self.tokens_per_second or 0.0)} tokens/s, "
            f"{_time(self.step_seconds or 0.0)} a step of full rows (predicted from {self.measured.model} "
            f"on {self.measured.date}: {self.measured.tokens_per_second:,.0f} tokens/s{guess})"
        )


def table(lengths: Sequence[int] = LENGTHS, names: Sequence[str] = CARDS) -> list[str]:
    """Models by cards: predicted GiB at each length with everything recomputed, and what fits.

    r 16, one sequence a pass; a dash where it does not fit, or where the model does not know so long a
    sequence; last the longest sequence.
    """
    from qlora.recipe import recipe_from

    rows = [("model", *names)]
    for name in siblings.TABLED:
        shape, cells = siblings.published()[name], []
        for card in (cards.named_card(text) for text in names):
            found = []
            for length in lengths:
                recipe = recipe_from(
                    {
                        "model": {"name": name},
                        "data": {"train": "hub:owner/rows", "max_length": length},
                        "run": {"name": "table"},
                    }
                )
                plan = memory.predict(recipe, shape, card)
                fits = plan.fits and length <= siblings.positions(name)
                found.append(f"{plan.total_bytes / GIB:.1f}" if fits else "-")
            longest = min(fitting.longest(recipe, shape, card), siblings.positions(name))
            cells.append(f"{'/'.join(found)} to {longest:,}" if longest else "-")
        rows.append((name.rpartition("/")[2], *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    heading = (
        f"GiB at {' / '.join(f'{n:,}' for n in lengths)} tokens, and the longest sequence, one a pass; "
        "NF4, r 16, every layer computed again (predicted)"
    )
    body = [
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [heading, "", *body]


def _split_scales(terms: dict[str, int], shape: Shape, recipe: Recipe) -> dict[str, int]:
    """The packed base without its scales, and the scales."""
    if "base_nf4" not in terms:
        return terms
    scales = terms["base_nf4"] - -(-shape.linear_parameters // 2)
    return {"base_nf4": terms["base_nf4"] - scales, "scales": scales} | {
        name: size for name, size in terms.items() if name != "base_nf4"
    }


def _table(terms: dict[str, int], traced: dict[str, Any] | None) -> list[str]:
    """Bytes term by term, beside the traced ones where there are some."""
    if traced is None:
        rows = [(name, size, None) for name, size in terms.items() if size >= _SHOWN_BYTES]
        total: tuple[int, int | None] = sum(terms.values()), None
    else:
        names = dict.fromkeys((*terms, *traced["terms"]))
        rows = [
            (name, terms.get(name, 0), traced["terms"].get(name, 0))
            for name in names
            if max(terms.get(name, 0), traced["terms"].get(name, 0)) >= _SHOWN_BYTES
        ]
        total = sum(terms.values()), traced["total_bytes"]
    lines = []
    if traced is not None:
        lines.append(f"  {'':<26}{'predicted':>10}{'traced':>10}")
    for name, size, other in [*rows, ("total", *total)]:
        word = _WORDS.get(name, name)
        beside = "" if other is None else f"{other / GIB:>10.3f}"
        lines.append(
            f"  {word:<26}{size / GIB:>10.3f}{beside}" + (" GiB" if name == "total" else "")
        )
    return lines


def _count(parameters: int) -> str:
    """
    >>> _count(8_030_261_248), _count(3_012_345)
    ('8.03 B', '3.0 M')
    """
    return f"{parameters / 1e9:.2f} B" if parameters >= 5e7 else f"{parameters / 1e6:.1f} M"


def _time(seconds: float) -> str:
    """
    >>> _time(0.52), _time(65.5), _time(30402.5)
    ('0.5 s', '66 s', '8.4 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _rate(tokens: float) -> str:
    """
    >>> _rate(3219.4), _rate(7.26)
    ('3,220', '7.3')
    """
    return f"{float(f'{tokens:.3g}'):,.0f}" if tokens >= 10 else f"{tokens:.2g}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
