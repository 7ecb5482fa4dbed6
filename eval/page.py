"""One self-contained HTML page of a run: every answer with its picture, what is wrong in it marked, and the figures.

    python -m eval.page RESULTS.json [OTHER.json] --images FOLDER [--names BASE ALIGNED] [--out page.html]

With two results each picture has both answers side by side. Text of a model is untrusted: the template escapes all of
it, the page's script sets it as text only, and the page's policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dama.console import report_error, say, write_atomic
from dama.images import UNREADABLE, ImageFolder, as_rgb, folders_of, open_image, resolve_image, validate_size
from dama.pages import render_page
from dama.report import cut_at_spans
from eval.compare import (
    TITLES,
    Comparison,
    Results,
    Row,
    bounds,
    figure_of,
    made_by,
    notes_on,
    read_all,
    refuse_different,
    rows_of,
    signed,
    verdict,
)
from eval.core.scores import cell
from eval.core.statistics import Interval

SIDE = 400  # pixels of a picture's longer side: a thousand photographs make a page of about 30 MB
PAGE = "page.html"

# What the benchmark calls a wrong answer.
WRONG = {
    "objhal": "names an object that is not in the picture",
    "amber": "invents an object, or answers a question falsely",
    "mmhal": "is rated below 3 of 6",
    "llavabench": "is scored below the reference answer",
    "mmvet": "is graded less than half right",
    "pope": "is not the labelled yes or no",
}
OUTCOMES: dict[bool | None, str] = {True: "wrong", False: "right", None: "unparsed"}
# What can be filtered by, for one result and for two: state -> its name on the page.
STATES = {"wrong": "Wrong", "right": "Right", "unparsed": "Unparsed"}
MISSING = ("missing", "No answer")  # the state of an item that some result has no answer to, and its name
PAIR_STATES = {
    "wrong right": "Wrong → right",
    "right wrong": "Right → wrong",
    "wrong wrong": "Wrong in both",
    "right right": "Right in both",
    "unparsed": "Unparsed",
}
_TAGS = ("kinds", "part", "split", "dimensions")  # fields of a record that say which class of items it belongs to


def write_page(
    results_path: str | Path,
    out: str | Path,
    images_folder: ImageFolder,
    other: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Path:
    """Writes the page of one results.json, or of two with their differences, the first being the base.

    Raises ValueError for a bad file, for two that are not comparable, and where not one picture is in the folder.
    """
    runs = read_all([results_path, *([] if other is None else [other])], names)
    refuse_different(runs)
    comparison = Comparison(tuple(runs), tuple(rows_of(runs)))
    wanted = dict.fromkeys(row["image"] for row in runs[0].items.values() if row["image"])
    pictures, faults = read_pictures(list(wanted), images_folder)
    write_atomic(out, render(comparison, pictures, faults))
    for fault in faults:
        say(f"picture left out: {fault}")
    size = Path(out).stat().st_size / 1e6
    say(f"page: {out}, {len(runs[0].items)} items, {len(pictures)} pictures, {size:.1f} MB")
    return Path(out)


# --------------------------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """A data URL and the size in pixels, so that the page keeps its shape while it loads."""

    url: str
    width: int
    height: int


def read_pictures(names: Sequence[str], folder: ImageFolder) -> tuple[dict[str, Picture], list[str]]:
    """Name -> picture, scaled down; and a line for each that cannot be shown. ValueError where none can be."""

    def read(name: str) -> Picture | str:
        try:
            return shrunk(resolve_image(folder, name))
        except UNREADABLE as error:
            return f"{name} ({type(error).__name__}: {error})"

    with ThreadPoolExecutor() as readers:
        results = tqdm(readers.map(read, names), total=len(names), desc="pictures", disable=len(names) < 100)
        found = dict(zip(names, results))
    faults = [fault for fault in found.values() if isinstance(fault, str)]
    if names and len(faults) == len(names):
        raise ValueError(
            f"{folders_of(folder)[-1]}: expected {len(names)} pictures, got none that can be shown, e.g. {faults[0]}\n"
            "Remedy: give the benchmark's image folder as --images"
        )
    return {name: picture for name, picture in found.items() if isinstance(picture, Picture)}, faults


def shrunk(path: Path) -> Picture:
    """A JPEG of at most SIDE pixels a side, not turned by its EXIF data: so the model saw it."""
    with open_image(path) as image:
        validate_size(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = as_rgb(image)
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return Picture("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *small.size)


# ------------------------------------------------------------------------------------------------------------ items


def item_view(records: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> dict[str, Any]:
    """What the page's script is given of an item; records: of one run or of two. numbers: picture -> its place."""
    first = records[0]
    return {
        "id": first["id"],
        "image": first["image"],
        "picture": numbers.get(first["image"], -1),
        "prompt": first["prompt"],
        "truth": first["truth"] if isinstance(first["truth"], list) else [first["truth"]],
        "context": first.get("context", ""),
        "tags": tags_of(first),
        "state": state_of(records),
        "answers": [_answer_view(record) for record in records],
    }


def _answer_view(record: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = [text or "(no reply)" for text in record.get("verdicts", ())]
    return {
        "outcome": _outcome(record),
        "pieces": marked(record),
        "facts": list(_facts(record)),
        "verdicts": verdicts,
    }


def state_of(records: Sequence[Mapping[str, Any]]) -> str:
    """One of STATES, or of PAIR_STATES, or MISSING's."""
    outcomes = [_outcome(record) for record in records]
    return next((state for state in ("unparsed", MISSING[0]) if state in outcomes), " ".join(outcomes))


def _outcome(record: Mapping[str, Any]) -> str:
    return MISSING[0] if record.get("missing") else OUTCOMES[record["wrong"]]


def tags_of(record: Mapping[str, Any]) -> list[str]:
    """The classes that an item belongs to: a kind of question, a split, a dimension."""
    values = [record.get(field, []) for field in _TAGS]
    return list(dict.fromkeys(tag for value in values for tag in ([value] if isinstance(value, str) else value)))


def marked(record: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """The answer in pieces: hallucinated, correct, or None. Of overlapping marks the first counts, wrong before right.

    In pieces and not by offsets, because a browser counts some characters twice.
    """
    named = [*record.get("mentions", ()), *record.get("nouns", ())]  # of Object HalBench, of AMBER
    spans = [(start, end, "hallucinated") for start, end in record["spans"]]
    spans += [(mark["start"], mark["end"], "correct") for mark in named if mark["correct"]]
    kept: list[Any] = []
    for start, end, kind in spans:
        if start < end and all(end <= other[0] or start >= other[1] for other in kept):
            kept.append((start, end, kind))
    return cut_at_spans(record["text"], kept)


def _facts(record: Mapping[str, Any]) -> Iterable[str]:
    """What the scorer found in an answer, in words."""
    if record.get("missing"):
        yield f"no answer: {record['missing']}"
    if record["spans"]:
        yield f"{len(record['spans'])} hallucinated"
    if record.get("missed"):
        yield f"not named: {', '.join(record['missed'])}"
    if record.get("said"):
        yield f"read as {record['said']}"
    if values := [_value(value) for value in record.get("values", ())]:
        yield f"judged {', '.join(values)}"


def _value(value: Any) -> str:
    """A rating, a grade, or the reference's score and the answer's."""
    if isinstance(value, list):
        reference, answer = value
        return f"{answer:g} (reference {reference:g})"
    return "unreadable" if value is None else f"{value:g}"


# ---------------------------------------------------------------------------------------------------------- figures


def row_view(row: Row, runs: Sequence[Results]) -> dict[str, Any]:
    title, better, decimals = figure_of(row.metric)
    view: dict[str, Any] = {
        "title": title,
        "better": better,
        "cells": [(cell(value.value, decimals), bounds(value, decimals)) for value in row.values],
    }
    for run, difference in zip(runs[1:], row.differences):
        words = verdict(row.metric, difference, run.name)
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
    """Left and right end of the interval and its dot, in percent from either side; zero is in the middle."""
    if difference.value is None or difference.low is None or difference.high is None:
        return None
    reach = _reach(difference)
    left, right, dot = (50 + 50 * value / reach for value in (difference.low, difference.high, difference.value))
    return round(left, 1), round(100 - right, 1), round(dot, 1)


def _reach(difference: Interval) -> float:
    """The value at the right end of the bar; minus this at its left end."""
    return 1.05 * max(abs(difference.low or 0.0), abs(difference.high or 0.0)) or 1.0


def _scale(difference: Interval, decimals: int) -> tuple[str, str]:
    """The values at both ends of the bar."""
    reach = _reach(difference)
    return signed(-reach, decimals), signed(reach, decimals)


def is_of_kind(metric: str, tags: Iterable[str]) -> bool:
    """Whether a metric is that of one class of items, such as relation_f1, score_counting or ocr."""
    return any(metric == tag or metric.startswith(f"{tag}_") or metric.endswith(f"_{tag}") for tag in tags)


# ------------------------------------------------------------------------------------------------------------- page


def render(comparison: Comparison, pictures: Mapping[str, Picture], faults: Sequence[str] = ()) -> str:
    """The page as text. faults: pictures that it lacks."""
    return render_page("page.html.jinja", Path(__file__).parent, **_view(comparison, pictures, faults))


def _view(comparison: Comparison, pictures: Mapping[str, Picture], faults: Sequence[str]) -> dict[str, Any]:
    runs, first = comparison.runs, comparison.runs[0]
    numbers = {name: number for number, name in enumerate(pictures)}
    items = [item_view([run.items[id_] for run in runs], numbers) for id_ in first.items]
    states = Counter(item["state"] for item in items)
    tags = Counter(tag for item in items for tag in item["tags"])
    named = (STATES, PAIR_STATES)[len(runs) - 1] | dict([MISSING] * (states[MISSING[0]] > 0))
    rows = [row for row in comparison.rows if any(value.value is not None for value in row.values)]
    by_kind = [is_of_kind(row.metric, tags) for row in rows]
    title = TITLES.get(first.benchmark, first.benchmark)
    notes = notes_on(comparison)
    if faults:
        notes.append(f"Pictures that could not be shown: {len(faults)}, e.g. {faults[0]}.")
    return {
        "title": f"{title}: {' beside '.join(run.name for run in runs)}",
        "lead": f"{len(items):,} answers about {comparison.pictures:,} pictures; {made_by(first)}.",
        "wrong": WRONG.get(first.benchmark),
        "marked": any(kind for item in items for answer in item["answers"] for _, kind in answer["pieces"]),
        "names": [run.name for run in runs],
        "rows": [row_view(row, runs) for row, apart in zip(rows, by_kind) if not apart],
        "rows_by_kind": [row_view(row, runs) for row, apart in zip(rows, by_kind) if apart],
        "notes": notes,
        "states": {state: (name, states[state]) for state, name in named.items()},
        "tags": dict(tags) if len(tags) > 1 else {},
        "items": items,
        "pictures": list(pictures.values()),
        "provenance": _provenance(runs),
    }


def _provenance(runs: Sequence[Results]) -> dict[str, str]:
    """What the figures depend on, one line each."""
    lines = {"benchmark": runs[0].benchmark, "made by": made_by(runs[0])}
    for run in runs:
        facts = run.provenance
        lines[run.name] = f"{facts['checkpoint']}, weights {facts['fingerprint']}"
        for field in ("decoding", "counts"):
            lines[f"{run.name}, {field}"] = ", ".join(f"{name} {value}" for name, value in facts[field].items())
    return lines


# ---------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results.json of the run, or of the base")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="results.json to set beside it")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="the benchmark's pictures")
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
