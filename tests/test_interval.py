"""The interval covers what it claims to, agrees with the textbook, and promises nothing of a few rows."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from qlora.evaluation import interval
from qlora.evaluation.interval import Interval, paired


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(interval).failed == 0


def test_the_interval_is_as_wide_as_the_central_limit_theorem_says():
    """The reference: 1.96 standard errors of the mean of the pairs' differences."""
    generator = np.random.default_rng(0)
    before = generator.normal(2.0, 1.0, 400)
    after = before - 0.1 + generator.normal(0, 0.5, 400)
    found = paired(before, after)
    half = 1.96 * (after - before).std(ddof=1) / math.sqrt(400)
    assert found.difference == pytest.approx((after - before).mean())
    assert found.difference - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.difference == pytest.approx(half, rel=0.1)


def test_with_weights_it_is_that_of_a_ratio_of_sums():
    """The reference: the delta method for the mean over tokens of rows of unlike length."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 80, 500)
    before = tokens * generator.normal(2.0, 0.3, 500)
    after = before + tokens * generator.normal(-0.05, 0.2, 500)
    found = paired(before, after, tokens)
    difference = (after - before).sum() / tokens.sum()
    rest = (after - before) - difference * tokens
    half = 1.96 * rest.std(ddof=1) / math.sqrt(500) / tokens.mean()
    assert found.difference == pytest.approx(difference)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(interval, "DRAWS", 1000)
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        before = generator.exponential(2.0, 80)
        found = paired(before, before + generator.normal(0.3, 1.0, 80))
        held += found.low <= 0.3 <= found.high
    assert 0.91 <= held / 400 <= 0.98


def test_pairs_are_kept_together():
    """Rows differ widely and every one is better by the same: unpaired, nothing would be seen."""
    before = np.linspace(0.1, 9.0, 30)
    found = paired(before, before - 0.01 * (1 + before / 100))
    assert found.high < 0 and found.verdict(lower_is_better=True) == "better"
    assert found.verdict(lower_is_better=False) == "worse"


def test_the_same_scores_give_the_same_interval_every_time():
    rows = np.random.default_rng(3).normal(size=(2, 50))
    assert paired(*rows) == paired(*rows)


def test_many_rows_are_drawn_in_blocks_and_the_draws_are_all_there(monkeypatch):
    rows = np.random.default_rng(4).normal(size=(2, 300))
    usual = paired(*rows)
    monkeypatch.setattr(interval, "_AT_ONCE", 1000)
    blocks = paired(*rows)
    assert blocks.difference == usual.difference
    assert blocks.low == pytest.approx(usual.low, abs=0.02)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_handful_of_rows_shows_nothing_however_they_agree(rows):
    found = paired([0.0] * rows, [1.0] * rows)
    assert found.low == found.high == 1.0 and not found.is_shown
    assert found.verdict(lower_is_better=False) == f"too few rows: {rows} differ, and 6 must"
    same = paired([1.0] * rows, [1.0] * rows).verdict(lower_is_better=False)
    these = "this 1 row" if rows == 1 else f"these {rows} rows"
    assert same == f"no difference that {these} can show"


def test_six_rows_that_all_agree_are_the_fewest_that_a_sign_test_believes():
    assert 2 * 0.5**interval.FEWEST < 1 - interval.CONFIDENCE <= 2 * 0.5 ** (interval.FEWEST - 1)
    assert paired([0.0] * 6, [1.0] * 6).verdict(lower_is_better=False) == "better"
    many = paired([0.0] * 100, [1.0] * 5 + [0.0] * 95)  # five of a hundred differ
    assert not many.is_shown and many.differing == 5


def test_equal_models_are_not_told_apart():
    same = paired([0.1] * 40, [0.1] * 40)
    assert (same.difference, same.low, same.high, same.differing) == (0, 0, 0, 0)
    assert same.verdict(lower_is_better=True) == "no difference that these 40 rows can show"


def test_a_row_without_supervised_tokens_counts_for_nothing():
    found = paired([1.0] * 10 + [0.0], [0.5] * 10 + [0.0], [1] * 10 + [0])
    assert found.rows == 10 and found.difference == -0.5


def test_it_can_be_written_as_json():
    assert Interval(1.0, 0.5, 1.5, 9, 9).to_json() == {
        "difference": 1.0, "low": 0.5, "high": 1.5, "rows": 9, "differing": 9, "is_shown": True,
    }  # fmt: skip
