"""The study in words and in one table: a verdict on each claim, as far as the intervals allow one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eval.core.scores import aligned
from eval.core.statistics import Interval
from playground.tinycoco.study.analysis import BETTER, NO_DIFFERENCE, TOO_FEW, UNDEFINED, WORSE, verdict
from playground.tinycoco.study.findings import Comparison, Findings, Row
from playground.tinycoco.study.grid import DAMA, DPO, RATE, TWO_IMAGES

HOLDS, CONTRARY, OPEN, NONE = "holds", "the contrary holds", "not shown either way", "none is shown to"
VERDICTS = (BETTER, NO_DIFFERENCE, WORSE, UNDEFINED, TOO_FEW)
SHORT = {BETTER: "better", NO_DIFFERENCE: "-", WORSE: "worse", UNDEFINED: "n/a", TOO_FEW: "few"}
NOTE = (
    "Points at equal recall, minus DPO's; brackets: 95 % intervals that hold for all methods of a column at once. "
    "better,\nworse: the interval excludes zero; *: that of the ability does; n/a: not comparable; few: too few seeds."
)


class Claim(NamedTuple):
    """What is claimed, whether the intervals bear it out, and the figures behind the verdict."""

    claim: str
    verdict: str
    figures: str


def claims_of(findings: Findings) -> list[Claim]:
    """The five of the paper first; none has a verdict where the methods have too few seeds."""
    claims = [
        _fewer_hallucinations(findings),
        _more_ability(findings),
        _overfits(findings),
        _underfits(findings),
        _robust(findings),
        *_of_other_methods(findings),
    ]
    return claims if findings.has_verdicts else [claim._replace(verdict=TOO_FEW) for claim in claims]


def borne_out(difference: Interval, *, below: bool = False) -> str:
    """Verdict on a claim that the difference is above 0, or `below`."""
    if difference.low is None or difference.high is None:
        return OPEN
    above, under = (CONTRARY, HOLDS) if below else (HOLDS, CONTRARY)
    return above if difference.low > 0 else under if difference.high < 0 else OPEN


# --- The paper's ------------------------------------------------------------------------------------------------------


def _fewer_hallucinations(findings: Findings) -> Claim:
    pooled = findings.pooled["dama"]
    told = _dama_by_condition(findings, "gap")
    return Claim(
        "DAMA hallucinates less than DPO at equal recall",
        borne_out(pooled, below=True),
        f"Response-level minus DPO's, points: {told}; mean {written(pooled, sign=True)}.",
    )


def _more_ability(findings: Findings) -> Claim:
    pooled = findings.pooled["dama_ability"]
    told, yes_no = (_dama_by_condition(findings, name) for name in ("ability_gap", "yes_no_gap"))
    return Claim(
        "DAMA keeps more general ability than DPO at equal recall",
        borne_out(pooled),
        f"Ability minus DPO's, points: {told}; mean {written(pooled, sign=True)}. Accuracy on yes/no questions minus "
        f"DPO's: {yes_no}.",
    )


def _dama_by_condition(findings: Findings, name: str) -> str:
    """Each condition with DAMA's difference from DPO."""
    found = {c: row for c, rows in findings.rows.items() for row in rows if row["method"] == DAMA}
    return ", ".join(f"{condition} {written(row[name], sign=True)}" for condition, row in found.items())


def _overfits(findings: Findings) -> Claim:
    gaps = findings.overfit
    easy, hard, both = (written(gaps[name], sign=True) for name in ("easy", "hard", "easy less hard"))
    return Claim(
        "Plain DPO overfits easy pairs more than hard ones",
        borne_out(gaps["easy less hard"]),
        f"At {RATE:g} on clean pairs. Its accuracy on easy pairs that it was trained on minus that on held-out ones is "
        f"{easy} points, on hard pairs {hard}; the difference is {both}.",
    )


def _underfits(findings: Findings) -> Claim:
    rows = {row["third"]: row for row in findings.thirds if row["method"] == DPO}
    seen, unseen = (
        " and ".join(written(rows[third][f"{kind}_accuracy"]) for third in ("easy", "hard") if third in rows)
        for kind in ("trained", "held_out")
    )
    return Claim(
        "Plain DPO fits hard pairs less than easy ones",
        borne_out(findings.underfit),
        f"At {RATE:g} on clean pairs. It prefers the right answer in {seen} % of the easy and hard pairs that it was "
        f"trained on, a difference of {written(findings.underfit, sign=True)} points; held out in {unseen} %. The "
        "figures do not show how much of this is the nature of the pairs.",
    )


def _robust(findings: Findings) -> Claim:
    by_condition = _dama_by_condition(findings, "gap")
    drops = "; ".join(
        f"{method} {written(parts[-1]['flipped'])} and {written(parts[-1]['right'])}"
        for method, parts in findings.drops.items()
    )
    return Claim(
        "DAMA is more robust to flipped pairs than DPO",
        borne_out(findings.robust, below=True),
        f"Response-level minus DPO's at equal recall, points: {by_condition}; flipped minus clean "
        f"{written(findings.robust, sign=True)}. Flipped and right pairs dropped in the last third of training at "
        f"{RATE:g}, %: {drops or 'n/a'}.",
    )


# --- Of the other methods ---------------------------------------------------------------------------------------------


def _of_other_methods(findings: Findings) -> Iterator[Claim]:
    tried = {row["method"] for rows in findings.rows.values() for row in rows} - {DPO, DAMA}
    if tried:
        yield _some_method_is_best(findings, len(tried))
    if findings.second_images:
        yield _counterfactual(findings)
    if tried & TWO_IMAGES.keys():
        yield _two_images_cost_ability(findings)


def _some_method_is_best(findings: Findings, tried: int) -> Claim:
    better = "; ".join(findings.recommended)
    return Claim(
        "Some method beats both DPO and DAMA under both conditions",
        HOLDS if better else NONE,
        f"Other methods: {tried}. Clearly better at equal recall, in intervals that hold for all methods at once: "
        f"{better or 'none'}.",
    )


def _counterfactual(findings: Findings) -> Claim:
    pooled = findings.pooled["counterfactual"]
    return Claim(
        "A second image without one object helps more than a blank one",
        borne_out(pooled, below=True),
        f"Response-level at equal recall minus that with a blank image, points: {written(pooled, sign=True)}, mean of "
        f"{len(findings.second_images)} comparisons: {_by_method(findings.second_images)}.",
    )


def _two_images_cost_ability(findings: Findings) -> Claim:
    pooled = findings.pooled["two_images_ability"]
    worse = {row["method"] for rows in findings.rows.values() for row in rows if _costs_ability(row)}
    names = [method for method in TWO_IMAGES if method in worse]
    return Claim(
        "Objectives with two images cost ability",
        borne_out(pooled, below=True),
        f"Ability minus DPO's at equal recall, points: {written(pooled, sign=True)}, mean of "
        f"{len(findings.asked_two_images)} comparisons of such methods. Clearly below DPO's, all methods at once: "
        f"{'; '.join(names) or 'none'}.",
    )


def _by_method(compared: Sequence[Comparison]) -> str:
    """Methods, without their second image, and under which conditions."""
    found: dict[str, list[str]] = {}
    for condition, method, _ in compared:
        found.setdefault(method.split(", ")[0], []).append(condition)
    return ", ".join(f"{method} ({' and '.join(conditions)})" for method, conditions in found.items())


def _costs_ability(row: Row) -> bool:
    return row["verdicts"].get("ability_gap") == WORSE


# --- As text ----------------------------------------------------------------------------------------------------------


def summary(numbers: Mapping[str, Any]) -> str:
    """From the contents of study.json: a line for each method, then claims and verdicts; 118 columns at most."""
    conditions = numbers["rows"]
    titles = [["method", *(word for c in conditions for word in (f"{c}: response-level", "", "ability"))]]
    by_method: dict[str, dict[str, Row]] = {}
    for condition, rows in conditions.items():
        for row in rows:
            by_method.setdefault(row["method"], {})[condition] = row
    body = [
        [method, *(word for condition in conditions for word in _summary_cells(found.get(condition)))]
        for method, found in by_method.items()
        if method != DPO
    ]
    table = [line.rstrip() for line in aligned([*titles, *body], left=1).splitlines()]
    return "\n".join([*table, NOTE, "", verdicts_on(numbers["claims"])])


def verdicts_on(claims: Sequence[Mapping[str, str]]) -> str:
    """From the claims of study.json: a line for each."""
    return "\n".join(f"{row['claim']}: {row['verdict']}" for row in claims)


def _summary_cells(row: Mapping[str, Any] | None) -> list[str]:
    """Response-level minus DPO's with interval, its verdict, ability minus DPO's."""
    if row is None:
        return ["", SHORT[UNDEFINED], ""]
    gap, ability = (Interval(*row["together"][name]) for name in ("gap", "ability_gap"))
    clear = "*" if verdict(ability) in (BETTER, WORSE) else " "
    of_ability = "n/a " if ability.value is None else f"{ability.value:+z.1f}{clear}"
    return [written(gap, sign=True), SHORT[row["verdicts"]["gap"]], of_ability]


def written(value: Interval | Sequence[float | None], decimals: int = 1, sign: bool = False) -> str:
    """Value and interval as text: `21.3 [16.7, 26.0]`, or n/a."""
    if any(number is None for number in value):
        return "n/a"
    middle, low, high = (f"{number:{'+' * sign}z.{decimals}f}" for number in value)
    return f"{middle} [{low}, {high}]"
