"""Pairs during training: over- and underfitting by hardness, DAMA's factors, and what a filter dropped.

Trained pairs are those of the trainer's pair log, each as it was when last met, before its last update; held-out pairs
are the probes, the same in every cell. Intervals are 95 % bootstrap percentiles over seeds, as wide as Student's t asks
for so few, and over held-out pairs where there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.core.curves import interval_of
from eval.core.statistics import Array, Interval
from playground.tinycoco.study.analysis import Study, last_stop, resample_weights
from playground.tinycoco.study.grid import RATE

BETA = 0.1  # of a margin, as the trainer's default
PARTS = ("first", "second", "last")  # thirds of a training
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # n seeds -> 97.5 % quantile of t with n - 1 degrees of freedom
NORMAL = 1.960  # of the normal distribution

Thirds = Mapping[str, Sequence[str]]
"""The ids of all pairs by third, as `Pool.thirds`."""
Fit = dict[str, dict[str, Array]]
"""Third -> "margin" and "accuracy" (%) in every resample, [1 + RESAMPLES]."""


def runs_at_rate(study: Study, condition: str, method: str) -> list[Mapping[str, Any]]:
    """The cells at RATE, of whole seeds; none where RATE was not declared."""
    seeds = study.seeds_of(condition, method) if RATE in study.rates_of(condition, method) else ()
    return study.runs(condition, method, RATE, seeds)


def last_met(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Id -> the pair's last line in the pair log."""
    return {pair["id"]: pair for pair in run["pairs"]}


def by_id(thirds: Thirds) -> dict[str, str]:
    """Id -> its third."""
    return {id: third for third, ids in thirds.items() for id in ids}


def seed_weights(count: int) -> Array:
    """Weights of seeds whose trainings are all that varies, [1 + RESAMPLES, count].

    Percentiles of a bootstrap are those of a normal distribution, too narrow for a few seeds: of five they would miss
    the mean in 12 % of studies. The weights are spread by Student's t over the normal quantile.
    """
    return 1 + STUDENT.get(count, NORMAL) / NORMAL * (resample_weights("seeds", count) - 1)


def over_seeds(values: Sequence[float]) -> Array:
    """The mean of one figure by seed in every resample, [1 + RESAMPLES]."""
    return seed_weights(len(values)) @ np.asarray(values, dtype=np.float64) / len(values)


def over_seeds_and_pairs(values: Array, third: str) -> Array:
    """The mean of a figure of held-out pairs, [seeds, pairs], in every resample, [1 + RESAMPLES].

    Seeds alone do not show what another choice of the pairs would change, for all seeds have the same.
    """
    of_seeds = seed_weights(len(values))
    of_pairs = resample_weights(f"held-out pairs, {third}", values.shape[1])
    return np.einsum("bn,np,bp->b", of_seeds, values, of_pairs, optimize=True) / values.size


# --- Over- and underfitting -------------------------------------------------------------------------------------------


def trained(runs: Sequence[Mapping[str, Any]], thirds: Thirds) -> Fit:
    """Margin and accuracy of trained pairs, as the trainer's evaluation defines them."""
    third_of = by_id(thirds)
    found: dict[str, list[list[float]]] = {third: [] for third in thirds}
    for run in runs:
        gaps: dict[str, list[float]] = {third: [] for third in thirds}
        for id, pair in last_met(run).items():
            gaps[third_of[id]].append(pair["R"])
        for third in thirds:
            found[third].append(gaps[third])
    return {
        third: {
            "margin": over_seeds([BETA * mean(gaps) for gaps in by_seed]),
            "accuracy": over_seeds([mean(right(np.array(gaps))) for gaps in by_seed]),
        }
        for third, by_seed in found.items()
    }


def held_out(runs: Sequence[Mapping[str, Any]], thirds: Iterable[str]) -> Fit:
    """Margin and accuracy of held-out pairs at the end of training."""
    found = {}
    for third in thirds:
        R = np.array([last_stop(run)["probes"][third] for run in runs], dtype=np.float64)
        found[third] = {
            "margin": over_seeds_and_pairs(BETA * R, third),
            "accuracy": over_seeds_and_pairs(right(R), third),
        }
    return found


def right(R: Array) -> Array:
    """100 where the preferred answer has the larger reward, else 0; NaN where R is."""
    return np.where(np.isnan(R), np.nan, np.where(R > 0, 100.0, 0.0))


# --- The factors ------------------------------------------------------------------------------------------------------


def weights_of_thirds(runs: Sequence[Mapping[str, Any]], thirds: Thirds) -> dict[str, dict[str, float]]:
    """Means over all visits of a third's pairs: alpha_D, beta, share selected, R when first and when last met."""
    third_of = by_id(thirds)
    rows: dict[str, list[Mapping[str, Any]]] = {third: [] for third in thirds}
    first: dict[str, list[float]] = {third: [] for third in thirds}
    last: dict[str, list[float]] = {third: [] for third in thirds}
    for run in runs:
        pairs = run["pairs"]
        starts = {pair["id"]: pair["R"] for pair in reversed(pairs)}
        for pair in pairs:
            rows[third_of[pair["id"]]].append(pair)
        for id, pair in last_met(run).items():
            last[third_of[id]].append(pair["R"])
            first[third_of[id]].append(starts[id])
    return {
        third: {
            "alpha_D": mean(row["alpha_D"] for row in rows[third]),
            "beta": mean(row["beta"] for row in rows[third]),
            "selected": mean(bool(row["selected"]) for row in rows[third]),
            "R_first": mean(first[third]),
            "R_last": mean(last[third]),
        }
        for third in thirds
    }


# --- The filter -------------------------------------------------------------------------------------------------------


def drop_rates(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Interval]]:
    """Shares of pairs that a filter dropped, in percent, for each third of the training on flipped pairs.

    "flipped" and "right" are the shares of those pairs, "difference" is the first minus the second.
    """
    by_seed = [_dropped(run) for run in runs]
    table = []
    for number in range(len(PARTS)):
        means = {kind: over_seeds([parts[number][kind] for parts in by_seed]) for kind in ("flipped", "right")}
        means["difference"] = means["flipped"] - means["right"]
        table.append({kind: interval_of(values) for kind, values in means.items()})
    return table


def _dropped(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """Of one cell, for each third of its training: kind of pair -> percent dropped."""
    flipped, steps = set(run["flipped"]), 1 + max(pair["step"] for pair in run["pairs"])
    dropped: list[dict[str, list[bool]]] = [{"flipped": [], "right": []} for _ in PARTS]
    for pair in run["pairs"]:
        kind = "flipped" if pair["id"] in flipped else "right"
        dropped[len(PARTS) * pair["step"] // steps][kind].append(not pair["selected"])
    return [{kind: 100 * mean(values) for kind, values in part.items()} for part in dropped]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN for no values."""
    found = list(values)
    return float(np.mean(found)) if found else float("nan")
