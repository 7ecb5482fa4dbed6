"""The cells of the study, declared before the first of them runs: method x learning rate x seed x condition.

Every cell takes as many steps of as many pairs, whatever its condition. Claims rest on five seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Scale(NamedTuple):
    """How large cells are."""

    steps: int = 72  # of 16 pairs: three times through 384
    stops: tuple[int, ...] = (36, 72)  # after which a cell is looked at
    pool: int = 1500  # of the shipped pairs, from which all others are drawn
    pairs: int = 384  # of a condition
    small: int = 96  # of the small one
    probes: int = 48  # held-out pairs in each third by delta, and as many of a cell's own
    test: int = 300  # scenes
    validation: int = 100


VERSION = 3  # of what a cell computes: raised with any change of it, so that no old result is taken for a new one
FULL = Scale()
STEP_PAIRS = 16
CELL_SECONDS = 46  # of one core, about
RATES = (1e-5, 2e-5, 4e-5)
RATE = 2e-5  # of the cells that vary something else
BETA = 0.1  # train_mem.py's default, which all but some variations keep
SEEDS = (0, 1, 2, 3, 4)

DPO, DAMA = "DPO", "DAMA"
# Flags of train_mem.py that make the method.
METHODS: Mapping[str, tuple[str, ...]] = {
    DPO: ("--strategy", "none"),
    DAMA: ("--strategy", "both"),
    "DPO, random K": ("--strategy", "none", "--selection", "random"),
    "data-aware": ("--strategy", "data"),
    "model-aware": ("--strategy", "model"),
    "DAMA, no selection": ("--strategy", "both", "--selection", "off"),
    "DAMA, nearest": ("--strategy", "both", "--selection", "nearest"),
    "DAMA, released": ("--strategy", "both", "--variant", "released"),
    "beta-DPO": ("--strategy", "beta_dpo"),
}
# One constant away from DAMA (or DPO), at one learning rate, on clean pairs.
VARIATIONS: Mapping[str, tuple[str, ...]] = {
    "DPO, beta 0.05": ("--strategy", "none", "--dpo_beta", "0.05"),
    "DPO, beta 0.2": ("--strategy", "none", "--dpo_beta", "0.2"),
    "DAMA, beta 0.05": ("--strategy", "both", "--dpo_beta", "0.05"),
    "DAMA, beta 0.2": ("--strategy", "both", "--dpo_beta", "0.2"),
    "DAMA, gamma 0.5": ("--strategy", "both", "--gamma", "0.5"),
    "DAMA, gamma 0.99": ("--strategy", "both", "--gamma", "0.99"),
    "DAMA, K 8 of 16": ("--strategy", "both", "--select_ratio", "0.5"),
    "DAMA, K 15 of 16": ("--strategy", "both", "--select_ratio", "0.9375"),
    "DAMA, logit": ("--strategy", "both"),
    "DAMA, mean": ("--strategy", "both"),
    "DAMA, logit mean": ("--strategy", "both"),
}
# What delta is in a cell, where not the sum of cosines: (scale, reduction).
HARDNESS: Mapping[str, tuple[str, str]] = {
    "DAMA, logit": ("logit", "sum"),
    "DAMA, mean": ("cosine", "mean"),
    "DAMA, logit mean": ("logit", "mean"),
}
CONDITIONS: Mapping[str, str] = {
    "clean": "384 pairs",
    "flipped": "the same, with chosen and rejected answer exchanged in 20 % of them",
    "easy": "384 pairs, four in five from the half with the larger delta",
    "hard": "384 pairs, four in five from the half with the smaller delta",
    "small": "96 pairs, met four times as often",
}


@dataclass(frozen=True, order=True)
class Cell:
    """One training with its captions and figures."""

    condition: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        words = [self.condition, self.method, f"{self.rate:g}", str(self.seed)]
        return "_".join(words).lower().replace(", ", "-").replace(" ", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """Training flags of the method."""
        return {**METHODS, **VARIATIONS}[self.method]

    @property
    def hardness(self) -> tuple[str, str]:
        """(scale, reduction) of the hardness stage; the sum of cosines unless the method says otherwise."""
        return HARDNESS.get(self.method, ("cosine", "sum"))


def hours_of(cells: int, cores: int) -> float:
    """About how long they take, several at a time."""
    return cells * CELL_SECONDS / cores / 3600


def declare(quick: bool = False) -> list[Cell]:
    """All cells in the order in which they run: seed by seed, so that an interrupted study has whole seeds.

    quick: DPO and DAMA on clean and flipped pairs, two seeds.
    """
    if quick:
        return [Cell(c, m, r, s) for s in SEEDS[:2] for c in ("clean", "flipped") for m in (DPO, DAMA) for r in RATES]
    return [cell for seed in SEEDS for cell in _of_seed(seed)]


def _of_seed(seed: int) -> Iterator[Cell]:
    for condition in CONDITIONS:
        methods = METHODS if condition == "clean" else (DPO, DAMA)
        for method in methods:
            for rate in RATES:
                yield Cell(condition, method, rate, seed)
    for method in VARIATIONS:
        yield Cell("clean", method, RATE, seed)
