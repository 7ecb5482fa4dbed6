"""The views of a pair: which answer is read with which image. An objective names the views whose log-probs it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class View(NamedTuple):
    """One row that the model reads: the pair's question, an image and an answer."""

    answer: str  # `chosen`, `rejected`, or `second`: the right answer for the corrupted image
    corrupted: bool = False  # read with the pair's corrupted image instead of its own

    @property
    def name(self) -> str:
        """`chosen`, or `chosen_corrupted` with the corrupted image."""
        return f"{self.answer}_corrupted" if self.corrupted else self.answer


CHOSEN, REJECTED, SECOND = View("chosen"), View("rejected"), View("second")
CHOSEN_CORRUPTED, REJECTED_CORRUPTED, SECOND_CORRUPTED = (
    View(view.answer, corrupted=True) for view in (CHOSEN, REJECTED, SECOND)
)
ALL_VIEWS = (CHOSEN, REJECTED, SECOND, CHOSEN_CORRUPTED, REJECTED_CORRUPTED, SECOND_CORRUPTED)
PAIR_VIEWS = (CHOSEN, REJECTED)  # of DPO; every objective needs at least these, which metrics and weighting look at


def ordered(views: Iterable[View]) -> tuple[View, ...]:
    """The distinct views in the order of ALL_VIEWS, and those of a pair in any case."""
    wanted = {*PAIR_VIEWS, *views}
    return tuple(view for view in ALL_VIEWS if view in wanted)


def by_image(views: Sequence[View]) -> list[tuple[int, ...]]:
    """Positions of the views that share an image, and with it a prefix: the pair's own image first."""
    groups = [tuple(i for i, view in enumerate(views) if view.corrupted is corrupted) for corrupted in (False, True)]
    return [group for group in groups if group]
