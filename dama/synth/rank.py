"""What is best and what is worst: rewards combined by rank, the choice of a pair, and the step `rank-images`."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from dama.stage import Record, open_stage
from dama.synth.prompts import IMAGES, RANK_IMAGES, by_prompt, chunks_of, numbers, read_step, step_folder
from dama.synth.rewards import Judged, Reward

PROMPTS_PER_CHUNK = 16  # what a kill can cost
PICTURES = "images"  # the folder, in --out, of each prompt's best image

NO_NUMBER = "the reward is no number"
NO_PICTURE = "no usable candidate picture"
ALL_TIED = "the reward gives all candidates the same score"
BELOW = "the best candidate is below the threshold"
TOO_FEW = "fewer than two usable answers"
MARGIN = "the margin between best and worst is too small"
LENGTH = "best and worst differ too much in length"
ALIKE = "best and worst are nearly the same text"

Scores = Sequence[float | None]
"""One for each candidate, None where there is no number."""


# ------------------------------------------------------------------------------------------------------------ choice


def combine(scores: Mapping[str, Scores]) -> list[float | None]:
    """One score a candidate: the only reward's own; of several each candidate's mean rank, from 0 (last) to 1 (first).

    Equal scores share the mean of their ranks. A candidate that any reward has no number for has none here.
    """
    if len(scores) == 1:
        return list(*scores.values())
    rated = [row for row, values in enumerate(zip(*scores.values())) if None not in values]
    combined: list[float | None] = [None] * len(next(iter(scores.values())))
    by_reward = [rank_shares([values[row] for row in rated]) for values in scores.values()]  # type: ignore[misc]
    for row, shares in zip(rated, zip(*by_reward)):
        combined[row] = sum(shares) / len(shares)
    return combined


def rank_shares(values: Sequence[float]) -> list[float]:
    """Share of the other values that each one is above, an equal one counting half."""
    others = max(1, len(values) - 1)
    return [(sum(x > y for y in values) + (values.count(x) - 1) / 2) / others for x in values]


class Choice(NamedTuple):
    """Rows of the chosen and the rejected answer; or why there is no pair."""

    chosen: int = -1
    rejected: int = -1
    error: str = ""


@dataclass(frozen=True)
class Filters:
    """What a pair must be. Each may be left at a value that lets everything through.

    margin: least difference of the combined scores. length_balance: largest difference of the numbers of words, as a
    share of the longer answer's. alike: share of the words in common, in order, from which on two answers are nearly
    the same.
    """

    margin: float = 0.0
    length_balance: float = math.inf
    alike: float = 1.0


def choose(texts: Sequence[str], scores: Scores, filters: Filters) -> Choice:
    """The pair of largest difference that passes the filters; without any, the best answer and the worst (PDS-DPO).

    The error names the first filter that nothing passed. Equal differences: the earlier candidates.
    """
    rated = [(row, score) for row, score in enumerate(scores) if score is not None]
    if len(rated) < 2:
        return Choice(error=TOO_FEW)
    gaps = [(x - y, i, j) for i, x in rated for j, y in rated if x > y]
    if not gaps:
        return Choice(error=ALL_TIED)
    gaps.sort(key=lambda gap: (-gap[0], gap[1], gap[2]))
    wide = [gap for gap in gaps if gap[0] >= filters.margin]
    if not wide:
        return Choice(error=MARGIN)
    balanced = [gap for gap in wide if length_difference(texts[gap[1]], texts[gap[2]]) <= filters.length_balance]
    if not balanced:
        return Choice(error=LENGTH)
    for _, chosen, rejected in balanced:
        if filters.alike >= 1 or likeness(texts[chosen], texts[rejected]) < filters.alike:
            return Choice(chosen, rejected)
    return Choice(error=ALIKE)


def length_difference(one: str, other: str) -> float:
    """In words, as a share of the longer text's."""
    lengths = sorted((len(one.split()), len(other.split())))
    return (lengths[1] - lengths[0]) / max(1, lengths[1])


def likeness(one: str, other: str) -> float:
    """Share of words that two texts have in common, in order: 2 M / T of difflib, M matching words of T in both."""
    return SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


# ----------------------------------------------------------------------------------------------------------- scoring


def score_all(rewards: Sequence[Reward], items: Sequence[Judged]) -> dict[str, list[float | None]]:
    """Reward -> score of each item, None for NaN and infinities."""
    every = {reward.name: reward.score(items) if items else [] for reward in rewards}
    return {name: [x if math.isfinite(x) else None for x in scores] for name, scores in every.items()}


def rewards_identity(rewards: Sequence[Reward]) -> Record:
    """Identify the rewards in the fingerprint."""
    return {reward.name: reward.identity() | {"sees_image": reward.sees_image} for reward in rewards}


def run_rank_images(
    rewards: Sequence[Reward], out: str | Path, *, threshold: float | None = None, overwrite: bool = False
) -> Record:
    """Copy the best candidate of each prompt to out/images/ID.jpg; records in out/stages/rank-images.

    A record is {id, prompt, question, image, best, error, candidates: [{image, digest, guidance, seed, error, scores,
    score}]}; `image` is null where the prompt is left out, `fault` says why. threshold: the least score of the best,
    in the reward's units, or as a mean rank of several.
    """
    manifest, drawn = read_step(out, IMAGES)
    groups = list(by_prompt(drawn).values())
    chunks = chunks_of(groups, PROMPTS_PER_CHUNK)
    identity = rewards_identity(rewards)
    fingerprint = {"images": manifest["digest"], "rewards": identity, "threshold": threshold}
    sizes = [len(chunk) for chunk in chunks]
    with open_stage(step_folder(out, RANK_IMAGES), RANK_IMAGES, fingerprint, sizes, overwrite=overwrite) as stage:
        stage.fill(lambda number: _rank_chunk(rewards, chunks[number], Path(out), threshold), "prompt")
        return stage.conclude(_summarize, {"rewards": identity}) or {}


def _rank_chunk(
    rewards: Sequence[Reward], groups: Sequence[Sequence[Record]], out: Path, threshold: float | None
) -> list[Record]:
    folder = step_folder(out, IMAGES)
    usable = [record for group in groups for record in group if record["image"] is not None]
    items = [Judged(folder / record["image"], "", record["prompt"]) for record in usable]
    by_item = {name: iter(scores) for name, scores in score_all(rewards, items).items()}
    records = []
    for group in groups:
        candidates = [
            {key: record[key] for key in ("image", "digest", "guidance", "seed", "fault")}
            | {"scores": {name: next(by_item[name]) if record["image"] else None for name in by_item}}
            for record in group
        ]
        records.append(_ranked(group[0], candidates, folder, out, threshold))
    return records


def _ranked(first: Record, candidates: Sequence[Record], folder: Path, out: Path, threshold: float | None) -> Record:
    names = candidates[0]["scores"]
    combined = combine({name: [candidate["scores"][name] for candidate in candidates] for name in names})
    for candidate, score in zip(candidates, combined):
        candidate["score"] = score
        if score is None and not candidate["fault"]:
            candidate["fault"] = NO_NUMBER
    best, error = best_picture(combined, threshold)
    image = digest = None
    if best is not None:
        source = folder / candidates[best]["image"]
        image, digest = f"{PICTURES}/{first['id']}{source.suffix}", candidates[best]["digest"]
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / image)
    return {"id": first["id"], "prompt": first["prompt"], "question": first["question"], "image": image,
            "digest": digest, "best": best, "fault": error, "candidates": list(candidates)}  # fmt: skip


def best_picture(scores: Scores, threshold: float | None) -> tuple[int | None, str]:
    """Row of the best candidate, the earliest of equals; or why none is taken."""
    rated = [score for score in scores if score is not None]
    if not rated:
        return None, NO_PICTURE
    if len(rated) > 1 and min(rated) == max(rated):
        return None, f"{ALL_TIED} ({numbers(rated[:1])})"
    if threshold is not None and max(rated) < threshold:
        return None, f"{BELOW} ({numbers([max(rated)])})"
    return list(scores).index(max(rated)), ""


def _summarize(records: list[Record], facts: list[Record]) -> Record:
    left_out = Counter(record["fault"].partition(" (")[0] for record in records if record["fault"])
    candidates = Counter(c["fault"] for record in records for c in record["candidates"] if c["fault"])
    return {"prompts": len(records), "pictures": len(records) - left_out.total(),
            "left_out": dict(sorted(left_out.items())), "candidates_left_out": dict(sorted(candidates.items())),
            **facts[0]}  # fmt: skip
