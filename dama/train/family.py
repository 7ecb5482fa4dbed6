"""What preference training asks of a model family, and the values that pass between them.

A family is one object that knows its model, tokenizer and image preparation. The trainer, the reference stage, the
memory estimate and the benches know only this protocol; LLaVA-1.5's implementation is llava.train.family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dama.logps import AnswerLogps, AnswerTokenLogps
from dama.pairs import PreferencePair
from dama.shared_prefix import PackedGroup, common_prefix
from dama.train.rows import EncodedRow, RowsOfPair
from dama.train.throughput import ModelSize
from dama.views import View, by_image


class ImageRef(NamedTuple):
    """What a view shows: files, and what is done to each before the model sees it.

    Most pairs show one image. How a model prepares several can depend on all of them, so they are one value.
    """

    paths: tuple[str, ...]  # relative to the image folder; none where the view is of texts alone
    corruption: str = ""  # a name of dama.corruptions; "" for the image as it is
    pair: str = ""  # id of the pair and seed, on which a corruption's random numbers depend
    seed: int = 0


@dataclass(frozen=True)
class PreparedPair:
    """A pair as the trainer needs it; what belongs to its views is in their order.

    Attributes:
        rows, images: what each view reads and shows.
        reference: sum of log pi_ref over the answer's tokens of each view, in nats.
        delta: hardness (Eq. 6).
        reference_tokens: log pi_ref of each answer token, float32, where token weights need it; None for a view whose
            reference is not used.
    """

    pair: PreferencePair
    rows: RowsOfPair
    images: tuple[ImageRef, ...]
    reference: tuple[float, ...] = (0.0, 0.0)
    delta: float = 0.0
    reference_tokens: tuple[NDArray[np.float32] | None, ...] = ()

    @property
    def chosen(self) -> EncodedRow:
        """Row of the chosen answer with the pair's own image."""
        return self.rows[0]

    @property
    def rejected(self) -> EncodedRow:
        """Row of the rejected answer with the pair's own image."""
        return self.rows[1]


class ModelFamily(Protocol):
    """Everything that training on preference pairs needs of one kind of model.

    Four things are asked for only where they are used: `answer_logps(..., per_token=True)`, which returns an
    AnswerTokenLogps (token weights); `with_views(views)`, the same family reading other views (adding views to a
    finished reference stage); `reads_context = True` of a family whose `encode` puts a pair's context in front of
    both answers, without supervising it; and `reads_conversations = True` of one that reads any
    `PreferencePair.prompt`, where others are given pairs of one question about one image.

    Attributes:
        module: what is trained; a PeftModel with adapters.
        views: the views that each pair is read in.
        encodes_ahead: whether image features are computed once a step, without gradient, by `encode_images`.
        files: folders besides the checkpoint's that log-probs depend on.
        max_tokens: the longest row in tokens, its images included.
        prepare_image: an RGB image to pixels, [3, H, W], or [F, 3, H, W] in crops, or whatever has a method `to`; of a
            family that reads conversations, all images of a view at once.
        collate: a batch of pairs without its images, which `shown_images` lists. Both run in loader workers and do
            not hold the model.
    """

    @property
    def module(self) -> Any:
        """The module that is trained."""

    @property
    def views(self) -> tuple[View, ...]:
        """Views of each pair, in the order of its rows."""

    @property
    def encodes_ahead(self) -> bool:
        """Whether `encode_images` is called before the forward pass."""

    @property
    def files(self) -> Sequence[str]:
        """Paths to fingerprint besides the checkpoint."""

    @property
    def max_tokens(self) -> int:
        """Row limit in tokens; longer pairs are left out."""

    @property
    def prepare_image(self) -> Callable[..., Any]:
        """Function from the RGB images of a view to pixels."""

    @property
    def collate(self) -> Callable[[Sequence[PreparedPair]], dict[str, Any]]:
        """Function from pairs to a batch without images."""

    def encode(self, pairs: Sequence[PreferencePair], images: Sequence[tuple[ImageRef, ...]]) -> Sequence[RowsOfPair]:
        """The rows of every pair, one for each view. Raises ValueError naming a pair that cannot be encoded.

        Args:
            images: what each view of each pair shows.
        """

    def tokens(self, ids: int) -> int:
        """Number of tokens of a row with so many ids, its images included."""

    def groups(self, item: PreparedPair) -> tuple[PackedGroup, ...]:
        """The lengths of a pair's prefixes and answers, in tokens with images included."""

    def encode_images(self, pixels: Mapping[ImageRef, Tensor], calls: int | None = None) -> dict[ImageRef, Tensor]:
        """Features of a frozen tower, in batches; `calls` fixes their number where each is a collective (ZeRO-3)."""

    def answer_logps(
        self, model: Any, batch: dict[str, Any], images: Sequence[Any], encoded: bool, chunk: int
    ) -> AnswerLogps | AnswerTokenLogps:
        """Summed log-probs of V x B answers: all pairs of the first view, then all of the second, and so on.

        Args:
            model: `module`, wrapped or not. batch: of `collate`, on the model's device.
            images: pixels of the batch's `shown_images`; where `encoded`, their features of `encode_images`.
            chunk: answer tokens whose logits exist at one time.
        """

    def size(self) -> ModelSize:
        """What a forward pass costs."""

    def fingerprint(self) -> dict[str, Any]:
        """Whatever a log-prob depends on besides the pairs: weights, tokenizer, template, image preparation."""


def shown_images(items: Iterable[PreparedPair]) -> list[ImageRef]:
    """What the views of pairs show, each once, in order of appearance; views of texts alone show nothing."""
    return list(dict.fromkeys(image for item in items for image in item.images if image.paths))


def common_length(rows: Sequence[EncodedRow]) -> int:
    """How many tokens rows begin with alike and none supervises."""
    unsupervised = min(row.unsupervised for row in rows)
    if len(rows) == 1:
        return unsupervised
    return min(unsupervised, common_prefix(*(row.input_ids.tolist() for row in rows)))


def join_answers(rows: Sequence[EncodedRow]) -> tuple[EncodedRow, tuple[int, ...]]:
    """One row [prefix | answer | answer ...] of rows of one image, and how many tokens each answer has."""
    k = common_length(rows)
    first, *others = rows
    joined = EncodedRow(
        torch.cat([first.input_ids, *(row.input_ids[k:] for row in others)]),
        torch.cat([first.labels, *(row.labels[k:] for row in others)]),
    )
    return joined, tuple(len(row.input_ids) - k for row in rows)


def group_lengths(rows: RowsOfPair, views: Sequence[View], tokens: Callable[[int], int]) -> tuple[PackedGroup, ...]:
    """The lengths of a pair's groups as PackedRows packs them.

    Args:
        tokens: number of tokens of a row with so many ids, its image included.
    """
    groups = []
    for group in by_image(views):
        own = [rows[v] for v in group]
        k = common_length(own)
        groups.append(PackedGroup(tokens(k), tuple(len(row.input_ids) - k for row in own)))
    return tuple(groups)


@dataclass(frozen=True)
class PackedRows:
    """The groups of a batch of pairs: every image of a pair with the answers that are read with it."""

    rows: tuple[EncodedRow, ...]
    tails: tuple[tuple[int, ...], ...]  # tokens of each answer at the end of each row
    images: tuple[ImageRef, ...]  # of each row
    owners: tuple[int, ...]  # of each answer: view x pairs + pair

    @staticmethod
    def of(items: Sequence[PreparedPair], views: Sequence[View]) -> PackedRows:
        """Pack pairs one after the other, each image's group in turn."""
        rows, tails, images, owners = [], [], [], []
        for number, item in enumerate(items):
            for group in by_image(views):
                row, tail = join_answers([item.rows[v] for v in group])
                rows.append(row)
                tails.append(tail)
                images.append(item.images[group[0]])
                owners += [v * len(items) + number for v in group]
        return PackedRows(tuple(rows), tuple(tails), tuple(images), tuple(owners))
