"""Metrics and how they are made of the items' parts: ratios of sums, formulas of other metrics, and groups of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.core.statistics import Array, ratio, resample
from eval.core.types import Parts, Question, Record


@dataclass(frozen=True)
class Metric:
    """A metric as results.json, tables and pages show it.

    better: the direction of improvement, None where neither is. inputs, formula: the metrics that it is derived from,
    and how, element-wise on arrays; without a formula it is sum(numerators) / sum(denominators) of the items' `parts`.
    """

    name: str
    title: str
    better: Literal["lower", "higher"] | None = "higher"
    decimals: int = 1
    inputs: tuple[str, ...] = ()
    formula: Callable[..., Array] | None = None


@dataclass(frozen=True)
class Grouping:
    """Items that are scored together, such as the two questions about one image.

    key: question -> name of its group, None for a question that is in no group. parts: the records of one group, in the
    order of the questions -> metric -> [numerator, denominator]. A group of which an answer is missing is counted and
    excluded.
    """

    name: str
    key: Callable[[Question], str | None]
    parts: Callable[[Sequence[Record]], Parts]


def ratios(items: Iterable[Record], names: Iterable[str]) -> dict[str, float | None]:
    """Compute each of the metrics from the items' parts; None where the denominator is 0."""
    sums = {name: [0.0, 0.0] for name in names}
    for item in items:
        for name, (above, below) in item["parts"].items():
            sums[name][0] += above
            sums[name][1] += below
    return {name: above / below if below else None for name, (above, below) in sums.items()}


def derived(metrics: Sequence[Metric], values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Compute the derived metrics whose inputs are all among the values; None where an input is undefined."""
    found: dict[str, float | None] = {}
    for metric in metrics:
        if metric.formula is not None and all(name in values for name in metric.inputs):
            inputs = [values[name] for name in metric.inputs]
            found[metric.name] = None if None in inputs else float(np.asarray(metric.formula(*inputs)))
    return found


def from_sums(metrics: Sequence[Metric], names: Sequence[str], sums: Array) -> dict[str, Array]:
    """Compute metric -> value, derived metrics first; NaN where undefined.

    sums: [M, 2, ...], numerators and denominators of the M metrics `names` that are made of parts.
    """
    plain = {name: ratio(*pair) for name, pair in zip(names, sums)}
    made = {
        metric.name: metric.formula(*(plain[name] for name in metric.inputs))
        for metric in metrics
        if metric.formula is not None and all(name in plain for name in metric.inputs)
    }
    return made | plain


def resampled(
    metrics: Sequence[Metric], names: Sequence[str], runs: Sequence[Mapping[str, Record]]
) -> list[dict[str, Array]]:
    """Compute each run's metric -> values in the same bootstrap resamples for all, [1 + RESAMPLES].

    Column 0 is the data themselves. names: metrics that are made of parts; those derived from them are added. runs: id
    -> record of each, with the same ids. An image is resampled with all its items, and with the images that share a
    group with it; an item without image is resampled by itself.
    """
    ids = list(runs[0])
    columns = [
        [run[id_]["parts"].get(name, (0.0, 0.0))[side] for id_ in ids]
        for run in runs
        for name in names
        for side in (0, 1)
    ]
    totals, sums = resample(columns, resampling_units([runs[0][id_] for id_ in ids]))
    both = np.concatenate([totals[:, None], sums], axis=1).reshape(len(runs), len(names), 2, -1)
    return [from_sums(metrics, names, run) for run in both]


# ---------------------------------------------------------------------------------------------------------- groups


def with_groups(
    records: Sequence[Record], questions: Iterable[Question], groupings: Iterable[Grouping]
) -> tuple[list[Record], dict[str, int]]:
    """Add the groups' parts to the first record of each group, and to all of its records the name of their group.

    Returns the records, and for each grouping the number of groups that lack an answer ("incomplete NAME").
    """
    questions, found = list(questions), {record["id"]: record | {"parts": dict(record["parts"])} for record in records}
    counts: dict[str, int] = {}
    for grouping in groupings:
        members: dict[str, list[str]] = {}
        for question in questions:
            if (name := grouping.key(question)) is not None:
                members.setdefault(name, []).append(question.id)
        incomplete = 0
        for name, ids in members.items():
            group = [found[id_] for id_ in ids if id_ in found]
            for record in group:
                record["groups"] = record.get("groups", {}) | {grouping.name: name}
            if len(group) == len(ids):
                group[0]["parts"] |= grouping.parts(group)
            incomplete += len(group) < len(ids)
        counts[f"incomplete {grouping.name}"] = incomplete
    return list(found.values()), counts


def resampling_units(records: Sequence[Record]) -> list[str]:
    """Name the unit that each record is resampled with: its image, together with all images that share a group.

    A record without image is resampled by itself, or with its group. The name is that of the unit's first image.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    images = [image_of(record) for record in records]
    for image, record in zip(images, records):
        for grouping, name in record.get("groups", {}).items():
            first, second = root(image), root(f"{grouping}\0{name}")
            parents[second] = first
    units = [root(image) for image in images]
    first_image: dict[str, str] = {}
    for unit, image in zip(units, images):
        first_image.setdefault(unit, image)
    return [first_image[unit] for unit in units]


def image_of(record: Record) -> str:
    """Name a record's image, or the record itself where it has none."""
    return record["image_id"] or record["image"] or f"no image, item {record['id']}"
