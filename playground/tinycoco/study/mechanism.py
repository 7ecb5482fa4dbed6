"""What happened to the pairs: over- and underfitting by hardness, what DAMA's factors did, what its filter dropped.

Trained pairs are those of the trainer's pair log, each as it was when last met, before its last update; held-out pairs
are the probes, the same in every cell. Intervals are 95 % bootstrap percentiles over seeds, as in `analysis`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.core.statistics import Interval
from playground.tinycoco.study.analysis import RESAMPLES, Array, Study, interval_of
from playground.tinycoco.study.data import THIRDS
from playground.tinycoco.study.grid import BETA, DPO, RATES

Thirds = Mapping[str, Sequence[str]]
"""The ids of all pairs by third, as `Pool.thirds`."""


def last_met(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Id -> the pair's last line in the pair log."""
    return {pair["id"]: pair for pair in run["pairs"]}


def by_id(thirds: Thirds) -> dict[str, str]:
    """Id -> its third."""
    return {id: third for third, ids in thirds.items() for id in ids}


def over_seeds(study: Study, values: Sequence[float]) -> Array:
    """The mean of one figure by seed in every resample, [1 + RESAMPLES]."""
    return study.draws.seeds @ np.asarray(values, dtype=np.float64) / len(values)


# --- Over- and underfitting -------------------------------------------------------------------------------------------


def held_out(study: Study, condition: str, method: str, rate: float, figure: str) -> dict[str, dict[int, list[float]]]:
    """Probes' "margin", "accuracy" or "loss": third -> step -> by seed."""
    table: dict[str, dict[int, list[float]]] = {third: {} for third in THIRDS}
    for run in study.runs(condition, method, rate):
        for step, stop in run["stops"].items():
            for third in THIRDS:
                table[third].setdefault(int(step), []).append(stop["probes"][f"held_out_{third}"][figure])
    return table


def held_out_at_end(study: Study, condition: str, method: str, rate: float, figure: str) -> dict[str, list[float]]:
    """The same at the last stop: third -> by seed."""
    table = held_out(study, condition, method, rate, figure)
    return {third: steps[max(steps)] if steps else [] for third, steps in table.items()}


def trained(
    study: Study, condition: str, method: str, rate: float, thirds: Thirds
) -> dict[str, dict[str, list[float]]]:
    """Trained pairs' "margin" and "accuracy", as the trainer's evaluation defines them: third -> name -> by seed."""
    third_of = by_id(thirds)
    table: dict[str, dict[str, list[float]]] = {third: {"margin": [], "accuracy": []} for third in thirds}
    for run in study.runs(condition, method, rate):
        gaps: dict[str, list[float]] = {third: [] for third in thirds}
        for id, pair in last_met(run).items():
            gaps[third_of[id]].append(pair["R"])
        for third, found in gaps.items():
            table[third]["margin"].append(BETA * mean(found))
            table[third]["accuracy"].append(mean(R > 0 for R in found))
    return table


def overfitting(
    study: Study, seen: Mapping[str, Sequence[float]], unseen: Mapping[str, Sequence[float]], probes: int
) -> dict[str, Array]:
    """Accuracy on trained minus held-out pairs, in points: third -> every resample; both given by third and seed.

    Seeds do not show what the choice of the `probes` held-out pairs of a third adds, for it is the same in all: a
    binomial draw does.
    """
    generator = np.random.default_rng(0)
    found = {}
    for third in seen:
        gaps = over_seeds(study, [100 * (a - b) for a, b in zip(seen[third], unseen[third])])
        share = mean(unseen[third])
        noise = 100 * (generator.binomial(probes, share, size=RESAMPLES) / probes - share)
        found[third] = gaps - np.concatenate([[0.0], noise])
    return found


def easy_over_hard(study: Study, condition: str, method: str, rate: float) -> dict[int, float]:
    """Held-out margin of the easy third over the hard third's, by seed, where both are positive.

    A ratio, because a method that moves less at the same learning rate has all margins smaller.
    """
    margins = held_out_at_end(study, condition, method, rate, "margin")
    by_seed = zip(study.seeds_of(condition, method, rate), margins["easy"], margins["hard"])
    return {seed: easy / hard for seed, easy, hard in by_seed if easy > 0 and hard > 0}


def more_even(study: Study, condition: str, method: str) -> tuple[int, int]:
    """In how many runs `easy_over_hard` is less than DPO's at the same rate and seed, and of how many."""
    less = total = 0
    for rate in RATES:
        ours, theirs = (easy_over_hard(study, condition, name, rate) for name in (method, DPO))
        both = ours.keys() & theirs.keys()
        less += sum(ours[seed] < theirs[seed] for seed in both)
        total += len(both)
    return less, total


# --- The factors ------------------------------------------------------------------------------------------------------


def weights_of_thirds(
    study: Study, condition: str, method: str, rate: float, thirds: Thirds
) -> dict[str, dict[str, float]]:
    """Means over all visits of a third's pairs: alpha_D, beta, share selected, R when first and when last met."""
    third_of = by_id(thirds)
    rows: dict[str, list[Mapping[str, Any]]] = {third: [] for third in thirds}
    first: dict[str, list[float]] = {third: [] for third in thirds}
    last: dict[str, list[float]] = {third: [] for third in thirds}
    for run in study.runs(condition, method, rate):
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


def spread_of_alpha_D(study: Study, condition: str, method: str, rate: float) -> float:
    """Its standard deviation over all pairs met: how strongly delta tells pairs apart."""
    return float(np.std([pair["alpha_D"] for run in study.runs(condition, method, rate) for pair in run["pairs"]]))


def by_delta(study: Study, condition: str, method: str, rate: float, parts: int = 10) -> dict[str, list[float]]:
    """Equal parts of all trained pairs by delta, hardest first: means of "delta", "alpha_D" and "R" when last met.

    R is divided by its mean over the pairs of its run, because a method that moves less has every R smaller.
    """
    found = []
    for run in study.runs(condition, method, rate):
        pairs = last_met(run).values()
        whole = mean(pair["R"] for pair in pairs)
        found += [(pair["delta"], pair["alpha_D"], pair["R"] / whole) for pair in pairs]
    means = [part.mean(axis=0) for part in np.array_split(np.array(sorted(found)), parts)]
    return {name: [float(row[n]) for row in means] for n, name in enumerate(("delta", "alpha_D", "R"))}


def alpha_M(study: Study, condition: str, method: str, rate: float) -> tuple[list[int], list[float], list[float]]:
    """(step, mean alpha_M, mean R_bar) over seeds."""
    logs = [run["log"] for run in study.runs(condition, method, rate)]
    steps = [row["step"] for row in logs[0]]
    alphas, bars = ([mean(row[key] for row in rows) for rows in zip(*logs)] for key in ("dama/alpha_M", "dama/R_bar"))
    return steps, alphas, bars


# --- The filter -------------------------------------------------------------------------------------------------------


def drop_rates(study: Study, method: str, rate: float) -> list[dict[str, Interval]]:
    """Shares of pairs that the filter dropped, in percent, for each third of the training on flipped pairs.

    "flipped" and "right" are the shares of those pairs, "difference" is the first minus the second.
    """
    parts: list[dict[str, list[float]]] = [{"flipped": [], "right": []} for _ in range(3)]
    for run in study.runs("flipped", method, rate):
        flipped, steps = set(run["flipped"]), 1 + max(pair["step"] for pair in run["pairs"])
        dropped: list[dict[str, list[bool]]] = [{"flipped": [], "right": []} for _ in range(3)]
        for pair in run["pairs"]:
            kind = "flipped" if pair["id"] in flipped else "right"
            dropped[3 * pair["step"] // steps][kind].append(not pair["selected"])
        for part, found in zip(parts, dropped):
            for kind, values in found.items():
                part[kind].append(100 * mean(values))
    table = []
    for part in parts:
        means = {kind: over_seeds(study, values) for kind, values in part.items()}
        means["difference"] = means["flipped"] - means["right"]
        table.append({kind: interval_of(values) for kind, values in means.items()})
    return table


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN for no values."""
    found = list(values)
    return float(np.mean(found)) if found else float("nan")
