"""The study as a page that is read in five minutes, and the numbers behind it as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dama.console import write_atomic, write_json
from dama.pages import render_page
from dama.report import SERIES, svg_of, url_of
from eval.core.statistics import Interval
from playground.tinycoco.ability import CLOSED, OPEN
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.scenes import draw
from playground.tinycoco.study import analysis, mechanism
from playground.tinycoco.study.analysis import BETTER, RECALL, RESPONSE, WORSE, Curve
from playground.tinycoco.study.claims import CONTRARY, HOLDS, claims_of, written
from playground.tinycoco.study.data import THIRDS, Pool
from playground.tinycoco.study.findings import Findings, Row
from playground.tinycoco.study.grid import CENTRAL, CONDITIONS, DAMA, DPO, RATE, STEP_PAIRS, TWO_IMAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, NUMBERS = "study.html", "study.json"
QUOTED = re.compile(r"(<!-- table: python -m playground\.tinycoco study -->\n```\n).*?(\n```\n)", re.DOTALL)
FIRST_PAGE, FIRST_NUMBERS = "study_1.html", "study_1.json"  # of the first study
LEAD = (
    "DAMA weights each preference pair by its hardness and each step by how the model responds. Its paper claims less "
    "hallucination, more general ability, and a cure for overfitting of easy pairs and underfitting of hard ones. Here "
    "DPO, DAMA and other objectives, several of which compare two images, train the same small model on the same "
    "pairs. Saying less is the cheap way to hallucinate less, so a method is better if it hallucinates less at equal "
    "recall."
)
TONES = {HOLDS: "positive", BETTER: "positive", CONTRARY: "negative", WORSE: "negative"}
SIGNS = {"positive": "✓", "negative": "✗", "open": "?"}
GRAY = SERIES[4]
MARKS = {
    "Hallucination minus DPO's": (
        "Horizontal: response-level hallucination minus DPO's at equal recall, in points; left of the zero line is "
        "better than DPO. Thick bar: 95 % interval of this method alone; thin bar: 95 % intervals that hold for all "
        "methods at once. Blue: better, orange: worse, by the thin bar; gray: no clear difference."
    ),
    "Ability minus DPO's": (
        "Horizontal: ability minus DPO's at equal recall, in points; right of the zero line is better than DPO. Bars "
        "and colors as for hallucination."
    ),
    "Trade-off": (
        "Horizontal: object recall in %, higher on the left. Vertical: response-level hallucination in %; lower is "
        "better. A dot is a stop of a training, a thin line one learning rate from the common start through its stops, "
        "mean over seeds. The cross is the end of the learning rate chosen on validation; its arms are 95 % intervals. "
        "Beside DPO and DAMA: the two methods with the least hallucination at equal recall in these very results."
    ),
    "Ability against recall": (
        "Horizontal: object recall in %, higher on the left. Vertical: ability in %. A dot is a method at the end of "
        "the learning rate chosen on validation, mean over seeds; the gray cross is the common start, with 95 % "
        "intervals."
    ),
    "Accuracy": (
        "Horizontal: third of the pairs by delta. Vertical: share of pairs whose preferred answer has the larger "
        "reward, in %. Filled: pairs that were trained on; hollow: held-out pairs. Bars: 95 % intervals over seeds "
        "and, of held-out pairs, also over pairs."
    ),
}
"""Beginning of a plot's title -> what its axes and marks are."""


# --- Plots ------------------------------------------------------------------------------------------------------------


def draw_trade_off(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Response-level against recall, a line for each learning rate's way through its stops."""
    for color, (name, curve) in zip(SERIES, curves.items()):
        for rate in sorted({point.rate for point in curve.points}):
            way = [curve.start, *sorted((p for p in curve.points if p.rate == rate), key=lambda p: p.step)]
            x, y = ([point.values[metric][0] for point in way] for metric in (RECALL, RESPONSE))
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5)
            axes.scatter(x[1:], y[1:], s=14, color=color, label=name if rate == curve.points[0].rate else None)
        _draw_cross(axes, curve.chosen.of(RECALL), curve.chosen.of(RESPONSE), color)
    axes.set_xlabel("object recall, %")
    axes.set_ylabel("response-level hallucination, %")
    axes.invert_xaxis()


def _draw_cross(axes: Axes, across: Interval, up: Interval, color: str) -> None:
    if across.value is not None and up.value is not None:
        axes.errorbar(across.value, up.value, xerr=_arms(across), yerr=_arms(up), color=color, capsize=2)


def _arms(interval: Interval) -> list[list[float]]:
    assert interval.value is not None and interval.low is not None and interval.high is not None
    return [[interval.value - interval.low], [interval.high - interval.value]]


def draw_gaps(axes: Axes, rows: Sequence[Row], name: str, label: str) -> None:
    """Differences from DPO, one method below the other: its own interval thick, that of all at once thin."""
    shown = [row for row in reversed(rows) if row["method"] != DPO and row[name].value is not None]
    cast("Figure", axes.figure).set_size_inches(5.6, 0.9 + 0.2 * len(shown))
    for place, row in enumerate(shown):
        own, together = row[name], row["together"][name]
        color = {BETTER: SERIES[0], WORSE: SERIES[1]}.get(row["verdicts"][name], GRAY)
        axes.plot([own.low, own.high], [place, place], color=color, linewidth=3.2, solid_capstyle="butt")
        axes.errorbar(own.value, place, xerr=_arms(together), color=color, fmt="o", markersize=4, capsize=2)
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_xlabel(label)
    axes.grid(axis="x")


def draw_abilities(axes: Axes, rows: Sequence[Row], start: Mapping[str, Interval]) -> None:
    """Ability against recall where each method ends, in groups of methods."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        method = row["method"]
        kind = "two images" if method in TWO_IMAGES else "others with one image"
        group = method if method in (DPO, DAMA) else kind
        groups.setdefault(group, []).append((row[RECALL].value, row["ability"].value))
    for color, (name, points) in zip(SERIES, groups.items()):
        recalls, abilities = zip(*points)
        axes.scatter(recalls, abilities, s=20, color=color, label=name)
    _draw_cross(axes, start[RECALL], start["ability"], GRAY)
    axes.set_xlabel("object recall, %")
    axes.set_ylabel("ability, %")
    axes.invert_xaxis()


def draw_thirds(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy by third: methods by color, trained pairs filled, held-out ones hollow."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, (color, method) in enumerate(zip(SERIES, methods)):
        for kind, fill in (("trained", color), ("held_out", "none")):
            label: str | None = f"{method}, {kind.replace('_', ' ')}"
            for row in (row for row in rows if row["method"] == method):
                place = THIRDS.index(row["third"]) + 0.3 * (number - 0.5) + (0.1 if fill == "none" else 0)
                interval = row[f"{kind}_accuracy"]
                if interval.value is not None:
                    style: dict[str, Any] = {"fmt": "o", "markersize": 5, "markerfacecolor": fill, "capsize": 2}
                    axes.errorbar(place, interval.value, yerr=_arms(interval), color=color, label=label, **style)
                    label = None
    axes.set_xticks(range(len(THIRDS)), THIRDS)
    axes.set_xlabel("third of the pairs by delta")
    axes.set_ylabel("accuracy, %")


# --- The page ---------------------------------------------------------------------------------------------------------


def write_study(findings: Findings, out: Path) -> dict[str, Any]:
    """Write out/study.html and out/study.json; return the contents of the latter."""
    numbers = {"claims": [claim._asdict() for claim in claims_of(findings)], **findings.numbers}
    write_json(out / NUMBERS, numbers)
    write_atomic(out / PAGE, render(findings, numbers))
    return numbers


def quote(text: str, page: Path) -> None:
    """Put the text into the block below the study's mark on a page of Markdown; without a mark, nothing is written."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    new = QUOTED.sub(lambda block: f"{block[1]}{text}{block[2]}", old)
    if new != old:
        write_atomic(page, new)


def render(findings: Findings, numbers: Mapping[str, Any]) -> str:
    """HTML of the study's page, complete in one file."""
    scale = findings.pool.scale
    return render_page(
        "study.html.jinja",
        Path(__file__).parent,
        report={"title": "Which preference objective, at equal recall? A study on TinyCOCO", "how_to_read": LEAD},
        numbers=numbers,
        pairs=list(_shown_pairs(findings.pool)),
        conditions=CONDITIONS,
        kinds=(*OPEN, *CLOSED),
        central=CENTRAL,
        parts=mechanism.PARTS,
        rate=RATE,
        steps=scale.steps,
        step_pairs=STEP_PAIRS,
        probes=scale.probes,
        plots={title: svg_of(f"study-{n}", plot) for n, (title, plot) in enumerate(_plots(findings))},
        cost=analysis.RECALL_COST,
        fewest=analysis.FEWEST_SEEDS,
        first=(FIRST_PAGE, FIRST_NUMBERS),
        written=written,
        tone_of=tone_of,
        marks_of=marks_of,
        SIGNS=SIGNS,
    )


def tone_of(words: str) -> str:
    """The class of a verdict: positive, negative, or open where the data do not decide."""
    return TONES.get(words, "open")


def marks_of(title: str) -> str:
    """What the axes and marks of a plot are. Raises KeyError for a plot without an explanation."""
    return MARKS[next((start for start in MARKS if title.startswith(start)), title)]


def _plots(findings: Findings) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    """Title -> plot; titles of a condition's plots end with its name."""
    for condition, rows in findings.rows.items():
        shown = (DPO, DAMA, *findings.best_others(condition))
        curves = {method: findings.curve(condition, method) for method in shown}
        response, ability = (f"{name} at equal recall, minus DPO's (points)" for name in ("response-level", "ability"))
        yield f"Hallucination minus DPO's, {condition}", partial(draw_gaps, rows=rows, name="gap", label=response)
        yield f"Trade-off, {condition}", partial(draw_trade_off, curves=curves)
        yield f"Ability minus DPO's, {condition}", partial(draw_gaps, rows=rows, name="ability_gap", label=ability)
        yield f"Ability against recall, {condition}", partial(draw_abilities, rows=rows, start=findings.start)
    yield "Accuracy by third, clean", partial(draw_thirds, rows=findings.thirds)


def _shown_pairs(pool: Pool) -> Iterator[dict[str, Any]]:
    """The pair in the middle of each third."""
    for third, ids in pool.thirds.items():
        row = pool.rows[ids[len(ids) // 2]]
        yield {"third": third, "delta": pool.delta(str(row["idx"])), "image": url_of(draw(scene_of(row["image_path"]))),
               "chosen": row["chosen"], "rejected": row["rejected"]}  # fmt: skip
