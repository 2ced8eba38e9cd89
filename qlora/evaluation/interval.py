"""How sure a difference is: the paired bootstrap, and what it allows to be said.

Both models are given the same rows, so a row that is hard for both says nothing of their difference. Rows
are drawn again with replacement, a pair at a time, and the difference is computed anew in each draw (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4000
CONFIDENCE = 0.95
SEED = 20240229  # the interval of the same scores is the same every time
# If fewer rows differ at all, then even when all of them point one way a coin would have done as well: two
# times 1/2 to the 5th is above 1 - CONFIDENCE.
FEWEST = 6
_AT_ONCE = 2**21  # drawn rows


@dataclass(frozen=True)
class Interval:
    """A difference, tuned less base, and between what it lies in 95 of 100 draws of rows.

    Attributes:
        difference: Of all rows.
        low: The lower end.
        high: The upper end.
        rows: How many were compared.
        differing: In how many of them the two are not equal.
    """

    difference: float
    low: float
    high: float
    rows: int
    differing: int

    @property
    def is_shown(self) -> bool:
        """Whether these rows tell the two apart: zero is outside, and enough rows differ."""
        return self.differing >= FEWEST and not self.low <= 0 <= self.high

    def verdict(self, *, lower_is_better: bool) -> str:
        """better, worse, or that these rows show no difference; of tuned against base.

        >>> Interval(-0.2, -0.3, -0.1, 50, 50).verdict(lower_is_better=True)
        'better'
        >>> Interval(-0.2, -0.5, 0.1, 50, 50).verdict(lower_is_better=True)
        'no difference that these 50 rows can show'
        >>> Interval(-0.2, -0.3, -0.1, 5, 5).verdict(lower_is_better=True)
        'too few rows: 5 differ, and 6 must'
        """
        if self.differing < FEWEST and not self.low <= 0 <= self.high:
            return f"too few rows: {self.differing} differ, and {FEWEST} must"
        if not self.is_shown:
            these = "this 1 row" if self.rows == 1 else f"these {self.rows:,} rows"
            return f"no difference that {these} can show"
        return "better" if (self.difference < 0) is lower_is_better else "worse"

    def to_json(self) -> dict[str, Any]:
        return {
            "difference": self.difference, "low": self.low, "high": self.high, "rows": self.rows,
            "differing": self.differing, "is_shown": self.is_shown,
        }  # fmt: skip


def paired(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float] | None = None
) -> Interval:
    """The difference of two means over the same rows, with its interval.

    Args:
        before: Of the base, a sum a row (of losses) or a value a row (0 or 1).
        after: Of the tuned model, of the same rows in the same order.
        weights: What the sums of a row count for, such as its tokens: the mean is then that over tokens.

    >>> found = paired([1.0, 4.0, 2.0] * 20, [0.0, 3.0, 1.0] * 20)
    >>> found.difference, found.low, found.high
    (-1.0, -1.0, -1.0)
    """
    deltas = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    count = len(deltas)
    assert count, "no rows to compare"
    weighed = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    assert len(weighed) == count
    kept = weighed > 0  # a row without a supervised token is in no mean
    deltas, weighed = deltas[kept], weighed[kept]
    count = len(deltas)
    generator = np.random.default_rng(SEED)
    block = max(1, _AT_ONCE // count)
    found = []
    for start in range(0, DRAWS, block):
        drawn = generator.integers(0, count, (min(block, DRAWS - start), count))
        found.append(deltas[drawn].sum(1) / weighed[drawn].sum(1))
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [outside, 1 - outside])
    difference = float(deltas.sum() / weighed.sum())
    # All draws of equal differences are equal but for rounding.
    low, high = min(float(low), difference), max(float(high), difference)
    return Interval(difference, low, high, count, int(np.count_nonzero(deltas)))
