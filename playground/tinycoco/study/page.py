"""The study as a page that is read in five minutes, and the numbers behind it as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.console import write_atomic, write_json
from dama.hardness.score import REDUCTIONS, hardness_delta
from dama.report import SERIES, render_page, svg_of, url_of
from eval.core.statistics import Interval
from llava.train.checkpoints import repository_revision
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.scenes import draw
from playground.tinycoco.study import analysis
from playground.tinycoco.study.analysis import LEVELS, METRICS, RECALL, RESPONSE, Curve, Point, Study, verdict
from playground.tinycoco.study.data import THIRDS, Pool
from playground.tinycoco.study.grid import CONDITIONS, DAMA, DPO, RATE, VARIATIONS, Cell

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


class Findings:
    """Everything that the page shows, computed once."""

    def __init__(self, study: Study, pool: Pool, declared: Sequence[Cell]) -> None:
        self.study, self.pool, self.declared = study, pool, declared

    @cached_property
    def curves(self) -> dict[tuple[str, str], Curve]:
        names = {(cell.condition, cell.method) for cell in self.study.cells}
        found = {name: self.study.curve(*name) for name in sorted(names)}
        return {name: curve for name, curve in found.items() if curve.points}

    @property
    def conditions(self) -> list[str]:
        return [c for c in CONDITIONS if (c, DPO) in self.curves and (c, DAMA) in self.curves]

    @cached_property
    def main(self) -> list[dict[str, Any]]:
        """DPO and DAMA under each condition: where they end, and DAMA's difference."""
        return [self._main_row(condition) for condition in self.conditions]

    @cached_property
    def pooled(self) -> Interval:
        """DAMA's difference, averaged over the conditions."""
        return analysis.pooled_gap([(self.curves[c, DAMA], self.curves[c, DPO]) for c in self.conditions])

    def _main_row(self, condition: str) -> dict[str, Any]:
        dpo, dama = (self.curves[condition, method] for method in (DPO, DAMA))
        return {
            "condition": condition,
            "about": CONDITIONS[condition],
            "ends": [self.end_of(curve) for curve in (dpo, dama)],
            **self.compared(dama, dpo),
        }

    @staticmethod
    def end_of(curve: Curve) -> dict[str, Any]:
        """The last stop at the learning rate that the validation scenes chose."""
        point = curve.chosen
        return {"method": curve.method, "rate": point.rate, "work": point.work,
                **{metric: point.of(metric) for metric in METRICS}}  # fmt: skip

    @staticmethod
    def compared(ours: Curve, theirs: Curve) -> dict[str, Any]:
        gap = analysis.mean_gap(ours, theirs)
        return {
            "levels": {level: analysis.gap_at(ours, theirs, level) for level in LEVELS},
            "equal_work": analysis.at_equal_work(ours, theirs),
            "mean": gap,
            "verdict": verdict(gap),
        }

    @cached_property
    def ablations(self) -> list[dict[str, Any]]:
        """The other methods on clean pairs, against DPO and against DAMA."""
        dpo, dama = (self.curves["clean", method] for method in (DPO, DAMA))
        curves = [self.curves["clean", m] for m in analysis.ablations(self.study) if ("clean", m) in self.curves]
        return [self.end_of(c) | self.compared(c, dpo) | {"less_dama": analysis.mean_gap(c, dama)} for c in curves]

    @cached_property
    def variations(self) -> list[dict[str, Any]]:
        """One constant changed: against DPO's trade-off at one learning rate, and less what unchanged DAMA is there."""
        dpo = self.curves["clean", DPO]
        points = {m: self._at_rate(m) for m in (DAMA, *VARIATIONS) if ("clean", m) in self.curves}
        rows = []
        for method, ours in points.items():
            gap = analysis.one_way_gap(ours, dpo)
            end = {metric: ours[-1].of(metric) for metric in METRICS}
            less_dama = analysis.one_way_gap(ours, dpo, than=points[DAMA])
            rows.append({"method": method, **end, "mean": gap, "verdict": verdict(gap), "less_dama": less_dama})
        return rows

    def _at_rate(self, method: str) -> list[Point]:
        """Its stops on clean pairs at the learning rate of the variations."""
        points = self.curves["clean", method].points
        return sorted((point for point in points if point.rate == RATE), key=lambda point: point.step)

    @cached_property
    def statements(self) -> dict[str, float]:
        """Correlation of delta with how many statements more the preferred answer makes, over the pool, by reduction.

        The sum grows with them; the mean should not.
        """
        more = [len(chosen) - len(rejected) for chosen, rejected in self.pool.scores.values()]
        return {
            reduction: statistics.correlation(
                more, [hardness_delta(*scores, reduction=reduction) for scores in self.pool.scores.values()]
            )
            for reduction in REDUCTIONS
        }

    @cached_property
    def better_than_both(self) -> list[str]:
        """What is clearly better than DPO and than DAMA on clean pairs."""
        rows = [*self.ablations, *self.variations]
        clear = "clearly better"
        return [r["method"] for r in rows if r["method"] != DAMA and r["verdict"] == verdict(r["less_dama"]) == clear]

    # --- Mechanism ------------------------------------------------------------------------------------------------

    def probes(self, condition: str, method: str, figure: str) -> dict[str, dict[int, list[float]]]:
        return analysis.by_third(self.study, condition, method, RATE, figure)

    @cached_property
    def thirds(self) -> list[dict[str, Any]]:
        """Each third and method on clean pairs: margin and accuracy at the end, trained on and held out."""
        rows = []
        for method in (DPO, DAMA):
            margin, accuracy = (self.probes("clean", method, figure) for figure in ("margin", "accuracy"))
            for third in THIRDS:
                ends = {}
                for kind in ("trained", "held_out"):
                    name = f"{kind}_{third}"
                    ends[f"{kind}_margin"] = spread(margin[name][max(margin[name])])
                    ends[f"{kind}_accuracy"] = spread([100 * a for a in accuracy[name][max(accuracy[name])]])
                rows.append({"method": method, "third": third, **ends})
        return rows

    @cached_property
    def weights(self) -> dict[str, dict[str, float]]:
        return analysis.weights_of_thirds(self.study, "clean", DAMA, RATE, self.pool.thirds)

    @cached_property
    def flips(self) -> list[dict[str, float]]:
        if "flipped" not in self.conditions:
            return []
        return analysis.flips_dropped(self.study, DAMA, RATE)

    @cached_property
    def easy_over_hard(self) -> dict[str, list[float]]:
        """Method -> by seed, how many times as large the held-out margin of the easy third is as the hard third's.

        A ratio, because a method that moves less at the same learning rate has all margins smaller.
        """
        found = {}
        for method in (DPO, DAMA):
            margin = self.probes("clean", method, "margin")
            last = max(margin["held_out_easy"])
            easy, hard = (margin[f"held_out_{third}"][last] for third in ("easy", "hard"))
            found[method] = [e / h for e, h in zip(easy, hard)]
        return found

    @cached_property
    def overfit(self) -> dict[str, dict[str, list[float]]]:
        """Method -> third -> by seed, accuracy on pairs that were trained on less accuracy on held-out ones, points."""
        found: dict[str, dict[str, list[float]]] = {}
        for method in (DPO, DAMA):
            accuracy = self.probes("clean", method, "accuracy")
            last = max(accuracy["held_out_easy"])
            found[method] = {
                third: [
                    100 * (seen - unseen)
                    for seen, unseen in zip(accuracy[f"trained_{third}"][last], accuracy[f"held_out_{third}"][last])
                ]
                for third in THIRDS
            }
        return found

    # --- In words -------------------------------------------------------------------------------------------------

    @cached_property
    def sentences(self) -> list[tuple[str, str]]:
        """(claim, what the figures say of it), in words that the intervals allow."""
        easy, hard = (self.overfit[DPO][third] for third in ("easy", "hard"))
        times = self.easy_over_hard
        narrower = sum(dama < dpo for dama, dpo in zip(times[DAMA], times[DPO]))
        seeds = len(self.study.seeds)
        lines = [
            ("DAMA gives fewer inventions than DPO at the same recall", self._told_by_condition()),
            (
                "Plain DPO overfits easy pairs",
                f"Its accuracy on easy pairs that it was trained on is {over_seeds(easy, 1, '+')} points above that on "
                f"held-out ones; on hard pairs {over_seeds(hard, 1, '+')}: it overfits {self._more(easy, hard)}.",
            ),
            (
                "Plain DPO underfits hard pairs",
                f"Its held-out margin on easy pairs is {over_seeds(times[DPO], 2)} times that on hard ones.",
            ),
            (
                "DAMA evens that out",
                f"With DAMA it is {over_seeds(times[DAMA], 2)} times, less than with DPO in {narrower} of {seeds} "
                f"seeds; alpha_D is {self.weights['easy']['alpha_D']:.3f} on easy and "
                f"{self.weights['hard']['alpha_D']:.3f} on hard pairs.",
            ),
        ]
        if self.flips:
            among = ", ".join(f"{100 * part['dropped']:.0f} %" for part in self.flips)
            there = 100 * statistics.fmean(part["all"] for part in self.flips)
            lines.append(
                (
                    "The filter drops wrong pairs",
                    f"Of the pairs that it drops, {among} are flipped in the first, second and last third of training; "
                    f"of all pairs {there:.0f} % are.",
                )
            )
        lines.append(("A delta free of length is better", self._length_free()))
        if tried := {row["method"] for row in (*self.ablations, *self.variations)} - {DAMA}:
            better = ", ".join(self.better_than_both) or "none"
            found = f"Of {len(tried)} tried on clean pairs, clearly better than DPO and than DAMA: {better}."
            lines.append(("A variant beats both", found))
        return lines

    def _told_by_condition(self) -> str:
        """Verdict and difference under each condition, and of all together."""
        by_verdict: dict[str, list[str]] = {}
        for row in self.main:
            by_verdict.setdefault(row["verdict"], []).append(f"{row['condition']} {_written(row['mean'], sign=True)}")
        told = "; ".join(f"{kind}: {', '.join(by_verdict[kind])}" for kind in VERDICTS if kind in by_verdict)
        return f"{told}. All together {in_words(self.pooled)}."

    def _length_free(self) -> str:
        """Of delta as a mean over statements instead of a sum."""
        with_sum, with_mean = (self.statements[reduction] for reduction in REDUCTIONS)
        told = (
            f"The sum over statements correlates with how many more of them the preferred answer makes by "
            f"{with_sum:.2f}, the mean by {with_mean:.2f}"
        )
        gaps = {row["method"]: row["less_dama"] for row in self.variations}
        found = [f"{name}: {in_words(gaps[name])}" for name in ("DAMA, mean", "DAMA, logit mean") if name in gaps]
        return f"{told}. Against the sum, at the same recall, {'; '.join(found)}." if found else f"{told}."

    @staticmethod
    def _more(easy: Sequence[float], hard: Sequence[float]) -> str:
        more = sum(e > h for e, h in zip(easy, hard))
        if more == len(easy):
            return "easy pairs more, in every seed"
        return "hard pairs more, in every seed" if more == 0 else f"easy pairs more in {more} of {len(easy)} seeds"

    # --- As numbers -----------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """What study.json holds: every figure of the page, and each cell's own."""
        return {
            "revision": repository_revision(),
            "seeds": self.study.seeds,
            "scenes": {split: len(self.study.sft[split]["response_level"]) for split in ("test", "validation")},
            "declared": len(self.declared),
            "missing": [cell.name for cell in self.declared if cell not in self.study.cells],
            "failed": dict(self.study.failed),
            "diverged": self.study.diverged,
            "better_than_both": self.better_than_both,
            "hours": sum(run["seconds"] for run in self.study.cells.values()) / 3600,
            "main": self.main,
            "pooled": self.pooled,
            "ablations": self.ablations,
            "variations": self.variations,
            "thirds": self.thirds,
            "easy_over_hard": self.easy_over_hard,
            "weights": self.weights,
            "by_delta": {m: analysis.by_delta(self.study, "clean", m, RATE) for m in (DPO, DAMA)},
            "statements": self.statements,
            "flips": self.flips,
            "findings": dict(self.sentences),
            "cells": {cell.name: end_of_cell(run) for cell, run in self.study.cells.items()},
        }


VERDICTS = ("clearly better", "no clear difference", "clearly worse", "not comparable")


def end_of_cell(run: Mapping[str, Any]) -> dict[str, Any]:
    last = analysis.last_stop(run)["test"]
    return {metric: round(analysis.plain_ratio([last], metric), 2) for metric in METRICS} | {
        "seconds": round(run["seconds"])
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and extremes over seeds."""
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}


def over_seeds(values: Sequence[float], decimals: int, sign: str = "") -> str:
    """"2.1 (1.0 to 3.4 over seeds)"."""
    ends = [f"{value:{sign}.{decimals}f}" for value in (statistics.fmean(values), min(values), max(values))]
    return f"{ends[0]} ({ends[1]} to {ends[2]} over seeds)"


def in_words(gap: Interval) -> str:
    """"+0.4 [-1.7, +3.0] points, no clear difference"."""
    return f"{_written(gap, sign=True)} points, {verdict(gap)}"


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
    axes.set_xlabel("response-level at equal recall, less DPO's (points)")
    axes.grid(axis="x")


def draw_thirds(axes: Axes, tables: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> None:
    """Held-out margin of each third over the steps, mean over seeds: methods by dash, thirds by colour."""
    for dash, (method, table) in zip(("-", "--"), tables.items()):
        for third, color in zip(THIRDS, SERIES):
            steps = table[f"held_out_{third}"]
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
    axes.plot(steps, alphas, color=SERIES[0], linewidth=1.2, label="alpha_M")
    axes.plot(steps, bars, color=SERIES[1], linewidth=1.2, label="R_bar")
    axes.set_xlabel("optimiser step")


# --- The page ---------------------------------------------------------------------------------------------------------


def write_study(findings: Findings, out: Path) -> tuple[Path, Path]:
    """Writes out/study.html and out/study.json."""
    numbers = findings.numbers()
    write_json(out / NUMBERS, numbers)
    write_atomic(out / PAGE, render(findings, numbers))
    return out / PAGE, out / NUMBERS


def render(findings: Findings, numbers: Mapping[str, Any]) -> str:
    study = findings.study
    return render_page(
        Path(__file__).parent / "study.html.jinja",
        report={"title": "Does DAMA do what it claims? A study on TinyCOCO", "how_to_read": LEAD},
        numbers=numbers,
        pairs=list(_shown_pairs(findings.pool)),
        conditions=CONDITIONS,
        levels=LEVELS,
        rate=RATE,
        steps=findings.pool.scale.steps,
        probes=findings.pool.scale.probes,
        start={metric: study.curve(*next(iter(findings.curves))).start.of(metric) for metric in METRICS},
        plots={title: svg_of(f"study-{n}", plot) for n, (title, plot) in enumerate(_plots(findings))},
        cost=analysis.RECALL_COST,
        written=_written,
    )


def _plots(findings: Findings) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    for condition in findings.conditions:
        curves = {method: findings.curves[condition, method] for method in (DPO, DAMA)}
        yield f"Trade-off, {condition}", partial(draw_trade_off, curves=curves)
    gaps = {f"DAMA, {row['condition']}": row["mean"] for row in findings.main}
    gaps |= {row["method"]: row["mean"] for row in findings.ablations if row["method"] != DAMA}
    yield "Against DPO's trade-off", partial(draw_gaps, rows=gaps)
    tables = {method: findings.probes("clean", method, "margin") for method in (DPO, DAMA)}
    yield "Margins of held-out pairs, clean", partial(draw_thirds, tables=tables)
    pairs = {method: analysis.by_delta(findings.study, "clean", method, RATE) for method in (DPO, DAMA)}
    yield "Reward gap and alpha_D of trained pairs, clean", partial(draw_by_delta, tables=pairs)
    steps, alphas, bars = analysis.alpha_M(findings.study, "clean", DAMA, RATE)
    yield "The model-aware factor, clean", partial(draw_alpha_M, steps=steps, alphas=alphas, bars=bars)


def _shown_pairs(pool: Pool) -> Iterator[dict[str, Any]]:
    """The pairs in the middle of each third."""
    for third, ids in pool.thirds.items():
        for id in ids[len(ids) // 2 :][:SHOWN_PAIRS]:
            row = pool.rows[id]
            yield {"third": third, "delta": pool.delta(id), "picture": url_of(draw(scene_of(row["image_path"]))),
                   "chosen": row["chosen"], "rejected": row["rejected"]}  # fmt: skip


def _written(value: Interval | Sequence[float | None], decimals: int = 1, sign: bool = False) -> str:
    """"21.3 [16.7, 26.0]", or n/a."""
    if any(number is None for number in value):
        return "n/a"
    middle, low, high = (f"{number:{'+' * sign}.{decimals}f}" for number in value)
    return f"{middle} [{low}, {high}]"
