"""A report as one self-contained HTML page and as Markdown with its images in a folder beside it.

Knows images, marked captions, estimates with intervals and logged curves; which models and benchmarks made them is
the caller's matter. The page needs no network and no script, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from dama.console import write_atomic
from dama.pages import page_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Estimate = tuple[float | None, float | None, float | None]
"""value, low end and high end of its interval; None where undefined."""
Span = tuple[int, int, Literal["hallucinated", "correct"]]
"""start and end (end exclusive) of an object's name in a caption; whether the picture shows the object."""

PANELS = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "R_bar": "R̄, running mean of the reward gap",
    "alpha_M": "α_M, model-aware factor",
}
"""Training curves shown by default: key of the log rows -> heading."""

_PICTURE_SIDE = 640  # pixels; longer sides are scaled down to keep the page small
_PNG_LIMIT = 100_000  # bytes; a drawing stays a PNG, a photograph becomes a JPEG

# Figures are drawn in the light theme's colors; on the page each becomes the style sheet's variable of the same role.
_INK, _LINE = "#3d444d", "#d8dbe0"
SERIES = ("#2f6fb7", "#d9822b", "#2a9d8f", "#8a63b8", "#7a828c")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
}
_VARIABLES = {_INK: "--ink-2", _LINE: "--line", **{color: f"--series-{i}" for i, color in enumerate(SERIES)}}


@dataclass(frozen=True)
class Metric:
    """A column of the table. `better` draws the arrow and decides which value is set in bold; None: neither."""

    name: str
    better: Literal["lower", "higher"] | None = None
    decimals: int = 1
    unit: str = ""


@dataclass(frozen=True)
class MarkedCaption:
    """What a model said about an image, with the objects that it named. Spans must not overlap."""

    model: str
    text: str
    spans: Sequence[Span] = ()


@dataclass(frozen=True)
class GalleryItem:
    """An image with its prompt and the captions of each model."""

    picture: Image.Image
    prompt: str
    captions: Sequence[MarkedCaption]


@dataclass(frozen=True)
class Hardness:
    """delta of the preference pairs by kind of pair, and their mean (method Eq. 5-7)."""

    delta: Mapping[str, Sequence[float]]
    delta_bar: float


@dataclass(frozen=True)
class Report:
    """results: method -> key of `metrics` -> estimate. curves: method -> log rows with "step" and keys of `panels`.

    warning: what a reader must know before any number, shown above them.
    """

    title: str
    how_to_read: str
    metrics: Mapping[str, Metric]
    results: Mapping[str, Mapping[str, Estimate]]
    provenance: Mapping[str, str]
    notes: Sequence[str] = ()
    gallery: Sequence[GalleryItem] = ()
    hardness: Hardness | None = None
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    panels: Mapping[str, str] = field(default_factory=lambda: dict(PANELS))
    warning: str = ""


class _Plot(NamedTuple):
    name: str
    title: str
    note: str
    draw: Callable[[Axes], None]


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write report.html, report.md and report_files/ into the folder; returns the paths of the first two."""
    folder = Path(folder)
    markdown, files = render_markdown(report, "report_files")
    for name, content in files.items():
        write_atomic(folder / "report_files" / name, content)
    write_atomic(folder / "report.md", markdown)
    write_atomic(folder / "report.html", render_html(report))
    return folder / "report.html", folder / "report.md"


def render_html(report: Report) -> str:
    """The whole page; images are data URLs and plots inline SVG."""
    pictures = [_data_url(*encode_picture(item.picture)) for item in report.gallery]
    plots = [_plot_view(plot, image=Markup(_themed_svg(plot))) for plot in _plots(report)]
    environment = _environment(autoescape=True)
    return environment.get_template("methods.html.jinja").render(_view(report, pictures, plots))


def render_markdown(report: Report, folder: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown text and the files (name -> content) that it expects in `folder`."""
    files: dict[str, bytes] = {}
    pictures, plots = [], []
    for number, item in enumerate(report.gallery, start=1):
        content, kind = encode_picture(item.picture)
        name = f"picture-{number:02d}.{kind}"
        files[name] = content
        pictures.append(Markup(f"{folder}/{name}"))
    for plot in _plots(report):
        name = f"plot-{plot.name}.png"
        files[name] = _draw(plot, "png")
        plots.append(_plot_view(plot, image=Markup(f"{folder}/{name}")))
    environment = _environment(finalize=escape_markdown)
    return environment.get_template("report.md.jinja").render(_view(report, pictures, plots)), files


def svg_of(name: str, draw: Callable[[Axes], None]) -> Markup:
    """A plot as an SVG element in the page's colors. `name` tells it from the others on the page."""
    return Markup(_themed_svg(_Plot(name, "", "", draw)))


def url_of(picture: Image.Image) -> str:
    """The image as a data URL, scaled down where it is large."""
    return _data_url(*encode_picture(picture))


@contextmanager
def plot_style() -> Iterator[None]:
    """Figures drawn inside look like the reports' own."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def draw_hardness(axes: Axes, hardness: Hardness) -> None:
    """Stacked histogram of delta with its mean."""
    _histogram(axes, hardness)


def draw_points(axes: Axes, x: Sequence[float], y: Sequence[float], labels: tuple[str, str], legend: str) -> None:
    """A point for each pair of values; `labels` of the axes, x first."""
    many = len(x) > 2000  # as single shapes they would make a page of many megabytes
    axes.scatter(x, y, s=9, color=SERIES[0], alpha=0.5, linewidths=0, label=legend, rasterized=many)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])


def cut_at_spans(text: str, spans: Sequence[Span]) -> list[tuple[str, str | None]]:
    """(piece, kind) in order, kind None between spans. ValueError for a span that overlaps or leaves the text."""
    pieces: list[tuple[str, str | None]] = []
    position = 0
    for start, end, kind in sorted(spans):
        if not position <= start < end <= len(text):
            raise ValueError(
                f"caption {text[:40]!r}: span ({start}, {end}) is empty, overlaps another or leaves the text; "
                f"expected {position} <= start < end <= {len(text)}; pass character offsets into this very caption"
            )
        if kind not in ("hallucinated", "correct"):
            raise ValueError(f"caption {text[:40]!r}: expected kind hallucinated or correct, got {kind!r}; rename it")
        pieces += [(text[position:start], None), (text[start:end], kind)]
        position = end
    pieces.append((text[position:], None))
    return [piece for piece in pieces if piece[0]]


def encode_picture(picture: Image.Image) -> tuple[bytes, str]:
    """(bytes, "png" or "jpg"): PNG unless that is large, longer side at most 640 pixels."""
    small = picture.convert("RGB")
    small.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    if buffer.tell() <= _PNG_LIMIT:
        return buffer.getvalue(), "png"
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "jpg"


def escape_markdown(value: Any) -> str:
    """Text that Markdown shows literally, on one line; Markup passes unchanged."""
    if isinstance(value, Markup):
        return value
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", re.sub(r"\s+", " ", text))


def _marked_markdown(text: str, kind: str | None) -> Markup:
    before, after = {"hallucinated": ("**", "** ✗"), "correct": ("*", "*"), None: ("", "")}[kind]
    return Markup(before + escape_markdown(text) + after)


def _environment(**options: Any) -> Environment:
    environment = page_environment(keep_trailing_newline=True, **options)
    environment.filters["marked_markdown"] = _marked_markdown
    environment.filters["pieces"] = lambda caption: cut_at_spans(caption.text, caption.spans)
    return environment


def _view(report: Report, pictures: Sequence[str], plots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What both templates are given."""
    return {
        "report": report,
        "table": _table(report),
        "gallery": list(zip(report.gallery, pictures)),
        "marked": any(caption.spans for item in report.gallery for caption in item.captions),
        "plots": plots,
    }


def _table(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Method -> one cell per metric: text, interval, best, the bar's ends and dot in percent, and its scale."""
    for method, row in report.results.items():
        if row.keys() != report.metrics.keys():
            raise ValueError(
                f"report, results of {method!r}: expected the metrics {sorted(report.metrics)}, got {sorted(row)}; "
                "give every method every metric, (None, None, None) where it is undefined"
            )
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in report.results}
    for key, metric in report.metrics.items():
        for method, cell in _column(metric, {method: row[key] for method, row in report.results.items()}).items():
            rows[method].append(cell)
    return rows


def _column(metric: Metric, estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    def written(number: float | None) -> str:
        return f"{number:.{metric.decimals}f}"

    defined = [number for estimate in estimates.values() for number in estimate if number is not None]
    start, length = (min(defined), (max(defined) - min(defined)) or 1.0) if defined else (0.0, 1.0)
    choose = {"lower": min, "higher": max, None: None}[metric.better]
    values = [estimate[0] for estimate in estimates.values() if estimate[0] is not None]
    best = written(choose(values)) if choose and len(values) > 1 else None
    cells = {}
    for method, (value, low, high) in estimates.items():
        cell: dict[str, Any] = {"text": "n/a", "interval": "", "best": False, "bar": None}
        cell["scale"] = written(start), written(start + length)
        if value is not None:
            cell |= {"text": written(value), "best": written(value) == best}
        if value is not None and low is not None and high is not None:
            left, right, dot = (round(100 * (number - start) / length, 1) for number in (low, high, value))
            cell |= {"interval": f"[{written(low)}, {written(high)}]", "bar": (left, round(100 - right, 1), dot)}
        cells[method] = cell
    return cells


def _plots(report: Report) -> list[_Plot]:
    """The histogram of delta, then one plot per panel that any method has logged."""
    plots = []
    if report.hardness is not None and any(len(values) for values in report.hardness.delta.values()):
        draw = partial(_histogram, hardness=report.hardness)
        plots.append(_Plot("delta", "Hardness δ of the preference pairs", "", draw))
    for number, (key, title) in enumerate(report.panels.items()):
        lines = {method: _line(rows, key) for method, rows in report.curves.items()}
        absent = [method for method, (steps, _) in lines.items() if not steps]
        if len(absent) < len(lines):
            note = f"Not logged: {', '.join(absent)}." if absent else ""
            plots.append(_Plot(f"curve-{number + 1}", title, note, partial(_curves, lines=lines)))
    return plots


def _line(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that carry the key."""
    present = [row for row in rows if "step" in row and row.get(key) is not None]
    return [row["step"] for row in present], [row[key] for row in present]


def _histogram(axes: Axes, hardness: Hardness) -> None:
    labels = [f"{kind} ({len(values)})" for kind, values in hardness.delta.items()]
    colors = [SERIES[i % len(SERIES)] for i in range(len(labels))]
    axes.hist(list(hardness.delta.values()), bins=40, stacked=True, color=colors, label=labels)
    axes.axvline(hardness.delta_bar, color=_INK, linewidth=1, linestyle="--", label=f"mean {hardness.delta_bar:.3g}")
    axes.set_xlabel("δ")
    axes.set_ylabel("pairs")


def _curves(axes: Axes, lines: Mapping[str, tuple[list[float], list[float]]]) -> None:
    for i, (method, (steps, values)) in enumerate(lines.items()):
        if steps:
            dash = ("-", "--", ":")[i // len(SERIES) % 3]
            axes.plot(steps, values, color=SERIES[i % len(SERIES)], linestyle=dash, linewidth=1.5, label=method)
    axes.set_xlabel("optimiser step")


def _draw(plot: _Plot, kind: Literal["svg", "png"]) -> bytes:
    """The plot as a file: SVG on nothing, PNG on white."""
    import matplotlib
    from matplotlib.figure import Figure

    # A salt of its own per plot: several SVGs on one page must not share ids.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": plot.name}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        plot.draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            # As many columns as fit: a line of the figure holds about 64 characters, a handle and its gap take 8.
            figure.legend(loc="outside upper left", ncols=max(1, 64 // (8 + max(map(len, labels)))))
        buffer = io.BytesIO()
        # No date and no version: the same input makes the same file.
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=160, transparent=kind == "svg", metadata=metadata)
    return buffer.getvalue()


def _themed_svg(plot: _Plot) -> str:
    """The plot's SVG element, its colors taken from the page's style sheet, without styles that leak into the page."""
    svg = _draw(plot, "svg").decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def _plot_view(plot: _Plot, image: Markup) -> dict[str, Any]:
    return {"title": plot.title, "note": plot.note, "image": image}


def _data_url(content: bytes, kind: str) -> str:
    mime = {"png": "image/png", "jpg": "image/jpeg"}[kind]
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
