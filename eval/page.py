"""One self-contained HTML page of a run: every answer with its image, what is wrong in it marked, and the metrics.

    python -m eval.page RESULTS.json [OTHER.json] --images FOLDER [--names BASE ALIGNED] [--out page.html]

With two results each image has both answers side by side. Text of a model is untrusted: the template escapes all of
it, the page's script sets it as text only, and the page's policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dama.console import log, report_error, write_atomic
from dama.images import ImageFolder
from dama.pages import render_page
from eval.compare import Comparison, Row, comparison_of, notes_on
from eval.core.scores import cell
from eval.core.statistics import Interval
from eval.page_images import PageImage, read_images
from eval.page_items import MISSING, ItemView, item_view, packed
from eval.results import Results, read_all
from eval.wording import bounds, made_by, signed, verdict

PAGE = "page.html"
# What can be filtered by, for one result and for two: state -> its name on the page.
STATES = {"wrong": "Wrong", "right": "Right", "unparsed": "Unparsed"}
PAIR_STATES = {
    "wrong right": "Wrong → right",
    "right wrong": "Right → wrong",
    "wrong wrong": "Wrong in both",
    "right right": "Right in both",
    "unparsed": "Unparsed",
}


def write_page(
    results_path: str | Path,
    out: str | Path,
    images_folder: ImageFolder,
    other: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Path:
    """Write the page of one results.json, or of two with their differences, the first being the base.

    Raises ValueError for a bad file, for two that are not comparable, and where no image of the folder can be shown.
    """
    comparison = comparison_of(read_all([results_path, *([] if other is None else [other])], names))
    items = comparison.runs[0].items
    wanted = dict.fromkeys(row["image"] for row in items.values() if row["image"])
    images, errors = read_images(list(wanted), images_folder)
    write_atomic(out, render(comparison, images, errors))
    for error in errors:
        log(f"image left out: {error}")
    size = Path(out).stat().st_size / 1e6
    log(f"page: {out}, {len(items)} items, {len(images)} images, {size:.1f} MB")
    return Path(out)


# --------------------------------------------------------------------------------------------------------- metrics


def row_view(row: Row, runs: Sequence[Results]) -> dict[str, Any]:
    """Return what the page's table shows of a metric."""
    benchmark = runs[0].benchmark
    metric = benchmark.metric(row.metric)
    decimals = metric.decimals
    view: dict[str, Any] = {
        "title": metric.title,
        "better": metric.better,
        "cells": [(cell(value.value, decimals), bounds(value, decimals)) for value in row.values],
    }
    for run, difference in zip(runs[1:], row.differences):
        words = verdict(benchmark, row.metric, difference, run.name)
        view["difference"] = {
            "text": signed(difference.value, decimals),
            "interval": bounds(difference, decimals, sign=True),
            "words": words,
            "kind": words.split()[-1] if words.endswith(("better", "worse")) else "",
            "bar": _bar(difference),
            "scale": _scale(difference, decimals),
        }
    return view


def _bar(difference: Interval) -> tuple[float, float, float] | None:
    """Return left and right end of the interval and its dot, in percent from either side; zero is in the middle."""
    if difference.value is None or difference.low is None or difference.high is None:
        return None
    reach = _reach(difference)
    left, right, dot = (50 + 50 * value / reach for value in (difference.low, difference.high, difference.value))
    return round(left, 1), round(100 - right, 1), round(dot, 1)


def _reach(difference: Interval) -> float:
    """Return the value at the right end of the bar; the left end is its negative."""
    return 1.05 * max(abs(difference.low or 0.0), abs(difference.high or 0.0)) or 1.0


def _scale(difference: Interval, decimals: int) -> tuple[str, str]:
    """Format the values at both ends of the bar."""
    reach = _reach(difference)
    return signed(-reach, decimals), signed(reach, decimals)


def is_of_kind(metric: str, tags: Iterable[str]) -> bool:
    """Whether a metric is that of one class of items: it begins or ends with the class's name."""
    return any(metric == tag or metric.startswith(f"{tag}_") or metric.endswith(f"_{tag}") for tag in tags)


# ------------------------------------------------------------------------------------------------------------- page


def render(comparison: Comparison, images: Mapping[str, PageImage], errors: Sequence[str] = ()) -> str:
    """Return the page as text. errors: images that could not be shown."""
    return render_page("page.html.jinja", Path(__file__).parent, **_view(comparison, images, errors))


def _view(comparison: Comparison, images: Mapping[str, PageImage], errors: Sequence[str]) -> dict[str, Any]:
    runs, first = comparison.runs, comparison.runs[0]
    stored = {image: number for number, image in enumerate(dict.fromkeys(images.values()))}
    numbers = {name: stored[image] for name, image in images.items()}
    items = [item_view([run.items[id_] for run in runs], numbers) for id_ in first.items]
    states = Counter(item.state for item in items)
    tags = Counter(tag for item in items for tag in item.tags)
    named = (STATES, PAIR_STATES)[len(runs) - 1] | dict([MISSING] * (states[MISSING[0]] > 0))
    notes = notes_on(comparison)
    if errors:
        notes.append(f"Images that could not be shown: {len(errors)}, e.g. {errors[0]}.")
    return {
        "title": f"{first.title}: {' beside '.join(run.name for run in runs)}",
        "lead": f"{len(items):,} answers about {comparison.images:,} images; {made_by(first)}.",
        "wrong": comparison.benchmark.wrong,
        "marked": _has_marks(items),
        "names": [run.name for run in runs],
        **_tables(comparison, tags),
        "notes": notes,
        "states": {state: (name, states[state]) for state, name in named.items()},
        "tags": dict(tags) if len(tags) > 1 else {},
        "item_count": len(items),
        "items": packed(items),
        "images": list(stored),
        "provenance": _provenance(runs),
    }


def _has_marks(items: Iterable[ItemView]) -> bool:
    return any(mark for item in items for answer in item.answers for _, mark in answer.pieces)


def _tables(comparison: Comparison, tags: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the table, and those of the table of metrics of one class of items."""
    tables: dict[str, list[dict[str, Any]]] = {"rows": [], "rows_by_kind": []}
    for row in comparison.rows:
        if any(value.value is not None for value in row.values):
            table = "rows_by_kind" if is_of_kind(row.metric, tags) else "rows"
            tables[table].append(row_view(row, comparison.runs))
    return tables


def _provenance(runs: Sequence[Results]) -> dict[str, str]:
    """Return what the metrics depend on, one line each."""
    lines = {"benchmark": runs[0].provenance["benchmark"], "made by": made_by(runs[0])}
    for run in runs:
        facts = run.provenance
        lines[run.name] = f"{facts['checkpoint']}, weights {facts['fingerprint']}"
        for name in ("decoding", "counts"):
            lines[f"{run.name}, {name}"] = ", ".join(f"{key} {value}" for key, value in facts[name].items())
    return lines


# ---------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results.json of the run, or of the base")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="results.json to show beside it")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="the benchmark's image folder")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="one for each result (default: its checkpoint's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {PAGE} beside the first results.json")
    args = parser.parse_args(argv)
    try:
        out = args.out or args.results.with_name(PAGE)
        write_page(args.results, out, args.images, args.other, names=args.names)
    except Exception as error:
        report_error(error, "page")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
