"""Pairs as the rows of one forward pass of a Hugging Face model, without their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dama.logps import IGNORE_INDEX, AnswerIndex
from dama.models.attention import GroupRows
from dama.models.way import Way
from dama.shared_prefix import PackedGroup, PackLayout, rows_by_answer
from dama.train.family import PackedRows, PreparedPair, shown_images
from dama.train.rows import EncodedRow
from dama.transfer import to_device
from dama.views import View


@dataclass(frozen=True)
class PairBatch:
    """Everything that a forward pass needs besides pixels.

    Attributes:
        input_ids: [R, T]: one row of all groups, a row a group, or a row an answer, padded at the right.
        real: [R, T] bool, False for padding.
        answers: which hidden states predict which answer tokens.
        shown: which of the batch's images the rows show, in their order.
        position_ids: [R, T]; None where the model counts for itself.
        pack: of the one row. rows: of a row a group.
        groups: of all rows, in order, and their ids on the CPU, from which a model may compute positions of its own.
    """

    input_ids: Tensor
    real: Tensor
    answers: AnswerIndex
    shown: tuple[int, ...]
    position_ids: Tensor | None = None
    pack: PackLayout | None = None
    rows: GroupRows | None = None
    groups: tuple[tuple[PackedGroup, Tensor], ...] = ()

    def to(self, device: torch.device, non_blocking: bool = True) -> PairBatch:
        """The batch on a device, in one copy that the host does not wait for (`non_blocking` is implied)."""
        return to_device(self, torch.device(device))

    @property
    def layout(self) -> PackLayout | GroupRows | None:
        """What the attention masks are made for."""
        return self.pack or self.rows

    @staticmethod
    def packed(items: Sequence[PreparedPair], views: Sequence[View]) -> PairBatch:
        """All groups one after the other in one row, without padding."""
        packed, groups = groups_of(items, views)
        layout = PackLayout.of([group for group, _ in groups], packed.owners)
        ids, labels = (torch.cat(parts) for parts in ids_and_labels(packed.rows))
        answers = layout.answers(labels)
        real = torch.ones(1, len(ids), dtype=torch.bool)
        return PairBatch(
            ids[None], real, answers, shown_by(packed, items), layout.position_ids(), pack=layout, groups=groups
        )

    @staticmethod
    def by_group(items: Sequence[PreparedPair], views: Sequence[View]) -> PairBatch:
        """A row for each group, padded."""
        packed, groups = groups_of(items, views)
        ids, labels = ids_and_labels(packed.rows)
        real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], True)
        rows = GroupRows.of([group for group, _ in groups])
        answers = index_of_groups([group for group, _ in groups], labels, packed.owners, real.shape[1])
        padded = pad_sequence(list(ids), True)
        return PairBatch(padded, real, answers, shown_by(packed, items), rows.alone, rows=rows, groups=groups)

    @staticmethod
    def by_answer(items: Sequence[PreparedPair], views: Sequence[View]) -> PairBatch:
        """A row for each answer, padded: those of all pairs of the first view, then of the second, and so on."""
        images = shown_images(items)
        rows = [item.rows[view] for view in range(len(views)) for item in items]
        shown = [images.index(item.images[view]) for view in range(len(views)) for item in items]
        ids, labels = ids_and_labels(rows)
        real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], True)
        answers = AnswerIndex.of(pad_sequence(list(labels), True, IGNORE_INDEX))
        return PairBatch(pad_sequence(list(ids), True), real, answers, tuple(shown))


@dataclass(frozen=True)
class PairCollator:
    """Collates pairs as a model reads them; see PairBatch."""

    way: Way
    views: tuple[View, ...]

    def __call__(self, items: Sequence[PreparedPair]) -> dict[str, PairBatch]:
        """{"pairs": PairBatch}."""
        collate = {Way.KERNEL: PairBatch.packed, Way.MASK: PairBatch.by_group, Way.ROWS: PairBatch.by_answer}
        return {"pairs": collate[self.way](items, self.views)}


def groups_of(
    items: Sequence[PreparedPair], views: Sequence[View]
) -> tuple[PackedRows, tuple[tuple[PackedGroup, Tensor], ...]]:
    """The packed rows of pairs, and each one's lengths and ids."""
    packed = PackedRows.of(items, views)
    groups = [
        (PackedGroup(len(row.input_ids) - sum(tail), tail), row.input_ids)
        for row, tail in zip(packed.rows, packed.tails, strict=True)
    ]
    return packed, tuple(groups)


def shown_by(packed: PackedRows, items: Sequence[PreparedPair]) -> tuple[int, ...]:
    """Which of the pairs' distinct images each row shows."""
    images = shown_images(items)
    return tuple(images.index(image) for image in packed.images)


def ids_and_labels(rows: Sequence[EncodedRow]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Ids and labels of rows."""
    return tuple(row.input_ids for row in rows), tuple(row.labels for row in rows)


def index_of_groups(
    groups: Sequence[PackedGroup], labels: Sequence[Tensor], owners: Sequence[int] | None, length: int
) -> AnswerIndex:
    """The answers of groups that lie in rows of `length` positions each."""
    owners = rows_by_answer([len(group.answers) for group in groups]) if owners is None else owners
    parts, first = [], 0
    for row, (group, targets) in enumerate(zip(groups, labels, strict=True)):
        index = PackLayout.of([group]).answers(targets)
        own = torch.tensor(owners[first : first + len(group.answers)])
        parts.append((index.predictors + row * length, index.targets, own[index.rows]))
        first += len(group.answers)
    predictors, targets, rows = (torch.cat(part) for part in zip(*parts))
    return AnswerIndex(predictors, targets, rows, rows.bincount(minlength=len(owners)))
