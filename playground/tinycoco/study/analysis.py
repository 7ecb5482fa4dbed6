"""From the cells' files to figures with intervals: trade-offs, and differences at matched recall.

Recall falls as hallucination falls, so methods are compared along that trade-off. A method's points are its stops at
all its learning rates, each the mean over seeds. Intervals are 95 % bootstrap percentiles over scenes and seeds drawn
together, the same draw for every method, so that what is hard for all cancels in differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.core import curves
from eval.core.curves import interval_of
from eval.core.statistics import Array, Interval, ratio
from playground.tinycoco.study.grid import DAMA, DPO, METHODS, Cell

RESAMPLES = 2000
METRICS = ("response_level", "mention_level", "object_recall", "mean_words")
RESPONSE, RECALL = METRICS.index("response_level"), METRICS.index("object_recall")
RECALL_COST = 5.0  # points of recall that a learning rate may cost on the validation scenes
LEVELS = (2.0, 4.0)  # points of recall below the SFT model's at which methods are compared
SHOWN_LEVEL = 3.0  # where one is enough


@dataclass(frozen=True)
class Draws:
    """How much each scene and each seed counts in every resample; row 0 is the data as they are.

    Of n, n - 1 are drawn and scaled up: resamples of few seeds vary as much as such means do (Rao and Wu 1988).
    """

    scenes: Array  # [1 + RESAMPLES, scenes]
    seeds: Array  # [1 + RESAMPLES, seeds]

    @staticmethod
    def of(scenes: int, seeds: int, seed: int = 0) -> Draws:
        """Resample `scenes` and `seeds`; a single one of either always counts once."""
        generator = np.random.default_rng(seed)

        def weights(count: int) -> Array:
            if count == 1:
                return np.ones((1 + RESAMPLES, 1))
            drawn = generator.multinomial(count - 1, np.full(count, 1 / count), size=RESAMPLES)
            return np.concatenate([np.ones((1, count)), drawn * count / (count - 1)])

        return Draws(weights(scenes), weights(seeds))


@dataclass(frozen=True)
class Point:
    """A method at one stop of one learning rate; values: every metric in every resample, [4, 1 + RESAMPLES]."""

    rate: float
    step: int
    work: float  # passes over a pair that it took, mean over seeds: one forward, two backward
    values: Array

    def of(self, metric: str) -> Interval:
        """A metric's value with its 95 % interval over the resamples."""
        return interval_of(self.values[METRICS.index(metric)])


@dataclass(frozen=True)
class Curve:
    """A method under one condition, and where it started."""

    method: str
    condition: str
    start: Point  # the SFT model
    points: Sequence[Point]
    chosen_rate: float | None  # by the validation scenes

    @cached_property
    def trade_off(self) -> curves.Curve:
        """Response-level against recall, the start first."""
        points = (self.start, *self.points)
        recalls, responses = (np.stack([p.values[metric] for p in points]) for metric in (RECALL, RESPONSE))
        return curves.Curve(recalls, responses, with_start=True)

    def at_recall(self, recall: Array) -> Array:
        """Response-level in every resample at these recalls, [1 + RESAMPLES].

        Linear between the points next in recall; NaN where the points do not reach that far.
        """
        return self.trade_off.at(recall)

    def response_at(self, cost: float) -> Interval:
        """Response-level where so many points of recall are lost."""
        return interval_of(self.at_recall(self.start.values[RECALL] - cost))

    def at_rate(self, rate: float) -> Curve:
        """With the stops of one learning rate alone."""
        return replace(self, points=[point for point in self.points if point.rate == rate])

    @property
    def chosen(self) -> Point:
        """The last stop at the chosen learning rate."""
        return max((p for p in self.points if p.rate == self.chosen_rate), key=lambda point: point.step)


# --- The study's results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Finished cells of those declared, what the SFT model says, which cells failed."""

    cells: Mapping[Cell, Mapping[str, Any]]
    declared: Sequence[Cell]
    sft: Mapping[str, Any]
    failed: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path, declared: Sequence[Cell], fingerprint: Callable[[Cell], str]) -> Study:
        """Of cells whose file has the fingerprint: what an earlier version left is not read."""
        read = ((cell, read_cell(folder / "cells", cell, fingerprint(cell))) for cell in declared)
        cells = {cell: figures for cell, figures in read if figures is not None}
        if not cells:
            raise FileNotFoundError(f"study {folder}: expected finished cells, found none; run the study first")
        failed = folder / "failed.json"
        sft = json.loads((folder / "cells/sft.json").read_text())
        return Study(cells, declared, sft, json.loads(failed.read_text()) if failed.is_file() else {})

    @cached_property
    def draws(self) -> Draws:
        """The resamples that all comparisons share."""
        return Draws.of(len(self.sft["test"]["response_level"]), len(self.seeds))

    @cached_property
    def seeds(self) -> list[int]:
        """Those that have every declared cell of DPO and DAMA, which are compared seed by seed."""
        lacking = {cell.seed for cell in self.declared if cell.method in (DPO, DAMA) and cell not in self.cells}
        whole = sorted({cell.seed for cell in self.cells} - lacking)
        if not whole:
            raise ValueError(
                f"study: expected a seed with every cell of {DPO} and {DAMA}, got none; {len(self.cells)} of "
                f"{len(self.declared)} cells are finished, {len(self.failed)} failed: run it again"
            )
        return whole

    @property
    def diverged(self) -> list[str]:
        """Names of cells whose held-out pairs end with a loss or reward that is no number."""
        ends = {cell.name: last_stop(run)["probes"].values() for cell, run in self.cells.items()}
        return [name for name, probes in ends.items() if not np.isfinite([list(p.values()) for p in probes]).all()]

    def runs(self, condition: str, method: str, rate: float) -> list[Mapping[str, Any]]:
        """The finished ones, a seed each."""
        return [self.cells[Cell(condition, method, rate, s)] for s in self.seeds_of(condition, method, rate)]

    def seeds_of(self, condition: str, method: str, rate: float) -> list[int]:
        """Of `runs`, in their order."""
        return [seed for seed in self.seeds if Cell(condition, method, rate, seed) in self.cells]

    def methods(self, condition: str) -> list[str]:
        """Methods with finished cells under a condition, in the order of the cells."""
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
        """Learning rate of the lowest response-level on validation scenes among those that cost little recall.

        At most RECALL_COST of recall may be lost there; the smallest rate where all cost more.
        """
        floor = plain_ratio([self.sft["validation"]], "object_recall") - RECALL_COST
        found = {}
        for rate, runs in runs_of.items():
            last = [last_stop(run)["validation"] for run in runs]
            if plain_ratio(last, "object_recall") >= floor:
                found[rate] = plain_ratio(last, "response_level")
        return min(found, key=found.__getitem__) if found else min(runs_of, default=None)


def read_cell(folder: Path, cell: Cell, fingerprint: str) -> dict[str, Any] | None:
    """What folder/NAME.json holds; None where it is missing or of other inputs."""
    path = folder / f"{cell.name}.json"
    figures = json.loads(path.read_text()) if path.is_file() else {"fingerprint": None}
    return figures if figures["fingerprint"] == fingerprint else None


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
    return interval_of(ours.at_recall(recall) - theirs.at_recall(recall))


def mean_gap(ours: Curve, theirs: Curve) -> Interval:
    """Response-level of ours minus theirs at equal recall, averaged over the points of both (eval.core.curves)."""
    return interval_of(curves.mean_gaps(ours.trade_off, theirs.trade_off))


def pooled_gap(pairs: Sequence[tuple[Curve, Curve]]) -> Interval:
    """`mean_gap` averaged over conditions, (ours, theirs) of each: what all of them say together."""
    gaps = [curves.mean_gaps(ours.trade_off, theirs.trade_off) for ours, theirs in pairs]
    return interval_of(np.mean(gaps, axis=0))


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


def ablations(study: Study) -> list[str]:
    """Methods of the clean condition but DPO, in the order of the declaration."""
    return [method for method in METHODS if method in study.methods("clean") and method != DPO]
