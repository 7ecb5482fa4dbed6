"""The study in words and in one table: what the figures say of each claim, as far as their intervals allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.core.ruled import aligned
from eval.core.statistics import Interval
from playground.tinycoco.study.analysis import SHOWN_LEVEL, verdict
from playground.tinycoco.study.findings import Findings
from playground.tinycoco.study.grid import DAMA, DPO, RATE

VERDICTS = ("clearly better", "no clear difference", "clearly worse", "not comparable")
MORE_OVERFIT = {
    "clearly worse": "it overfits easy pairs more",
    "clearly better": "it overfits hard pairs more",
    "no clear difference": "no clear difference",
}
LENGTH_FREE = {"DAMA, mean": DAMA, "DAMA, logit mean": "DAMA, logit"}
"""Variations of delta that take means -> the same with sums."""


def claims_of(findings: Findings) -> dict[str, str]:
    """Claim -> what the figures say of it."""
    found = {
        "DAMA gives fewer inventions than DPO at the same recall": _by_condition(findings),
        "Plain DPO overfits easy pairs": _overfits(findings),
        "Plain DPO underfits hard pairs": _underfits(findings),
        "DAMA evens that out": _evens_out(findings),
    }
    if findings.drops:
        found["The filter drops wrong pairs"] = _filters(findings)
    found["A delta free of length is better"] = _length_free(findings)
    if tried := {row["method"] for row in (*findings.ablations, *findings.variations)} - {DAMA}:
        better = ", ".join(findings.better_than_both) or "none"
        found["A variant beats both"] = (
            f"Of {len(tried)} tried on clean pairs, clearly better than DPO and than DAMA at the same recall: {better}."
        )
    return found


def _by_condition(findings: Findings) -> str:
    by_verdict: dict[str, list[str]] = {}
    for row in findings.main:
        by_verdict.setdefault(row["verdict"], []).append(f"{row['condition']} {written(row['mean'], sign=True)}")
    told = "; ".join(f"{kind}: {', '.join(by_verdict[kind])}" for kind in VERDICTS if kind in by_verdict)
    return f"Points of response-level, {told}. All together {in_words(findings.pooled)}."


def _overfits(findings: Findings) -> str:
    gaps = findings.overfit
    easy, hard, both = (written(gaps[name], sign=True) for name in ("easy", "hard", "easy less hard"))
    return (
        f"Its accuracy on easy pairs that it was trained on is {easy} points above that on held-out ones, on hard "
        f"pairs {hard}; easy less hard {both}: {MORE_OVERFIT[verdict(gaps['easy less hard'])]}."
    )


def _underfits(findings: Findings) -> str:
    rows = {row["third"]: row for row in findings.thirds if row["method"] == DPO}
    easy, hard = (written(rows[third]["held_out_accuracy"]) for third in ("easy", "hard"))
    margins = " and ".join(written(rows[third]["held_out_margin"], 3) for third in ("easy", "hard"))
    return (
        f"Held out, it prefers the right answer in {easy} % of easy and {hard} % of hard pairs, by margins of "
        f"{margins}. How much of that is the pairs' own nature, no figure here tells."
    )


def _evens_out(findings: Findings) -> str:
    """A ratio of margins, and which parts of DAMA lower it."""
    ratios = findings.easy_over_hard
    means = [f"{statistics.fmean(ratios[m].values()):.2f} with {m}" for m in (DPO, DAMA) if ratios[m]]
    lower = ", ".join(f"{name} {less} of {total}" for name, (less, total) in findings.more_even.items())
    return (
        f"The held-out margin of easy pairs over that of hard ones is {' and '.join(means)} (learning rate {RATE:g}). "
        f"Over all rates and seeds, so many runs have a lower one than DPO's: {lower}."
    )


def _filters(findings: Findings) -> str:
    late = findings.drops[-1]
    flipped, right = (written(late[kind]) for kind in ("flipped", "right"))
    return (
        f"In the last third of training it drops {flipped} % of the flipped pairs and {right} % of the right ones, a "
        f"difference of {written(late['difference'], sign=True)} points."
    )


def _length_free(findings: Findings) -> str:
    with_sum, with_mean = (findings.statements[reduction] for reduction in ("sum", "mean"))
    told = (
        f"The sum over statements correlates with how many more of them the preferred answer makes by {with_sum:.2f}, "
        f"the mean by {with_mean:.2f}."
    )
    gaps = {row["method"]: row["less_dama"] for row in findings.variations}
    pairs = {mean: total for mean, total in LENGTH_FREE.items() if mean in gaps and total in gaps}
    if not pairs:
        return told
    found = "; ".join(f"{name}: {in_words(gaps[name])}" for name in pairs)
    spread = findings.spread_of_alpha_D
    spreads = "; ".join(f"{total}: {spread(total):.3f}; {mean}: {spread(mean):.3f}" for mean, total in pairs.items())
    return (
        f"{told} Response-level at the same recall, less DAMA's: {found}. Standard deviation of alpha_D over pairs: "
        f"{spreads}."
    )


def main_table(numbers: Mapping[str, Any]) -> str:
    """DPO and DAMA under each condition as aligned lines, from what study.json holds: for README."""
    lines = [["pairs", "", *(f"{method} at recall -{SHOWN_LEVEL:g}" for method in (DPO, DAMA)), "DAMA less DPO", ""]]
    for row in numbers["main"]:
        levels = (written(value) for value in row["at_level"])
        lines.append([row["condition"], "", *levels, written(row["mean"], sign=True), row["verdict"]])
    pooled = Interval(*numbers["pooled"])
    lines.append(["together", "", "", "", written(pooled, sign=True), verdict(pooled)])
    return "\n".join(line.rstrip() for line in aligned(lines).splitlines())


def written(value: Interval | Sequence[float | None], decimals: int = 1, sign: bool = False) -> str:
    """"21.3 [16.7, 26.0]", or n/a."""
    if any(number is None for number in value):
        return "n/a"
    middle, low, high = (f"{number:{'+' * sign}.{decimals}f}" for number in value)
    return f"{middle} [{low}, {high}]"


def in_words(gap: Interval) -> str:
    """"+0.4 [-1.7, +3.0] points, no clear difference"."""
    return f"{written(gap, sign=True)} points, {verdict(gap)}"
