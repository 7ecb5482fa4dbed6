"""From token ids with image placeholders to embeddings: a plan made on the CPU, and one gather on the device.

Shapes: B rows, T token ids a row, T' positions after splicing, P positions an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dama.logps import AnswerIndex
from dama.shared_prefix import PackedGroup, PackLayout
from dama.transfer import to_device
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class SplicePlan:
    """Where every position of a batch comes from.

    It follows from ids, labels and the images' lengths alone, so a data loader can make it, and the device then has
    nothing to search for and the host nothing to wait for.
    """

    text_ids: Tensor  # [N] ids of the batch's text tokens, row after row
    source: Tensor  # [B, T'] row of [text (N) | image features (sum of P) | one of zeros] at each position
    labels: Tensor  # [B, T'], IGNORE_INDEX where nothing is predicted
    mask: Tensor  # [B, T'] bool, True where a row has a position
    position_ids: Tensor  # [B, T'], 0 at padding

    def embed(self, embed_tokens: Callable[[Tensor], Tensor], features: Sequence[Tensor]) -> Tensor:
        """[B, T', D] input embeddings; zeros at padding.

        Args:
            embed_tokens: [N] token ids to [N, D].
            features: [P, D] of each image. Every one takes part, shown or not: under ZeRO-3 each rank must touch the
                projector, also where its rows have only text.
        """
        text = embed_tokens(self.text_ids)
        pieces = [text, *(image.to(text.device) for image in features), text.new_zeros(1, text.shape[-1])]
        return torch.cat(pieces).index_select(0, self.source.flatten()).view(*self.source.shape, -1)


@dataclass(frozen=True)
class ForwardPlan:
    """Everything that a forward pass in training needs to know about its batch's ids and labels."""

    splice: SplicePlan
    answers: AnswerIndex
    pack: PackLayout | None = None  # of a row whose answers share prefixes

    def to(self, device: torch.device, non_blocking: bool = True) -> ForwardPlan:
        """The plan on a device, in one copy that the host does not wait for (`non_blocking` is implied)."""
        return to_device(self, torch.device(device))

    @staticmethod
    def of_rows(
        input_ids: Sequence[Tensor],
        labels: Sequence[Tensor],
        images: Sequence[Sequence[int]],
        lengths: Sequence[int],
        max_length: int | None = None,
    ) -> ForwardPlan:
        """For rows padded at the right; arguments as of `plan_splice`."""
        spliced = plan_splice(input_ids, labels, images, lengths, max_length)
        return ForwardPlan(spliced, AnswerIndex.of(spliced.labels))

    @staticmethod
    def of_groups(
        input_ids: Sequence[Tensor],
        labels: Sequence[Tensor],
        images: Sequence[Sequence[int]],
        lengths: Sequence[int],
        tails: Sequence[Sequence[int]],
        owners: Sequence[int] | None = None,
    ) -> ForwardPlan:
        """For groups [prefix | answer | answer ...], one after the other in a single row without padding.

        Args:
            tails: token ids of each answer at the end of each row. owners: see PackLayout. Others: see `plan_splice`.
        """
        each = zip(input_ids, labels, images, strict=True)
        rows = [plan_splice([ids], [targets], [shown], lengths) for ids, targets, shown in each]
        sizes = [row.source.shape[1] for row in rows]
        groups = [PackedGroup(size - sum(tail), tuple(tail)) for size, tail in zip(sizes, tails, strict=True)]
        layout = PackLayout.of(groups, owners)
        joined = concatenate(rows)
        spliced = SplicePlan(*joined, torch.ones(1, layout.positions, dtype=torch.bool), layout.position_ids())
        return ForwardPlan(spliced, layout.answers(spliced.labels[0]), layout)


def concatenate(rows: Sequence[SplicePlan]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (text_ids, source, labels) of single-row plans laid end to end: [N], [1, T'], [1, T'].

    Image features come behind the text of all rows.
    """
    total = sum(len(row.text_ids) for row in rows)
    sources, before = [], 0
    for row in rows:
        own = len(row.text_ids)
        # Text moves behind that of the rows before, image features behind the text of all rows.
        sources.append(torch.where(row.source < own, row.source + before, row.source - own + total))
        before += own
    text_ids = torch.cat([row.text_ids for row in rows])
    return text_ids, torch.cat(sources, dim=1), torch.cat([row.labels for row in rows], dim=1)


def plan_splice(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    images: Sequence[Sequence[int]],
    lengths: Sequence[int],
    max_length: int | None = None,
    side: str = "right",
) -> SplicePlan:
    """Replace every image placeholder by its image's positions, cut rows, pad them.

    Args:
        input_ids, labels: [T] a row, on the CPU, without padding.
        images: the images that each row shows, as indices into `lengths`, in the order of its placeholders.
        lengths: positions P of each image of the batch.
        max_length: rows are cut to this many positions; None: no limit.
        side: where padding goes, 'right' (training) or 'left' (generation).

    Raises:
        ValueError: a row has another number of placeholders than images.
    """
    if side not in ("left", "right"):
        raise ValueError(f"padding side: expected 'left' or 'right', got {side!r}")
    is_image = [ids == IMAGE_TOKEN_INDEX for ids in input_ids]
    text_ids = torch.cat([ids[~mask] for ids, mask in zip(input_ids, is_image)])
    starts = torch.tensor([len(text_ids), *lengths]).cumsum(0).tolist()  # of each image, and of the row of zeros
    sources, targets, text_start = [], [], 0
    for row, (mask, row_labels, shown) in enumerate(zip(is_image, labels, images, strict=True)):
        if int(mask.sum()) != len(shown):
            raise ValueError(f"row {row} of the batch: {int(mask.sum())} image token(s) and {len(shown)} image(s)")
        ranges = [torch.arange(starts[image], starts[image] + lengths[image]) for image in shown]
        source, target = splice_row(mask, row_labels, ranges, text_start)
        sources.append(source[:max_length])
        targets.append(target[:max_length])
        text_start += len(mask) - len(shown)

    def padded(rows: list[Tensor], value: float) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    return SplicePlan(
        text_ids=text_ids,
        source=padded(sources, starts[-1]),
        labels=padded(targets, IGNORE_INDEX),
        mask=padded([torch.ones(len(row), dtype=torch.bool) for row in sources], False),
        position_ids=padded([torch.arange(len(row)) for row in sources], 0),
    )


def splice_row(mask: Tensor, labels: Tensor, images: Sequence[Tensor], text_start: int) -> tuple[Tensor, Tensor]:
    """Return the source and the labels of one row, [T'] each.

    Args:
        mask: [T], whether each token is an image placeholder.
        labels: [T].
        images: sources of each image's features, [P], in the order of the placeholders.
        text_start: source of the row's first text token.
    """
    # The k-th placeholder, at p, stands before text token p - k of its row.
    cuts = [place - k for k, place in enumerate(mask.nonzero().flatten().tolist())]
    text = torch.arange(text_start, text_start + len(mask) - len(images)).tensor_split(cuts)
    blanks = [labels.new_full((len(image),), IGNORE_INDEX) for image in images]
    return interleave(text, images), interleave(labels[~mask].tensor_split(cuts), blanks)


def interleave(text: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Text 0, image 0, text 1, image 1, ..., text n, joined."""
    between = [piece for pair in zip(images, text[1:]) for piece in pair]
    return torch.cat([text[0], *between])


def assign_images(image_counts: Sequence[int], available: int) -> list[list[int]]:
    """Which images each row shows, where only their order is known.

    Args:
        image_counts: image placeholders of each row.
        available: number of images: one for each placeholder; LLaVA's collator adds one, unused, for each row without.

    Raises:
        ValueError: the number of images fits neither convention.
    """
    placeholders = sum(image_counts)
    with_dummies = placeholders + sum(count == 0 for count in image_counts)
    if available not in (placeholders, with_dummies):
        raise ValueError(
            f"images: expected {placeholders} (one for each image token; rows hold {list(image_counts)}), got "
            f"{available}. Give as many images as there are '<image>' in the prompts, or {with_dummies} with an "
            "unused one for every row without."
        )
    dummies = int(available == with_dummies)
    assigned, start = [], 0
    for count in image_counts:
        assigned.append(list(range(start, start + count)))
        start += count or dummies
    return assigned


# --- Images in crops (anyres) --------------------------------------------------------------------------------------


def assemble_crops(crops: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Features of an image's crops, row by row, as one map.

    Args:
        crops: [rows * columns, side * side, D].

    Returns:
        [rows * side, columns * side, D].
    """
    grid = crops.view(rows, columns, side, side, -1)
    return grid.transpose(1, 2).reshape(rows * side, columns * side, -1)


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cuts off what padding to the crops' resolution added.

    Args:
        tensor: [D, H, W] features. original_size: (width, height) of the image before padding.

    Returns:
        [D, H', W'] of the image's own shape.
    """
    width, height = original_size
    have_height, have_width = tensor.shape[1:]
    if width / height > have_width / have_height:
        border = (have_height - int(height * (have_width / width))) // 2
        return tensor[:, border : have_height - border]
    border = (have_width - int(width * (have_height / height))) // 2
    return tensor[:, :, border : have_width - border]
