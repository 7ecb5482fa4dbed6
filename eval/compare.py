"""What models differ in on one benchmark, with paired bootstrap intervals; on request the published results, too.

    python -m eval.compare BASE/results.json ALIGNED/results.json [MORE/results.json ...] [--names A B ...] [--json]
                           [--published]

The first is the base: differences are every later result minus the first, on the same items; all of them meet the same
pictures in each resample.
Results that were not made alike (benchmark, protocol, judge, items) are refused, naming every difference.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

from dama.console import report_error, say
from dama.errors import error_list
from eval.core.judge import QUIRKS
from eval.core.official import Fields, field_faults
from eval.core.scores import aligned, cell, ratios
from eval.core.statistics import Array, Interval, interval, ratio, resample
from eval.core.store import not_finite

TITLES = {
    "objhal": "Object HalBench",
    "amber": "AMBER",
    "mmhal": "MMHal-Bench",
    "llavabench": "LLaVA-Bench (In-the-Wild)",
    "mmvet": "MM-Vet",
    "pope": "POPE",
}
FEW_PICTURES = 30  # percentile intervals of fewer are too narrow to rely on


# ---------------------------------------------------------------------------------------------------------- metrics


class Figure(NamedTuple):
    """How a metric is called, read and rounded; `better` is None where neither direction is."""

    title: str
    better: Literal["lower", "higher"] | None
    decimals: int


_NAMES = {
    "response_level": "response-level %",
    "chairs": "CHAIRs %",
    "mention_level": "mention-level %",
    "object_recall": "object recall %",
    "chair": "CHAIR %",
    "cover": "Cover %",
    "hal": "Hal %",
    "cog": "Cog %",
    "cog_paper": "Cog (paper) %",
    "cover_unshadowed": "Cover (unshadowed) %",
    "amber_score": "AMBER score",
    "score": "score (0 to 6)",
    "hallucination_rate": "hallucination %",
    "relative": "relative score",
}
_LOWER = {"response_level", "chairs", "mention_level", "repeated_objects", "chair", "hal", "cog", "cog_paper",
          "hallucination_rate"}  # fmt: skip
_NEITHER = ("mean_words", "yes_ratio", "reference_score")
_FINE = ("score", "reference_", "answer_", "informativeness", "repeated_", "mean_f1", "mean_acc", "random_", "popular_",
         "adversarial_")  # fmt: skip


def figure_of(metric: str) -> Figure:
    """For any metric of results.json."""
    better: Literal["lower", "higher"] | None = "lower" if metric in _LOWER else "higher"
    name = _NAMES.get(metric, metric.replace("_", " ").replace("f1", "F1"))
    return Figure(name, None if metric.endswith(_NEITHER) else better, 2 if metric.startswith(_FINE) else 1)


# Metrics that are no sum over a sum: what they are made of, and how.
DERIVED: dict[str, tuple[tuple[str, ...], Callable[..., Array]]] = {
    "amber_score": (("chair", "f1"), lambda chair, f1: (100 - chair + f1) / 2),
    "mean_f1": (("random_f1", "popular_f1", "adversarial_f1"), lambda *splits: sum(splits) / 3),
    "mean_accuracy": (
        ("random_accuracy", "popular_accuracy", "adversarial_accuracy"),
        lambda *splits: sum(splits) / 3,
    ),
}


def _figures(metrics: Sequence[str], sums: Array) -> dict[str, Array]:
    """Metric -> value; sums: [M, 2, ...], numerators and denominators of the M metrics that are made of parts."""
    plain = {metric: ratio(*pair) for metric, pair in zip(metrics, sums)}
    derived = {
        metric: function(*(plain[part] for part in parts))
        for metric, (parts, function) in DERIVED.items()
        if all(part in plain for part in parts)
    }
    return derived | plain


# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Results:
    """A results.json under the name that it goes by here. items: id -> record."""

    path: Path
    name: str
    provenance: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    items: Mapping[str, Mapping[str, Any]]

    @property
    def benchmark(self) -> str:
        return self.provenance["benchmark"]

    @property
    def protocol(self) -> str:
        return self.provenance["protocol"]

    @property
    def judge(self) -> Mapping[str, Any] | None:
        return self.provenance["judge"]


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
_ROUNDING = 0.15  # how far official_quirks round a figure away from its parts


def read_all(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Results]:
    """The files, under these names, or under those of their checkpoints; under their paths where these are alike.

    Raises ValueError, naming file and fields, for what is no results.json and for metrics that its items do not give.
    """
    contents = [_read(Path(path)) for path in paths]
    checkpoints = [Path(content["provenance"]["checkpoint"]).name for content in contents]
    chosen = names or (checkpoints if len(set(checkpoints)) == len(paths) else [str(path) for path in paths])
    if len(set(chosen)) < len(paths) or len(chosen) != len(paths):
        raise ValueError(f"names: expected {len(paths)} different ones, got {', '.join(chosen)}\nRemedy: give --names")
    return [_named(Path(path), name, content) for path, name, content in zip(paths, chosen, contents)]


def _named(path: Path, name: str, content: Mapping[str, Any]) -> Results:
    items = {row["id"]: row for row in content["items"]}
    return Results(path, name, content["provenance"], content["metrics"], items)


def _read(path: Path) -> dict[str, Any]:
    remedy = "give a results.json that eval.evaluate wrote, or write it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})\nRemedy: {remedy}") from error
    if places := list(not_finite(content)):  # Python reads them, browsers and other programs do not
        raise ValueError(error_list(f"{path}: not JSON compliant", places, remedy))
    if faults := _content_faults(content):
        raise ValueError(error_list(str(path), faults, remedy))
    return content


def _content_faults(content: Any) -> list[str]:
    """Of the fields; where these are right, of what they say of each other."""
    if faults := field_faults("results", content, _RESULTS):
        return faults
    provenance, items = content["provenance"], content["items"]
    faults = field_faults("provenance", provenance, _PROVENANCE)
    faults += field_faults("judge", provenance["judge"], _JUDGE) if isinstance(provenance.get("judge"), dict) else []
    faults += [fault for number, row in enumerate(items) for fault in _item_faults(number, row)]
    faults += [] if items else ["items: expected some, got none"]
    if faults:
        return faults
    twice = len(items) - len({row["id"] for row in items})
    return [f"items: {twice} ids are used twice"] * bool(twice) + _metric_faults(content)


def _item_faults(number: int, row: Any) -> list[str]:
    """Fields, two finite numbers for each metric, and spans inside the text."""
    if faults := field_faults(f"item {number}", row, _ITEM):
        return faults
    faults = [
        f"item {number}: parts of {metric!r}: expected two numbers, got {pair!r}"
        for metric, pair in row["parts"].items()
        if not (_are_two(pair, (int, float)) and all(map(math.isfinite, pair)))
    ]
    length = len(row["text"])
    return faults + [
        f"item {number}: spans: expected [start, end] within {length} characters, got {span!r}"
        for span in row["spans"]
        if not (_are_two(span, int) and 0 <= span[0] < span[1] <= length)
    ]


def _are_two(pair: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(value, kind) for value in pair)


def _metric_faults(content: Mapping[str, Any]) -> list[str]:
    """Metrics that the items' parts do not give, as in a file that was changed by hand."""
    items, tolerance = content["items"], _ROUNDING if QUIRKS in content["provenance"]["protocol"] else 1e-6
    faults = []
    for metric, given in ratios(items, dict.fromkeys(metric for row in items for metric in row["parts"])).items():
        said = content["metrics"].get(metric)
        known = isinstance(said, (int, float)) and given is not None
        if abs(said - given) > tolerance if known else said is not given:
            faults.append(f"metric {metric!r}: says {said!r}, but its items give {given!r}")
    return faults


# -------------------------------------------------------------------------------------------------------- refusing


def refuse_different(runs: Sequence[Results]) -> None:
    """ValueError that names everything in which results were made differently from the first."""
    first, *others = runs
    faults = [fault for other in others for fault in _condition_faults(first, other)]
    faults += [fault for other in others for fault in _pairing_faults(first, other)]
    if faults:
        remedy = (
            f"score both in one way, as `python -m eval.evaluate {first.benchmark} CHECKPOINT --compare BASE` does; "
            "figures of other protocols, judges or questions are not comparable"
        )
        raise ValueError(error_list("not comparable", faults, remedy))


def _conditions(run: Results) -> dict[str, Any]:
    """What must be alike, by name."""
    judge = run.judge or dict.fromkeys(("name", "version", "prompt_digest", "temperature"), "no judge")
    return {"benchmark": run.benchmark, "protocol": run.protocol} | {f"judge's {key}": judge[key] for key in judge}


def _condition_faults(first: Results, other: Results) -> Iterator[str]:
    ours, theirs = _conditions(first), _conditions(other)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {ours.get(name)!r} in {first.name}, {theirs.get(name)!r} in {other.name}"


def _pairing_faults(first: Results, other: Results) -> Iterator[str]:
    """Items that only one of them has, and items that are about something else."""
    for run, lacking in ((first, other), (other, first)):
        alone = [id_ for id_ in run.items if id_ not in lacking.items]
        if alone:
            shown = ", ".join(alone[:5]) + ", ..." * (len(alone) > 5)
            yield f"items: {len(alone)} of {len(run.items)} are in {run.name} but not in {lacking.name}: {shown}"
    for field in ("image_id", "prompt", "truth"):
        shared = [id_ for id_ in first.items if id_ in other.items and not _lacks_truth(first, other, id_, field)]
        unlike = [id_ for id_ in shared if first.items[id_][field] != other.items[id_][field]]
        if unlike:
            pair = " and ".join(repr(run.items[unlike[0]][field])[:60] for run in (first, other))
            yield f"items: {len(unlike)} of {len(shared)} have another {field}, e.g. {unlike[0]}: {pair}"


def _lacks_truth(first: Results, other: Results, id_: str, field: str) -> bool:
    """A missing answer is never scored, so its record has the question's truth as text, whatever the benchmark."""
    return field == "truth" and any("missing" in run.items[id_] for run in (first, other))


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Row:
    """A metric of all runs, and of every later one minus the first's; each with its interval."""

    metric: str
    values: tuple[Interval, ...]
    differences: tuple[Interval, ...] = ()


def rows_of(runs: Sequence[Results]) -> list[Row]:
    """Every metric that is made of the items' parts, derived ones first. The runs have the same items.

    A picture is drawn as one, with all its items; an item without picture is drawn by itself.
    """
    ids = list(runs[0].items)
    metrics = list(dict.fromkeys(metric for run in runs for row in run.items.values() for metric in row["parts"]))
    columns = [
        [run.items[id_]["parts"].get(metric, (0.0, 0.0))[side] for id_ in ids]
        for run in runs
        for metric in metrics
        for side in (0, 1)
    ]
    totals, sums = resample(columns, [_picture(runs[0].items[id_]) for id_ in ids])
    shape = len(runs), len(metrics), 2
    values = [_figures(metrics, run) for run in totals.reshape(shape)]
    drawn = [_figures(metrics, run) for run in sums.reshape(*shape, -1)]
    return [
        Row(
            name,
            tuple(interval(value[name], sample[name]) for value, sample in zip(values, drawn)),
            tuple(
                interval(value[name] - values[0][name], sample[name] - drawn[0][name])
                for value, sample in zip(values[1:], drawn[1:])
            ),
        )
        for name in _in_order(values[0], runs[0].metrics)
    ]


def _in_order(names: Collection[str], like: Iterable[str]) -> list[str]:
    """Derived metrics, then the others as results.json has them."""
    return list(dict.fromkeys(name for name in (*DERIVED, *like, *names) if name in names))


def _picture(row: Mapping[str, Any]) -> str:
    return row["image_id"] or row["image"] or f"no picture, item {row['id']}"


def verdict(metric: str, difference: Interval, name: str) -> str:
    """What the interval allows to say of the run called `name` against the first."""
    if difference.low is None or difference.high is None:
        return "undefined"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    better, up = figure_of(metric).better, difference.low > 0
    if better is None:
        return f"{name} {'higher' if up else 'lower'}"
    return f"{name} {'better' if up == (better == 'higher') else 'worse'}"


@dataclass(frozen=True)
class Comparison:
    runs: tuple[Results, ...]
    rows: tuple[Row, ...]

    @cached_property
    def pictures(self) -> int:
        return len({_picture(row) for row in self.runs[0].items.values()})

    @cached_property
    def published(self) -> list[Published]:
        """Of this benchmark, those of its own protocol and judge first."""
        order = ("same", "unknown", "other")
        mine = [entry for entry in read_published() if entry.benchmark == self.runs[0].benchmark]
        return sorted(mine, key=lambda entry: order.index(entry.standing(self.runs[0])))

    @property
    def text(self) -> str:
        return self.report()

    def report(self, published: bool = False) -> str:
        """Tables to be read: each run against the first, then notes, then on request the published results."""
        first = self.runs[0]
        head = f"{TITLES.get(first.benchmark, first.benchmark)}, {made_by(first)}; "
        head += f"{len(first.items)} answers about {self.pictures} pictures"
        beside = [_published_table(self)] if published and self.published else []
        tables = [_difference_table(self, number) for number in range(1, len(self.runs))]
        notes = notes_on(self)
        if not published and self.published:
            notes = [*notes, f"--published shows {len(self.published)} published results of this benchmark below these"]
        return "\n\n".join([head, *tables, "\n".join(notes), *beside])

    def record(self) -> dict[str, Any]:
        """The same for a program."""
        first, others = self.runs[0], self.runs[1:]
        return {
            "benchmark": first.benchmark,
            "protocol": first.protocol,
            "judge": first.judge,
            "answers": len(first.items),
            "pictures": self.pictures,
            "runs": [
                {"name": run.name, "path": str(run.path)}
                | {key: run.provenance[key] for key in ("checkpoint", "fingerprint")}
                for run in self.runs
            ],
            "rows": [
                {
                    "metric": row.metric,
                    "better": figure_of(row.metric).better,
                    "values": [value._asdict() for value in row.values],
                    "differences": [
                        difference._asdict() | {"verdict": verdict(row.metric, difference, run.name)}
                        for run, difference in zip(others, row.differences)
                    ],
                }
                for row in self.rows
            ],
            "published": [entry.record(first) for entry in self.published],
            "notes": notes_on(self),
        }  # fmt: skip


def compare(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> Comparison:
    """Each result against the first. ValueError for fewer than two, for a bad file, and for files made differently."""
    if len(paths) < 2:
        raise ValueError(f"compare: expected two results.json or more, got {len(paths)}")
    runs = read_all(paths, names)
    refuse_different(runs)
    return Comparison(tuple(runs), tuple(rows_of(runs)))


def made_by(run: Results) -> str:
    """Protocol and judge in words."""
    if run.judge is None:
        return f"protocol {run.protocol}"
    version = run.judge["version"] or "version not named"
    warmth = run.judge["temperature"]
    temperature = "its own temperature" if warmth is None else f"temperature {warmth}"
    return f"protocol {run.protocol}, judge {run.judge['name']} ({version}) at {temperature}"


def _difference_table(comparison: Comparison, number: int) -> str:
    first, other = comparison.runs[0], comparison.runs[number]
    lines = [[f"{other.name} - {first.name}", "", first.name, other.name, "difference", "95 % interval"]]
    for row in comparison.rows:
        values, difference = (row.values[0].value, row.values[number].value), row.differences[number - 1]
        title, _, decimals = figure_of(row.metric)
        if values == (None, None):
            continue
        figures = [*(cell(value, decimals) for value in values), signed(difference.value, decimals)]
        words = verdict(row.metric, difference, other.name)
        lines.append([title, words, *figures, bounds(difference, decimals, sign=True)])
    return aligned(lines)


def signed(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:+.{decimals}f}"


def bounds(of: Interval, decimals: int, *, sign: bool = False) -> str:
    """In brackets; empty where undefined."""
    if of.low is None or of.high is None:
        return ""
    form = f"{'+' if sign else ''}.{decimals}f"
    return f"[{of.low:{form}}, {of.high:{form}}]"


def notes_on(comparison: Comparison) -> list[str]:
    """What a reader of the figures must know: everything left out, and every reason to doubt an interval."""
    runs, first = comparison.runs, comparison.runs[0]
    notes = ["Intervals: 95 %, bootstrap over pictures, each figure by itself."]
    if len(runs) > 1:
        notes.append(f"Differences: each minus the base, {first.name}.")
        notes.append("Of 20 figures without any true difference, about one shows a clear one by chance.")
    if comparison.pictures < FEW_PICTURES:
        notes.append(f"Pictures: only {comparison.pictures}, too few for intervals to be relied on.")
    values = {row.metric: [value.value for value in row.values] for row in comparison.rows}
    known = {name for run in runs for name, value in run.metrics.items() if value is not None}
    undefined = [name for name in dict.fromkeys((*values, *first.metrics)) if name not in known]
    apart = [f"{name} {_shown(runs, name)}" for name in first.metrics if name in known and name not in values]
    listed = {"Undefined": undefined, "No sums over items, so without interval": apart}
    notes += [f"{what}: {', '.join(names)}." for what, names in listed.items() if names]
    for count in ("missing", "unparsed", "failed"):
        numbers = {run.name: run.provenance["counts"].get(count, 0) for run in runs}
        if any(numbers.values()):
            notes.append(f"{count.capitalize()}: {', '.join(f'{name} {number}' for name, number in numbers.items())}.")
    if first.judge is not None and not first.judge["version"]:
        notes.append("The judge's version is not named: behind one name it may have changed between the runs.")
    for other in runs[1:]:
        notes += _run_notes(first, other)
    return notes


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
    """(name, value), of AMBER's parts as well."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


# -------------------------------------------------------------------------------------------------------- published


Standing = Literal["same", "unknown", "other"]
_MARKS: dict[Standing, str] = {"same": "", "unknown": "?", "other": "*"}


@dataclass(frozen=True)
class Published:
    """Figures of a model that somebody printed. protocol, judge: None where they do not say.

    sources: who printed them -> what of theirs was read.
    """

    benchmark: str
    model: str
    figures: Mapping[str, float]
    protocol: str | None
    judge: str | None
    sources: Mapping[str, str]
    note: str

    def standing(self, run: Results) -> Standing:
        """Whether they were made as those of the run, as far as the source says."""
        judges = (run.judge["name"], run.judge["version"]) if run.judge else ()
        if self.protocol not in (None, run.protocol) or (judges and self.judge not in (None, *judges)):
            return "other"
        return "unknown" if self.protocol is None or (judges and self.judge is None) else "same"

    def record(self, run: Results) -> dict[str, Any]:
        return {
            "model": self.model,
            "figures": dict(self.figures),
            "protocol": self.protocol,
            "judge": self.judge,
            "comparable": {"same": True, "other": False, "unknown": None}[self.standing(run)],
            "sources": dict(self.sources),
            "note": self.note,
        }


def read_published() -> list[Published]:
    """All that published.json has, in its order."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return [
        Published(
            row["benchmark"],
            row["model"],
            row["figures"],
            row["protocol"],
            row.get("judge"),
            {name: content["sources"][name] for name in row["sources"]},
            row.get("note", ""),
        )
        for row in content["entries"]
    ]


def _published_table(comparison: Comparison) -> str:
    """These runs and the published models, a line each; the marks say what may be compared."""
    first, entries = comparison.runs[0], comparison.published
    mine = {row.metric: row for row in comparison.rows}
    named = dict.fromkeys(metric for entry in entries for metric in entry.figures)
    metrics = _in_order(named.keys(), mine)
    lines = [["published figures", "protocol; source", *(figure_of(metric).title for metric in metrics)]]
    for number, run in enumerate(comparison.runs):
        values = {metric: row.values[number].value for metric, row in mine.items()}
        figures = (cell(values[m], figure_of(m).decimals) if m in mine else "" for m in metrics)
        lines.append([run.name, "this run", *figures])
    for entry in entries:
        mark = _MARKS[entry.standing(first)]
        figures = (f"{entry.figures[m]}{mark}" if m in entry.figures else "" for m in metrics)
        lines.append([entry.model, _making(entry, first.judge is not None), *figures])
    below = ["* made in another way: not comparable; ? made in a way that the source does not state"]
    for note in dict.fromkeys(entry.note for entry in entries if entry.note):
        noted = [f"{entry.model} ({', '.join(entry.sources)})" for entry in entries if entry.note == note]
        below.append(f"{', '.join(noted)}: {note}")
    sources = {name: read for entry in entries for name, read in entry.sources.items()}
    below.append("Sources: " + "; ".join(f"{name} ({read})" for name, read in sources.items()))
    return "\n".join([aligned(lines), *below])


def _making(entry: Published, judged: bool) -> str:
    """Protocol, judge and sources in words."""
    judge = f", judge {entry.judge or 'not stated'}" if judged else ""
    return f"{entry.protocol or 'not stated'}{judge}; {', '.join(entry.sources)}"


# ---------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.json of each model, the base first")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="one for each (default: its checkpoint's)")
    parser.add_argument("--published", action="store_true", help="show published results below these (--json has them)")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object instead of tables")
    args = parser.parse_args(argv)
    try:
        comparison = compare(args.results, args.names)
        record = json.dumps(comparison.record(), indent=2, ensure_ascii=False) if args.json else None
        say(record or comparison.report(args.published))
    except Exception as error:
        report_error(error, "compare")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
