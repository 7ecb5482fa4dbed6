"""The pairs of a cell: sampled from the shipped ones by seed, with their CLIP scores, some of them flipped."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dama.hardness.score import hardness_delta
from dama.stage import read_stage
from playground.tinycoco.study.grid import FULL, Cell, Scale

FLIPPED = 0.2
THIRDS = ("hard", "middle", "easy")

Row = dict[str, Any]
Scores = dict[str, tuple[list[float], list[float]]]
"""Id -> cosines of the statements of both answers."""
Logps = dict[str, tuple[float, float]]
"""Id -> log-probs of both answers."""


@dataclass(frozen=True)
class Pool:
    """Pairs with their CLIP scores: those to sample from, and held-out ones of other scenes.

    reference: id of a held-out pair -> log-probs of both answers before alignment.
    """

    rows: dict[str, Row]
    scores: Scores
    held_out_scores: Scores
    reference: Logps
    scale: Scale = FULL

    @cached_property
    def thirds(self) -> dict[str, list[str]]:
        """Ids by third of delta, each hardest first; sizes differ by at most one."""
        return thirds_of(self.scores)

    @cached_property
    def probes(self) -> dict[str, list[str]]:
        """Ids of held-out pairs by third of their delta, the same in all cells."""
        return {third: sorted(ids[: self.scale.probes]) for third, ids in thirds_of(self.held_out_scores).items()}

    def delta(self, id: str) -> float:
        """A pair's hardness (Eq. 6)."""
        return hardness_delta(*self.scores[id])


def thirds_of(scores: Scores) -> dict[str, list[str]]:
    """Ids by third of delta, hardest first; the id settles ties."""
    ids = sorted(scores, key=lambda id: (hardness_delta(*scores[id]), id))
    cuts = [round(k * len(ids) / 3) for k in range(4)]
    return {name: ids[cuts[k] : cuts[k + 1]] for k, name in enumerate(THIRDS)}


def read_pool(folder: Path, scale: Scale) -> Pool:
    """From pool/, hardness/, held_out_hardness/ and reference/ of the study's folder."""
    return Pool(
        {str(row["idx"]): row for row in json.loads((folder / "pool/pairs.json").read_text())},
        _scores(folder / "hardness"),
        _scores(folder / "held_out_hardness"),
        logps_of(folder / "reference"),
        scale,
    )


def _scores(stage: Path) -> Scores:
    _, scored = read_stage(stage, "hardness")
    return {record["id"]: (record["chosen_scores"], record["rejected_scores"]) for record in scored}


def logps_of(stage: Path) -> Logps:
    """From a folder of `reference`."""
    _, given = read_stage(stage, "reference")
    return {record["id"]: (record["chosen_logp"], record["rejected_logp"]) for record in given}


def rows_of(pool: Pool, cell: Cell) -> list[Row]:
    """The cell's training pairs in the released layout with the statements' scores; the first are flipped, if any."""
    ids = random.Random(f"study/{cell.seed}").sample(sorted(pool.rows), pool.scale.pairs)
    flipped = round(FLIPPED * len(ids)) if cell.condition == "flipped" else 0
    return [given_row(pool, id, place < flipped) for place, id in enumerate(ids)]


def given_row(pool: Pool, id: str, flipped: bool = False) -> Row:
    """One pair with `*_logits`; flipped, what was rejected is preferred, and delta changes its sign."""
    order = slice(None, None, -1 if flipped else 1)
    chosen, rejected = [pool.rows[id]["chosen"], pool.rows[id]["rejected"]][order]
    of_chosen, of_rejected = pool.scores[id][order]
    scores = {"chosen_logits": of_chosen, "rejected_logits": of_rejected}
    return pool.rows[id] | {"chosen": chosen, "rejected": rejected, **scores, "flipped": flipped}
