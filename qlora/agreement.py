"""How near two models' predictions of the next token are, position by position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

CHUNK = 64  # positions compared at a time: some copies of (64, V) in double precision


@dataclass(frozen=True)
class Agreement:
    """Another model held against the reference, over some positions.

    Attributes:
        kl: Kullback-Leibler divergence of the other's next-token distribution from the reference's,
            sum of p log(p / q), in nats, mean over the positions.
        worst_kl: The largest of a single position.
        top1: Share of the positions whose likeliest token is the same.
        max_logit: Largest difference of a single logit.
        positions: How many.
    """

    kl: float
    worst_kl: float
    top1: float
    max_logit: float
    positions: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.2g} nats a token (at worst {self.worst_kl:.2g}), the likeliest token the same "
            f"on {self.top1:.1%} of {self.positions:,}, logits within {self.max_logit:.2g}"
        )


def compare(reference: torch.Tensor, other: torch.Tensor) -> Agreement:
    """Hold logits (N, V) of a model against those of a reference at the same positions.

    Where either is not finite, the divergence is infinite: no verdict may pass on it.

    >>> same = compare(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))
    >>> abs(same.kl) < 1e-12, same.top1, same.max_logit
    (True, 1.0, 5.0)
    """
    assert reference.shape == other.shape and len(reference), (reference.shape, other.shape)
    kls, hits, largest = [], 0, 0.0
    for start in range(0, len(reference), CHUNK):
        ours = reference[start : start + CHUNK].double()
        theirs = other[start : start + CHUNK].to(ours)
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
        kls.append(each.masked_fill(each.isnan(), torch.inf))
        hits += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        apart = (ours - theirs).abs().max()
        largest = max(largest, torch.inf if bool(apart.isnan()) else float(apart))
    kl = torch.cat(kls)
    return Agreement(
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        top1=hits / len(reference),
        max_logit=largest,
        positions=len(reference),
    )
