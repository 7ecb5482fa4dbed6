"""From token ids with image placeholders to embeddings: assign, splice, truncate, pad, as pure functions on tensors.

Shapes: B rows, T token ids a row, T' positions after splicing, P positions an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence after splicing: what the language model reads and what it is to predict."""

    embeds: Tensor  # [T', D]
    labels: Tensor  # [T'], IGNORE_INDEX where nothing is predicted


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    embeds: Tensor  # [B, T', D], zeros at padding
    labels: Tensor  # [B, T'], IGNORE_INDEX at padding
    mask: Tensor  # [B, T'] bool, True where a row has a position
    position_ids: Tensor  # [B, T'], 0 at padding


def assign_images(image_counts: Sequence[int], features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Which features belong to which row, in order.

    Args:
        image_counts: image placeholders of each row.
        features: one [P, D] for each placeholder; LLaVA's collator adds one, unused, for each row without an image.

    Raises:
        ValueError: the number of images fits neither convention.
    """
    placeholders = sum(image_counts)
    with_dummies = placeholders + sum(count == 0 for count in image_counts)
    if len(features) not in (placeholders, with_dummies):
        raise ValueError(
            f"images: expected {placeholders} (one for each image token; rows hold {list(image_counts)}), got "
            f"{len(features)}. Give as many images as there are '<image>' in the prompts, or {with_dummies} with an "
            "unused one for every row without."
        )
    has_dummies = len(features) == with_dummies
    remaining = iter(features)
    assigned = []
    for count in image_counts:
        assigned.append([next(remaining) for _ in range(count)])
        if count == 0 and has_dummies:
            next(remaining)
    return assigned


def splice(
    input_ids: Sequence[Tensor],
    labels: Sequence[Tensor],
    features: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
) -> list[Row]:
    """Replaces every image placeholder by its features; placeholders are never predicted.

    Args:
        input_ids, labels: [T] a row, without padding.
        features: [P, D] an image, see `assign_images`.
        embed: [M] token ids to [M, D]; called once for the whole batch.
    """
    is_image = [ids == IMAGE_TOKEN_INDEX for ids in input_ids]
    assigned = assign_images([int(mask.sum()) for mask in is_image], features)
    text_lengths = [int((~mask).sum()) for mask in is_image]
    text = embed(torch.cat([ids[~mask] for ids, mask in zip(input_ids, is_image)])).split(text_lengths)
    # Under ZeRO-3 a rank with only text must still touch the projector: an empty slice of a feature does.
    touch = features[0][:0] if len(features) else text[0][:0]
    return [_splice_row(*row, touch) for row in zip(text, labels, is_image, assigned)]


def _splice_row(text: Tensor, labels: Tensor, is_image: Tensor, images: list[Tensor], touch: Tensor) -> Row:
    places = is_image.nonzero().flatten().tolist()
    # The k-th placeholder at position p of the ids stands before text position p - k.
    text_pieces = text.tensor_split([place - k for k, place in enumerate(places)])
    label_pieces = labels[~is_image].tensor_split([place - k for k, place in enumerate(places)])
    embeds, targets = [text_pieces[0]], [label_pieces[0]]
    for image, text_piece, label_piece in zip(images, text_pieces[1:], label_pieces[1:]):
        image = image.to(text.device)
        embeds += [image, text_piece]
        targets += [labels.new_full((len(image),), IGNORE_INDEX), label_piece]
    return Row(torch.cat([*embeds, touch.to(text.device)]), torch.cat(targets))


def truncate(rows: Sequence[Row], max_length: int | None) -> list[Row]:
    """Cuts every row to its first `max_length` positions (None: no limit)."""
    return [Row(row.embeds[:max_length], row.labels[:max_length]) for row in rows]


def pad(rows: Sequence[Row], side: str = "right") -> PaddedBatch:
    """Rows of different lengths as one batch, padding at the 'right' (training) or 'left' (generation)."""
    if side not in ("left", "right"):
        raise ValueError(f"padding side: expected 'left' or 'right', got {side!r}")
    lengths = [len(row.embeds) for row in rows]
    device = rows[0].embeds.device

    def batch(tensors: list[Tensor], value: float) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    return PaddedBatch(
        embeds=batch([row.embeds for row in rows], 0.0),
        labels=batch([row.labels for row in rows], IGNORE_INDEX),
        mask=batch([torch.ones(n, dtype=torch.bool, device=device) for n in lengths], False),
        position_ids=batch([torch.arange(n, device=device) for n in lengths], 0),
    )


# --- Pictures in crops (anyres) --------------------------------------------------------------------------------------


def assemble_crops(crops: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Features of a picture's crops, row by row, as one map.

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
        tensor: [D, H, W] features. original_size: (width, height) of the picture before padding.

    Returns:
        [D, H', W'] of the picture's own shape.
    """
    width, height = original_size
    have_height, have_width = tensor.shape[1:]
    if width / height > have_width / have_height:
        border = (have_height - int(height * (have_width / width))) // 2
        return tensor[:, border : have_height - border]
    border = (have_width - int(width * (have_height / height))) // 2
    return tensor[:, :, border : have_width - border]
