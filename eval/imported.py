"""Results that another harness computed: a results.json that describes its own benchmark, for comparison and pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from eval.core.benchmark import Benchmark
from eval.core.metrics import Metric
from eval.core.official import Fields, field_errors
from eval.core.sources import ImageSource

DESCRIPTION: Fields = {"name": (str,), "title": (str,), "wrong": (str,), "metrics": (list,)}
_METRIC: Fields = {"name": (str,), "title": (str,), "decimals": (int,)}
_DIRECTIONS = ("lower", "higher", None)


def description(name: str, title: str, wrong: str, metrics: list[Metric]) -> dict[str, Any]:
    """Return what results.json has as "benchmark"; the arguments are as in `Benchmark`."""
    rows = [{"name": m.name, "title": m.title, "better": m.better, "decimals": m.decimals} for m in metrics]
    return {"name": name, "title": title, "wrong": wrong, "metrics": rows}


def description_errors(described: Any, name: str) -> list[str]:
    """Return the errors of a description. name: the benchmark's name elsewhere in the file."""
    if errors := field_errors("benchmark", described, DESCRIPTION):
        return errors
    errors = [f"benchmark: named {described['name']!r}, and {name!r} in provenance"] * (described["name"] != name)
    for number, row in enumerate(described["metrics"]):
        errors += field_errors(f"benchmark, metric {number}", row, _METRIC)
        if isinstance(row, dict) and row.get("better") not in _DIRECTIONS:
            errors.append(f"benchmark, metric {number}: better: expected lower, higher or null, got {row['better']!r}")
    return errors


def described_benchmark(described: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a description; it can neither be loaded nor scored here."""
    metrics = tuple(
        Metric(row["name"], row["title"], row.get("better"), row["decimals"]) for row in described["metrics"]
    )

    def unavailable(*args: Any, **options: Any) -> NoReturn:
        raise ValueError(f"{described['title']}: scored elsewhere and imported\nRemedy: score it there anew")

    return Benchmark(
        name=described["name"],
        title=described["title"],
        wrong=described["wrong"],
        files=(),
        images=ImageSource(str(Path()), lambda data: {}, "not known"),
        load=unavailable,
        parts=(),
        score=unavailable,
        metrics=metrics,
    )
