"""The study in words and in one table: what the figures say of each claim, as far as their intervals allow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.core.scores import aligned
from eval.core.statistics import Interval
from playground.tinycoco.study.analysis import SHOWN_LEVEL, verdict
from playground.tinycoco.study.findings import Findings
from playground.tinycoco.study.grid import DAMA, DPO, RATE

HOLDS, CONTRARY, OPEN, NONE = "holds", "the contrary holds", "not shown either way", "none does"
VERDICTS = ("clearly better", "no clear difference", "clearly worse", "not comparable")
LENGTH_FREE = {"DAMA, mean": DAMA, "DAMA, logit mean": "DAMA, logit"}
"""Variations of delta that take means -> the same with sums."""


class Claim(NamedTuple):
    """What is claimed, whether the intervals bear it out, and the figures that say so."""

    claim: str
    verdict: str
    figures: str


def claims_of(findings: Findings) -> list[Claim]:
    """Those of the paper first."""
    found = [_fewer_inventions(findings), _overfits(findings), _underfits(findings), _evens_out(findings)]
    if findings.drops:
        found.append(_filters(findings))
    if any(row["method"] in LENGTH_FREE for row in findings.variations):
        found.append(_length_free(findings))
    if tried := {row["method"] for row in (*findings.ablations, *findings.variations)} - {DAMA}:
        better = "; ".join(findings.better_than_both)
        told = f"Of {len(tried)} tried on clean pairs, clearly better at the same recall: {better or 'none'}."
        found.append(Claim("Some variant beats both DPO and DAMA", HOLDS if better else NONE, told))
    return found


def borne_out(difference: Interval, *, below: bool = False) -> str:
    """Of a claim that the difference is above 0, or `below`."""
    if difference.low is None or difference.high is None:
        return OPEN
    above, under = (CONTRARY, HOLDS) if below else (HOLDS, CONTRARY)
    return above if difference.low > 0 else under if difference.high < 0 else OPEN


def _fewer_inventions(findings: Findings) -> Claim:
    by_verdict: dict[str, list[str]] = {}
    for row in findings.main:
        by_verdict.setdefault(row["verdict"], []).append(f"{row['condition']} {written(row['mean'], sign=True)}")
    told = "; ".join(f"{kind}: {', '.join(by_verdict[kind])}" for kind in VERDICTS if kind in by_verdict)
    return Claim(
        "DAMA gives fewer inventions than DPO at the same recall",
        borne_out(findings.pooled, below=True),
        f"Response-level minus DPO's, points: {told}; all together {written(findings.pooled, sign=True)}.",
    )


def _overfits(findings: Findings) -> Claim:
    gaps = findings.overfit
    easy, hard, both = (written(gaps[name], sign=True) for name in ("easy", "hard", "easy less hard"))
    return Claim(
        "Plain DPO overfits easy pairs more than hard ones",
        borne_out(gaps["easy less hard"]),
        f"Its accuracy on easy pairs that it was trained on is {easy} points above that on held-out ones, on hard "
        f"pairs {hard}; the difference is {both}.",
    )


def _underfits(findings: Findings) -> Claim:
    rows = {row["third"]: row for row in findings.thirds if row["method"] == DPO}
    seen, unseen = (
        " and ".join(written(rows[third][f"{kind}_accuracy"]) for third in ("easy", "hard"))
        for kind in ("trained", "held_out")
    )
    return Claim(
        "Plain DPO fits hard pairs less than easy ones",
        borne_out(findings.underfit),
        f"Where it was trained on them, it prefers the right answer in {seen} % of easy and hard pairs, held out in "
        f"{unseen} %. How much of that is the pairs' own nature, no figure here tells.",
    )


def _evens_out(findings: Findings) -> Claim:
    """A ratio of margins, and which parts of DAMA lower it."""
    lower = "; ".join(f"{name} {less} of {total}" for name, (less, total) in findings.more_even.items())
    means = [f"{statistics.fmean(r.values()):.2f} with {m}" for m, r in findings.easy_over_hard.items() if r]
    return Claim(
        "DAMA evens that out",
        borne_out(findings.evened),
        f"The held-out margin of easy pairs over that of hard ones is {' and '.join(means)} (learning rate {RATE:g}); "
        f"DPO's minus DAMA's {written(findings.evened, 2, sign=True)}. Over all rates and seeds, so many runs have a "
        f"lower one than DPO's: {lower}.",
    )


def _filters(findings: Findings) -> Claim:
    late = findings.drops[-1]
    flipped, right = (written(late[kind]) for kind in ("flipped", "right"))
    return Claim(
        "The filter drops wrong pairs rather than right ones",
        borne_out(late["difference"]),
        f"In the last third of training it drops {flipped} % of the flipped pairs and {right} % of the right ones, a "
        f"difference of {written(late['difference'], sign=True)} points.",
    )


def _length_free(findings: Findings) -> Claim:
    """Of delta as a mean over statements instead of a sum."""
    with_sum, with_mean = (findings.statements[reduction] for reduction in ("sum", "mean"))
    gaps = {row["method"]: row["less_dama"] for row in findings.variations}
    pairs = {mean: total for mean, total in LENGTH_FREE.items() if mean in gaps and total in gaps}
    found = "; ".join(f"{name} {written(gaps[name], sign=True)}" for name in pairs)
    spread = findings.spread_of_alpha_D
    spreads = "; ".join(f"{total} {spread(total):.3f}, {mean} {spread(mean):.3f}" for mean, total in pairs.items())
    verdicts = {borne_out(gaps[name], below=True) for name in pairs}
    return Claim(
        "A delta free of length is better",
        verdicts.pop() if len(verdicts) == 1 else OPEN,
        f"The sum over statements correlates with how many more of them the preferred answer makes by {with_sum:.2f}, "
        f"the mean by {with_mean:.2f}. Response-level at the same recall minus DAMA's, points: {found}. Standard "
        f"deviation of alpha_D over pairs: {spreads}.",
    )


def summary(numbers: Mapping[str, Any]) -> str:
    """From what study.json holds: DPO and DAMA under each condition as aligned lines, then claims and verdicts."""
    at_level = f"at recall -{SHOWN_LEVEL:g}"
    lines = [["response-level %", "", f"DPO {at_level}", f"DAMA {at_level}", "DAMA minus DPO", ""]]
    for row in numbers["main"]:
        levels = (written(value) for value in row["at_level"])
        lines.append([row["condition"], "", *levels, written(row["mean"], sign=True), row["verdict"]])
    pooled = Interval(*numbers["pooled"])
    lines.append(["together", "", "", "", written(pooled, sign=True), verdict(pooled)])
    table = [line.rstrip() for line in aligned(lines).splitlines()]
    return "\n".join([*table, "", *(f"{row['claim']}: {row['verdict']}" for row in numbers["claims"])])


def written(value: Interval | Sequence[float | None], decimals: int = 1, sign: bool = False) -> str:
    """Value and interval as text: `21.3 [16.7, 26.0]`, or n/a."""
    if any(number is None for number in value):
        return "n/a"
    middle, low, high = (f"{number:{'+' * sign}.{decimals}f}" for number in value)
    return f"{middle} [{low}, {high}]"
