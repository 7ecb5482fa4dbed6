"""All benchmarks of one or more models in one table, as the papers print it, and in a radar chart.

`python -m eval.summary runs/eval/A runs/eval/B --out DIR` reads the results.json files that `eval.evaluate` wrote.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from dama.console import log, report_error, write_atomic
from dama.errors import error_list
from eval import benchmarks
from eval.core.benchmark import SummaryColumn
from eval.core.official import read_json
from eval.core.scores import aligned, cell
from eval.results import unknown_metrics

OTHER = "*"  # marks metrics of another protocol or judge than the column's first
MARKS = {"hallucination": "H", "ability": "A"}
LEGEND = "H hallucination, A general ability; + higher is better, - lower is better, no sign: neither is better"


@dataclass(frozen=True)
class Column:
    """A column of the table: a benchmark's metric. better: "lower", "higher", or None where neither is."""

    benchmark: str
    shown: SummaryColumn
    better: str | None

    @property
    def lower(self) -> bool:
        """Whether lower values are better."""
        return self.better == "lower"

    @property
    def metric(self) -> str:
        """Name of the metric in results.json."""
        return self.shown.metric

    @property
    def heading(self) -> str:
        """Mark of what it measures, title, and + or - for the better direction if there is one."""
        sign = {"lower": " -", "higher": " +"}.get(self.better or "", "")
        return f"{MARKS[self.shown.kind]} {self.shown.title}{sign}"


def columns() -> list[Column]:
    """Return the columns of all benchmarks, hallucination before ability, else in the order of the tuple."""
    found = [
        Column(benchmark.name, shown, benchmark.metric(shown.metric).better)
        for benchmark in benchmarks.BENCHMARKS
        for shown in benchmark.columns
    ]
    return sorted(found, key=lambda column: list(MARKS).index(column.shown.kind))


Results = Mapping[str, Mapping[str, Any]]
"""Benchmark -> the content of its results.json."""


def read_results(run: Path) -> dict[str, dict[str, Any]]:
    """Read the results.json files in a model's folder. Raises ValueError for metrics that a benchmark does not have."""
    paths = {name: run / name / "results.json" for name in benchmarks.names()}
    results = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    for name, content in results.items():
        if errors := unknown_metrics(content, benchmarks.named(name)):
            remedy = "score the answers anew with eval.evaluate"
            raise ValueError(error_list(str(paths[name]), errors, remedy))
    return results


def format_table(models: Mapping[str, Results]) -> str:
    """Format one line per model, n/a where a benchmark has no result; below it the protocols."""
    shown = columns()
    lines = [["", "", *(column.heading for column in shown)]]
    for name, results in models.items():
        lines.append([name, "", *(_cell(models, results, column) for column in shown)])
    return "\n".join([aligned(lines), LEGEND, *_ability(models), *_protocols(models)])


def _ability(models: Mapping[str, Results]) -> list[str]:
    """Return a line for each model but the last: how its abilities differ from the last one's, where comparable."""
    *others, base = models
    lines = []
    for name in others:
        changes = [
            f"{column.shown.title} {change:+.{column.shown.decimals}f}{' (lower)' * (change < 0)}"
            for column in columns()
            if column.shown.kind == "ability" and (change := _change(column, models[name], models[base])) is not None
        ]
        lines += [f"ability, {name} minus {base}: {', '.join(changes)}"] if changes else []
    return lines


def _change(column: Column, ours: Results, theirs: Results) -> float | None:
    """Return the difference of a metric; None where one is undefined, or was made in another way."""
    results = [results[column.benchmark] for results in (ours, theirs) if column.benchmark in results]
    values = [result["metrics"].get(column.metric) for result in results]
    if len(results) < 2 or None in values or _protocol(results[0]) != _protocol(results[1]):
        return None
    return float(values[0]) - float(values[1])


def _cell(models: Mapping[str, Results], results: Results, column: Column) -> str:
    if column.benchmark not in results:
        return "n/a"
    result = results[column.benchmark]
    text = cell(result["metrics"].get(column.metric), column.shown.decimals)
    return text + OTHER * (_protocol(result) != _first_protocol(models, column.benchmark))


def _protocol(result: Mapping[str, Any]) -> str:
    judge = result["provenance"]["judge"]
    by = f", judge {judge['name']} ({judge['version'] or 'version not named'})" if judge else ""
    return result["provenance"]["protocol"] + by


def _first_protocol(models: Mapping[str, Results], benchmark: str) -> str:
    return next(_protocol(results[benchmark]) for results in models.values() if benchmark in results)


def _protocols(models: Mapping[str, Results]) -> list[str]:
    """Return a line for each benchmark, and another one for results that are not comparable with the first."""
    lines = []
    for benchmark in benchmarks.names():
        named = {name: _protocol(results[benchmark]) for name, results in models.items() if benchmark in results}
        if not named:
            continue
        first = next(iter(named.values()))
        lines.append(f"{benchmark}: {first}")
        others = [f"{name}: {protocol}" for name, protocol in named.items() if protocol != first]
        lines += [f"{OTHER} {benchmark}, not comparable: {other}" for other in others]
    return lines


def reach(column: Column, value: float) -> float:
    """Return how far out a value is plotted, 0 to 1; farther is better."""
    assert column.shown.rim is not None
    share = min(1.0, max(0.0, value / column.shown.rim))
    return 1 - share if column.lower else share


def radar(models: Mapping[str, Results]) -> bytes | None:
    """Draw a PNG with an axis for each metric that all models have, farther out is better; None for fewer than 3."""
    from matplotlib.figure import Figure

    values = {
        column: [results.get(column.benchmark, {}).get("metrics", {}).get(column.metric) for results in models.values()]
        for column in columns()
        if column.shown.rim is not None
    }
    axes = [column for column, numbers in values.items() if None not in numbers]
    if len(axes) < 3:
        return None
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    figure = Figure(figsize=(8, 7), layout="constrained")
    chart = figure.add_subplot(projection="polar")
    for number, name in enumerate(models):
        reached = [reach(column, float(values[column][number])) for column in axes]
        chart.plot([*angles, angles[0]], [*reached, reached[0]], marker="o", label=name)
        chart.fill(angles, reached, alpha=0.1)
    chart.set_xticks(angles, [_tick(column, values[column]) for column in axes])
    chart.tick_params(axis="x", pad=26)
    chart.set_ylim(0, 1)
    chart.set_yticks([0.25, 0.5, 0.75], [""] * 3)
    chart.set_title("farther out is better")
    chart.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22))
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _tick(column: Column, values: Sequence[float | None]) -> str:
    """Label an axis: its name, its values in the order of the legend, and the values at center and rim."""
    ends = (column.shown.rim, 0) if column.lower else (0, column.shown.rim)
    shown = " / ".join(cell(value, column.shown.decimals) for value in values)
    return f"{column.shown.title}\n{shown}\n({ends[0]} to {ends[1]})"


def summarize(models: Mapping[str, Results], out: Path) -> None:
    """Print the table and write it to out/summary.txt; write out/radar.png where there are three metrics or more."""
    table, chart = format_table(models), radar(models)
    log(table)
    write_atomic(out / "summary.txt", table + "\n")
    if chart is not None:
        write_atomic(out / "radar.png", chart)
        log(f"summary: {out / 'summary.txt'}, {out / 'radar.png'}")
    else:
        log(f"summary: {out / 'summary.txt'}; no chart, because the models have fewer than three metrics in common")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m eval.summary", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of models, as eval.evaluate writes them")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="for summary.txt, radar.png (%(default)s)")
    args = parser.parse_args(argv)
    try:
        models = {run.name: read_results(run) for run in args.runs}
        if not any(models.values()):
            folders = ", ".join(map(str, args.runs))
            raise ValueError(f"expected results.json of a benchmark in {folders}, got none; run eval.evaluate first")
        summarize(models, args.out)
    except Exception as error:
        report_error(error, "summary")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
