"""The pairs of a cell: drawn from the shipped ones by condition and seed, with scores and log-probs inside."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dama.hardness.score import hardness_delta
from dama.stage import read_stage
from playground.tinycoco.study.grid import FULL, Cell, Scale

FLIPPED = 0.2
MOSTLY = 0.8  # of an easy or hard set from the half that it is named after
THIRDS = ("hard", "middle", "easy")

Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """All pairs with what the hardness and the reference stage say of them; the probes are never trained on."""

    rows: dict[str, Row]
    scores: dict[str, tuple[list[float], list[float]]]  # cosines of the statements of both answers
    logps: dict[str, tuple[float, float]]
    logit_scale: float
    scale: Scale = FULL

    def delta(self, id: str) -> float:
        """A pair's hardness (Eq. 6) from its stored scores."""
        return hardness_delta(*self.scores[id])

    @cached_property
    def by_delta(self) -> list[str]:
        """Ids, hardest first; the id settles ties."""
        return sorted(self.rows, key=lambda id: (self.delta(id), id))

    @cached_property
    def thirds(self) -> dict[str, list[str]]:
        """Ids by third, each hardest first; sizes differ by at most one."""
        ids = self.by_delta
        cuts = [round(k * len(ids) / 3) for k in range(4)]
        return {name: ids[cuts[k] : cuts[k + 1]] for k, name in enumerate(THIRDS)}

    @cached_property
    def probes(self) -> dict[str, list[str]]:
        """Held-out pairs of each third, the same in all cells."""
        rng = random.Random("study/probes")
        return {name: sorted(rng.sample(ids, self.scale.probes)) for name, ids in self.thirds.items()}


def read_pool(data: Path, hardness: Path, reference: Path, logit_scale: float, scale: Scale) -> Pool:
    """From the folders of `scenes`, `hardness` (cosine) and `reference`."""
    rows = {str(row["idx"]): row for row in json.loads((data / "pairs.json").read_text())}
    _, scored = read_stage(hardness, "hardness")
    _, given = read_stage(reference, "reference")
    return Pool(
        rows,
        {record["id"]: (record["chosen_scores"], record["rejected_scores"]) for record in scored},
        {record["id"]: (record["chosen_logp"], record["rejected_logp"]) for record in given},
        logit_scale,
        scale,
    )


def draw_ids(pool: Pool, condition: str, seed: int) -> list[str]:
    """Ids of the condition's pairs, in the order of the draw."""
    rng = random.Random(f"study/{seed}")
    held_out = {id for ids in pool.probes.values() for id in ids}
    ids = [id for id in pool.by_delta if id not in held_out]
    if condition in ("easy", "hard"):
        half = len(ids) // 2
        low, high = ids[:half], ids[half:]
        most, rest = (high, low) if condition == "easy" else (low, high)
        many = round(MOSTLY * pool.scale.pairs)
        return rng.sample(most, many) + rng.sample(rest, pool.scale.pairs - many)
    drawn = rng.sample(ids, pool.scale.pairs)
    return drawn[: pool.scale.small] if condition == "small" else drawn


def rows_of(pool: Pool, cell: Cell) -> list[Row]:
    """The cell's training pairs in the released layout, scores as its kind of delta takes them."""
    ids = draw_ids(pool, cell.condition, cell.seed)
    flipped = set(ids[: round(FLIPPED * len(ids))] if cell.condition == "flipped" else [])
    return [given_row(pool, id, cell.hardness, id in flipped) for id in ids]


def given_row(pool: Pool, id: str, hardness: tuple[str, str] = ("cosine", "sum"), flipped: bool = False) -> Row:
    """One pair with `logps` and `*_logits`; flipped, what was rejected is preferred, and delta changes its sign."""
    scale, reduction = hardness
    factor = pool.logit_scale if scale == "logit" else 1.0
    sides = [_reduced([factor * score for score in scores], reduction) for scores in pool.scores[id]]
    answers = [pool.rows[id]["chosen"], pool.rows[id]["rejected"]]
    logps = list(pool.logps[id])
    if flipped:
        sides, answers, logps = sides[::-1], answers[::-1], logps[::-1]
    return pool.rows[id] | {
        "chosen": answers[0],
        "rejected": answers[1],
        "chosen_logits": sides[0],
        "rejected_logits": sides[1],
        "logps": [logps[0], 0.0, [], logps[1], 0.0, []],
        "flipped": flipped,
    }


def _reduced(scores: Sequence[float], reduction: str) -> list[float]:
    """What training adds up: the scores, or their mean alone."""
    return [statistics.fmean(scores)] if reduction == "mean" else list(scores)
