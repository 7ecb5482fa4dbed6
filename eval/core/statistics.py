"""Bootstrap intervals for a ratio of two sums over items, and for the difference of two models on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1_000_000  # bounds the memory of one block of sampled item numbers (8 MB)


class Interval(NamedTuple):
    """A metric and its percentile bootstrap interval; all three are None where the denominator is 0."""

    value: float | None
    low: float | None
    high: float | None


def ratio_interval(
    numerators: ArrayLike, denominators: ArrayLike, groups: Sequence[Any] | None = None, *, seed: int = 0
) -> Interval:
    """Compute sum(numerators) / sum(denominators) with its 95 % interval over items.

    numerators, denominators: [n], one entry per item. groups: [n], e.g. image ids: a group is resampled as one.
    10,000 resamples; a resample whose denominator is 0 has no ratio and is excluded.
    """
    totals, sums = resample([numerators, denominators], groups, seed=seed)
    return interval(ratio(*totals), ratio(*sums))


def paired_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Compute the ratio of `first` minus that of `second`, each (numerators, denominators), [n] over the SAME items.

    Both models have the same items in each resample, so what makes an item hard for both cancels.
    """
    totals, sums = resample([*first, *second], groups, seed=seed)
    return interval(ratio(*totals[:2]) - ratio(*totals[2:]), ratio(*sums[:2]) - ratio(*sums[2:]))


def resample(
    columns: Sequence[ArrayLike], groups: Sequence[Any] | None = None, *, seed: int = 0
) -> tuple[Array, Array]:
    """Compute sums of C columns over all items, [C], and over as many sampled with replacement, [C, RESAMPLES].

    columns: C of [n]. All columns have the same items in each resample, so that any metric made of the sums, such as
    the difference of two models, may be made of each resample's sums and handed to `interval`.
    """
    grouped = _grouped(columns, groups)
    count = grouped.shape[1]
    if count == 0:
        return np.zeros(len(grouped)), np.zeros((len(grouped), RESAMPLES))
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // count)
    sums = []
    for start in range(0, RESAMPLES, rows):
        sampled = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        sums.append(grouped @ _times(sampled).T)
    return grouped.sum(axis=1), np.concatenate(sums, axis=1)


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """Return the element-wise ratio, NaN where the denominator is 0."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def interval(value: ArrayLike, samples: Array) -> Interval:
    """Return a metric and the percentile interval of its resamples, [RESAMPLES]; NaN resamples are excluded."""
    if np.isnan(value):
        return Interval(None, None, None)
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.asarray(value)), float(low), float(high))


def _grouped(columns: Sequence[ArrayLike], groups: Sequence[Any] | None) -> Array:
    """Return [C, n] as float64, summed within groups to [C, number of groups]."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    lengths = {array.shape for array in arrays} | ({(len(groups),)} if groups is not None else set())
    if len(lengths) > 1 or arrays[0].ndim != 1:
        raise ValueError(f"bootstrap: expected columns of one length, one entry per item, got shapes {sorted(lengths)}")
    if groups is None:
        return np.stack(arrays)
    names, members = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    return np.stack([np.bincount(members, weights=array, minlength=len(names)) for array in arrays])


def _times(sampled: NDArray[np.int64]) -> Array:
    """Count how often each item is in each draw: [draws, n] item numbers to [draws, n] counts."""
    draws, count = sampled.shape
    flat = sampled + count * np.arange(draws)[:, None]
    return np.bincount(flat.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)
