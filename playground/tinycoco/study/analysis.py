"""From the cells' files to figures with intervals: trade-offs, and differences at equal recall.

Recall falls as hallucination falls, so methods are compared along that trade-off. A method's points are its stops at
all its learning rates, each the mean over seeds. Intervals are 95 % bootstrap percentiles over scenes and seeds, which
are resampled together, alike for both methods of a comparison, so that what is hard for both cancels in differences.
Where the best of many methods is wanted, the intervals of all of them hold at once (`simultaneous`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.core import curves
from eval.core.curves import interval_of
from eval.core.statistics import LEVEL, Array, Interval, ratio
from playground.tinycoco.study.cell import ABILITIES, SCORED, read_finished, read_object
from playground.tinycoco.study.grid import Cell

RESAMPLES = 2000
RECALL_COST = 5.0  # points of recall that a learning rate may cost on the validation scenes
RESPONSE, RECALL = "response_level", "object_recall"
FEWEST_SEEDS = 3  # for a verdict: of fewer, intervals do not show how much trainings differ
BETTER, WORSE, NO_DIFFERENCE, UNDEFINED = "clearly better", "clearly worse", "no clear difference", "not comparable"
TOO_FEW = "too few seeds"
NO_INTERVAL = Interval(None, None, None)


@cache
def resample_weights(kind: str, count: int) -> Array:
    """Weight of each of `count` items in every resample, [1 + RESAMPLES, count]; row 0 is the data as they are.

    kind: what the items are, such as "scenes" or "seeds"; kinds are resampled independently of each other. Of n items,
    n - 1 are sampled and scaled up: resamples of few seeds vary as much as such means do (Rao and Wu 1988). A single
    item always counts once.
    """
    if count == 1:
        return np.ones((1 + RESAMPLES, 1))
    generator = np.random.default_rng([zlib.crc32(kind.encode()), count])
    times = generator.multinomial(count - 1, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count)), times * count / (count - 1)])


@dataclass(frozen=True)
class Point:
    """A method at one stop of one learning rate; values: metric -> its value in every resample, [1 + RESAMPLES].

    Abilities are among the values of the start and of last stops only.
    """

    rate: float
    step: int
    work: float  # token passes that it took, mean over seeds: one forward, two backward
    values: Mapping[str, Array]

    def of(self, metric: str) -> Interval:
        """A metric's value with its 95 % interval over the resamples."""
        return interval_of(self.values[metric])


@dataclass(frozen=True)
class Curve:
    """A method under one condition, and where it started."""

    method: str
    condition: str
    seeds: tuple[int, ...]
    start: Point  # the model before alignment
    points: Sequence[Point]
    chosen_rate: float | None  # by the validation scenes

    def against_recall(self, metric: str) -> curves.Curve:
        """A metric against recall, the start first, of the points that have the metric."""
        points = [p for p in (self.start, *self.points) if metric in p.values]
        recalls, values = (np.stack([p.values[name] for p in points]) for name in (RECALL, metric))
        return curves.Curve(recalls, values, with_start=True)

    @property
    def chosen(self) -> Point:
        """The last stop at the chosen learning rate."""
        return max((p for p in self.points if p.rate == self.chosen_rate), key=lambda point: point.step)

    @property
    def work(self) -> float:
        """That of the point that took most."""
        return max(point.work for point in self.points)


# --- The study's results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Finished cells of those declared, what the model before alignment scores, which cells failed."""

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
            raise no_cells(folder)
        failed = folder / "failed.json"
        listed = read_object(failed) if failed.is_file() else {}
        return Study(cells, declared, read_object(folder / "cells/sft.json"), listed)

    @cached_property
    def _seeds(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(condition, method) -> seeds with every declared cell, in the order of the declaration."""
        unfinished = {(c.condition, c.method, c.seed) for c in self.declared if c not in self.cells}
        found: dict[tuple[str, str], dict[int, None]] = {}
        for cell in self.declared:
            of_method = found.setdefault((cell.condition, cell.method), {})
            if (cell.condition, cell.method, cell.seed) not in unfinished:
                of_method[cell.seed] = None
        return {name: tuple(sorted(seeds)) for name, seeds in found.items()}

    def seeds_of(self, condition: str, *methods: str) -> tuple[int, ...]:
        """Seeds for which every one of these methods has finished all its declared learning rates."""
        common = set.intersection(*(set(self._seeds.get((condition, method), ())) for method in methods))
        return tuple(sorted(common))

    def rates_of(self, condition: str, method: str) -> list[float]:
        """Declared learning rates."""
        return sorted({c.rate for c in self.declared if (c.condition, c.method) == (condition, method)})

    def methods(self, condition: str) -> list[str]:
        """Methods with a whole seed under a condition, in the order of the declaration."""
        names = dict.fromkeys(cell.method for cell in self.declared if cell.condition == condition)
        return [method for method in names if self.seeds_of(condition, method)]

    @property
    def diverged(self) -> list[str]:
        """Names of cells with a loss, or a reward gap of a held-out pair, that is no number."""
        return [cell.name for cell, run in self.cells.items() if not np.isfinite(_losses_and_gaps(run)).all()]

    def runs(self, condition: str, method: str, rate: float, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
        """The finished cells of these seeds, in their order."""
        return [self.cells[Cell(condition, method, rate, seed)] for seed in seeds]

    def curve(self, condition: str, method: str, seeds: Sequence[int] | None = None) -> Curve:
        """Of these seeds, all of which must be whole; by default of all that are."""
        seeds = self.seeds_of(condition, method) if seeds is None else tuple(seeds)
        runs_of = {rate: self.runs(condition, method, rate, seeds) for rate in self.rates_of(condition, method)}
        points = [
            self._point(rate, step, runs)
            for rate, runs in runs_of.items()
            for step in sorted(map(int, runs[0]["stops"]))
        ]
        start = Point(0.0, 0, 0.0, self._values([self.sft] * len(seeds)))
        return Curve(method, condition, seeds, start, points, self._choose_rate(runs_of))

    def _point(self, rate: float, step: int, runs: Sequence[Mapping[str, Any]]) -> Point:
        work = float(np.mean([work_until(run, step) for run in runs]))
        return Point(rate, step, work, self._values([run["stops"][str(step)] for run in runs]))

    def _values(self, looks: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
        """Metric -> [1 + RESAMPLES]: of captions, and of abilities where they were measured."""
        found = {metric: self._resampled([look["test"][metric] for look in looks]) for metric in SCORED}
        if all("ability" in look for look in looks):
            found |= {metric: self._resampled([look["ability"][metric] for look in looks]) for metric in ABILITIES}
        return found

    def _resampled(self, parts: Sequence[Sequence[Sequence[float]]]) -> Array:
        """Ratios of sums over the resampled seeds and scenes, [1 + RESAMPLES]; parts: [seeds, first scenes, 2]."""
        numbers = np.asarray(parts, dtype=np.float64)
        of_seeds = resample_weights("seeds", len(numbers))
        of_scenes = resample_weights("scenes", len(self.sft["test"][RESPONSE]))[:, : numbers.shape[1]]
        return ratio(*np.einsum("bn,nsk,bs->kb", of_seeds, numbers, of_scenes, optimize=True))

    def _choose_rate(self, runs_of: Mapping[float, Sequence[Mapping[str, Any]]]) -> float | None:
        """Learning rate of the lowest response-level on validation scenes among those that cost little recall.

        At most RECALL_COST of recall may be lost there; the smallest rate where all cost more.
        """
        floor = plain_ratio([self.sft["validation"]], RECALL) - RECALL_COST
        found = {}
        for rate, runs in runs_of.items():
            last = [last_stop(run)["validation"] for run in runs]
            if plain_ratio(last, RECALL) >= floor:
                found[rate] = plain_ratio(last, RESPONSE)
        return min(found, key=found.__getitem__) if found else min(runs_of, default=None)


def read_cell(folder: Path, cell: Cell, fingerprint: str) -> dict[str, Any] | None:
    """What folder/NAME.json holds; None where it is missing or of other inputs."""
    return read_finished(folder / f"{cell.name}.json", fingerprint)


def no_cells(folder: Path) -> FileNotFoundError:
    """What is raised where a page is asked for and no cell is finished."""
    return FileNotFoundError(f"study {folder}: expected finished cells, found none; run the study first")


def last_stop(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's file holds of its end."""
    return run["stops"][max(run["stops"], key=int)]


def _losses_and_gaps(run: Mapping[str, Any]) -> list[float]:
    gaps = [R for gaps in last_stop(run)["probes"].values() for R in gaps]
    return [*gaps, *(entry["loss"] for entry in run["log"])]


def plain_ratio(scored: Sequence[Mapping[str, Any]], metric: str) -> float:
    """A metric over all scenes of all these captions or abilities; NaN where nothing was counted."""
    numbers = np.array([parts[metric] for parts in scored], dtype=np.float64)
    return float(ratio(numbers[..., 0].sum(), numbers[..., 1].sum()))


def work_until(run: Mapping[str, Any], step: int) -> float:
    """Token passes of the first `step` steps: forward of all pairs, and twice as much, backward, of selected ones."""
    return run["tokens"] * sum(1 + 2 * bool(pair["selected"]) for pair in run["pairs"] if pair["step"] < step)


# --- Comparisons ------------------------------------------------------------------------------------------------------


def gap(ours: Curve, theirs: Curve, metric: str = RESPONSE) -> Array:
    """A metric of ours minus theirs at equal recall, averaged over the points of both: [1 + RESAMPLES].

    NaN unless each reaches a point of the other: one way alone leans to a side.
    """
    return curves.mean_gaps(ours.against_recall(metric), theirs.against_recall(metric), both_ways=True)


def gap_at_equal_work(ours: Curve, theirs: Curve) -> Array:
    """`gap` of both curves as they were when each learning rate had worked as much as the cheaper method in all."""
    work = min(ours.work, theirs.work)
    return gap(cut_at(ours, work), cut_at(theirs, work))


def cut_at(curve: Curve, work: float) -> Curve:
    """The stops of each learning rate until so much work; the last lies on the line between two stops."""
    cut = []
    for rate in sorted({point.rate for point in curve.points}):
        before = curve.start
        for point in sorted((p for p in curve.points if p.rate == rate), key=lambda p: p.work):
            if point.work > work:
                part = (work - before.work) / (point.work - before.work)
                cut.append(replace(point, work=work, values=_between(before, point, part)))
                break
            cut.append(point)
            before = point
    return replace(curve, points=cut)


def _between(before: Point, after: Point, part: float) -> dict[str, Array]:
    """Metrics of the captions on the line between two points."""
    return {m: before.values[m] + part * (after.values[m] - before.values[m]) for m in SCORED}


def simultaneous(gaps: Mapping[str, Array]) -> dict[str, Interval]:
    """Intervals of a family of gaps, [1 + RESAMPLES] each, that hold for all of them at once.

    Each reaches q standard errors to both sides, where q is the 95 % quantile of the largest |deviation| / standard
    error among the family in a resample (max-statistic bootstrap). Undefined gaps are no part of the family.
    """
    defined = {name: values for name, values in gaps.items() if interval_of(values).value is not None}
    if not defined:
        return dict.fromkeys(gaps, NO_INTERVAL)
    table = np.stack(list(defined.values()))
    deviations, errors = abs(table[:, 1:] - table[:, :1]), np.nanstd(table[:, 1:], axis=1)
    relative = deviations[errors > 0] / errors[errors > 0, None]
    known = relative[:, ~np.isnan(relative).all(axis=0)]
    quantile = np.quantile(np.nanmax(known, axis=0), LEVEL) if known.size else 0.0
    centers = zip(defined, table[:, 0], quantile * errors)
    found = {name: Interval(float(v), float(v - half), float(v + half)) for name, v, half in centers}
    return {name: found.get(name, NO_INTERVAL) for name in gaps}


def verdict(difference: Interval, higher: bool = False) -> str:
    """What an interval allows to conclude of a difference; higher: whether more is better, as of an ability."""
    if difference.low is None or difference.high is None:
        return UNDEFINED
    above, below = (BETTER, WORSE) if higher else (WORSE, BETTER)
    return below if difference.high < 0 else above if difference.low > 0 else NO_DIFFERENCE
