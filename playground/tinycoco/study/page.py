"""The study as a page that is read in five minutes, and the numbers behind it as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.console import write_atomic, write_json
from dama.pages import render_page
from dama.report import SERIES, svg_of, url_of
from eval.core.statistics import Interval
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.scenes import draw
from playground.tinycoco.study import analysis, mechanism
from playground.tinycoco.study.analysis import LEVELS, METRICS, RECALL, RESPONSE, SHOWN_LEVEL, Curve, verdict
from playground.tinycoco.study.claims import CONTRARY, HOLDS, NONE, claims_of, written
from playground.tinycoco.study.data import THIRDS, Pool
from playground.tinycoco.study.findings import Findings
from playground.tinycoco.study.grid import CONDITIONS, DAMA, DPO, RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, NUMBERS = "study.html", "study.json"
LEAD = (
    "DAMA weighs each preference pair by how hard it is and each step by how the model responds. Its paper says that "
    "plain DPO overfits easy pairs and underfits hard ones, and that the weights cure it. Here both train the same "
    "small model on the same pairs, five conditions, several learning rates and seeds; a method is better where it "
    "invents fewer objects at the same recall, for saying less is the cheap way to invent less."
)
SHOWN_PAIRS = 1  # of each third
TONES = {HOLDS: "positive", "clearly better": "positive", CONTRARY: "negative", NONE: "negative",
         "clearly worse": "negative"}  # fmt: skip
SIGNS = {"positive": "✓", "negative": "✗", "open": "?"}
MARKS = {
    "Trade-off": (
        "Horizontal: object recall in %, higher on the left. Vertical: response-level hallucination in %; lower "
        "is better. A dot is a stop of a training, a thin line one learning rate from the common start (SFT) "
        "through its stops, mean over seeds. The cross is the end of the learning rate chosen on validation; its "
        "arms are 95 % intervals."
    ),
    "Against": (
        "Horizontal: response-level minus DPO's at equal recall, in points; left of the zero line is better than "
        "DPO. Dot: mean; bar: 95 % interval. Blue: the interval excludes zero; gray: no clear difference."
    ),
    "Margins": (
        "Horizontal: optimizer step. Vertical: reward margin of pairs that are not trained on, mean over seeds. "
        "Solid: DPO; dashed: DAMA. Color: third of the pairs by delta."
    ),
    "Reward gap": (
        "Horizontal: delta, in tenths of the pairs from hard to easy. Vertical: multiple of the mean, 1 at the "
        "thin line. A dot is a tenth: its reward gap R over the mean, by method; gray: DAMA's alpha_D."
    ),
    "The model-aware": (
        "Horizontal: optimizer step. Vertical: the value of alpha_M (no unit, 1 leaves beta as it is) and of "
        "R_bar, the running mean of the reward gap."
    ),
}
"""Beginning of a plot's title -> what its axes and marks are."""


# --- Plots ------------------------------------------------------------------------------------------------------------


def draw_trade_off(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Response-level against recall, a line for each learning rate's way through its stops."""
    for number, (name, curve) in enumerate(curves.items()):
        color = SERIES[number % len(SERIES)]
        for rate in sorted({point.rate for point in curve.points}):
            way = [curve.start, *sorted((p for p in curve.points if p.rate == rate), key=lambda p: p.step)]
            x, y = ([point.values[metric, 0] for point in way] for metric in (RECALL, RESPONSE))
            axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5)
            axes.scatter(x[1:], y[1:], s=14, color=color, label=name if rate == curve.points[0].rate else None)
        end = curve.chosen
        across, up = end.of("object_recall"), end.of("response_level")
        centre = float(across.value or 0), float(up.value or 0)
        axes.errorbar(*centre, xerr=_arms(across), yerr=_arms(up), color=color, capsize=2)
    axes.set_xlabel("object recall, %")
    axes.set_ylabel("response-level hallucination, %")
    axes.invert_xaxis()


def _arms(interval: Interval) -> list[list[float]]:
    assert interval.value is not None and interval.low is not None and interval.high is not None
    return [[interval.value - interval.low], [interval.high - interval.value]]


_DOT: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2}


def draw_gaps(axes: Axes, rows: Mapping[str, Interval]) -> None:
    """Differences with their intervals, one below the other, zero marked."""
    shown = {name: gap for name, gap in rows.items() if gap.value is not None}
    for place, gap in enumerate(reversed(shown.values())):
        clear = verdict(gap) != "no clear difference"
        color = SERIES[0] if clear else SERIES[4]
        axes.errorbar(float(gap.value or 0), place, xerr=_arms(gap), color=color, **_DOT)
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.axvline(0, color=SERIES[4], linewidth=1)
    axes.set_xlabel("response-level at equal recall, minus DPO's (points)")
    axes.grid(axis="x")


def draw_thirds(axes: Axes, tables: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> None:
    """Held-out margin of each third over the steps, mean over seeds: methods by dash, thirds by color."""
    for dash, (method, table) in zip(("-", "--"), tables.items()):
        for third, color in zip(THIRDS, SERIES):
            steps = table[third]
            means = [0.0, *(statistics.fmean(steps[step]) for step in sorted(steps))]
            axes.plot([0, *sorted(steps)], means, color=color, linestyle=dash, label=f"{method}, {third}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("reward margin, held out")


def draw_by_delta(axes: Axes, tables: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """What pairs came to by their delta, in tenths of them: R over its mean by method, and DAMA's alpha_D."""
    for color, (method, table) in zip(SERIES, tables.items()):
        axes.plot(table["delta"], table["R"], color=color, marker="o", markersize=3, label=f"R over its mean, {method}")
    axes.plot(tables[DAMA]["delta"], tables[DAMA]["alpha_D"], color=SERIES[4], label="alpha_D of DAMA")
    axes.axhline(1, color=SERIES[4], linewidth=0.5)
    axes.set_xlabel("delta, hard to easy")
    axes.set_ylabel("times the mean")


def draw_alpha_M(axes: Axes, steps: Sequence[int], alphas: Sequence[float], bars: Sequence[float]) -> None:
    """Plot alpha_M and R_bar over optimizer steps."""
    axes.plot(steps, alphas, color=SERIES[0], linewidth=1.2, label="alpha_M")
    axes.plot(steps, bars, color=SERIES[1], linewidth=1.2, label="R_bar")
    axes.set_xlabel("optimiser step")


# --- The page ---------------------------------------------------------------------------------------------------------


def write_study(findings: Findings, out: Path) -> dict[str, Any]:
    """Writes out/study.html and out/study.json; returns what the latter holds."""
    numbers = {"claims": [claim._asdict() for claim in claims_of(findings)], **findings.numbers}
    write_json(out / NUMBERS, numbers)
    write_atomic(out / PAGE, render(findings, numbers))
    return numbers


def render(findings: Findings, numbers: Mapping[str, Any]) -> str:
    """HTML of the study's page, complete in one file."""
    study = findings.study
    return render_page(
        "study.html.jinja",
        Path(__file__).parent,
        report={"title": "Does DAMA do what it claims? A study on TinyCOCO", "how_to_read": LEAD},
        numbers=numbers,
        pairs=list(_shown_pairs(findings.pool)),
        conditions=CONDITIONS,
        levels=LEVELS,
        shown_level=SHOWN_LEVEL,
        rate=RATE,
        steps=findings.pool.scale.steps,
        probes=findings.pool.scale.probes,
        start={metric: study.curve(*next(iter(findings.curves))).start.of(metric) for metric in METRICS},
        plots={title: svg_of(f"study-{n}", plot) for n, (title, plot) in enumerate(_plots(findings))},
        cost=analysis.RECALL_COST,
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
    for condition in findings.conditions:
        curves = {method: findings.curves[condition, method] for method in (DPO, DAMA)}
        yield f"Trade-off, {condition}", partial(draw_trade_off, curves=curves)
    gaps = {f"DAMA, {row['condition']}": row["mean"] for row in findings.main}
    gaps |= {row["method"]: row["mean"] for row in findings.ablations if row["method"] != DAMA}
    yield "Against DPO's trade-off", partial(draw_gaps, rows=gaps)
    tables = {method: mechanism.held_out(findings.study, "clean", method, RATE, "margin") for method in (DPO, DAMA)}
    yield "Margins of held-out pairs, clean", partial(draw_thirds, tables=tables)
    yield "Reward gap and alpha_D of trained pairs, clean", partial(draw_by_delta, tables=findings.by_delta)
    steps, alphas, bars = mechanism.alpha_M(findings.study, "clean", DAMA, RATE)
    yield "The model-aware factor, clean", partial(draw_alpha_M, steps=steps, alphas=alphas, bars=bars)


def _shown_pairs(pool: Pool) -> Iterator[dict[str, Any]]:
    """The pairs in the middle of each third."""
    for third, ids in pool.thirds.items():
        for id in ids[len(ids) // 2 :][:SHOWN_PAIRS]:
            row = pool.rows[id]
            yield {"third": third, "delta": pool.delta(id), "picture": url_of(draw(scene_of(row["image_path"]))),
                   "chosen": row["chosen"], "rejected": row["rejected"]}  # fmt: skip
