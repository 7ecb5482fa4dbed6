"""Pairs as the rows of one forward pass of a Hugging Face model, without their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dama.logps import IGNORE_INDEX, AnswerIndex
from dama.models.attention import GroupRows
from dama.models.way import Way
from dama.shared_prefix import PackedGroup, PackLayout, rows_by_answer
from dama.train.family import ImageRef, PackedRows, PreparedPair, shown_images
from dama.train.rows import EncodedRow
from dama.transfer import to_device
from dama.views import View

BLANK = ImageRef(("",))
"""What a row shows that stands in for images in a batch of texts alone."""


@dataclass(frozen=True)
class PairBatch:
    """Everything that a forward pass needs besides pixels.

    Attributes:
        input_ids: [R, T]: one row of all groups, a row a group, or a row an answer, padded at the right.
        real: [R, T] bool, False for padding.
        answers: which hidden states predict which answer tokens.
        shown: which of the batch's images each row shows; None where it is of texts alone.
        blank: of a batch without images, the position in all rows of the token behind a blank one; see PairCollator.
        position_ids: [R, T]; None where the model counts for itself.
        pack: of the one row. rows: of a row a group.
        groups: of all rows, in order, and their ids on the CPU, from which a model may compute positions of its own.
    """

    input_ids: Tensor
    real: Tensor
    answers: AnswerIndex
    shown: tuple[int | None, ...]
    blank: int | None = None
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
    def packed(packed: PackedRows, images: Sequence[ImageRef]) -> PairBatch:
        """All groups one after the other in one row, without padding. `images` are those of the batch."""
        groups = groups_of(packed)
        layout = PackLayout.of([group for group, _ in groups], packed.owners)
        ids, labels = (torch.cat(parts) for parts in ids_and_labels(packed.rows))
        return PairBatch(
            ids[None],
            torch.ones(1, len(ids), dtype=torch.bool),
            layout.answers(labels),
            numbered(packed.images, images),
            blank=len(ids) - 1 if BLANK in packed.images else None,
            position_ids=layout.position_ids(),
            pack=layout,
            groups=groups,
        )

    @staticmethod
    def by_group(packed: PackedRows, images: Sequence[ImageRef]) -> PairBatch:
        """A row for each group, padded."""
        groups = groups_of(packed)
        lengths = [group for group, _ in groups]
        ids, labels = ids_and_labels(packed.rows)
        rows, padded = GroupRows.of(lengths), pad_sequence(list(ids), True)
        return PairBatch(
            padded,
            pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], True),
            index_of_groups(lengths, labels, packed.owners, padded.shape[1]),
            numbered(packed.images, images),
            blank=last_of(padded, ids) if BLANK in packed.images else None,
            position_ids=rows.alone,
            rows=rows,
            groups=groups,
        )

    @staticmethod
    def by_answer(rows: Sequence[EncodedRow], shown: Sequence[ImageRef], images: Sequence[ImageRef]) -> PairBatch:
        """A row for each answer, padded."""
        ids, labels = ids_and_labels(rows)
        padded, answers = pad_sequence(list(ids), True), AnswerIndex.of(pad_sequence(list(labels), True, IGNORE_INDEX))
        has_blank = BLANK in shown
        return PairBatch(
            padded,
            pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], True),
            replace(answers, tokens=answers.tokens[:-1]) if has_blank else answers,
            numbered(shown, images),
            blank=last_of(padded, ids) if has_blank else None,
        )


@dataclass(frozen=True)
class PairCollator:
    """Collates pairs as a model reads them; see PairBatch.

    A batch of texts alone is given a blank image behind all rows, which none of them sees and whose log-probs nobody
    asks for. So every rank calls the same modules in every batch, as ZeRO-3 and every reduction of gradients want.

    Args:
        blank: [T] ids of an image and a token behind it; None where no batch is of texts alone.
    """

    way: Way
    views: tuple[View, ...]
    blank: Tensor | None = None

    def __call__(self, items: Sequence[PreparedPair]) -> dict[str, PairBatch]:
        """{"pairs": PairBatch}."""
        images, added = shown_images(items), []
        if not images and self.blank is not None:
            images, added = [BLANK], [EncodedRow(self.blank, torch.full_like(self.blank, IGNORE_INDEX))]
        if self.way is Way.ROWS:
            rows = [item.rows[view] for view in range(len(self.views)) for item in items]
            shown = [item.images[view] for view in range(len(self.views)) for item in items]
            return {"pairs": PairBatch.by_answer([*rows, *added], [*shown, *(BLANK for _ in added)], images)}
        packed = PackedRows.of(items, self.views)
        for row in added:
            packed = PackedRows(
                (*packed.rows, row), (*packed.tails, (1,)), (*packed.images, BLANK), (*packed.owners, 0)
            )
        collate = PairBatch.packed if self.way is Way.KERNEL else PairBatch.by_group
        return {"pairs": collate(packed, images)}


def groups_of(packed: PackedRows) -> tuple[tuple[PackedGroup, Tensor], ...]:
    """The lengths and ids of packed rows."""
    return tuple(
        (PackedGroup(len(row.input_ids) - sum(tail), tail), row.input_ids)
        for row, tail in zip(packed.rows, packed.tails, strict=True)
    )


def numbered(shown: Sequence[ImageRef], images: Sequence[ImageRef]) -> tuple[int | None, ...]:
    """What rows show as numbers of a batch's images."""
    number = {image: place for place, image in enumerate(images)}
    return tuple(number.get(image) for image in shown)


def last_of(padded: Tensor, ids: Sequence[Tensor]) -> int:
    """Where the last row's last token lies among all positions of rows padded at the right."""
    return padded.numel() - padded.shape[1] + len(ids[-1]) - 1


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
    return AnswerIndex(predictors, targets, rows, rows.bincount(minlength=max(owners) + 1))
