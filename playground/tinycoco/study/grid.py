"""The cells of the study, declared before the first of them runs: method x learning rate x seed x condition.

Every cell takes as many steps of as many pairs. Methods that the questions of the study are about have five seeds, the
others three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Scale(NamedTuple):
    """How large cells are."""

    steps: int = 72  # of 16 pairs: three times through 384
    stops: tuple[int, ...] = (36, 72)  # after which a cell is measured
    pool: int = 1500  # of the shipped pairs, from which a cell draws
    pairs: int = 384  # of a cell
    probes: int = 300  # held-out pairs in each third by delta
    test: int = 300  # scenes
    asked: int = 150  # of the test scenes, about which the ability benchmark asks
    validation: int = 100


VERSION = 5  # of what a cell computes: raised with any change of it, so that no old result is taken for a new one
FULL = Scale()
STEP_PAIRS = 16
RATES = (2e-5, 4e-5, 8e-5)
RATE = 4e-5  # at which thirds of the pairs are compared
SEEDS = (0, 1, 2, 3, 4)
FEWER_SEEDS = SEEDS[:3]

DPO, DAMA, RANDOM_K = "DPO", "DAMA", "DPO, random K"
SECOND_IMAGES: Mapping[str, str] = {"blank": "blank", "counterfactual": "field"}
"""What an image is compared with -> --corruption: its mean color, or the scene without one object."""

# Flags of train_mem.py that make the method.
_ONE_IMAGE: Mapping[str, tuple[str, ...]] = {
    DPO: ("--strategy", "none"),
    DAMA: ("--strategy", "both"),
    RANDOM_K: ("--strategy", "none", "--selection", "random"),
    "beta-DPO": ("--strategy", "beta_dpo"),
    "cDPO": ("--strategy", "none", "--loss", "cdpo"),
    "IPO": ("--strategy", "none", "--loss", "ipo"),
    "SimPO": ("--strategy", "none", "--loss", "simpo", "--dpo_beta", "2"),
    "SFT on chosen": ("--strategy", "none", "--loss", "sft"),
    "segments": ("--strategy", "none", "--token_weights", "segments:3"),
}
_SECOND: Mapping[str, tuple[str, ...]] = {
    "visual": ("--strategy", "none", "--token_weights", "visual"),
    "mDPO": ("--strategy", "none", "--loss", "mdpo"),
    "AdaViP": ("--strategy", "none", "--loss", "adavip"),
    "OPA": ("--strategy", "none", "--loss", "opa"),
    "SymMPO": ("--strategy", "none", "--loss", "symmpo"),
    "DAMA on mDPO": ("--strategy", "both", "--loss", "mdpo"),
    "DAMA on AdaViP": ("--strategy", "both", "--loss", "adavip"),
}
TWO_IMAGES: Mapping[str, tuple[str, ...]] = {
    f"{name}, {image}": (*flags, "--corruption", corruption)
    for name, flags in _SECOND.items()
    for image, corruption in SECOND_IMAGES.items()
    if (name, image) != ("SymMPO", "blank")  # its second answer describes the second image
}
METHODS: Mapping[str, tuple[str, ...]] = {**_ONE_IMAGE, **TWO_IMAGES}
CENTRAL = (DPO, DAMA, RANDOM_K, "mDPO, counterfactual", "DAMA on mDPO, counterfactual")
PROBED = (DPO, DAMA)  # methods whose reward gaps of held-out pairs are measured: a quarter of a cell's time
CONDITIONS: Mapping[str, str] = {
    "clean": "384 pairs",
    "flipped": "the same, with chosen and rejected answer exchanged in 20 % of them",
}
CELL_SECONDS = 60  # of one core, about


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
        return METHODS[self.method]


def hours_of(cells: int, cores: int) -> float:
    """About how long they take, several at a time."""
    return cells * CELL_SECONDS / cores / 3600


def declare(quick: bool = False) -> list[Cell]:
    """All cells in the order in which they run: seed by seed, so that an interrupted study has whole seeds.

    Neighbors have other pairs or views, so that cells that run at one time can take what earlier ones have computed.

    quick: DPO and DAMA on clean and flipped pairs, two rates, one seed.
    """
    if quick:
        return [Cell(c, m, r, 0) for r in RATES[1:] for m in (DPO, DAMA) for c in CONDITIONS]
    return [cell for seed in SEEDS for cell in _of_seed(seed)]


def _of_seed(seed: int) -> Iterator[Cell]:
    for rate in RATES:
        for method in METHODS:
            if method in CENTRAL or seed in FEWER_SEEDS:
                for condition in CONDITIONS:
                    yield Cell(condition, method, rate, seed)
