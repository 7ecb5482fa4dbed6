"""From the cells' files to figures with intervals: trade-offs, matched recall, and what happened to the pairs.

Recall falls as hallucination falls, so methods are compared along that trade-off. A method's points are its stops at
all its learning rates, each the mean over seeds. Intervals are 95 % bootstrap percentiles over scenes and seeds drawn
together, the same draw for every method, so that what is hard for all cancels in differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.core.statistics import Interval, interval, ratio
from playground.tinycoco.study.grid import DPO, METHODS, Cell

Array = NDArray[np.float64]
RESAMPLES = 2000
METRICS = ("response_level", "mention_level", "object_recall", "mean_words")
RESPONSE, RECALL = METRICS.index("response_level"), METRICS.index("object_recall")
RECALL_COST = 5.0  # points of recall that a learning rate may cost on the validation scenes
LEVELS = (2.0, 4.0, 6.0)  # points of recall below the SFT model's at which methods are compared


@dataclass(frozen=True)
class Draws:
    """How often each scene and each seed is drawn in every resample; row 0 is the data as they are."""

    scenes: Array  # [1 + RESAMPLES, scenes]
    seeds: Array  # [1 + RESAMPLES, seeds]

    @staticmethod
    def of(scenes: int, seeds: int, seed: int = 0) -> Draws:
        generator = np.random.default_rng(seed)

        def times(count: int) -> Array:
            drawn = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
            return np.concatenate([np.ones((1, count)), drawn])

        return Draws(times(scenes), times(seeds))


@dataclass(frozen=True)
class Point:
    """A method at one stop of one learning rate; values: every metric in every resample, [4, 1 + RESAMPLES]."""

    rate: float
    step: int
    work: float  # passes over a pair that it took, mean over seeds: one forward, two backward
    values: Array

    def of(self, metric: str) -> Interval:
        return _interval(self.values[METRICS.index(metric)])


@dataclass(frozen=True)
class Curve:
    """A method under one condition, and where it started."""

    method: str
    condition: str
    start: Point  # the SFT model
    points: Sequence[Point]
    chosen_rate: float | None  # by the validation scenes

    def at_recall(self, recall: Array) -> Array:
        """Response-level in every resample at these recalls, [1 + RESAMPLES]: linear between the points next in
        recall, NaN where the points do not reach that far."""
        points = (self.start, *self.points)
        recalls, responses = (np.stack([p.values[metric] for p in points], axis=1) for metric in (RECALL, RESPONSE))
        return np.array([_interpolate(*row) for row in zip(recalls, responses, recall)])

    @property
    def chosen(self) -> Point:
        """The last stop at the chosen learning rate."""
        return max((p for p in self.points if p.rate == self.chosen_rate), key=lambda point: point.step)


def _interpolate(recalls: Array, responses: Array, recall: float) -> float:
    order = np.argsort(recalls)
    return float(np.interp(recall, recalls[order], responses[order], left=np.nan, right=np.nan))


def _interval(values: Array) -> Interval:
    """Of row 0, with the percentiles of the others; undefined where a tenth of the resamples is."""
    if np.isnan(values[1:]).mean() > 0.1:
        return Interval(None, None, None)
    return interval(values[0], values[1:])


# --- The study's results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Finished cells by condition and method, rate, seed; what the SFT model says; which cells failed."""

    cells: Mapping[Cell, Mapping[str, Any]]
    sft: Mapping[str, Any]
    failed: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path, declared: Sequence[Cell]) -> Study:
        """Cells of the declaration that have a file."""
        found = {cell: folder / "cells" / f"{cell.name}.json" for cell in declared}
        cells = {cell: json.loads(path.read_text()) for cell, path in found.items() if path.is_file()}
        if not cells:
            raise FileNotFoundError(f"study {folder}: expected finished cells, found none; run the study first")
        failed = folder / "failed.json"
        sft = json.loads((folder / "cells/sft.json").read_text())
        return Study(cells, sft, json.loads(failed.read_text()) if failed.is_file() else {})

    @cached_property
    def draws(self) -> Draws:
        return Draws.of(len(self.sft["test"]["response_level"]), len(self.seeds))

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.cells})

    @property
    def diverged(self) -> list[str]:
        return [cell.name for cell, figures in self.cells.items() if figures["diverged"]]

    def runs(self, condition: str, method: str, rate: float) -> list[Mapping[str, Any]]:
        """The finished ones, a seed each."""
        cells = (Cell(condition, method, rate, seed) for seed in self.seeds)
        return [self.cells[cell] for cell in cells if cell in self.cells]

    def methods(self, condition: str) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.cells if cell.condition == condition))

    def curve(self, condition: str, method: str) -> Curve:
        """Of rates that every seed has finished."""
        rates = sorted({c.rate for c in self.cells if (c.condition, c.method) == (condition, method)})
        found = {rate: self.runs(condition, method, rate) for rate in rates}
        whole = {rate: runs for rate, runs in found.items() if len(runs) == len(self.seeds)}
        points = [
            self._point(rate, int(step), runs)
            for rate, runs in whole.items()
            for step in sorted(runs[0]["stops"], key=int)
        ]
        start = Point(0.0, 0, 0.0, self._values([self.sft["test"]] * len(self.seeds)))
        return Curve(method, condition, start, points, self._choose_rate(whole))

    def _point(self, rate: float, step: int, runs: Sequence[Mapping[str, Any]]) -> Point:
        work = float(np.mean([work_until(run["pairs"], step) for run in runs]))
        return Point(rate, step, work, self._values([run["stops"][str(step)]["test"] for run in runs]))

    def _values(self, scored: Sequence[Mapping[str, Any]]) -> Array:
        """[4, 1 + RESAMPLES]: ratios of sums over the drawn scenes and seeds."""
        rows = []
        for metric in METRICS:
            numbers = np.array([captions[metric] for captions in scored], dtype=np.float64)  # [seeds, scenes, 2]
            sums = np.einsum("bn,nsk,bs->kb", self.draws.seeds, numbers, self.draws.scenes, optimize=True)
            rows.append(ratio(*sums))
        return np.stack(rows)

    def _choose_rate(self, runs_of: Mapping[float, Sequence[Mapping[str, Any]]]) -> float | None:
        """The rate of the lowest response-level on validation scenes that costs at most RECALL_COST of recall there;
        the smallest rate where all cost more."""
        floor = plain_ratio([self.sft["validation"]], "object_recall") - RECALL_COST
        found = {}
        for rate, runs in runs_of.items():
            last = [last_stop(run)["validation"] for run in runs]
            if plain_ratio(last, "object_recall") >= floor:
                found[rate] = plain_ratio(last, "response_level")
        return min(found, key=found.__getitem__) if found else min(runs_of, default=None)


def last_stop(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's file says of its end."""
    return run["stops"][max(run["stops"], key=int)]


def plain_ratio(scored: Sequence[Mapping[str, Any]], metric: str) -> float:
    """A metric over all scenes of all these captions."""
    numbers = np.array([captions[metric] for captions in scored], dtype=np.float64)
    return float(numbers[..., 0].sum() / numbers[..., 1].sum())


def work_until(pairs: Sequence[Mapping[str, Any]], step: int) -> float:
    """Forward passes of all pairs of the first `step` steps and twice as much, backward, of the selected ones."""
    return sum(1 + 2 * bool(pair["selected"]) for pair in pairs if pair["step"] < step)


# --- Comparisons ------------------------------------------------------------------------------------------------------


def gap_at(ours: Curve, theirs: Curve, cost: float) -> Interval:
    """Response-level of ours less theirs where both have lost `cost` points of recall; below 0 ours is better."""
    recall = ours.start.values[RECALL] - cost
    return _interval(ours.at_recall(recall) - theirs.at_recall(recall))


def mean_gap(ours: Curve, theirs: Curve) -> Interval:
    """Response-level of ours less theirs at equal recall, averaged over the points of both.

    At each point of one the other is interpolated; points that it does not reach are left out, in each resample. Both
    ways, because interpolating along a noisy convex curve overstates it, which would favour the side that is not.
    """
    return _interval(_mean_gaps(ours, theirs))


def pooled_gap(curves: Sequence[tuple[Curve, Curve]]) -> Interval:
    """`mean_gap` averaged over conditions, (ours, theirs) of each: what all of them say together."""
    return _interval(np.mean([_mean_gaps(ours, theirs) for ours, theirs in curves], axis=0))


def one_way_gap(ours: Sequence[Point], theirs: Curve, than: Sequence[Point] | None = None) -> Interval:
    """Of a few points to a whole curve at their recall; with `than`, less the same of those points."""
    gaps = _mean_over_points(_to_curve(ours, theirs))
    return _interval(gaps if than is None else gaps - _mean_over_points(_to_curve(than, theirs)))


def _mean_gaps(ours: Curve, theirs: Curve) -> Array:
    """In every resample, [1 + RESAMPLES]."""
    return _mean_over_points([*_to_curve(ours.points, theirs), *(-gap for gap in _to_curve(theirs.points, ours))])


def _to_curve(points: Sequence[Point], curve: Curve) -> list[Array]:
    """Response-level of each point less the curve's at its recall, NaN where that does not reach: [1 + RESAMPLES]."""
    return [point.values[RESPONSE] - curve.at_recall(point.values[RECALL]) for point in points]


def _mean_over_points(gaps: Sequence[Array]) -> Array:
    """Of those that are defined; NaN in resamples where none is."""
    stacked = np.stack(gaps)
    defined = ~np.isnan(stacked)
    return np.where(defined.any(axis=0), np.nansum(stacked, axis=0) / np.maximum(defined.sum(axis=0), 1), np.nan)


def at_equal_work(ours: Curve, theirs: Curve) -> Interval:
    """`mean_gap` to their curve as it was when each learning rate had worked as much as ours in all."""
    return mean_gap(ours, cut_at(theirs, max(point.work for point in ours.points)))


def cut_at(curve: Curve, work: float) -> Curve:
    """The stops of each learning rate until so much work; the last lies on the line between two stops."""
    kept = []
    for rate in sorted({point.rate for point in curve.points}):
        before = curve.start
        for point in sorted((p for p in curve.points if p.rate == rate), key=lambda p: p.work):
            if point.work > work:
                part = (work - before.work) / (point.work - before.work)
                kept.append(replace(point, work=work, values=before.values + part * (point.values - before.values)))
                break
            kept.append(point)
            before = point
    return replace(curve, points=kept)


def verdict(gap: Interval) -> str:
    """What an interval of a difference in hallucination allows to say."""
    if gap.low is None or gap.high is None:
        return "not comparable"
    return "clearly better" if gap.high < 0 else "clearly worse" if gap.low > 0 else "no clear difference"


# --- What happened to the pairs ---------------------------------------------------------------------------------------


def by_third(study: Study, condition: str, method: str, rate: float, figure: str) -> dict[str, dict[int, list[float]]]:
    """probe set, for instance "held_out_easy" -> step -> the figure of each seed: "margin", "accuracy" or "loss"."""
    table: dict[str, dict[int, list[float]]] = {}
    for run in study.runs(condition, method, rate):
        for step, stop in run["stops"].items():
            for name, values in stop["probes"].items():
                table.setdefault(name, {}).setdefault(int(step), []).append(values[figure])
    return table


def weights_of_thirds(
    study: Study, condition: str, method: str, rate: float, thirds: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """third -> means over all its pairs' visits: alpha_D, beta, share selected, R when first and when last met."""
    third_of = {id: third for third, ids in thirds.items() for id in ids}
    rows: dict[str, list[Mapping[str, Any]]] = {third: [] for third in thirds}
    first: dict[str, list[float]] = {third: [] for third in thirds}
    last: dict[str, list[float]] = {third: [] for third in thirds}
    for run in study.runs(condition, method, rate):
        pairs = run["pairs"]
        ends = {pair["id"]: pair["R"] for pair in pairs}
        starts = {pair["id"]: pair["R"] for pair in reversed(pairs)}
        for pair in pairs:
            rows[third_of[pair["id"]]].append(pair)
        for id, R in ends.items():
            last[third_of[id]].append(R)
            first[third_of[id]].append(starts[id])
    return {
        third: {
            "alpha_D": _mean(row["alpha_D"] for row in rows[third]),
            "beta": _mean(row["beta"] for row in rows[third]),
            "selected": _mean(bool(row["selected"]) for row in rows[third]),
            "R_first": _mean(first[third]),
            "R_last": _mean(last[third]),
        }
        for third in thirds
    }


def flips_dropped(study: Study, method: str, rate: float) -> list[dict[str, float]]:
    """Each third of the training, flipped condition: the share of flipped pairs among all, and among those dropped."""
    parts: list[dict[str, list[bool]]] = [{"all": [], "dropped": []} for _ in range(3)]
    for run in study.runs("flipped", method, rate):
        flipped, steps = set(run["flipped"]), 1 + max(pair["step"] for pair in run["pairs"])
        for pair in run["pairs"]:
            part = parts[3 * pair["step"] // steps]
            part["all"].append(pair["id"] in flipped)
            if not pair["selected"]:
                part["dropped"].append(pair["id"] in flipped)
    return [{name: _mean(values) for name, values in part.items()} for part in parts]


def by_delta(study: Study, condition: str, method: str, rate: float, parts: int = 10) -> dict[str, list[float]]:
    """Equal parts of all trained pairs by delta, hardest first: means of "delta", "alpha_D" and "R" when last met.

    R is divided by its mean over the pairs of its run, because a method that moves less has every R smaller.
    """
    found = []
    for run in study.runs(condition, method, rate):
        last = {pair["id"]: pair for pair in run["pairs"]}
        mean = _mean(pair["R"] for pair in last.values())
        found += [(pair["delta"], pair["alpha_D"], pair["R"] / mean) for pair in last.values()]
    means = [part.mean(axis=0) for part in np.array_split(np.array(sorted(found)), parts)]
    return {name: [float(mean[n]) for mean in means] for n, name in enumerate(("delta", "alpha_D", "R"))}


def alpha_M(study: Study, condition: str, method: str, rate: float) -> tuple[list[int], list[float], list[float]]:
    """(step, mean alpha_M, mean R_bar) over seeds."""
    logs = [run["log"] for run in study.runs(condition, method, rate)]
    steps = [row["step"] for row in logs[0]]
    alphas, bars = ([_mean(row[key] for row in rows) for rows in zip(*logs)] for key in ("dama/alpha_M", "dama/R_bar"))
    return steps, alphas, bars


def _mean(values: Any) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def ablations(study: Study) -> list[str]:
    """Methods of the clean condition but DPO, in the order of the declaration."""
    return [method for method in METHODS if method in study.methods("clean") and method != DPO]
