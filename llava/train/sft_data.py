"""Conversations for supervised fine-tuning: LLaVA's JSON rows to token ids, labels and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dama.console import log
from dama.errors import error_list
from dama.images import ImageFolder, load_image, open_image, resolve_image
from dama.pairs import FILE_REMEDY, PairsError
from dama.texts import visible_text
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Template, default_conversation, get_template
from llava.mm_utils import get_anyres_image_grid_shape, literal, process_images
from llava.model.splice import ForwardPlan
from llava.records import Row
from llava.train.arguments import Arguments
from llava.train.preprocess import encode_turns, preprocess, preprocess_multimodal
from llava.train.sft_rows import SftRows, checked_rows, load_rows, row_errors, turns_of_row

WORDS_OF_AN_IMAGE = 128  # what LLaVA counts for an image when it groups rows by length


class LazySupervisedDataset(Dataset):
    """LLaVA's conversations, tokenized when they are asked for; a "</s>" in a turn is encoded as text.

    Args:
        data_path: rows {"id", "image"?, "conversations": [{"from", "value"}, ...]} see `llava.train.sft_rows`.
        data_args: has image_folder, image_processor, image_aspect_ratio, is_multimodal, mm_use_im_start_end.
        template: the prompt format; LLaVA-v1.5's when None.
        rows: the file's, where they have been read already (`read_rows`).
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        data_args: Any,
        *,
        template: Any = None,
        rows: list[Row] | None = None,
    ) -> None:
        self.tokenizer, self.data_args = tokenizer, data_args
        self.template = template or default_conversation
        self.list_data_dict = _load(data_path, self.template) if rows is None else rows

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words of each row, an image counted as 128."""
        return [_words(row) + (WORDS_OF_AN_IMAGE if "image" in row else 0) for row in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words of each row, negative where it has no image."""
        return [_words(row) if "image" in row else -_words(row) for row in self.list_data_dict]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = self.list_data_dict[i]
        has_image = "image" in row
        source = [turn | {"value": literal(turn["value"], self.tokenizer)} for turn in row["conversations"]]
        if has_image:
            (source,) = preprocess_multimodal([source], self.data_args)
        encoded = preprocess([source], self.tokenizer, has_image=has_image, template=self.template)
        item = {"input_ids": encoded["input_ids"][0], "labels": encoded["labels"][0]}
        if has_image:
            item["image"] = self._pixels(row["image"])
        elif self.data_args.is_multimodal:
            size = self.data_args.image_processor.crop_size
            item["image"] = torch.zeros(3, size["height"], size["width"])
        return item

    def _pixels(self, image: str) -> Tensor:
        opened = load_image(resolve_image(self.data_args.image_folder, image))
        return process_images([opened], self.data_args.image_processor, self.data_args)[0]


def read_rows(
    data_path: str,
    image_folder: ImageFolder,
    on_bad_image: str = "fail",
    *,
    template: Template = default_conversation,
) -> list[Row]:
    """The rows of `llava.train.sft_rows.checked_rows`, without their names."""
    return checked_rows(data_path, image_folder, on_bad_image, template=template).rows


def _load(data_path: str, template: Template) -> list[Row]:
    """The rows of a file, images unchecked. Raises PairsError naming every row that is no conversation."""
    named, errors = load_rows(data_path)
    errors += [f"{name}: {error}" for name, row in named for error in row_errors(row, template)]
    if errors:
        raise PairsError(error_list(data_path, errors, FILE_REMEDY))
    return [row for _, row in named]


def _words(row: Row) -> int:
    return sum(len(turn["value"].split()) for turn in row["conversations"])


# --- What is supervised ----------------------------------------------------------------------------------------------


def supervised_rows(data: SftRows, tokenizer: PreTrainedTokenizerBase, data_args: Any, per_image: int) -> SftRows:
    """The rows that supervise at least one token; the others are left out or an error. Rows that are cut are counted.

    Args:
        data_args: `supervised_settings`. per_image: positions of an image, of each crop in anyres.

    Raises:
        ValueError: with on_long_pair="fail", naming every row without a supervised token; or no row has one.
    """
    kept, idle, cut = [], [], []
    for index, (name, row) in enumerate(zip(data.names, data.rows)):
        length, reason = supervision_of(row, tokenizer, data_args, per_image)
        if reason is not None:
            idle.append((name, reason))
            continue
        kept.append(index)
        if length > tokenizer.model_max_length:
            cut.append(f"{name}, {length} positions")
    if idle and (data_args.on_long_pair == "fail" or not kept):
        remedy = "correct these rows, raise --model_max_length as far as the model allows, or --on_long_pair skip"
        errors = [f"{name}: {reason}" for name, reason in idle]
        raise ValueError(error_list(str(data_args.data_path), errors, remedy))
    if cut:
        log(f"rows: {len(cut)} are cut at --model_max_length {tokenizer.model_max_length}, the first is {cut[0]}")
    return SftRows([data.rows[i] for i in kept], [data.names[i] for i in kept], [*data.skipped, *idle])


def supervision_of(
    row: Row, tokenizer: PreTrainedTokenizerBase, data_args: Any, per_image: int
) -> tuple[int, str | None]:
    """(positions of a row, or a bound on them where it certainly fits; why it supervises no token, or None)."""
    limit = tokenizer.model_max_length
    if not any(who == "gpt" and visible_text(text) for who, text in turns_of_row(row)[1:]):
        return 0, "no answer with text in it"
    image = image_positions(row, data_args, per_image) if "image" in row else 0
    # No tokenizer in use makes more tokens than bytes of a text; the template's own words come on top.
    texts = [data_args.template.system, *(text for _, text in turns_of_row(row))]
    bound = image + sum(len(text.encode()) + 32 for text in texts)
    if bound <= limit:
        return bound, None
    (source,) = preprocess_multimodal([row["conversations"]], data_args)
    turns = [(turn["from"], literal(turn["value"], tokenizer)) for turn in source]
    encoded = encode_turns(turns, tokenizer, data_args.template, has_image="image" in row)
    widths = torch.where(encoded.input_ids == IMAGE_TOKEN_INDEX, image, 1)
    supervised = (encoded.labels != IGNORE_INDEX).nonzero().flatten()
    first = int(widths[: supervised[0] + 1].sum()) if len(supervised) else 0
    reason = None if first <= limit else f"its first answer begins at position {first}, the model takes {limit}"
    return int(widths.sum()), reason


def image_positions(row: Row, data_args: Any, per_image: int) -> int:
    """Positions of the row's image; those of its whole and of its crops in anyres."""
    if data_args.image_aspect_ratio != "anyres":
        return per_image
    with open_image(resolve_image(data_args.image_folder, row["image"])) as image:
        size, side = image.size, data_args.image_processor.crop_size["height"]
    return per_image * (1 + math.prod(get_anyres_image_grid_shape(size, data_args.image_grid_pinpoints, side)))


# --- Batches ---------------------------------------------------------------------------------------------------------


@dataclass
class DataCollatorForSupervisedDataset:
    """Rows to one batch: right-padded, cut at the tokenizer's model_max_length.

    Args:
        image_tokens: positions of an image, or of one of its crops, in the language model; with it a batch brings its
            ForwardPlan along.
    """

    tokenizer: PreTrainedTokenizerBase
    image_tokens: int | None = None

    def __call__(self, instances: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Collate rows into ids, labels [B, T], attention_mask, and images where rows have some."""
        limit = self.tokenizer.model_max_length
        ids = [item["input_ids"][:limit] for item in instances]
        input_ids = pad_sequence(ids, True, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in ids])
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "labels": pad_sequence([item["labels"][:limit] for item in instances], True, IGNORE_INDEX),
            # Lengths, not the pad id: a literal <unk>, which LLaMA pads with, stays visible.
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
        }
        if "image" in instances[0]:
            images = [item["image"] for item in instances]
            same = all(image.shape == images[0].shape for image in images)
            batch["images"] = torch.stack(images) if same else images
            if self.image_tokens is not None:
                labels = [item["labels"][:limit] for item in instances]
                batch["plan"] = self._plan(ids, labels, images)
        return batch

    def _plan(self, ids: list[Tensor], labels: list[Tensor], images: list[Tensor]) -> ForwardPlan:
        """Of rows that have one image each, which is not shown where a row is only text or cut before it."""
        shown = [[i] * bool((row == IMAGE_TOKEN_INDEX).any()) for i, row in enumerate(ids)]
        crops = [len(image) if image.ndim == 4 else 1 for image in images]
        lengths = [count * (self.image_tokens or 0) for count in crops]
        return ForwardPlan.of_rows(ids, labels, shown, lengths, self.tokenizer.model_max_length)


def supervised_settings(arguments: Arguments, model: Any, image_processor: Any) -> SimpleNamespace:
    """The dataset's `data_args`: flags of the data, and how the model sees images."""
    model_args, data_args, _ = arguments
    merge = getattr(model.config, "mm_patch_merge_type", None) or "flat"  # others make as many positions as they like
    return SimpleNamespace(
        data_path=data_args.data_path,
        image_folder=data_args.image_folder,
        on_long_pair=data_args.on_long_pair,
        template=get_template(str(model_args.version)),
        is_multimodal=data_args.is_multimodal,
        image_processor=image_processor,
        image_aspect_ratio=model.config.image_aspect_ratio,
        image_grid_pinpoints=getattr(model.config, "image_grid_pinpoints", None),
        mm_use_im_start_end=model_args.mm_use_im_start_end,
        image_tokens=model.get_vision_tower().tokens_per_image if merge == "flat" else None,
    )


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: Any, *, template: Any = None, rows: list[Row] | None = None
) -> dict[str, Any]:
    """The trainer's data arguments: train_dataset, eval_dataset (None), data_collator."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args, template=template, rows=rows),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer, getattr(data_args, "image_tokens", None)),
    }
