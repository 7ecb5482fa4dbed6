"""Conversations for supervised fine-tuning: LLaVA's JSON rows to token ids, labels and pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dama.pairs import fault_list, load_image, resolve_image
from llava.constants import IGNORE_INDEX
from llava.conversation import default_conversation
from llava.mm_utils import literal, process_images
from llava.train.arguments import Arguments
from llava.train.preprocess import preprocess, preprocess_multimodal

WORDS_OF_AN_IMAGE = 128  # what LLaVA counts for an image when it groups rows by length

Row = dict[str, Any]


class LazySupervisedDataset(Dataset):
    """LLaVA's conversations, tokenised when they are asked for; a "</s>" in a turn is encoded as text.

    Args:
        data_path: JSON list of rows {"id", "image"?, "conversations": [{"from", "value"}, ...]}.
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
        self.list_data_dict = _load(data_path) if rows is None else rows
        self.tokenizer, self.data_args = tokenizer, data_args
        self.template = template or default_conversation

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
        picture = load_image(resolve_image(self.data_args.image_folder, image))
        return process_images([picture], self.data_args.image_processor, self.data_args)[0]


def read_rows(data_path: str, image_folder: str) -> list[Row]:
    """Before a model is loaded: every row is a conversation, and its image is a file inside the image folder.

    Raises:
        ValueError: naming the rows that are not.
    """
    rows = _load(data_path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{data_path}: expected a JSON list of conversations, got {type(rows).__name__}, or none")
    faults = []
    for index, row in enumerate(rows):
        name = row.get("id", index) if isinstance(row, dict) else index
        faults += [f"row {name}: {fault}" for fault in _row_faults(row, image_folder)]
    if faults:
        raise ValueError(fault_list(data_path, faults, "correct the rows, or supply the images"))
    return rows


def _load(data_path: str) -> Any:
    with open(data_path, encoding="utf-8") as file:
        return json.load(file)


def _row_faults(row: Any, image_folder: str) -> Iterator[str]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns):
        yield "expected conversations, a list of turns with 'from' and 'value'"
        return
    if "image" in row:
        try:
            if not resolve_image(image_folder, row["image"]).is_file():
                yield f"no image {row['image']}"
        except (ValueError, OSError, TypeError) as error:
            yield f"image {row['image']}: {error}"


def _words(row: Row) -> int:
    return sum(len(turn["value"].split()) for turn in row["conversations"])


@dataclass
class DataCollatorForSupervisedDataset:
    """Rows to one batch: right-padded, cut at the tokenizer's model_max_length."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
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
        return batch


def supervised_settings(arguments: Arguments, model: Any, image_processor: Any) -> SimpleNamespace:
    """The dataset's `data_args`: flags of the data, and how the model sees pictures."""
    model_args, data_args, _ = arguments
    return SimpleNamespace(
        data_path=data_args.data_path,
        image_folder=data_args.image_folder,
        is_multimodal=data_args.is_multimodal,
        image_processor=image_processor,
        image_aspect_ratio=model.config.image_aspect_ratio,
        image_grid_pinpoints=getattr(model.config, "image_grid_pinpoints", None),
        mm_use_im_start_end=model_args.mm_use_im_start_end,
    )


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: Any, *, template: Any = None, rows: list[Row] | None = None
) -> dict[str, Any]:
    """The trainer's data arguments: train_dataset, eval_dataset (None), data_collator."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args, template=template, rows=rows),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }
