"""All benchmarks of one or more models in one table, as the papers print it, and in a radar chart.

`python -m eval.summary runs/eval/A runs/eval/B --out DIR` reads the results.json files that `eval.evaluate` wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from dama.console import report_error, say, write_atomic
from eval.core.official import read_json
from eval.core.scores import aligned, cell

OTHER = "*"  # marks figures of another protocol or judge than the column's first


@dataclass(frozen=True)
class Column:
    """One figure of the table; `better` is "up" or "down". rim: the value that is drawn farthest out (figures that are
    better down have it in the centre, and 0 at the rim); None leaves the figure out of the chart."""

    benchmark: str
    metric: str
    title: str
    better: str
    rim: float | None = 100
    decimals: int = 1

    @property
    def heading(self) -> str:
        return f"{self.title} {'+' if self.better == 'up' else '-'}"


COLUMNS = (
    Column("objhal", "response_level", "ObjHal resp.", "down"),
    Column("objhal", "mention_level", "ObjHal ment.", "down", rim=50),
    Column("amber", "chair", "AMBER CHAIR", "down", rim=20),
    Column("amber", "cover", "Cover", "up"),
    Column("amber", "hal", "Hal", "down"),
    Column("amber", "cog", "Cog", "down", rim=None),
    Column("amber", "f1", "AMBER F1", "up"),
    Column("mmhal", "score", "MMHal", "up", rim=6, decimals=2),
    Column("mmhal", "hallucination_rate", "MMHal hal.", "down"),
    Column("llavabench", "relative", "LLaVA-Bench", "up"),
    Column("mmvet", "total", "MM-Vet", "up"),
    Column("pope", "mean_f1", "POPE F1", "up"),
)

Results = Mapping[str, Mapping[str, Any]]
"""Benchmark -> the content of its results.json."""


def read_results(run: Path) -> dict[str, dict[str, Any]]:
    """What there is in a model's folder."""
    paths = {name: run / name / "results.json" for name in dict.fromkeys(column.benchmark for column in COLUMNS)}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def format_table(models: Mapping[str, Results]) -> str:
    """One line a model, n/a where a benchmark has no result; below it the protocols."""
    lines = [["", "", *(column.heading for column in COLUMNS)]]
    for name, results in models.items():
        lines.append([name, "", *(_cell(models, results, column) for column in COLUMNS)])
    return "\n".join([aligned(lines), "+ higher is better, - lower is better", *_protocols(models)])


def _cell(models: Mapping[str, Results], results: Results, column: Column) -> str:
    if column.benchmark not in results:
        return "n/a"
    result = results[column.benchmark]
    text = cell(result["metrics"].get(column.metric), column.decimals)
    return text + OTHER * (_protocol(result) != _first_protocol(models, column.benchmark))


def _protocol(result: Mapping[str, Any]) -> str:
    judge = result["provenance"]["judge"]
    by = f", judge {judge['name']} ({judge['version'] or 'version not named'})" if judge else ""
    return result["provenance"]["protocol"] + by


def _first_protocol(models: Mapping[str, Results], benchmark: str) -> str:
    return next(_protocol(results[benchmark]) for results in models.values() if benchmark in results)


def _protocols(models: Mapping[str, Results]) -> list[str]:
    """A line for each benchmark; another one for what may not be compared with it."""
    lines = []
    for benchmark in dict.fromkeys(column.benchmark for column in COLUMNS):
        named = {name: _protocol(results[benchmark]) for name, results in models.items() if benchmark in results}
        if not named:
            continue
        first = next(iter(named.values()))
        lines.append(f"{benchmark}: {first}")
        others = [f"{name}: {protocol}" for name, protocol in named.items() if protocol != first]
        lines += [f"{OTHER} {benchmark}, not comparable: {other}" for other in others]
    return lines


def reach(column: Column, value: float) -> float:
    """How far out a figure is drawn, 0 to 1; farther is better."""
    assert column.rim is not None
    share = min(1.0, max(0.0, value / column.rim))
    return share if column.better == "up" else 1 - share


def radar(models: Mapping[str, Results]) -> bytes | None:
    """A PNG: an axis for each figure that all models have, farther out is better; None for fewer than three."""
    import math

    from matplotlib.figure import Figure

    def value(results: Results, column: Column) -> float | None:
        return results.get(column.benchmark, {}).get("metrics", {}).get(column.metric)

    axes = [
        column
        for column in COLUMNS
        if column.rim is not None and all(value(results, column) is not None for results in models.values())
    ]
    if len(axes) < 3:
        return None
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    figure = Figure(figsize=(8, 7), layout="constrained")
    chart = figure.add_subplot(projection="polar")
    for name, results in models.items():
        figures = [float(value(results, column) or 0.0) for column in axes]
        reached = [reach(column, number) for column, number in zip(axes, figures)]
        chart.plot([*angles, angles[0]], [*reached, reached[0]], marker="o", label=name)
        chart.fill(angles, reached, alpha=0.1)
    chart.set_xticks(angles, [_tick(column, [value(r, column) for r in models.values()]) for column in axes])
    chart.tick_params(axis="x", pad=26)
    chart.set_ylim(0, 1)
    chart.set_yticks([0.25, 0.5, 0.75], [""] * 3)
    chart.set_title("farther out is better")
    chart.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22))
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _tick(column: Column, values: Sequence[float | None]) -> str:
    """An axis' name, its figures in the order of the legend, and what lies at centre and rim."""
    ends = (0, column.rim) if column.better == "up" else (column.rim, 0)
    return f"{column.title}\n{' / '.join(cell(v, column.decimals) for v in values)}\n({ends[0]} to {ends[1]})"


def summarise(models: Mapping[str, Results], out: Path) -> None:
    """Prints the table, and writes it to out/summary.txt; out/radar.png of three figures or more."""
    table, chart = format_table(models), radar(models)
    say(table)
    write_atomic(out / "summary.txt", table + "\n")
    if chart is not None:
        write_atomic(out / "radar.png", chart)
        say(f"summary: {out / 'summary.txt'}, {out / 'radar.png'}")
    else:
        say(f"summary: {out / 'summary.txt'}; no chart, because the models have fewer than three figures in common")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.summary", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of models, as eval.evaluate writes them")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="for summary.txt, radar.png (%(default)s)")
    args = parser.parse_args(argv)
    try:
        models = {run.name: read_results(run) for run in args.runs}
        if not any(models.values()):
            folders = ", ".join(map(str, args.runs))
            raise ValueError(f"expected results.json of a benchmark in {folders}, got none; run eval.evaluate first")
        summarise(models, args.out)
    except Exception as error:
        report_error(error, "summary")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
