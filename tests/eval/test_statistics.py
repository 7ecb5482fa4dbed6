"""Bootstrap intervals: values on paper, a textbook limit, pairing, groups, and the time for 300 items."""

from __future__ import annotations

import numpy as np
import pytest

from eval.core import statistics
from eval.core.statistics import RESAMPLES, Interval, interval, paired_difference, ratio_interval, resample

pytestmark = pytest.mark.fast


def test_value_is_ratio_of_sums_not_mean_of_ratios():
    """(1 + 0 + 3) / (2 + 1 + 5) = 4 / 8 = 0.5, whereas the mean of 1/2, 0 and 3/5 is 0.3667."""
    assert ratio_interval([1, 0, 3], [2, 1, 5]).value == 0.5


def test_two_items_give_the_interval_on_paper():
    """Two items, 0 and 1: a resample has mean 0, 0.5, 1 with probability 1/4, 1/2, 1/4, so quantiles 0 and 1."""
    assert ratio_interval([0, 1], [1, 1]) == Interval(0.5, 0.0, 1.0)


def test_equal_items_have_no_spread():
    assert ratio_interval([3, 3, 3], [4, 4, 4]) == Interval(0.75, 0.75, 0.75)


def test_interval_of_a_rate_agrees_with_the_normal_approximation():
    """30 of 300: standard error sqrt(0.1 * 0.9 / 300) = 0.01732, so about 0.1 +- 1.96 * 0.01732 = [0.066, 0.134]."""
    interval = ratio_interval([1] * 30 + [0] * 270, np.ones(300))
    assert interval.low == pytest.approx(0.066, abs=0.005)
    assert interval.high == pytest.approx(0.134, abs=0.005)


def test_same_seed_same_interval_other_seed_other_interval():
    data = np.random.default_rng(1).random(50)
    first, again, other = (ratio_interval(data, np.ones(50), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.low != other.low


@pytest.mark.parametrize("numerators, denominators", [([0, 0], [0, 0]), ([], [])])
def test_nothing_to_divide_by_is_undefined(numerators, denominators):
    assert ratio_interval(numerators, denominators) == Interval(None, None, None)


def test_resamples_without_a_denominator_are_left_out():
    """Only item 0 has a denominator: every resample that holds it has ratio 1, the others (1 in 4) have none."""
    assert ratio_interval([1, 0], [1, 0]) == Interval(1.0, 1.0, 1.0)


def test_items_of_one_group_are_drawn_together():
    """Two pictures with 50 equal answers each are two observations, not 100: the interval stays [0, 1]."""
    numerators, groups = [0] * 50 + [1] * 50, ["a"] * 50 + ["b"] * 50
    assert ratio_interval(numerators, np.ones(100), groups) == Interval(0.5, 0.0, 1.0)
    assert ratio_interval(numerators, np.ones(100)).high < 0.65


def test_pairing_removes_what_both_models_share():
    """The second model is better by exactly 0.1 on every item, so every resample has difference 0.1."""
    hardness = np.random.default_rng(2).random(40)
    interval = paired_difference((hardness + 0.1, np.ones(40)), (hardness, np.ones(40)))
    assert interval == pytest.approx((0.1, 0.1, 0.1))


def test_paired_difference_of_an_undefined_ratio_is_undefined():
    assert paired_difference(([1], [1]), ([0], [0])) == Interval(None, None, None)


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="expected columns of one length"):
        ratio_interval([1, 2], [1])
    with pytest.raises(ValueError, match="expected columns of one length"):
        ratio_interval([1, 2], [1, 1], ["a"])


def test_more_items_than_one_block_agree_with_the_known_spread():
    """14,000 items are resampled in blocks of 71; rate 0.5 has standard error sqrt(0.25 / 14000) = 0.00423."""
    data = np.tile([0, 1], 7000)
    interval = ratio_interval(data, np.ones(14000))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.00423, rel=0.05)


def test_300_items_are_resampled_in_four_blocks(monkeypatch):
    """A million draws at a time, so that the cost is numpy's and not that of 10,000 steps in Python."""
    blocks, times = [], statistics._times
    monkeypatch.setattr(statistics, "_times", lambda drawn: times(blocks.append(drawn.shape) or drawn))
    data = np.random.default_rng(3).integers(0, 5, size=(2, 300))
    ratio_interval(data[0], data[1] + 1)
    assert blocks == [(3333, 300)] * 3 + [(1, 300)]


def test_all_columns_meet_the_same_draws():
    """[1, 0] and [0, 1] share each resample of two items: their sums are 2 and 0, 1 and 1 or 0 and 2."""
    totals, sums = resample([[1, 0], [0, 1]])
    assert totals.tolist() == [1, 1] and sums.shape == (2, RESAMPLES)
    assert set(map(tuple, sums.T.tolist())) == {(2, 0), (1, 1), (0, 2)}


def test_any_figure_of_the_sums_has_an_interval():
    """The product of both sums is 1 on the items, 0, 1 or 0 over the resamples: quantiles 0 and 1. NaN is left out."""
    totals, sums = resample([[1, 0], [0, 1]])
    assert interval(totals[0] * totals[1], sums[0] * sums[1]) == Interval(1, 0, 1)
    assert interval(1.0, np.array([np.nan, 2.0])) == Interval(1, 2, 2)
    assert interval(np.nan, np.array([1.0])) == Interval(None, None, None)
