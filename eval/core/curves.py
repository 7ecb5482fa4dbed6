"""Differences between runs at equal coverage: error rates fall by saying less, so curves are compared, not points.

A run's points are its checkpoints, each with a coverage (recall, or how much is said) and an error rate, in the same
bootstrap resamples for all runs, so that what is hard for all of them cancels in differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.core.statistics import Array, Interval, interval

UNDEFINED_SHARE = 0.1  # of resamples without a value, above which there is no interval


@dataclass(frozen=True)
class Curve:
    """A run's points: coverage and error, each [P, 1 + RESAMPLES]; column 0 is the data themselves.

    with_start: whether point 0 is the model that the runs started from. The curve begins there, but it is the same
    point on all curves, so runs are not compared at it.
    """

    coverage: Array
    error: Array
    with_start: bool = False

    def at(self, coverage: Array) -> Array:
        """Interpolate the error at these coverages, [1 + RESAMPLES]: linear between the points next in coverage.

        NaN where the points do not reach that far.
        """
        order = np.argsort(self.coverage, axis=0, kind="stable")
        x, y = (np.take_along_axis(values, order, axis=0) for values in (self.coverage, self.error))
        right = np.clip((x < coverage).sum(axis=0), min(1, len(x) - 1), len(x) - 1)[None]
        left = np.maximum(right - 1, 0)
        (x0, x1), (y0, y1) = ([np.take_along_axis(v, n, axis=0)[0] for n in (left, right)] for v in (x, y))
        part = np.divide(coverage - x0, x1 - x0, out=np.ones_like(x0), where=x1 > x0)
        return np.where((x[0] <= coverage) & (coverage <= x[-1]), y0 + part * (y1 - y0), np.nan)

    def above(self, other: Curve) -> list[Array]:
        """Return the error of each own point minus the other curve's at its coverage, NaN where that ends before."""
        first = int(self.with_start)
        return [error - other.at(coverage) for coverage, error in zip(self.coverage[first:], self.error[first:])]


def mean_gaps(ours: Curve, theirs: Curve, both_ways: bool = False) -> Array:
    """Compute the error of ours minus theirs at equal coverage, averaged over the points of both: [1 + RESAMPLES].

    At each point of one curve the other is interpolated; points that it does not reach are excluded, in each resample.
    Both directions count, because interpolating along a noisy convex curve overstates it, which would favor the side
    that is not interpolated. NaN where neither reaches a point of the other; with `both_ways` also where only one does.
    """
    at_ours, at_theirs = np.stack(ours.above(theirs)), -np.stack(theirs.above(ours))
    ours_reached, theirs_reached = ((~np.isnan(gaps)).sum(axis=0) for gaps in (at_ours, at_theirs))
    points = ours_reached + theirs_reached
    known = (ours_reached > 0) & (theirs_reached > 0) if both_ways else points > 0
    sums = np.nansum(at_ours, axis=0) + np.nansum(at_theirs, axis=0)
    return np.where(known, sums / np.maximum(points, 1), np.nan)


def points_compared(ours: Curve, theirs: Curve) -> tuple[int, int]:
    """Count the points of ours that their curve reaches, and of theirs that ours reaches, in the data themselves."""
    return _reached(ours.above(theirs)), _reached(theirs.above(ours))


def _reached(gaps: Sequence[Array]) -> int:
    return sum(not np.isnan(gap[0]) for gap in gaps)


def interval_of(values: Array) -> Interval:
    """Return the value of column 0 with the percentiles of the others, [1 + RESAMPLES].

    Undefined where column 0 is, or where more than a tenth of the resamples are.
    """
    if np.isnan(values[1:]).mean() > UNDEFINED_SHARE:
        return Interval(None, None, None)
    return interval(values[0], values[1:])
