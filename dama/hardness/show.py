"""A page and an image of what the stage found: the spread of delta, how far it is length, and pairs with scores."""

from __future__ import annotations

import io
import json
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from dama.console import write_atomic
from dama.corruptions import FIELD, OTHER_IMAGE, PIXEL_CORRUPTIONS, corrupted, other_number
from dama.hardness.score import REDUCTIONS, SIDES, STAGE, correlation, hardness_delta, length_differences, spread
from dama.images import ImageFolder, load_image, resolve_image
from dama.pages import render_page
from dama.report import Hardness, draw_hardness, draw_points, plot_style, svg_of, url_of
from dama.stage import MANIFEST, Record, StageError, read_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM = "random"  # as in dama.hardness.clip, which imports torch
SOURCES_SHOWN = 4  # the others are one group
SPREAD = {"pairs": "{:d}", "mean": "{:+.4f}", "sd": "{:.4f}", "min": "{:+.4f}", "max": "{:+.4f}", "negative": "{:.1%}"}
LEAD = (
    "δ is how much better CLIP finds the preferred answer than the rejected one: the sum (or mean) of the scores of "
    "its statements, less the other's. Where it is large the pair is easy, near zero hard; where it is negative CLIP "
    "prefers the rejected answer."
)


class Plot(NamedTuple):
    """A plot of the page."""

    name: str
    title: str
    draw: Callable[[Axes], None]


class SecondImages(NamedTuple):
    """A pair's image and what it becomes as a second image, in the order in which they are shown."""

    pair: str  # its id
    images: dict[str, Image.Image]  # by corruption; the pair's own first


@dataclass(frozen=True)
class Group:
    """Some of the pairs, and why these."""

    title: str
    note: str
    records: list[Record]


def write_hardness_page(
    folder: str | Path,
    out: str | Path,
    image_folder: ImageFolder | None = None,
    count: int = 6,
    *,
    corruption_seed: int = 0,
) -> tuple[Path, Path]:
    """Write out/hardness.html and out/hardness.png of the stage in `folder`, `count` pairs in each group.

    The second images are those of a training with this `corruption_seed`, of the first pair of each group.

    Images are read from `image_folder`, or from the folder that the manifest names where that is inside `folder`: a
    manifest of somebody else could name any other. Raises StageError where the stage is not complete or the images are
    not there.
    """
    manifest, records = read_stage(folder, STAGE)
    if missing := sorted({"image", "source", "kind", "chosen_words", "rejected_words"}.difference(*records[:1])):
        remedy = "an earlier version wrote it: run `python -m dama hardness` with --overwrite"
        raise StageError(f"{folder}: its records have no {', '.join(missing)}\nRemedy: {remedy}")
    groups = pick_groups(records, count)
    source = image_folder or _own_image_folder(Path(folder), manifest)
    loaded_images = _load_images([record["image"] for group in groups for record in group.records], source)
    seconds = second_images(records, [group.records[0] for group in groups], loaded_images, source, corruption_seed)
    page, image = Path(out) / "hardness.html", Path(out) / "hardness.png"
    write_atomic(page, render(manifest, records, groups, loaded_images, seconds))
    write_atomic(image, draw_sheet(manifest, records, groups, loaded_images))
    return page, image


def pick_groups(records: Sequence[Record], count: int) -> list[Group]:
    """The easiest pairs, the hardest that CLIP still ranks rightly, and the most negative; empty groups left out."""
    by_delta = sorted(records, key=lambda record: (record["delta"], record["id"]))
    right = [record for record in by_delta if record["delta"] >= 0]
    negative = [record for record in by_delta if record["delta"] < 0]
    groups = [
        Group("Easiest pairs", "Largest δ: the preferred answer plainly fits the image better.", right[::-1][:count]),
        Group("Hardest pairs", "Smallest δ that is not negative: CLIP hardly tells the answers apart.", right[:count]),
        Group("Negative pairs", "Smallest δ: CLIP prefers the rejected answer.", negative[:count]),
    ]
    return [group for group in groups if group.records]


def _own_image_folder(folder: Path, manifest: Record) -> Path:
    """The image folder that the manifest names. Raises StageError where it is outside the stage's own folder."""
    named = manifest["summary"].get("image_folder")
    remedy = "give the folder that holds the images as --image_folder"
    if not isinstance(named, str) or not Path(named).resolve().is_relative_to(folder.resolve()):  # a list neither
        got = f"{named!r}, which is not inside {folder}"
        raise StageError(f"{folder / MANIFEST}: image_folder is {got}, so it is not read unasked\nRemedy: {remedy}")
    return Path(named)


def _load_images(names: Sequence[str], image_folder: ImageFolder) -> dict[str, Image.Image]:
    try:
        return {name: load_image(resolve_image(image_folder, name)) for name in dict.fromkeys(names)}
    except OSError as error:
        raise StageError(f"{error}\nRemedy: give the folder that contains the images now as --image_folder") from error


def second_images(
    records: Sequence[Record],
    shown: Sequence[Record],
    loaded_images: dict[str, Image.Image],
    image_folder: ImageFolder,
    seed: int,
) -> list[SecondImages]:
    """Every corruption of some pairs' images, as a training on all `records` with this seed makes them.

    Args:
        shown: the pairs. loaded_images: at least theirs, by name.
    """
    names = list(dict.fromkeys(name for record in records for name in record.get("images", [record["image"]])))
    found = []
    for record in shown:
        own, images = loaded_images[record["image"]], {"own image": loaded_images[record["image"]]}
        images |= {name: corrupted(own, name, seed, record["id"]) for name in PIXEL_CORRUPTIONS}
        files = {FIELD: record["second_image"]} if record.get("second_image") else {}
        if len(names) > 1:
            number = other_number(names.index(record["image"]), len(names), seed, record["id"])
            files = {OTHER_IMAGE: names[number]} | files
        loaded = _load_images(list(files.values()), image_folder)
        found.append(SecondImages(record["id"], images | {name: loaded[file] for name, file in files.items()}))
    return found


# ---------------------------------------------------------------------------------------------------------- figures


def by_field(records: Sequence[Record], field: str) -> dict[str, list[float]]:
    """Delta by the value of a field; the most frequent values apart, the rest together."""
    counts = Counter(record[field] or f"(no {field})" for record in records)
    shown = [value for value, _ in counts.most_common(SOURCES_SHOWN)]
    groups: dict[str, list[float]] = {value: [] for value in shown}
    for record in records:
        value = record[field] or f"(no {field})"
        name = value if value in shown else f"{len(counts) - SOURCES_SHOWN} others"
        groups.setdefault(name, []).append(record["delta"])
    return groups


def correlations(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Pearson's r of delta, by reduction, with the answers' differences in statements and in words."""
    scores = [(record["chosen_scores"], record["rejected_scores"]) for record in records]
    deltas = {name: [hardness_delta(chosen, rejected, name) for chosen, rejected in scores] for name in REDUCTIONS}
    return {
        unit: {reduction: correlation(values, longer) for reduction, values in deltas.items()}
        for unit, longer in length_differences(records).items()
    }


def _plots(manifest: Record, records: Sequence[Record]) -> list[Plot]:
    mean = manifest["summary"]["delta_bar"]
    plots = [
        Plot(f"by-{field}", f"δ by {words}", partial(draw_hardness, hardness=Hardness(by_field(records, field), mean)))
        for field, words in (("source", "source"), ("kind", "kind of pair"))
    ]
    deltas = [record["delta"] for record in records]
    for unit, longer in length_differences(records).items():
        r = correlation(deltas, longer)
        legend = "r = " + ("undefined" if r is None else f"{r:+.2f}")
        labels = (f"{unit}: preferred answer less rejected", "δ")
        draw = partial(draw_points, x=longer, y=deltas, labels=labels, legend=legend)
        plots.append(Plot(f"by-{unit}", f"δ and the difference in {unit}", draw))
    return plots


def _notes(manifest: Record, records: Sequence[Record]) -> list[str]:
    summary, reduction = manifest["summary"], manifest["fingerprint"]["reduction"]
    notes = [f"δ̄ = {summary['delta_bar']:.6f}, the mean of δ over all pairs; δ is a {reduction} of scores."]
    for unit, of_reduction in correlations(records).items():
        values = (f"{'undefined' if r is None else format(r, '+.2f')} as a {name}" for name, r in of_reduction.items())
        notes.append(f"Correlation of δ with how many {unit} more the preferred answer has: {', '.join(values)}.")
    if summary["skipped"]:
        notes.append(f"{len(summary['skipped'])} pairs were left out; the manifest names them.")
    if summary["fallbacks"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary["fallbacks"].items())
        notes.append(f"Answers that rules split instead of the LLM, of {2 * len(records)}: {reasons}.")
    return notes


# ------------------------------------------------------------------------------------------------------------- page


def render(
    manifest: Record,
    records: Sequence[Record],
    groups: Sequence[Group],
    loaded_images: dict[str, Image.Image],
    seconds: Sequence[SecondImages] = (),
) -> str:
    """The page, with images and plots inside."""
    deltas = {"all": [record["delta"] for record in records]}
    deltas |= {f"source {name}": values for name, values in by_field(records, "source").items()}
    deltas |= {f"kind {name}": values for name, values in by_field(records, "kind").items()}
    rows = {name: spread(values) for name, values in deltas.items()}
    sources = {name: url_of(image) for name, image in loaded_images.items()}
    return render_page(
        "hardness.html.jinja",
        report={"title": "Hardness of the preference pairs", "how_to_read": LEAD, "warning": random_warning(manifest)},
        columns=list(SPREAD),
        rows={name: [form.format(row[key]) for key, form in SPREAD.items()] for name, row in rows.items()},
        notes=_notes(manifest, records),
        plots=[(plot.title, svg_of(plot.name, plot.draw)) for plot in _plots(manifest, records)],
        groups=[
            {"title": group.title, "note": group.note, "pairs": [_pair_view(r, sources) for r in group.records]}
            for group in groups
        ],
        seconds=[(of.pair, {name: url_of(image) for name, image in of.images.items()}) for of in seconds],
        provenance={name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                    for name, value in manifest["fingerprint"].items()},
    )  # fmt: skip


def random_warning(manifest: Record) -> str:
    """What the page says where CLIP's weights are random; "" where they are not."""
    clip = manifest["fingerprint"].get("clip")
    if not isinstance(clip, dict) or clip.get("pretrained") != RANDOM:
        return ""
    return (
        f"RANDOM weights: the CLIP {clip.get('model', 'model')} was not trained, so that δ, the groups and the plots "
        "below say nothing about these pairs. They show only that the stage runs."
    )


def _pair_view(record: Record, sources: dict[str, str]) -> dict[str, Any]:
    words = [word for word in (record["kind"], record["source"]) if word]
    words += [f"the first of {len(record['images'])} images"] if "images" in record else []
    words += [f"{side} split by rules ({reason})" for side, reason in record.get("fallbacks", {}).items()]
    sides = []
    for side, name in zip(SIDES, ("Preferred", "Rejected")):
        scores = record[f"{side}_scores"]
        statements = record[f"{side}_statements"] or [""] * len(scores)  # given scores come without statements
        total = f"{len(scores)} statements, {record[f'{side}_words']} words, scores sum to {sum(scores):.4f}"
        scored = [(f"{score:+.3f}", statement) for score, statement in zip(scores, statements)]
        sides.append({"name": name, "total": total, "statements": scored})
    return {key: record[key] for key in ("id", "delta", "image")} | {
        "words": words, "sides": sides, "source": sources[record["image"]], "question": record.get("question", ""),
        "context": record.get("context", ""),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- image

_WIDTH, _PLOTS_HEIGHT, _HEADING, _PAIR = 12.0, 6.4, 0.45, 2.1  # inches
_LINES = 7  # of text for each answer, which is what fits beside an image


def draw_sheet(
    manifest: Record, records: Sequence[Record], groups: Sequence[Group], loaded_images: dict[str, Image.Image]
) -> bytes:
    """A PNG: the four plots, and below them each group's pairs, two in a row."""
    rows = [-(-len(group.records) // 2) for group in groups]
    heights = [_PLOTS_HEIGHT, *(_HEADING + _PAIR * count for count in rows)]
    with plot_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the plots' font has no Chinese, for one
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, sum(heights)))
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        title = f"Hardness of {len(records)} preference pairs; mean {manifest['summary']['delta_bar']:.4f}"
        parts[0].suptitle(f"{title}; CLIP with RANDOM weights" if random_warning(manifest) else title)
        edges = {"left": 0.06, "right": 0.98, "bottom": 0.08, "top": 0.88, "hspace": 0.45, "wspace": 0.14}
        for axes, plot in zip(parts[0].subplots(2, 2, gridspec_kw=edges).flat, _plots(manifest, records)):
            plot.draw(axes)
            axes.set_title(plot.title, fontsize=9)
            axes.legend(fontsize=7)
        for part, group, count in zip(parts[1:], groups, rows):
            _draw_group(part, group, count, loaded_images)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw_group(part: Figure, group: Group, rows: int, loaded_images: dict[str, Image.Image]) -> None:
    height = _HEADING + _PAIR * rows
    part.suptitle(f"{group.title}. {group.note}", fontsize=9, x=0.01, y=1 - 0.1 / height, ha="left")
    edges = {"left": 0.01, "right": 0.99, "bottom": 0.0, "top": 1 - _HEADING / height, "hspace": 0.06, "wspace": 0.04}
    cells = part.subplots(rows, 4, squeeze=False, width_ratios=[2, 4, 2, 4], gridspec_kw=edges)
    for axes in cells.flat:
        axes.axis("off")
    for number, record in enumerate(group.records):
        image, text = cells[number // 2, 2 * (number % 2) : 2 * (number % 2) + 2]
        small = loaded_images[record["image"]].copy()
        small.thumbnail((240, 240))
        image.imshow(small)
        image.set_anchor("NW")
        text.text(0, 1, sheet_text(record), fontsize=7, va="top", parse_math=False, transform=text.transAxes)


def sheet_text(record: Record, width: int = 64) -> str:
    """Delta and both answers' scored statements in lines of `width` characters, cut after some."""
    view = _pair_view(record, {record["image"]: ""})
    lines = [f"δ = {record['delta']:+.4f}   pair {record['id']}   {'   '.join(view['words'])}"[:width]]
    lines += textwrap.wrap(view["question"], width, max_lines=2, placeholder=" …")
    if view["context"]:
        lines += textwrap.wrap(f"Context: {view['context']}", width, max_lines=2, placeholder=" …")
    for side in view["sides"]:
        said = [line for score, text in side["statements"] for line in _hanging(f"{score}  {text}", width)]
        more = [f"… {len(said) - _LINES + 1} more lines"] if len(said) > _LINES else []
        lines += [f"{side['name']}:", *(said[: _LINES - 1] + more if more else said)]
    return "\n".join(lines)


def _hanging(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * 8)
