"""Differences between models on one benchmark, with paired bootstrap intervals; on request beside published results.

    python -m eval.compare BASE ALIGNED [MORE ...] [--names A B ...] [--json] [--published]
    python -m eval.compare --curve DPO_1 DPO_2 ... --curve DAMA_1 DAMA_2 ... [--start SFT] [--names DPO DAMA] [--json]

Each is a results.json or the folder of one. The first is the base: differences are every later result minus the first,
on the same items; all models have the same images in each resample. Results that were not made the same way (benchmark,
protocol, judge, items) are refused, with every difference named.

Hallucination falls as a model says less. With --curve, once for each training run, the results of a run's checkpoints
make a curve of errors against recall or coverage, and runs are compared where both say as much: at each checkpoint the
other run's curve is interpolated, and the differences are averaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dama.console import log, report_error
from eval import benchmarks
from eval.compare_curves import compare_curves
from eval.core.benchmark import Benchmark
from eval.core.metrics import Metric, image_of, resampled
from eval.core.published import Published, Standing
from eval.core.scores import aligned, cell
from eval.core.statistics import Array, Interval, interval
from eval.results import Results, read_all, validate_comparable
from eval.wording import FEW_IMAGES, bounds, count_notes, made_by, signed, verdict

# -------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Row:
    """A metric of all runs, and of every later one minus the first; each with its interval."""

    metric: str
    values: tuple[Interval, ...]
    differences: tuple[Interval, ...] = ()


def rows_of(runs: Sequence[Results]) -> list[Row]:
    """Compute every metric that is made of the items' parts, derived ones too. The runs have the same items.

    Of imported results all metrics are rows, those that their items do not give as stated.
    """
    names = list(dict.fromkeys(metric for run in runs for row in run.items.values() for metric in row["parts"]))
    rows = _resampled_rows(runs, names) if names else {}
    if runs[0].described is not None:
        metrics = runs[0].benchmark.metrics
        return [rows.get(metric.name) or _row_without_interval(runs, metric.name) for metric in metrics]
    return list(rows.values())


def _resampled_rows(runs: Sequence[Results], names: Sequence[str]) -> dict[str, Row]:
    """Compute the rows of the metrics `names`, which are made of parts, and of those derived from them."""
    known = runs[0].benchmark.metrics
    values = resampled(known, names, [run.items for run in runs])
    return {
        metric.name: Row(
            metric.name,
            tuple(_interval(value[metric.name]) for value in values),
            tuple(_interval(value[metric.name] - values[0][metric.name]) for value in values[1:]),
        )
        for metric in known
        if metric.name in values[0]
    }


def _interval(values: Array) -> Interval:
    """Return the value of the data, column 0, with the interval of the resamples."""
    return interval(values[0], values[1:])


def _row_without_interval(runs: Sequence[Results], metric: str) -> Row:
    """Return the values that the files state, and their differences."""
    values = [run.metrics.get(metric) for run in runs]
    differences = [None if None in (value, values[0]) else value - values[0] for value in values[1:]]  # type: ignore[operator]
    return Row(metric, *(tuple(Interval(each, None, None) for each in of) for of in (values, differences)))


@dataclass(frozen=True)
class Comparison:
    """Runs and the metrics of all of them."""

    runs: tuple[Results, ...]
    rows: tuple[Row, ...]

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark's description."""
        return self.runs[0].benchmark

    @cached_property
    def images(self) -> int:
        """Number of images that the items are about."""
        return len({image_of(row) for row in self.runs[0].items.values()})

    @cached_property
    def published(self) -> list[Published]:
        """Published results of this benchmark, those of its own protocol and judge first."""
        first, order = self.runs[0], ("same", "unknown", "other")
        entries = first.benchmark.published() if first.title == first.benchmark.title else ()
        return sorted(entries, key=lambda entry: order.index(entry.standing(first.protocol, first.judge)))

    @property
    def text(self) -> str:
        """The report without published results."""
        return self.report()

    def report(self, published: bool = False) -> str:
        """Format tables of each run against the first, then notes, then on request the published results."""
        first = self.runs[0]
        head = f"{first.title}, {made_by(first)}; {len(first.items)} answers about {self.images} images"
        beside = [_published_table(self)] if published and self.published else []
        tables = [_difference_table(self, number) for number in range(1, len(self.runs))]
        notes = notes_on(self)
        if not published and self.published:
            notes = [*notes, f"--published shows {len(self.published)} published results of this benchmark below these"]
        return "\n\n".join([head, *tables, "\n".join(notes), *beside])

    def record(self) -> dict[str, Any]:
        """Return the same for a program, as a JSON object."""
        first = self.runs[0]
        return {
            "benchmark": first.provenance["benchmark"],
            "protocol": first.protocol,
            "judge": first.judge,
            "answers": len(first.items),
            "images": self.images,
            "runs": [
                {"name": run.name, "path": str(run.path)}
                | {key: run.provenance[key] for key in ("checkpoint", "fingerprint")}
                for run in self.runs
            ],
            "rows": [self._row_record(row) for row in self.rows],
            "published": [entry.record(first.protocol, first.judge) for entry in self.published],
            "notes": notes_on(self),
        }

    def _row_record(self, row: Row) -> dict[str, Any]:
        return {
            "metric": row.metric,
            "better": self.benchmark.metric(row.metric).better,
            "values": [value._asdict() for value in row.values],
            "differences": [
                difference._asdict() | {"verdict": verdict(self.benchmark, row.metric, difference, run.name)}
                for run, difference in zip(self.runs[1:], row.differences)
            ],
        }


def compare(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> Comparison:
    """Compare each result with the first.

    Raises ValueError for fewer than two results, for a bad file, and for files that were made differently.
    """
    if len(paths) < 2:
        raise ValueError(f"compare: expected two results.json or more, got {len(paths)}")
    return comparison_of(read_all(paths, names))


def comparison_of(runs: Sequence[Results]) -> Comparison:
    """Compute the metrics of one run or more. Raises ValueError for runs that are not comparable."""
    validate_comparable(runs)
    return Comparison(tuple(runs), tuple(rows_of(runs)))


def _difference_table(comparison: Comparison, number: int) -> str:
    first, other = comparison.runs[0], comparison.runs[number]
    lines = [[f"{other.name} - {first.name}", "", first.name, other.name, "difference", "95 % interval"]]
    for row in comparison.rows:
        values, difference = (row.values[0].value, row.values[number].value), row.differences[number - 1]
        metric = comparison.benchmark.metric(row.metric)
        if values == (None, None):
            continue
        cells = [*(cell(value, metric.decimals) for value in values), signed(difference.value, metric.decimals)]
        words = verdict(comparison.benchmark, row.metric, difference, other.name)
        lines.append([metric.title, words, *cells, bounds(difference, metric.decimals, sign=True)])
    return aligned(lines)


def notes_on(comparison: Comparison) -> list[str]:
    """List what a reader of the metrics must know: everything left out, and every reason to doubt an interval."""
    runs, first = comparison.runs, comparison.runs[0]
    notes = ["Intervals: 95 %, bootstrap over images, each metric by itself."]
    if len(runs) > 1:
        notes.append(f"Differences: each minus the base, {first.name}.")
        notes.append("Of 20 metrics without any true difference, about one shows a clear one by chance.")
    if comparison.images < FEW_IMAGES:
        notes.append(f"Images: only {comparison.images}, too few for reliable intervals.")
    notes += _undefined_notes(comparison)
    notes += count_notes(runs)
    if first.judge is not None and not first.judge["version"]:
        notes.append("The judge's version is not named: behind one name it may have changed between the runs.")
    for other in runs[1:]:
        notes += _run_notes(first, other)
    return notes


def _undefined_notes(comparison: Comparison) -> Iterator[str]:
    runs, first = comparison.runs, comparison.runs[0]
    rows = {row.metric for row in comparison.rows}
    known = {name for run in runs for name, value in run.metrics.items() if value is not None}
    listed = [metric.name for metric in comparison.benchmark.metrics if metric.name in {*rows, *first.metrics}]
    undefined = [name for name in listed if name not in known]
    if undefined:
        yield f"Undefined: {', '.join(undefined)}."
    apart = [f"{name} {_shown(runs, name)}" for name in listed if name in known and name not in rows]
    if apart:
        yield f"No sums over items, so without interval: {', '.join(apart)}."


def _shown(runs: Sequence[Results], metric: str) -> str:
    return " / ".join(cell(run.metrics.get(metric), 2) for run in runs)


def _run_notes(first: Results, other: Results) -> Iterator[str]:
    if first.provenance["fingerprint"] == other.provenance["fingerprint"]:
        yield f"{first.name} and {other.name} have the same weights."
    ours, theirs = (dict(_flat(run.provenance["decoding"])) for run in (first, other))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            yield f"Decoded differently, {name}: {first.name} {ours.get(name)}, {other.name} {theirs.get(name)}."


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value), also of settings by part."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


# -------------------------------------------------------------------------------------------------------- published

_MARKS: dict[Standing, str] = {"same": "", "unknown": "?", "other": "*"}


def _published_table(comparison: Comparison) -> str:
    """Format these runs and the published models, one line each; the marks say what is comparable."""
    entries = comparison.published
    named = dict.fromkeys(metric for entry in entries for metric in entry.metrics)
    known = comparison.benchmark.metric_named
    metrics = [metric for name, metric in known.items() if name in named]
    metrics += [Metric(name, name.replace("_", " ")) for name in named if name not in known]  # only published
    lines = [["published results", "protocol; source", *(metric.title for metric in metrics)]]
    values = {row.metric: row.values for row in comparison.rows}
    for number, run in enumerate(comparison.runs):
        cells = (cell(values[m.name][number].value, m.decimals) if m.name in values else "" for m in metrics)
        lines.append([run.name, "this run", *cells])
    first = comparison.runs[0]
    for entry in entries:
        mark = _MARKS[entry.standing(first.protocol, first.judge)]
        cells = (f"{entry.metrics[m.name]}{mark}" if m.name in entry.metrics else "" for m in metrics)
        lines.append([entry.model, _making(entry, first.judge is not None), *cells])
    return "\n".join([aligned(lines), *_published_notes(entries)])


def _published_notes(entries: Sequence[Published]) -> Iterator[str]:
    yield "* made in another way: not comparable; ? made in a way that the source does not state"
    for note in dict.fromkeys(entry.note for entry in entries if entry.note):
        noted = [f"{entry.model} ({', '.join(entry.sources)})" for entry in entries if entry.note == note]
        yield f"{', '.join(noted)}: {note}"
    sources = {name: read for entry in entries for name, read in entry.sources.items()}
    yield "Sources: " + "; ".join(f"{name} ({read})" for name, read in sources.items())


def _making(entry: Published, judged: bool) -> str:
    """Return protocol, judge and sources in words."""
    judge = f", judge {entry.judge or 'not stated'}" if judged else ""
    return f"{entry.protocol or 'not stated'}{judge}; {', '.join(entry.sources)}"


# ---------------------------------------------------------------------------------------------------------- command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="results.json of each model, the base first")
    parser.add_argument(
        "--curve", nargs="+", action="append", default=[], metavar="RESULTS",
        help=f"results of the checkpoints of one training run, for a comparison at equal {_coverages()}; give it once "
        "for each run, the base first; one of them may be a single result",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="RESULTS", help="with --curve: results of the model that all runs started from"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME",
        help="one for each result, then one for each --curve (default: the checkpoint's name, and what those of a run "
        "begin with)",
    )  # fmt: skip
    parser.add_argument("--published", action="store_true", help="show published results below these (--json has them)")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object instead of tables")


def _coverages() -> str:
    """Name the metrics at which runs are compared, and the benchmarks that have them."""
    having = [(each, each.trade_off) for each in benchmarks.BENCHMARKS if each.trade_off is not None]
    names = (f"{each.metric(trade_off.coverage).title.removesuffix(' %')} ({each.name})" for each, trade_off in having)
    return ", ".join(names)


def run(args: argparse.Namespace) -> None:
    """Print the comparison of the results, then that of the curves; either may be left out."""
    if args.start and not args.curve:
        raise ValueError("--start: expected --curve beside it, got none\nRemedy: give the runs' results by --curve")
    count = len(args.results)
    names, curve_names = (args.names[:count] or None, args.names[count:] or None) if args.names else (None, None)
    plain = compare(args.results, names if args.curve else args.names) if args.results or not args.curve else None
    curves = compare_curves(args.curve, args.start, curve_names) if args.curve else None
    if args.json:
        record = ({} if plain is None else plain.record()) | ({} if curves is None else {"curve": curves.record()})
        log(json.dumps(record, indent=2, ensure_ascii=False))
        return
    reports = [None if plain is None else plain.report(args.published), None if curves is None else curves.report()]
    log("\n\n".join(report for report in reports if report is not None))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        run(args)
    except Exception as error:
        report_error(error, "compare")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
