"""A score that rules decide, without a judge: ratios of sums over the items' parts, and the table of models.

What POPE and AMBER share. An answer that cannot be read is right nowhere, is counted, and its item's `wrong` is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.core.judge import Parts
from eval.core.statistics import Interval, ratio_interval
from eval.core.types import Answer, Question


@dataclass(frozen=True)
class Score:
    """metrics: name -> value, None where undefined. items: one record for each answer, as in results.json.

    A metric that is in the items' `parts` is sum(first) / sum(second) over the items that have it; the others are made
    of such ones. counts: answers, missing (questions without one), unparsed. missing: the ids of these questions.
    """

    protocol: str
    metrics: Mapping[str, float | None]
    items: tuple[dict[str, Any], ...]
    counts: Mapping[str, int]
    missing: tuple[str, ...] = ()
    judge: None = None

    def interval(self, metric: str) -> Interval:
        """The metric with its 95 % bootstrap interval over pictures; KeyError for one that is no ratio of sums."""
        having = [item for item in self.items if metric in item["parts"]]
        if not having:
            raise KeyError(metric)
        above, below = zip(*(item["parts"][metric] for item in having))
        return ratio_interval(above, below, [item["image_id"] for item in having])


def record(question: Question, answer: Answer, *, wrong: bool | None, parts: Parts, **extras: Any) -> dict[str, Any]:
    """An answer's record in results.json; `extras` replace or follow the fields that all benchmarks have."""
    return {
        "id": question.id,
        "image_id": question.image_id,
        "image": question.image,
        "prompt": question.prompt,
        "text": answer.text,
        "truth": question.truth,
        "wrong": wrong,
        "spans": [],
        "parts": parts,
    } | extras


def ratios(items: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, float | None]:
    """Each of the metrics from the items' parts; None where there is nothing to divide by."""
    sums = {name: [0.0, 0.0] for name in names}
    for item in items:
        for name, (above, below) in item["parts"].items():
            sums[name][0] += above
            sums[name][1] += below
    return {name: above / below if below else None for name, (above, below) in sums.items()}


def mean(values: Iterable[float | None]) -> float | None:
    """None where one of them is."""
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None) / len(known)


def score_of(
    protocol: str,
    metrics: Mapping[str, float | None],
    items: Sequence[dict[str, Any]],
    questions: Iterable[Question],
) -> Score:
    """The score with its counts; `questions` are those that were to be answered."""
    answered = {item["id"] for item in items}
    missing = tuple(question.id for question in questions if question.id not in answered)
    unparsed = sum(item["wrong"] is None for item in items)
    counts = {"answers": len(items), "missing": len(missing), "unparsed": unparsed}
    return Score(protocol, metrics, tuple(items), counts, missing)


def format_scores(rows: Mapping[str, Score], columns: Mapping[str, tuple[str, int]]) -> str:
    """One aligned line per model, with its protocol; below it what is missing, and how unparsed answers count.

    columns: metric -> (title, decimals).
    """
    lines = [["", "protocol", *(title for title, _ in columns.values()), "unparsed"]]
    for name, score in rows.items():
        cells = [cell(score.metrics[metric], decimals) for metric, (_, decimals) in columns.items()]
        lines.append([name, score.protocol, *cells, f"{score.counts['unparsed']} of {score.counts['answers']}"])
    notes = [f"{name}: no answer to {len(score.missing)} questions" for name, score in rows.items() if score.missing]
    notes += [
        f"{name}: {score.counts['unparsed']} unparsed answers are right in no metric; they lower accuracy and recall"
        for name, score in rows.items()
        if score.counts["unparsed"]
    ]
    return "\n".join([aligned(lines), *notes])


def cell(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = [str.ljust, str.ljust, *[str.rjust] * len(widths)]
    return "\n".join("  ".join(side(c, w) for side, c, w in zip(sides, line, widths)) for line in lines)
