"""Words and number formats that the comparisons and pages share: verdicts, protocols, differences, counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eval.core.benchmark import Benchmark
from eval.core.statistics import Interval
from eval.results import Results

FEW_IMAGES = 30  # percentile intervals of fewer are too narrow to rely on


def verdict(benchmark: Benchmark, metric: str, difference: Interval, name: str) -> str:
    """Say what the interval allows to conclude about the run called `name` against the first."""
    better = benchmark.metric(metric).better
    if difference.low is None or difference.high is None:
        return "undefined" if difference.value is None else "no interval"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    up = difference.low > 0
    if better is None:
        return f"{name} {'higher' if up else 'lower'}"
    return f"{name} {'better' if up == (better == 'higher') else 'worse'}"


def made_by(run: Results) -> str:
    """Return protocol and judge in words."""
    if run.judge is None:
        return f"protocol {run.protocol}"
    version = run.judge["version"] or "version not named"
    warmth = run.judge["temperature"]
    temperature = "its own temperature" if warmth is None else f"temperature {warmth}"
    return f"protocol {run.protocol}, judge {run.judge['name']} ({version}) at {temperature}"


def signed(value: float | None, decimals: int) -> str:
    """Format a difference with its sign, n/a for None."""
    return "n/a" if value is None else f"{value:+.{decimals}f}"


def bounds(of: Interval, decimals: int, *, sign: bool = False) -> str:
    """Format an interval in brackets; empty where undefined."""
    if of.low is None or of.high is None:
        return ""
    form = f"{'+' if sign else ''}.{decimals}f"
    return f"[{of.low:{form}}, {of.high:{form}}]"


def count_notes(runs: Sequence[Results]) -> Iterator[str]:
    """Name what was counted and left out of metrics, where there was any."""
    counts = dict.fromkeys(name for run in runs for name in run.provenance["counts"])
    for count in counts:
        if count in ("missing", "unparsed", "failed") or count.startswith("incomplete "):
            numbers = {run.name: run.provenance["counts"].get(count, 0) for run in runs}
            if any(numbers.values()):
                yield f"{count.capitalize()}: {', '.join(f'{name} {number}' for name, number in numbers.items())}."
