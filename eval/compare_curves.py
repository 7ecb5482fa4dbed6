"""Runs of several checkpoints, compared at equal recall or coverage: what `eval.compare --curve` adds.

Error rates fall as a model says less, so that one checkpoint of each run may only differ in how much it says. Here a
run is a curve through its checkpoints, error against coverage, and runs are compared where they say as much
(eval.core.curves).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dama.errors import error_list
from eval import benchmarks
from eval.core.benchmark import Benchmark, TradeOff
from eval.core.curves import Curve, interval_of, mean_gaps, points_compared
from eval.core.metrics import Metric, image_of, resampled
from eval.core.scores import aligned, cell
from eval.core.statistics import Array, Interval
from eval.results import Results, read_all, results_file, validate_comparable
from eval.wording import FEW_IMAGES, bounds, count_notes, made_by, signed, verdict

LENGTH = "mean_words"  # shown beside the coverage where the benchmark has it


class Gap(NamedTuple):
    """A run's error minus the first's at equal coverage, and how many points of it and of the first were compared."""

    difference: Interval
    points: tuple[int, int]


@dataclass(frozen=True)
class Run:
    """A run and its checkpoints; values: of each checkpoint, metric -> [1 + RESAMPLES]."""

    name: str
    checkpoints: tuple[Results, ...]
    values: tuple[dict[str, Array], ...]


@dataclass(frozen=True)
class CurveComparison:
    """Runs of one benchmark, the first being the base. start: the model that all started from, if it is known."""

    runs: tuple[Run, ...]
    start: Run | None

    @property
    def first(self) -> Results:
        """The first result, which says how all were made."""
        return self.runs[0].checkpoints[0]

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark's description."""
        return self.first.benchmark

    @property
    def trade_off(self) -> TradeOff:
        """The metrics that are compared, and the coverage at which they are."""
        assert self.benchmark.trade_off is not None  # checked when the results were read
        return self.benchmark.trade_off

    @property
    def coverage(self) -> Metric:
        """The metric at which the runs are compared."""
        return self.benchmark.metric(self.trade_off.coverage)

    @property
    def _coverage_title(self) -> str:
        return self.coverage.title.removesuffix(" %")

    def gap(self, run: Run, metric: str) -> Gap:
        """Compare a run with the first."""
        ours, theirs = (self._curve(each, metric) for each in (run, self.runs[0]))
        return Gap(interval_of(mean_gaps(ours, theirs)), points_compared(ours, theirs))

    def _curve(self, run: Run, metric: str) -> Curve:
        values = (*(() if self.start is None else self.start.values), *run.values)
        coverage, error = (np.stack([each[name] for each in values]) for name in (self.coverage.name, metric))
        return Curve(coverage, error, with_start=self.start is not None)

    def report(self) -> str:
        """Format a table of all checkpoints, one of differences for each run but the first, and notes."""
        images = len({image_of(record) for record in self.first.items.values()})
        head = f"{self.first.title}, {made_by(self.first)}; {len(self.first.items)} answers about {images} images"
        tables = [self._differences_table(run) for run in self.runs[1:]]
        return "\n\n".join([head, self._checkpoints_table(), *tables, "\n".join(self._notes(images))])

    def _shown(self) -> list[Metric]:
        """Return the metrics of a checkpoint: coverage, length, and what is compared."""
        names = dict.fromkeys((self.coverage.name, LENGTH, *self.trade_off.metrics))
        return [metric for name in names if (metric := self.benchmark.metric_named.get(name)) is not None]

    def _checkpoints_table(self) -> str:
        metrics = self._shown()
        lines = [["run", "checkpoint", *(metric.title for metric in metrics)]]
        for run in (*([] if self.start is None else [self.start]), *self.runs):
            for result, values in zip(run.checkpoints, run.values):
                cells = (cell(_number(values[metric.name]), metric.decimals) for metric in metrics)
                lines.append([run.name, result.name, *cells])
        return aligned(lines)

    def _differences_table(self, run: Run) -> str:
        base, lines = self.runs[0], []
        for name in self.trade_off.metrics:
            metric, gap = self.benchmark.metric(name), self.gap(run, name)
            words = self._verdict(run, name, gap)
            value, (ours, theirs) = gap.difference, gap.points
            counts = f"{ours} of {len(run.checkpoints)}", f"{theirs} of {len(base.checkpoints)}"
            lines.append(
                [
                    metric.title,
                    words,
                    signed(value.value, metric.decimals),
                    bounds(value, metric.decimals, sign=True),
                    *counts,
                ]
            )
        title = f"{run.name} - {base.name} at equal {self._coverage_title}"
        heads = [title, "", "difference", "95 % interval", f"compared of {run.name}", f"of {base.name}"]
        return aligned([heads, *lines])

    def _verdict(self, run: Run, metric: str, gap: Gap) -> str:
        if gap.difference.value is None:
            return "not comparable"
        return verdict(self.benchmark, metric, gap.difference, run.name)

    def _notes(self, images: int) -> Iterator[str]:
        title = self._coverage_title
        yield "Intervals: 95 %, bootstrap over images, the same images for all checkpoints; each metric by itself."
        yield (
            f"Differences: each checkpoint minus the other run's line between its checkpoints next in {title}"
            f"{', the start included' * (self.start is not None)}, averaged over the checkpoints of both runs. "
            "Checkpoints that the other run's line does not reach are excluded."
        )
        if any(
            self.gap(run, metric).difference.value is None for run in self.runs[1:] for metric in self.trade_off.metrics
        ):
            ranges = (f"{run.name} {' to '.join(self._range(run))}" for run in self.runs)
            yield f"Not comparable where runs have no {title} in common in most resamples: {', '.join(ranges)}."
        if images < FEW_IMAGES:
            yield f"Images: only {images}, too few for reliable intervals."
        yield from count_notes([result for run in self.runs for result in run.checkpoints])

    def _range(self, run: Run) -> tuple[str, str]:
        """Format the lowest and the highest coverage of a run."""
        found = [values[self.coverage.name][0] for values in run.values]
        return cell(min(found), self.coverage.decimals), cell(max(found), self.coverage.decimals)

    def record(self) -> dict[str, Any]:
        """Return the same for a program, as a JSON object."""
        images = len({image_of(record) for record in self.first.items.values()})
        return {
            "benchmark": self.first.provenance["benchmark"],
            "protocol": self.first.protocol,
            "judge": self.first.judge,
            "answers": len(self.first.items),
            "images": images,
            "coverage": self.coverage.name,
            "start": None if self.start is None else self._run_record(self.start)["checkpoints"][0],
            "runs": [self._run_record(run) for run in self.runs],
            "rows": [self._row_record(metric) for metric in self.trade_off.metrics],
            "notes": list(self._notes(images)),
        }

    def _run_record(self, run: Run) -> dict[str, Any]:
        names = [metric.name for metric in self._shown()]
        checkpoints = [
            {"name": result.name, "path": str(result.path), "values": {name: _number(values[name]) for name in names}}
            for result, values in zip(run.checkpoints, run.values)
        ]
        return {"name": run.name, "checkpoints": checkpoints}

    def _row_record(self, metric: str) -> dict[str, Any]:
        gaps = [(run, self.gap(run, metric)) for run in self.runs[1:]]
        return {
            "metric": metric,
            "better": self.benchmark.metric(metric).better,
            "differences": [
                gap.difference._asdict() | {"verdict": self._verdict(run, metric, gap), "points_compared": gap.points}
                for run, gap in gaps
            ],
        }


def _number(values: Array) -> float | None:
    """Return the value of the data, None where it is undefined."""
    return None if np.isnan(values[0]) else float(values[0])


# ------------------------------------------------------------------------------------------------------------ reading


def compare_curves(
    runs: Sequence[Sequence[str | Path]], start: str | Path | None = None, names: Sequence[str] | None = None
) -> CurveComparison:
    """Compare runs, each given by the results of its checkpoints, with the first of them.

    start: results of the model that all runs started from, a point of every curve. names: of the runs. Raises
    ValueError for fewer than two runs, runs that are all single points, a result that is given twice, a bad file, and
    results that are not comparable or have no coverage.
    """
    paths = [path for run in runs for path in run] + ([] if start is None else [start])
    _check_paths(runs, start, paths)
    read = read_all(paths)
    validate_comparable(read)
    trade_off = _trade_off_of(read[0])
    wanted = [trade_off.coverage, *trade_off.metrics, LENGTH]
    known = [name for name in dict.fromkeys(wanted) if name in read[0].benchmark.metric_named]
    values = resampled(read[0].benchmark.metrics, known, [result.items for result in read])
    _check_values(read, values, [trade_off.coverage, *trade_off.metrics])
    pairs = iter(zip(read, values))
    groups = [[next(pairs) for _ in run] for run in runs]
    titles = _names(groups, names)
    made = tuple(_run(name, group) for name, group in zip(titles, groups))
    return CurveComparison(made, None if start is None else _run("start", list(pairs)))


def _run(name: str, group: Sequence[tuple[Results, dict[str, Array]]]) -> Run:
    return Run(name, tuple(result for result, _ in group), tuple(values for _, values in group))


def _check_paths(runs: Sequence[Sequence[str | Path]], start: str | Path | None, paths: Sequence[str | Path]) -> None:
    remedy = "give --curve once for each run, with the results of its checkpoints; see --help"
    errors = []
    if len(runs) < 2:
        errors.append(f"expected two runs or more, got {len(runs)}")
    elif start is None and all(len(run) == 1 for run in runs):
        errors.append("expected a run of two checkpoints or more, or --start, got one result of each run")
    times = Counter(str(results_file(path)) for path in paths)
    errors += [
        f"{path}: given {count} times; a model that all runs started from is given once, by --start"
        for path, count in times.items()
        if count > 1
    ]
    if errors:
        raise ValueError(error_list("--curve", errors, remedy))


def _trade_off_of(result: Results) -> TradeOff:
    trade_off = result.benchmark.trade_off
    if trade_off is None:
        having = ", ".join(each.name for each in benchmarks.BENCHMARKS if each.trade_off is not None)
        raise ValueError(
            f"--curve: expected results of a benchmark that measures how much is said ({having}), got {result.title}\n"
            "Remedy: compare results of one of these, or leave --curve out"
        )
    return trade_off


def _check_values(results: Sequence[Results], values: Sequence[dict[str, Array]], names: Sequence[str]) -> None:
    errors = [
        f"{result.name}: {name} is undefined"
        for result, of in zip(results, values)
        for name in names
        if np.isnan(of[name][0])
    ]
    if errors:
        raise ValueError(error_list("--curve", errors, "leave these checkpoints out; their answers name nothing"))


def _names(groups: Sequence[Sequence[tuple[Results, Any]]], chosen: Sequence[str] | None) -> list[str]:
    """Return the runs' names: those chosen, or what their checkpoints' names begin with."""
    if chosen is not None:
        if len(chosen) != len(groups) or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"--names: expected {len(groups)} different ones, one for each --curve, got {', '.join(chosen)}"
            )
        return list(chosen)
    begun = [_stem([result.name for result, _ in group]) for group in groups]
    return begun if all(begun) and len(set(begun)) == len(begun) else [f"run {n}" for n in range(1, len(groups) + 1)]


def _stem(names: Sequence[str]) -> str:
    """Return what all names begin with, without "checkpoint" and separators at its end."""
    common = commonprefix(list(names))
    return common.rstrip("-_/. 0123456789").removesuffix("checkpoint").rstrip("-_/. ") if len(names) > 1 else common
