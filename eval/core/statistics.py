"""Bootstrap intervals for a ratio of two sums over items, and for the difference of two models on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1_000_000  # bounds the memory of one block of drawn item numbers (8 MB)


class Interval(NamedTuple):
    """A metric and its percentile bootstrap interval; all three are None where the denominator is 0."""

    value: float | None
    low: float | None
    high: float | None


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, groups: Sequence[Any] | None = None, *, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators) with its 95 % interval over items.

    numerators, denominators: [n], one entry per item. groups: [n], e.g. picture ids: a group is drawn as one.
    10,000 resamples; a resample whose denominator is 0 has no ratio and is left out.
    """
    columns = _columns([numerators, denominators], groups)
    totals = columns.sum(axis=1)
    return _interval(_ratio(totals[0], totals[1]), _resampled_sums(columns, seed))


def paired_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Ratio of `first` minus ratio of `second`, each (numerators, denominators), [n] over the SAME items in one order.

    Both models meet the same drawn items in each resample, so what makes an item hard for both cancels.
    """
    columns = _columns([*first, *second], groups)
    totals = columns.sum(axis=1)
    difference = _ratio(totals[0], totals[1]) - _ratio(totals[2], totals[3])
    return _interval(difference, _resampled_sums(columns, seed))


def _columns(columns: Sequence[ArrayLike], groups: Sequence[Any] | None) -> Array:
    """[C, n] as float64, summed within groups to [C, number of groups]."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    lengths = {array.shape for array in arrays} | ({(len(groups),)} if groups is not None else set())
    if len(lengths) > 1 or arrays[0].ndim != 1:
        raise ValueError(f"bootstrap: expected columns of one length, one entry per item, got shapes {sorted(lengths)}")
    if groups is None:
        return np.stack(arrays)
    names, members = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    return np.stack([np.bincount(members, weights=array, minlength=len(names)) for array in arrays])


def _resampled_sums(columns: Array, seed: int) -> Array:
    """[C, RESAMPLES]: the sums of each column over n items drawn with replacement, the same items for all columns."""
    count = columns.shape[1]
    if count == 0:
        return np.zeros((len(columns), RESAMPLES))
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // count)
    sums = []
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in columns]))
    return np.concatenate(sums, axis=1)


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Element-wise ratio, NaN where the denominator is 0."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def _interval(value: Array, sums: Array) -> Interval:
    if np.isnan(value):
        return Interval(None, None, None)
    samples = _ratio(sums[0], sums[1])
    if len(sums) == 4:
        samples = samples - _ratio(sums[2], sums[3])
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
