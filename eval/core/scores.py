"""The score of one model on one benchmark, and the table of several models' scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.core.metrics import Grouping, Metric, derived, ratios, resampling_units, with_groups
from eval.core.statistics import Interval, paired_difference, ratio_interval
from eval.core.types import Question, Record

QUIRKS = "-official-quirks"  # ends the label of a protocol that reproduces the original scorer's handling


@dataclass(frozen=True)
class Score:
    """The score of one model.

    metrics: name -> value, None where undefined. items: one record for each answer, as in results.json. A metric in the
    items' `parts` is sum(first) / sum(second) over the items that have it. counts: answers, missing (questions without
    answer), unparsed (answers, or verdicts, that cannot be read) and others. missing: ids of the questions without
    answer. judge: its entry in results.json, None for rules. by_run: the first metric in each round of a judge.
    """

    protocol: str
    metrics: Mapping[str, float | None]
    items: tuple[Record, ...]
    counts: Mapping[str, int]
    missing: tuple[str, ...] = ()
    judge: Mapping[str, Any] | None = None
    by_run: tuple[float | None, ...] = ()

    def interval(self, metric: str) -> Interval:
        """Compute the metric with its 95 % bootstrap interval over images; KeyError unless it is a ratio of sums."""
        having = [item for item in self.items if metric in item["parts"]]
        if not having:
            if self.items or metric not in self.metrics:
                raise KeyError(metric)
            return Interval(None, None, None)
        return ratio_interval(*_columns(having, metric), resampling_units(having))


def score_items(
    protocol: str,
    metrics: Sequence[Metric],
    items: Sequence[Record],
    questions: Iterable[Question],
    *,
    groupings: Sequence[Grouping] = (),
    others: Mapping[str, float | None] | None = None,
    counts: Mapping[str, int] | None = None,
    **facts: Any,
) -> Score:
    """Compute a score from the records of the answers.

    metrics: all metrics of the benchmark. questions: those that were to be answered. others: values of the metrics that
    are neither ratios of the items' parts nor derived. counts: beside, or instead of, those of answers. facts: `judge`
    and `by_run` of the score. Raises ValueError for an answer id used twice,
    KeyError for parts of a metric that is not among `metrics`.
    """
    questions, ids = list(questions), [item["id"] for item in items]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"{protocol}: expected one answer to each question, got {len(ids) - len(set(ids))} more\n"
            "Remedy: give every answer an id of its own"
        )
    records, group_counts = with_groups(items, questions, groupings)
    values = ratios(records, [metric.name for metric in metrics if metric.formula is None]) | dict(others or {})
    values |= derived(metrics, values)
    answered = {item["id"] for item in records}
    missing = tuple(question.id for question in questions if question.id not in answered)
    unparsed = sum(item["wrong"] is None for item in records)
    counted = {"answers": len(records), "missing": len(missing), "unparsed": unparsed} | dict(counts or {})
    ordered = {metric.name: values[metric.name] for metric in metrics}
    return Score(protocol, ordered, tuple(records), counted | group_counts, missing, **facts)


def difference(first: Score, second: Score, metrics: Iterable[str]) -> dict[str, Interval]:
    """Compute first - second per metric, with a paired bootstrap interval.

    Raises ValueError unless both scores have the same questions.
    """
    ours, theirs = ({item["id"]: item for item in score.items} for score in (first, second))
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"paired difference: expected the same questions in both scores, got {len(ours.keys() ^ theirs.keys())} "
            f"question ids in only one of the two (of {len(ours)} and {len(theirs)})\n"
            "Remedy: score both models on the same questions"
        )
    items, others = list(ours.values()), [theirs[key] for key in ours]
    units = resampling_units(items)
    return {name: paired_difference(_columns(items, name), _columns(others, name), units) for name in metrics}


def _columns(items: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """Numerators and denominators, 0 / 0 for an item without the metric."""
    pairs = [item["parts"].get(metric, (0.0, 0.0)) for item in items]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# ---------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class TableColumn:
    """A column of a benchmark's own table; interval: whether the value comes with its 95 % interval."""

    metric: str
    title: str
    decimals: int = 1
    interval: bool = False


@dataclass(frozen=True)
class Table:
    """A benchmark's own table: one aligned line per model, and below it what is missing or could not be read.

    protocol, unparsed: whether there are columns of these. note: what an unparsed answer or verdict is, and its effect.
    """

    columns: tuple[TableColumn, ...]
    protocol: bool = True
    unparsed: bool = True
    note: str = "unparsed, in no metric"

    def __call__(self, rows: Mapping[str, Score]) -> str:
        """Format scores; rows: name of the model -> score."""
        titles = (column.title for column in self.columns)
        lines = [["", *["protocol"] * self.protocol, *titles, *["unparsed"] * self.unparsed]]
        for name, score in rows.items():
            cells = [_cell_of(score, column) for column in self.columns]
            lines.append([name, *[score.protocol] * self.protocol, *cells, *[_unparsed(score)] * self.unparsed])
        notes = [note for name, score in rows.items() for note in self._notes(name, score)]
        return "\n".join([aligned(lines, left=1 + self.protocol), *notes])

    def _notes(self, name: str, score: Score) -> list[str]:
        unread = [item["id"] for item in score.items if None in item.get("values", (item["wrong"],))]
        quirks = " (given the original scorer's value)" * score.protocol.endswith(QUIRKS)
        notes = {self.note + quirks: (unread, len(score.items))}
        notes["no answer"] = (list(score.missing), len(score.items) + len(score.missing))
        return [f"{name}: {what}: {len(ids)} of {total}: {some_of(ids)}" for what, (ids, total) in notes.items() if ids]


def _cell_of(score: Score, column: TableColumn) -> str:
    interval = score.interval(column.metric) if column.interval else Interval(None, None, None)
    if interval.value is None:
        return cell(score.metrics[column.metric], column.decimals)
    value, low, high = (cell(number, column.decimals) for number in interval)
    return f"{value} [{low}, {high}]"


def _unparsed(score: Score) -> str:
    """Count verdicts where a judge gave some, else answers."""
    counts = score.counts
    return f"{counts['unparsed'] + counts.get('failed', 0)} of {counts.get('verdicts', counts['answers'])}"


def some_of(names: Sequence[str], count: int = 20) -> str:
    """List the first of the names, and say that there are more."""
    return ", ".join(names[:count]) + ", ..." * (len(names) > count)


def cell(value: float | None, decimals: int) -> str:
    """Format a value, n/a for None."""
    return "n/a" if value is None else f"{value:.{decimals}f}"


def aligned(lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """Align the first `left` columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = [*[str.ljust] * left, *[str.rjust] * len(widths)]
    return "\n".join("  ".join(side(c, w) for side, c, w in zip(sides, line, widths)) for line in lines)
