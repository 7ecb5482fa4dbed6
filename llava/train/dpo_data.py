"""Preference pairs as LLaVA-1.5 reads them: token ids and labels, batches. The names of the released DAMA code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dama.pairs import PreferencePair
from dama.train.data import PairDataset as DPODataset
from dama.train.family import EncodedRow, ImageRef, PackedRows, PreparedPair, shown_images
from dama.views import PAIR_VIEWS, View
from llava.constants import IGNORE_INDEX
from llava.conversation import Template, image_placeholder
from llava.mm_utils import literal
from llava.model.splice import ForwardPlan
from llava.train.preprocess import encode_turns

__all__ = ["DPODataset", "DataCollatorForDPODataset", "encode_answer", "encode_pair"]


def encode_answer(
    pair: PreferencePair,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    use_im_start_end: bool = False,
) -> EncodedRow:
    """Ids and labels of an answer to the pair's question, the image before it as in LLaVA-v1.5's training.

    Of a pair with a context, which stands before the answer, only the answer's own tokens are supervised.

    A special token's spelling in these texts, such as "</s>", is encoded as the text that it is.

    Raises:
        ValueError: naming the pair, where its texts cannot be encoded.
    """
    image = image_placeholder(use_im_start_end)
    context = [("context", literal(pair.context, tokenizer))] if pair.context else []
    turns = [("human", f"{image}\n{literal(pair.question, tokenizer)}"), *context, ("gpt", literal(answer, tokenizer))]
    try:
        return encode_turns(turns, tokenizer, template, has_image=True)
    except ValueError as error:
        raise ValueError(f"pair {pair.id}: {error}") from error


def encode_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, template: Template, use_im_start_end: bool = False
) -> tuple[EncodedRow, EncodedRow]:
    """Ids and labels of both answers, see `encode_answer`."""
    chosen, rejected = (
        encode_answer(pair, answer, tokenizer, template, use_im_start_end) for answer in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


@dataclass(frozen=True)
class PairCollator:
    """A batch of pairs as the plan of one forward pass.

    With `shared_prefix` the answers to an image are one row [prefix | answer | answer ...]; without, a row each, all
    pairs' rows of the first view first.

    Args:
        image_tokens: tokens of an image in the language model.
    """

    image_tokens: int
    shared_prefix: bool = True
    views: tuple[View, ...] = PAIR_VIEWS

    def __call__(self, items: Sequence[PreparedPair]) -> dict[str, Any]:
        """{"plan"}: everything that the forward pass needs besides the images of `shown_images`."""
        images = shown_images(items)
        lengths = [self.image_tokens] * len(images)
        if self.shared_prefix:
            packed = PackedRows.of(items, self.views)
            rows, shown = packed.rows, [[images.index(image)] for image in packed.images]
        else:
            rows, all_shown = zip(*rows_by_view(items))
            shown = [[images.index(image)] for image in all_shown]
        ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
        if self.shared_prefix:
            return {"plan": ForwardPlan.of_groups(ids, labels, shown, lengths, packed.tails, packed.owners)}
        return {"plan": ForwardPlan.of_rows(ids, labels, shown, lengths)}


def rows_by_view(items: Sequence[PreparedPair]) -> list[tuple[EncodedRow, ImageRef]]:
    """Every row with its image: those of all pairs of the first view, then of the second, and so on."""
    views = range(len(items[0].rows))
    return [(item.rows[view], item.images[view]) for view in views for item in items]


@dataclass(frozen=True)
class DataCollatorForDPODataset:
    """Pairs to one batch of padded tensors. An image that several pairs show is there once.

    With `shared_prefix` a pair is one row [prefix | chosen | rejected]; without, two: the chosen answers first.

    Args:
        image_tokens: tokens of an image in the language model; with it a batch brings its ForwardPlan along.
    """

    tokenizer: PreTrainedTokenizerBase
    dataset: DPODataset
    shared_prefix: bool = False
    image_tokens: int | None = None

    def __call__(self, instances: Sequence[PreparedPair]) -> dict[str, Tensor]:
        """Keys: those of `rows`, and images [U, 3, H, W]."""
        pixels = [self.dataset.pixels(image) for image in shown_images(instances)]
        return self.rows(instances) | {"images": torch.stack(pixels)}

    def rows(self, instances: Sequence[PreparedPair]) -> dict[str, Any]:
        """All but the pixels.

        Keys: input_ids, attention_mask, targets [R, T]; image_index [R], into `shown_images`; ref_chosen,
        ref_rejected, delta [B]; with the shared prefix tails [B, 2]; R rows, B or 2B of them. With `image_tokens` also
        plan, a ForwardPlan: all that the forward pass needs of the other keys.
        """
        images = shown_images(instances)
        batch: dict[str, Any] = {}
        if self.shared_prefix:
            packed = PackedRows.of(instances, PAIR_VIEWS)
            rows, shown = list(packed.rows), list(packed.images)
            batch["tails"] = torch.tensor(packed.tails)
        else:
            rows, shown = map(list, zip(*rows_by_view(instances)))
        if self.image_tokens is not None:
            batch |= PairCollator(self.image_tokens, self.shared_prefix)(instances)
        input_ids = pad_sequence([row.input_ids for row in rows], True, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        ref_chosen, ref_rejected = torch.tensor([item.reference for item in instances], dtype=torch.float64).T
        return batch | {
            "input_ids": input_ids,
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            # Not "labels": the trainer would scale the loss by their number.
            "targets": pad_sequence([row.labels for row in rows], True, IGNORE_INDEX),
            "image_index": torch.tensor([images.index(image) for image in shown]),
            "ref_chosen": ref_chosen,
            "ref_rejected": ref_rejected,
            "delta": torch.tensor([item.delta for item in instances], dtype=torch.float64),
        }
