"""All figures of the study from its cells, each with its interval where it has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dama.train.provenance import repository_revision
from eval.core.curves import interval_of
from eval.core.statistics import Array, Interval, ratio
from playground.tinycoco.ability import CLOSED, OPEN
from playground.tinycoco.study import analysis, mechanism
from playground.tinycoco.study.analysis import (
    BETTER,
    FEWEST_SEEDS,
    NO_INTERVAL,
    RECALL,
    RESPONSE,
    TOO_FEW,
    Curve,
    Study,
    verdict,
)
from playground.tinycoco.study.data import THIRDS, Pool
from playground.tinycoco.study.grid import CONDITIONS, DAMA, DPO, METHODS, RANDOM_K, TWO_IMAGES

STUDY = 2  # which study study.json is of: the first one's is study_1.json
ENDS = (RESPONSE, "mention_level", RECALL, "mean_words", "ability", "yes_no", "yes_ratio", *OPEN, *CLOSED)
ASKED = ("ability", "yes_no", "yes_ratio")  # compared with DPO's at equal recall
SHOWN_OTHERS = 2  # methods beside DPO and DAMA in a plot of trade-offs

Row = dict[str, Any]
Comparison = tuple[str, str, str]
"""Condition, ours, theirs."""


class Findings:
    """The study's results, each computed once."""

    def __init__(self, study: Study, pool: Pool) -> None:
        self.study, self.pool = study, pool
        self._curves: dict[tuple[Any, ...], Curve] = {}
        self._gaps: dict[tuple[str, ...], Array] = {}

    @cached_property
    def conditions(self) -> list[str]:
        """Conditions under which DPO and DAMA have a whole seed in common. Raises ValueError where none has."""
        study = self.study
        found = [c for c in CONDITIONS if study.seeds_of(c, DPO, DAMA)]
        if not found:
            finished = f"{len(study.cells)} of {len(study.declared)} cells are finished, {len(study.failed)} failed"
            raise ValueError(
                f"study: expected a seed with every cell of {DPO} and {DAMA} under a condition, got none; {finished}: "
                "run it again"
            )
        return found

    @cached_property
    def has_verdicts(self) -> bool:
        """Whether DPO and DAMA have seeds enough under every condition."""
        return all(len(self.study.seeds_of(c, DPO, DAMA)) >= FEWEST_SEEDS for c in self.conditions)

    def methods(self, condition: str) -> list[str]:
        """Methods that have a whole seed in common with DPO."""
        return [m for m in self.study.methods(condition) if self.study.seeds_of(condition, m, DPO)]

    def curve(self, condition: str, method: str, *others: str) -> Curve:
        """A method's curve, over the seeds that these other methods have, too."""
        key = (condition, method, self.study.seeds_of(condition, method, *others))
        if key not in self._curves:
            self._curves[key] = self.study.curve(*key)
        return self._curves[key]

    def gap(self, condition: str, ours: str, theirs: str, metric: str = RESPONSE) -> Array:
        """A metric of ours minus theirs at equal recall over the seeds of both, [1 + RESAMPLES]; NaN without any."""
        key = (condition, ours, theirs, metric)
        if key not in self._gaps:
            common = self.study.seeds_of(condition, ours, theirs)
            both = self._both(condition, ours, theirs) if common else ()
            self._gaps[key] = analysis.gap(*both, metric) if both else np.full(1 + analysis.RESAMPLES, np.nan)
        return self._gaps[key]

    def _both(self, condition: str, ours: str, theirs: str) -> tuple[Curve, Curve]:
        return self.curve(condition, ours, theirs), self.curve(condition, theirs, ours)

    # --- Methods --------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Condition -> each method: where it ends, and its differences from DPO and DAMA.

        "gap" and "less_dama" are of response-level at equal recall, "..._gap" of other metrics; "together" holds the
        intervals of all methods under the condition that hold at once, by which "verdicts" are given.
        """
        return {condition: self._rows_of(condition) for condition in self.conditions}

    def _rows_of(self, condition: str) -> list[Row]:
        together = {
            "gap": self.family(condition, DPO),
            "less_dama": self.family(condition, DAMA),
            "ability_gap": self.family(condition, DPO, "ability"),
        }
        rows = []
        for method in self.methods(condition):
            row = self._end_of(self.curve(condition, method)) | self._differences(condition, method)
            row["together"] = {name: of_all[method] for name, of_all in together.items() if method in of_all}
            enough = len(row["seeds"]) >= FEWEST_SEEDS and self.has_verdicts
            row["verdicts"] = {
                name: verdict(interval, higher=name == "ability_gap") if enough else TOO_FEW
                for name, interval in row["together"].items()
            }
            rows.append(row)
        return rows

    def family(self, condition: str, theirs: str, metric: str = RESPONSE) -> dict[str, Interval]:
        """`gap` of every other method to theirs, with intervals that hold for all of them at once."""
        others = [method for method in self.methods(condition) if method != theirs]
        return analysis.simultaneous({method: self.gap(condition, method, theirs, metric) for method in others})

    @staticmethod
    def _end_of(curve: Curve) -> Row:
        """The last stop at the learning rate that the validation scenes chose."""
        point = curve.chosen
        return {"method": curve.method, "seeds": curve.seeds, "rate": point.rate, "work": point.work,
                **{metric: point.of(metric) for metric in ENDS}}  # fmt: skip

    def _differences(self, condition: str, method: str) -> Row:
        """From DPO and DAMA at equal recall, each with its own interval."""
        row: Row = {}
        if method != DPO:
            row["gap"] = interval_of(self.gap(condition, method, DPO))
            row["equal_work"] = interval_of(analysis.gap_at_equal_work(*self._both(condition, method, DPO)))
            row |= {f"{metric}_gap": interval_of(self.gap(condition, method, DPO, metric)) for metric in ASKED}
        if method != DAMA:
            row["less_dama"] = interval_of(self.gap(condition, method, DAMA))
        return row

    def best_others(self, condition: str) -> list[str]:
        """Methods beside DPO and DAMA with the least response-level at equal recall."""
        gaps = {row["method"]: row["gap"].value for row in self.rows[condition] if row["method"] not in (DPO, DAMA)}
        known = {method: value for method, value in gaps.items() if value is not None}
        return sorted(known, key=known.__getitem__)[:SHOWN_OTHERS]

    @cached_property
    def recommended(self) -> list[str]:
        """Methods clearly better than DPO and than DAMA under every condition, in intervals that hold at once."""
        tables = [{row["method"]: row["verdicts"] for row in rows} for rows in self.rows.values()]
        if len(tables) < len(CONDITIONS):
            return []
        return [m for m in METHODS if m not in (DPO, DAMA) and all(_beats_both(t.get(m, {})) for t in tables)]

    # --- Pooled over the conditions -------------------------------------------------------------------------------

    @cached_property
    def pooled(self) -> dict[str, Interval]:
        """Averages over conditions and methods of differences at equal recall.

        "dama", "dama_ability": DAMA minus DPO, under all conditions. "counterfactual": `second_images`.
        "two_images_ability": `asked_two_images`.
        """
        dama = [(c, DAMA, DPO) for c in CONDITIONS]
        return {
            "dama": self._mean_gap(dama),
            "dama_ability": self._mean_gap(dama, "ability"),
            "counterfactual": self._mean_gap(self.second_images),
            "two_images_ability": self._mean_gap(self.asked_two_images, "ability"),
        }

    @cached_property
    def second_images(self) -> list[Comparison]:
        """Each method with a second image without one object, and the same with a blank one, as far as comparable."""
        names = [(m, m.replace(", counterfactual", ", blank")) for m in TWO_IMAGES if m.endswith(", counterfactual")]
        return self._comparable(((c, *pair) for c in self.conditions for pair in names), RESPONSE)

    @cached_property
    def asked_two_images(self) -> list[Comparison]:
        """Methods with two images and DPO, as far as their ability is comparable."""
        return self._comparable(((c, m, DPO) for c in self.conditions for m in TWO_IMAGES), "ability")

    def _comparable(self, compared: Iterable[Comparison], metric: str) -> list[Comparison]:
        return [names for names in compared if interval_of(self.gap(*names, metric)).value is not None]

    def _mean_gap(self, compared: Sequence[Comparison], metric: str = RESPONSE) -> Interval:
        """Average of gaps, none of which may be undefined; in a resample, of those that are defined there."""
        if not compared or self._comparable(compared, metric) != list(compared):
            return NO_INTERVAL
        gaps = np.stack([self.gap(*names, metric) for names in compared])
        known = ~np.isnan(gaps)
        return interval_of(ratio(np.where(known, gaps, 0).sum(axis=0), known.sum(axis=0)))

    @cached_property
    def robust(self) -> Interval:
        """DAMA minus DPO at equal recall on flipped pairs, minus the same on clean ones; below 0: more robust."""
        if not {"clean", "flipped"} <= set(self.conditions):
            return NO_INTERVAL
        return interval_of(self.gap("flipped", DAMA, DPO) - self.gap("clean", DAMA, DPO))

    # --- Mechanism ------------------------------------------------------------------------------------------------

    @cached_property
    def _fits(self) -> dict[str, tuple[mechanism.Fit, mechanism.Fit]]:
        """DPO and DAMA on clean pairs -> trained and held-out pairs."""
        runs_of = {method: mechanism.runs_at_rate(self.study, "clean", method) for method in (DPO, DAMA)}
        return {
            method: (mechanism.trained(runs, self.pool.thirds), mechanism.held_out(runs, THIRDS))
            for method, runs in runs_of.items()
            if runs
        }

    @cached_property
    def thirds(self) -> list[Row]:
        """Each third of the clean pairs and method: margin and accuracy (%) at the end, trained on and held out."""
        return [
            {"method": method, "third": third}
            | {f"trained_{figure}": interval_of(values) for figure, values in seen[third].items()}
            | {f"held_out_{figure}": interval_of(values) for figure, values in unseen[third].items()}
            for method, (seen, unseen) in self._fits.items()
            for third in THIRDS
        ]

    @cached_property
    def overfit(self) -> dict[str, Interval]:
        """DPO's accuracy on trained minus held-out pairs, points: by third, and "easy less hard"."""
        if DPO not in self._fits:
            return dict.fromkeys((*THIRDS, "easy less hard"), NO_INTERVAL)
        seen, unseen = self._fits[DPO]
        found = {third: seen[third]["accuracy"] - unseen[third]["accuracy"] for third in THIRDS}
        found["easy less hard"] = found["easy"] - found["hard"]
        return {name: interval_of(values) for name, values in found.items()}

    @cached_property
    def underfit(self) -> Interval:
        """DPO's accuracy on easy pairs that it was trained on minus that on hard ones, points."""
        if DPO not in self._fits:
            return NO_INTERVAL
        seen, _ = self._fits[DPO]
        return interval_of(seen["easy"]["accuracy"] - seen["hard"]["accuracy"])

    @cached_property
    def weights(self) -> dict[str, dict[str, float]]:
        """DAMA's weights by third of the clean pairs."""
        runs = mechanism.runs_at_rate(self.study, "clean", DAMA)
        return mechanism.weights_of_thirds(runs, self.pool.thirds) if runs else {}

    @cached_property
    def drops(self) -> dict[str, list[dict[str, Interval]]]:
        """Method with a filter -> share of flipped and of right pairs that it dropped, by third of the training."""
        runs_of = {method: mechanism.runs_at_rate(self.study, "flipped", method) for method in (DAMA, RANDOM_K)}
        return {method: mechanism.drop_rates(runs) for method, runs in runs_of.items() if runs}

    # --- As numbers -----------------------------------------------------------------------------------------------

    @cached_property
    def numbers(self) -> Row:
        """What study.json holds beside the claims: every figure of the page, and each cell's own."""
        study, sft = self.study, self.study.sft
        return {
            "version": STUDY,
            "revision": repository_revision(),
            "seeds": {c: {m: study.seeds_of(c, m) for m in study.methods(c)} for c in CONDITIONS},
            "scenes": {split: len(sft[split][RESPONSE]) for split in ("test", "validation")}
            | {"asked": len(sft["ability"]["ability"])},
            "declared": len(study.declared),
            "missing": [cell.name for cell in study.declared if cell not in study.cells],
            "failed": dict(study.failed),
            "diverged": study.diverged,
            "hours": sum(run["seconds"] for run in study.cells.values()) / 3600,
            "start": self.start,
            "rows": self.rows,
            "recommended": self.recommended,
            "pooled": self.pooled,
            "robust": self.robust,
            "thirds": self.thirds,
            "overfit": self.overfit,
            "underfit": self.underfit,
            "weights": self.weights,
            "drops": self.drops,
            "cells": {cell.name: end_of_cell(run) for cell, run in study.cells.items()},
        }

    @cached_property
    def start(self) -> dict[str, Interval]:
        """The model before alignment."""
        point = self.curve(self.conditions[0], DPO, DAMA).start
        return {metric: point.of(metric) for metric in ENDS}


def _beats_both(verdicts: Mapping[str, str]) -> bool:
    return verdicts.get("gap") == verdicts.get("less_dama") == BETTER


def end_of_cell(run: Mapping[str, Any]) -> dict[str, float]:
    """Test metrics and abilities of a cell's last stop, in percent, and its seconds."""
    last = analysis.last_stop(run)
    found = {metric: _rounded([last["test"]], metric) for metric in ENDS if metric in last["test"]}
    found |= {metric: _rounded([last["ability"]], metric) for metric in ASKED}
    return found | {"seconds": round(run["seconds"])}


def _rounded(scored: Sequence[Mapping[str, Any]], metric: str) -> float:
    return round(analysis.plain_ratio(scored, metric), 2)
