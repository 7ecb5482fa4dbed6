"""Marks of tokens that some models read beside the ids: those of images, or those behind a prefix."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dama.models.batch import PairBatch
from dama.models.suffix import takes_suffix

TYPE_IDS = ("mm_token_type_ids", "token_type_ids")  # what models call them
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class TokenTypes:
    """How a model wants tokens marked.

    Attributes:
        names: keywords of the model's call; none where it wants no marks.
        image_token: the id that stands for each token of an image; -1 where the config names none.
        of_answers: whether 1 marks what follows the prefix, which sees itself in both directions; else image tokens.
    """

    names: tuple[str, ...]
    image_token: int
    of_answers: bool = False

    @staticmethod
    def of(model: Any, processor: Any = None) -> TokenTypes:
        """From the signature of the model's call, its config, and what its processor marks."""
        accepted = inspect.signature(model.base_model.forward).parameters
        names = tuple(name for name in TYPE_IDS if name in accepted)
        return TokenTypes(names, image_token_id(model.config), takes_suffix(processor))

    def of_pairs(self, pairs: PairBatch) -> dict[str, Tensor]:
        """{name: [R, T]} of the rows of a batch."""
        if not self.names:
            return {}
        marked = answers_of(pairs) if self.of_answers else pairs.input_ids == self.image_token
        return {name: marked.long() for name in self.names}

    def of_prompts(self, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
        """{name: [B, T]} of prompts that are to be answered; `real` is 0 for padding."""
        marked = (ids == self.image_token) & real.bool() & (not self.of_answers)
        return {name: marked.long() for name in self.names}


def answers_of(pairs: PairBatch) -> Tensor:
    """[R, T] bool: tokens behind the prefix of their row."""
    if pairs.rows is not None:
        return pairs.rows.segment != 0
    found = torch.zeros(pairs.input_ids.numel(), dtype=torch.bool, device=pairs.input_ids.device)
    found[pairs.answers.predictors + 1] = True
    return found.view(pairs.input_ids.shape)


def image_token_id(config: Any) -> int:
    """The id that stands for each token of an image; -1 where the config names none."""
    found = (getattr(config, name, None) for name in IMAGE_TOKEN_FIELDS)
    return next((number for number in found if number is not None), -1)
