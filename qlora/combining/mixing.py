"""What several adapters add to one linear, made into one of a low rank.

``linear`` is the weighted sum, exactly; ``svd`` is that sum cut down to a rank. ``ties`` and ``dare_ties``
choose among the entries of the full matrices before they add them, so that opposed ones do not cancel. What
they choose is no longer of low rank: cutting it down costs something, and how much is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qlora.combining.deltas import LARGEST_RANK, largest
from qlora.errors import RecipeError

METHODS = ("linear", "ties", "dare_ties", "svd")
DENSITIES = {"ties": 0.2, "dare_ties": 0.5}  # 0.2 in the paper of TIES; DARE's drop half or more
EXACT_SVD = 1024  # the smaller side of a matrix: a larger one is cut down by a random projection
OVERSAMPLED, POWERS = 16, 4  # of that projection (Halko, Martinsson, Tropp, arXiv:0909.4061)


@dataclass(frozen=True)
class Asked:
    """How to combine, complete and checked; see :func:`ask`."""

    method: str
    weights: tuple[float, ...]
    density: float | None
    rank: int
    scale: float
    seed: int


def ask(
    ranks: Sequence[int],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    scale: float = 1.0,
    seed: int = 42,
) -> Asked:
    """What was asked for, with what was left open filled in.

    Args:
        ranks: Of the adapters.
        method: One of :data:`METHODS`.
        weights: One for each adapter; equal shares of 1 by default. For ``ties`` and ``dare_ties`` only
            their ratios count. A negative one takes an adapter's opposite.
        density: Share of entries that ``ties`` and ``dare_ties`` keep.
        rank: Of the combination. By default all of it for ``linear``, the largest of the adapters' for
            ``svd``, and their sum for the others.
        scale: Times the whole.
        seed: Of what ``dare_ties`` drops.

    Raises:
        RecipeError: One of these makes no sense; names it.
    """
    if method not in METHODS:
        raise RecipeError(f"--method is {method!r}. Write one of {', '.join(METHODS)}.")
    count = len(ranks)
    shares = tuple(weights) if weights else (1 / count,) * count
    if len(shares) != count:
        raise RecipeError(
            f"--weights has {len(shares)} numbers for {count} runs. Write one for each, in their order, "
            f"such as --weights {','.join(['1'] * count)}."
        )
    for share in shares:
        if share == 0 or not math.isfinite(share):
            raise RecipeError(
                f"--weights has {share:g}. Write numbers other than 0; to leave a run out, do not name it."
            )
    if scale == 0 or not math.isfinite(scale):
        raise RecipeError(f"--scale is {scale:g}. Write a number other than 0, such as 0.8.")
    if density is not None and method not in DENSITIES:
        raise RecipeError(
            f"--density is about {' and '.join(DENSITIES)}, and --method is {method}, which keeps every "
            "entry. Leave one of the two out."
        )
    density = DENSITIES.get(method) if density is None else density
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"--density is {density:g}. Write a share above 0, at most 1.")
    if rank is not None and not 1 <= rank <= LARGEST_RANK:
        raise RecipeError(f"--rank is {rank}. Write a rank from 1 to {LARGEST_RANK:,}.")
    whole = sum(ranks)
    if rank is None and method != "svd" and whole > LARGEST_RANK:
        raise RecipeError(
            f"The ranks of the adapters add up to {whole:,}, and an adapter may have {LARGEST_RANK:,}. Cut "
            "the combination down to a rank, such as --rank 64."
        )
    rank = rank or (max(ranks) if method == "svd" else whole)
    rank = rank if method in DENSITIES else min(rank, whole)
    return Asked(method, shares, density, rank, scale, seed)


@dataclass(frozen=True)
class Mixed:
    """A (r, in) and B (out, r) of a sum, and what of it they could not hold.

    Attributes:
        a, b: The matrices; what is added is ``b @ a``.
        lost: The square of the Frobenius norm of what was cut off.
        whole: The square of the norm of what should have been added.
    """

    a: torch.Tensor
    b: torch.Tensor
    lost: float
    whole: float

    @property
    def error(self) -> float:
        """What was cut off, as a share of the norm."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def mix(
    asked: Asked,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights: Sequence[float],
    generator: torch.Generator,
) -> Mixed:
    """One linear of a combination.

    Args:
        asked: How.
        factors: A and scaled B of the adapters that add to this linear.
        weights: Theirs.
        generator: Of the CPU; the linears go through it one after the other.
    """
    if asked.method not in DENSITIES:
        return add_up(factors, [weight * asked.scale for weight in weights], asked.rank)
    full = (b @ a for a, b in factors)  # one of them at a time
    assert asked.density is not None
    if asked.method == "ties":
        chosen = ties(full, weights, asked.density)
    else:
        chosen = dare_ties(full, weights, asked.density, generator)
    return factored(chosen * asked.scale, asked.rank, generator)


def add_up(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights: Sequence[float],
    rank: int | None = None,
) -> Mixed:
    """The sum of ``weight * B @ A``, whose rank is at most the sum of the ranks.

    A and B lie side by side: nothing is approximated unless a lower rank is asked for, and then no other
    matrix of that rank is nearer to the sum (Eckart and Young).
    """
    a = torch.cat([a for a, _ in factors])
    b = torch.cat([b * weight for (_, b), weight in zip(factors, weights, strict=True)], dim=1)
    # The sum is Qb (Rb Ra') Qa': its singular values are those of a matrix as small as the ranks.
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    whole = float(s.square().sum())
    if rank is None or rank >= len(a):
        return Mixed(a, b, 0.0, whole)
    root = s[:rank].sqrt()
    cut = ((vh[:rank] @ qa.T) * root[:, None]).float(), ((qb @ u[:, :rank]) * root).float()
    return Mixed(*cut, float(s[rank:].square().sum()), whole)


def ties(deltas: Iterable[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """TIES (arXiv:2306.01708) of full matrices: trim, elect a sign for each entry, average those of it.

    Of each matrix the ``density`` largest entries are kept, by magnitude.
    """
    return merge_by_sign([d * (d.abs() >= largest(d, density)) for d in deltas], weights)


def dare_ties(
    deltas: Iterable[torch.Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """DARE (arXiv:2311.03099) in place of TIES' trimming: entries are dropped by chance, others scaled up.

    ``density`` is the probability with which one is kept. ``generator`` is of the CPU: a seed means the
    same on any device.
    """
    kept = [
        d * (torch.rand(d.shape, generator=generator) < density).to(d.device) / density
        for d in deltas
    ]
    return merge_by_sign(kept, weights)


def merge_by_sign(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """For each entry the weighted mean of those whose sign has more weight; zero where none is left.

    The sign is that of the weighted sum (TIES, section 4). With equal weights this is the paper's; a
    negative weight means the adapter's opposite. Weights are shares: only their ratios count.

    >>> one, other = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([2.0, 3.0, -2.0])
    >>> merge_by_sign([one, other], [0.5, 0.5]).tolist()
    [3.0, 3.0, -2.0]
    """
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    elected = total.sign_()
    summed, counted = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta.sign() * math.copysign(1, weight) == elected) & (elected != 0)
        summed.add_(delta * agrees, alpha=weight)
        counted.add_(agrees, alpha=abs(weight))
    return summed.div_(counted.clamp_(min=1e-30))


def factored(delta: torch.Tensor, rank: int, generator: torch.Generator) -> Mixed:
    """A matrix (out, in) cut down to a rank; what is lost is measured, not estimated.

    Up to :data:`EXACT_SVD` it is the nearest of that rank; above, a random projection comes near it: a
    whole decomposition of a large linear takes minutes.
    """
    smaller = min(delta.shape)
    if smaller <= EXACT_SVD or rank + OVERSAMPLED >= smaller:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        wide = torch.randn(delta.shape[1], rank + OVERSAMPLED, generator=generator)
        q = torch.linalg.qr(delta @ wide.to(delta.device)).Q
        for _ in range(POWERS):
            q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    a, b = vh[:rank] * root[:, None], u[:, :rank] * root
    lost = float(torch.linalg.vector_norm(delta - b @ a).double().square())
    return Mixed(a, b, lost, float(torch.linalg.vector_norm(delta).double().square()))
