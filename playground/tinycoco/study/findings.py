"""All figures of the study from its cells, each with its interval where it has one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from dama.hardness.score import REDUCTIONS, hardness_delta
from dama.train.provenance import repository_revision
from eval.core.statistics import Interval
from playground.tinycoco.study import analysis, mechanism
from playground.tinycoco.study.analysis import LEVELS, METRICS, SHOWN_LEVEL, Curve, Study, interval_of, verdict
from playground.tinycoco.study.data import THIRDS, Pool
from playground.tinycoco.study.grid import CONDITIONS, DAMA, DPO, RATE, VARIATIONS


class Findings:
    """What the study found, each figure computed once."""

    def __init__(self, study: Study, pool: Pool) -> None:
        self.study, self.pool = study, pool

    @cached_property
    def curves(self) -> dict[tuple[str, str], Curve]:
        """Curves by (condition, method), without those that have no finished learning rate."""
        names = {(cell.condition, cell.method) for cell in self.study.cells}
        found = {name: self.study.curve(*name) for name in sorted(names)}
        return {name: curve for name, curve in found.items() if curve.points}

    @property
    def conditions(self) -> list[str]:
        """Conditions under which both DPO and DAMA have a curve."""
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
            "at_level": [curve.response_at(SHOWN_LEVEL) for curve in (dpo, dama)],
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
        """Differences ours minus theirs: by recall level, at equal work and on average, with the verdict."""
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
        """One constant changed, against DPO and unchanged DAMA, all at one learning rate."""
        named = [m for m in (DPO, DAMA, *VARIATIONS) if ("clean", m) in self.curves]
        found = {m: self.curves["clean", m].at_rate(RATE) for m in named}
        rows = []
        for method, ours in found.items():
            if method == DPO or not ours.points:
                continue
            end = max(ours.points, key=lambda point: point.step)
            gap = analysis.mean_gap(ours, found[DPO])
            rows.append(
                {"method": method, **{metric: end.of(metric) for metric in METRICS}, "mean": gap,
                 "verdict": verdict(gap), "less_dama": analysis.mean_gap(ours, found[DAMA])}
            )  # fmt: skip
        return rows

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

    @cached_property
    def thirds(self) -> list[dict[str, Any]]:
        """Each third and method on clean pairs: margin and accuracy at the end, trained on and held out."""
        rows = []
        for method, seen in self._trained.items():
            for third in THIRDS:
                row: dict[str, Any] = {"method": method, "third": third}
                for figure, scale in (("margin", 1), ("accuracy", 100)):
                    unseen = mechanism.held_out_at_end(self.study, "clean", method, RATE, figure)[third]
                    row[f"trained_{figure}"] = self._mean([scale * value for value in seen[third][figure]])
                    row[f"held_out_{figure}"] = self._mean([scale * value for value in unseen])
                rows.append(row)
        return rows

    @cached_property
    def _trained(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """`mechanism.trained` of both methods on clean pairs."""
        return {m: mechanism.trained(self.study, "clean", m, RATE, self.pool.thirds) for m in (DPO, DAMA)}

    def spread_of_alpha_D(self, method: str) -> float:
        """Standard deviation of alpha_D on clean pairs."""
        return mechanism.spread_of_alpha_D(self.study, "clean", method, RATE)

    def _mean(self, values: Sequence[float]) -> Interval:
        return interval_of(mechanism.over_seeds(self.study, values))

    @cached_property
    def overfit(self) -> dict[str, Interval]:
        """DPO's accuracy on trained less on held-out pairs, points: by third, and "easy less hard"."""
        seen = {third: figures["accuracy"] for third, figures in self._trained[DPO].items()}
        unseen = mechanism.held_out_at_end(self.study, "clean", DPO, RATE, "accuracy")
        found = mechanism.overfitting(self.study, seen, unseen, self.pool.scale.probes)
        found["easy less hard"] = found["easy"] - found["hard"]
        return {name: interval_of(values) for name, values in found.items()}

    @cached_property
    def underfit(self) -> Interval:
        """DPO's accuracy on easy pairs that it was trained on less that on hard ones, points."""
        easy, hard = (self._trained[DPO][third]["accuracy"] for third in ("easy", "hard"))
        return self._mean([100 * (e - h) for e, h in zip(easy, hard)])

    @cached_property
    def easy_over_hard(self) -> dict[str, dict[int, float]]:
        """DPO and DAMA -> seed -> held-out margin of easy over hard pairs: clean, at the rate of the variations."""
        return {method: mechanism.easy_over_hard(self.study, "clean", method, RATE) for method in (DPO, DAMA)}

    @cached_property
    def evened(self) -> Interval:
        """That ratio with DPO less that with DAMA; undefined where a seed has none."""
        dpo, dama = (self.easy_over_hard[method] for method in (DPO, DAMA))
        if not set(self.study.seeds) == dpo.keys() == dama.keys():
            return Interval(None, None, None)
        return self._mean([dpo[seed] - dama[seed] for seed in self.study.seeds])

    @cached_property
    def more_even(self) -> dict[str, tuple[int, int]]:
        """Method -> in how many runs on clean pairs that ratio is less than DPO's at the same rate and seed, of all."""
        return {m: mechanism.more_even(self.study, "clean", m) for m in analysis.ablations(self.study)}

    @cached_property
    def weights(self) -> dict[str, dict[str, float]]:
        """DAMA's weights by third of the clean pairs."""
        return mechanism.weights_of_thirds(self.study, "clean", DAMA, RATE, self.pool.thirds)

    @cached_property
    def drops(self) -> list[dict[str, Interval]]:
        """Share of pairs that the filter dropped, by third of the training; empty without flipped pairs."""
        return mechanism.drop_rates(self.study, DAMA, RATE) if "flipped" in self.conditions else []

    @cached_property
    def by_delta(self) -> dict[str, dict[str, list[float]]]:
        """Means of delta, alpha_D and R by tenth of the clean pairs, for DPO and DAMA."""
        return {method: mechanism.by_delta(self.study, "clean", method, RATE) for method in (DPO, DAMA)}

    # --- As numbers -----------------------------------------------------------------------------------------------

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """What study.json holds beside the claims: every figure of the page, and each cell's own."""
        return {
            "revision": repository_revision(),
            "seeds": self.study.seeds,
            "scenes": {split: len(self.study.sft[split]["response_level"]) for split in ("test", "validation")},
            "declared": len(self.study.declared),
            "missing": [cell.name for cell in self.study.declared if cell not in self.study.cells],
            "failed": dict(self.study.failed),
            "diverged": self.study.diverged,
            "better_than_both": self.better_than_both,
            "hours": sum(run["seconds"] for run in self.study.cells.values()) / 3600,
            "main": self.main,
            "pooled": self.pooled,
            "ablations": self.ablations,
            "variations": self.variations,
            "thirds": self.thirds,
            "overfit": self.overfit,
            "underfit": self.underfit,
            "evened": self.evened,
            "easy_over_hard": self.easy_over_hard,
            "more_even": self.more_even,
            "weights": self.weights,
            "by_delta": self.by_delta,
            "statements": self.statements,
            "drops": self.drops,
            "cells": {cell.name: end_of_cell(run) for cell, run in self.study.cells.items()},
        }


def end_of_cell(run: Mapping[str, Any]) -> dict[str, Any]:
    """Test metrics of a cell's last stop, in percent, and its seconds."""
    last = analysis.last_stop(run)["test"]
    return {metric: round(analysis.plain_ratio([last], metric), 2) for metric in METRICS} | {
        "seconds": round(run["seconds"])
    }
