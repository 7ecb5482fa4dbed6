"""results.json files of several models: read, checked against the benchmark's metrics, checked to be comparable."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

from dama.errors import error_list
from eval import benchmarks
from eval.core.benchmark import Benchmark
from eval.core.metrics import ratios
from eval.core.official import Fields, field_errors
from eval.core.scores import QUIRKS, some_of
from eval.core.store import not_finite
from eval.core.types import Record
from eval.imported import described_benchmark, description_errors


@dataclass(frozen=True)
class Results:
    """A results.json under the name that tables and pages give it.

    items: id -> record. described: the file's own description of its benchmark, None for one of this repository's.
    """

    path: Path
    name: str
    provenance: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    items: Mapping[str, Record]
    described: Mapping[str, Any] | None = None

    @cached_property
    def benchmark(self) -> Benchmark:
        """The benchmark's description."""
        return benchmark_of(self.provenance["benchmark"], self.described)

    @property
    def title(self) -> str:
        """The benchmark's title, or the other name that the file has for it."""
        name = self.provenance["benchmark"]
        return self.benchmark.title if name == self.benchmark.name else name

    @property
    def protocol(self) -> str:
        """The protocol's label."""
        return self.provenance["protocol"]

    @property
    def judge(self) -> Mapping[str, Any] | None:
        """The judge's entry, None for rules."""
        return self.provenance["judge"]


def benchmark_of(name: str, described: Mapping[str, Any] | None) -> Benchmark:
    """Return the benchmark of a results.json. Raises ValueError for an unknown one that is not described."""
    return benchmarks.named(name) if described is None else described_benchmark(described)


_RESULTS: Fields = {"provenance": (dict,), "metrics": (dict,), "items": (list,)}
_PROVENANCE: Fields = {
    "benchmark": (str,),
    "protocol": (str,),
    "checkpoint": (str,),
    "fingerprint": (str,),
    "decoding": (dict,),
    "counts": (dict,),
    "judge": (dict, NoneType),
}
_JUDGE: Fields = {"name": (str,), "version": (str,), "prompt_digest": (str,), "temperature": (int, float, NoneType)}
_ITEM: Fields = {
    "id": (str,),
    "image_id": (str,),
    "image": (str,),
    "prompt": (str,),
    "text": (str,),
    "truth": (str, list),
    "wrong": (bool, NoneType),
    "spans": (list,),
    "parts": (dict,),
}
_ROUNDING = 0.15  # how far official_quirks round a metric away from its parts
_REMEDY = "give a results.json that eval.evaluate wrote with this version of the benchmark, or score the answers anew"


def read_all(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Results]:
    """Read the files, or those in folders, under these names, or under those of their checkpoints.

    Where two checkpoints have the same name, the files' paths are the names. Raises ValueError, naming file and fields,
    for what is no results.json, for an unknown benchmark, for metrics that the benchmark does not have, and for metrics
    that do not agree with the items.
    """
    files = [results_file(path) for path in paths]
    contents = [_read(file) for file in files]
    checkpoints = [_name_of(Path(content["provenance"]["checkpoint"])) for content in contents]
    chosen = names or (checkpoints if len(set(checkpoints)) == len(files) else [str(file) for file in files])
    if len(set(chosen)) < len(paths) or len(chosen) != len(paths):
        raise ValueError(f"names: expected {len(paths)} different ones, got {', '.join(chosen)}\nRemedy: give --names")
    return [_named(path, name, content) for path, name, content in zip(files, chosen, contents)]


def results_file(path: str | Path) -> Path:
    """Return the results.json that is meant: the file, or the one in a folder."""
    return Path(path) / "results.json" if Path(path).is_dir() else Path(path)


def _name_of(checkpoint: Path) -> str:
    """Return the last part of a checkpoint's path, and the one before it where it is only the number of a step."""
    if checkpoint.name.startswith("checkpoint-") and checkpoint.parent.name:
        return f"{checkpoint.parent.name}_{checkpoint.name}"
    return checkpoint.name


def _named(path: Path, name: str, content: Mapping[str, Any]) -> Results:
    items = {row["id"]: row for row in content["items"]}
    return Results(path, name, content["provenance"], content["metrics"], items, content.get("benchmark"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})\nRemedy: {_REMEDY}") from error
    if places := list(not_finite(content)):  # Python reads them, browsers and other programs do not
        raise ValueError(error_list(f"{path}: not JSON compliant", places, _REMEDY))
    if errors := content_errors(content):
        raise ValueError(error_list(str(path), errors, _REMEDY))
    return content


# -------------------------------------------------------------------------------------------------------- one file


def content_errors(content: Any) -> list[str]:
    """Return the errors of a results.json: of its fields; where these are right, of what they say of each other."""
    if errors := field_errors("results", content, _RESULTS):
        return errors
    provenance, items = content["provenance"], content["items"]
    errors = field_errors("provenance", provenance, _PROVENANCE)
    errors += field_errors("judge", provenance["judge"], _JUDGE) if isinstance(provenance.get("judge"), dict) else []
    errors += [error for number, row in enumerate(items) for error in _item_errors(number, row)]
    errors += [] if items else ["items: expected some, got none"]
    if errors:
        return errors
    twice = len(items) - len({row["id"] for row in items})
    return [f"items: {twice} ids are used twice"] * bool(twice) + _metric_errors(content) + _sum_errors(content)


def _item_errors(number: int, row: Any) -> list[str]:
    """Check fields, two finite numbers for each metric, and spans inside the text."""
    if errors := field_errors(f"item {number}", row, _ITEM):
        return errors
    errors = [
        f"item {number}: parts of {metric!r}: expected two numbers, got {pair!r}"
        for metric, pair in row["parts"].items()
        if not (_are_two(pair, (int, float)) and all(map(math.isfinite, pair)))
    ]
    length = len(row["text"])
    return errors + [
        f"item {number}: spans: expected [start, end] within {length} characters, got {span!r}"
        for span in row["spans"]
        if not (_are_two(span, int) and 0 <= span[0] < span[1] <= length)
    ]


def _are_two(pair: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(value, kind) for value in pair)


def _metric_errors(content: Mapping[str, Any]) -> list[str]:
    """Name an unknown benchmark, or its unknown metrics."""
    name, described = content["provenance"]["benchmark"], content.get("benchmark")
    if described is not None and (errors := description_errors(described, name)):
        return errors
    try:
        return unknown_metrics(content, benchmark_of(name, described))
    except ValueError as error:
        return [str(error)]


def unknown_metrics(content: Mapping[str, Any], benchmark: Benchmark) -> list[str]:
    """Return an error for each metric of the file and of its items that the benchmark does not have."""
    used = [*content["metrics"], *(metric for row in content.get("items", ()) for metric in row["parts"])]
    return [benchmark.unknown_metric(name) for name in dict.fromkeys(used) if name not in benchmark.metric_named]


def _sum_errors(content: Mapping[str, Any]) -> list[str]:
    """Name metrics that the items' parts do not give, as in a file that was edited by hand."""
    items, tolerance = content["items"], _ROUNDING if QUIRKS in content["provenance"]["protocol"] else 1e-6
    errors = []
    for metric, given in ratios(items, dict.fromkeys(metric for row in items for metric in row["parts"])).items():
        stated = content["metrics"].get(metric)
        known = isinstance(stated, (int, float)) and given is not None
        if abs(stated - given) > tolerance if known else stated is not given:
            errors.append(f"metric {metric!r}: says {stated!r}, but its items give {given!r}")
    return errors


# ---------------------------------------------------------------------------------------------------- several files


def validate_comparable(runs: Sequence[Results]) -> None:
    """Raise ValueError that names everything in which results were made differently from the first."""
    first, *others = runs
    errors = [error for other in others for error in _condition_errors(first, other)]
    errors += [error for other in others for error in _pairing_errors(first, other)]
    if errors:
        remedy = (
            f"score both in one way, as `python -m eval.evaluate {first.benchmark.name} CHECKPOINT --compare BASE` "
            "does; metrics of other protocols, judges or questions are not comparable"
        )
        raise ValueError(error_list("not comparable", errors, remedy))


def _conditions(run: Results) -> dict[str, Any]:
    """Return what must be equal, by name."""
    judge = run.judge or dict.fromkeys(("name", "version", "prompt_digest", "temperature"), "no judge")
    conditions = {"benchmark": run.provenance["benchmark"], "protocol": run.protocol}
    return conditions | {f"judge's {key}": judge[key] for key in judge}


def _condition_errors(first: Results, other: Results) -> Iterator[str]:
    ours, theirs = _conditions(first), _conditions(other)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {ours.get(name)!r} in {first.name}, {theirs.get(name)!r} in {other.name}"


def _pairing_errors(first: Results, other: Results) -> Iterator[str]:
    """Name items that only one of them has, and items that are about something else."""
    for run, without in ((first, other), (other, first)):
        alone = [id_ for id_ in run.items if id_ not in without.items]
        if alone:
            count = f"{len(alone)} of {len(run.items)}"
            yield f"items: {count} are in {run.name} but not in {without.name}: {some_of(alone, 5)}"
    for field in ("image_id", "prompt", "truth"):
        shared = [id_ for id_ in first.items if id_ in other.items and not _is_text_only(first, other, id_, field)]
        unlike = [id_ for id_ in shared if first.items[id_][field] != other.items[id_][field]]
        if unlike:
            pair = " and ".join(repr(run.items[unlike[0]][field])[:60] for run in (first, other))
            yield f"items: {len(unlike)} of {len(shared)} have another {field}, e.g. {unlike[0]}: {pair}"


def _is_text_only(first: Results, other: Results, id_: str, field: str) -> bool:
    """Whether one of the answers is missing: it is never scored, so its truth is the question's, as text."""
    return field == "truth" and any("missing" in run.items[id_] for run in (first, other))
