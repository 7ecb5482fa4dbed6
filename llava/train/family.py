"""LLaVA-1.5 as a model family of preference training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dama.console import digest_of
from dama.fingerprint import digest_of_checkpoint
from dama.logps import AnswerLogps, AnswerTokenLogps
from dama.pairs import PreferencePair
from dama.shared_prefix import PackedGroup
from dama.train.family import ImageRef, PreparedPair, group_lengths
from dama.train.rows import TableRows
from dama.train.steps import IMAGES_AT_ONCE
from dama.train.throughput import ModelSize
from dama.views import View
from llava.conversation import get_template
from llava.mm_utils import process_images
from llava.train.batch_encoding import encode_answers
from llava.train.dpo_data import PairCollator


class ImagePreparation:
    """One RGB image to the pixels of the vision tower, by the checkpoint's `image_aspect_ratio`."""

    def __init__(self, processor: Any, config: Any) -> None:
        self.processor, self.config = processor, config

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W], or [F, 3, H, W] in crops (anyres)."""
        return process_images([image], self.processor, self.config)[0]


class LlavaFamily:
    """What preference training needs of LLaVA-1.5, see dama.train.family.ModelFamily.

    reads_context: `encode` knows pairs with a context.

    Args:
        model: LlavaLlamaForCausalLM with its vision tower loaded, or a PeftModel of one.
        args: TrainingArguments.
        base_name, version: the checkpoint's folder or hub name, and its conversation template; `encode` and
            `fingerprint` need them.
    """

    reads_context = True

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, args: Any, *, base_name: str = "", version: str = ""
    ) -> None:
        self.module, self.tokenizer = model, tokenizer
        self.views: tuple[View, ...] = args.views()
        self.base_name, self.version = base_name, version
        config, tower = model.config, model.get_vision_tower()
        self.image_tokens = tower.tokens_per_image
        self.max_tokens = min(args.model_max_length, getattr(config, "max_position_embeddings", args.model_max_length))
        self.prepare_image = ImagePreparation(tower.image_processor, config)
        self.collate = PairCollator(self.image_tokens, args.shared_prefix, self.views)

    @staticmethod
    def of(arguments: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> LlavaFamily:
        """The family of (model_args, data_args, args)."""
        model_args, _, args = arguments
        name, version = str(model_args.model_name_or_path), str(model_args.version)
        return LlavaFamily(model, tokenizer, args, base_name=name, version=version)

    @property
    def files(self) -> list[str]:
        """Folders besides the checkpoint's that log-probs depend on."""
        return [self.module.get_vision_tower().folder]

    def with_views(self, views: tuple[View, ...]) -> LlavaFamily:
        """The same model, reading other views of each pair."""
        other = copy.copy(self)
        other.views, other.collate = views, replace(self.collate, views=views)
        return other

    @property
    def encodes_ahead(self) -> bool:
        """Whether the vision tower is frozen."""
        return self.module.get_vision_tower().is_frozen

    def encode(self, pairs: Sequence[PreferencePair], images: Sequence[tuple[ImageRef, ...]]) -> list[TableRows]:
        """The rows of every pair, one for each view. Raises ValueError naming a pair that cannot be encoded."""
        template, marks = get_template(self.version), bool(self.module.config.mm_use_im_start_end)
        answers = list(dict.fromkeys(view.answer for view in self.views))
        table = encode_answers(pairs, self.tokenizer, template, marks, answers)
        places = [answers.index(view.answer) for view in self.views]
        return [TableRows(table, tuple(i * len(answers) + k for k in places)) for i in range(len(pairs))]

    def tokens(self, ids: int) -> int:
        """Number of tokens of a row with so many ids, its image included."""
        return ids - 1 + self.image_tokens

    def groups(self, item: PreparedPair) -> tuple[PackedGroup, ...]:
        """The lengths of a pair's prefixes and answers, in tokens with images included."""
        return group_lengths(item.rows, self.views, self.tokens)

    def encode_images(self, pixels: Mapping[ImageRef, Tensor], calls: int | None = None) -> dict[ImageRef, Tensor]:
        """[P, width], or [F, P, width] in crops: features of the frozen tower, see `encode_in_batches`."""
        return encode_in_batches(self.module.get_vision_tower(), pixels, self.module.dtype, calls)

    def answer_logps(
        self,
        model: Any,
        batch: dict[str, Any],
        images: Sequence[Tensor],
        encoded: bool,
        chunk: int,
        *,
        per_token: bool = False,
    ) -> AnswerLogps | AnswerTokenLogps:
        """Summed log-probs of V x B answers; images are pixels or, `encoded`, the tower's features."""
        asked = {"per_token": True} if per_token else {}
        stacked = torch.stack(list(images))
        return model(plan=batch["plan"], images=stacked, images_encoded=encoded, logp_chunk=chunk, **asked)

    def size(self) -> ModelSize:
        """What a forward pass costs."""
        return size_of(self.module)

    def fingerprint(self) -> dict[str, Any]:
        """Whatever a log-prob depends on besides the pairs: weights, tower, tokenizer, template, image preparation."""
        config, tower = self.module.config, self.module.get_vision_tower()
        return {
            "model": digest_of_checkpoint(self.base_name),
            "vision_tower": digest_of_checkpoint(tower.folder),
            "tokenizer": digest_of([len(self.tokenizer), self.tokenizer("Is it a cat? It's 3.5 cats!\n").input_ids]),
            "template": self.version,
            "image_aspect_ratio": config.image_aspect_ratio,
            "image_processor": digest_of(json.loads(tower.image_processor.to_json_string())),
            "mm_use_im_start_end": config.mm_use_im_start_end,
        }


def size_of(model: Any) -> ModelSize:
    """The matrices of a LLaVA's decoder, output layer, vision tower and projector."""
    config, tower = model.config, model.get_vision_tower()
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    layer = 2 * width * head * (heads + key_heads) + 3 * width * config.intermediate_size
    vision = tower.config
    vision_layer = (4 * vision.hidden_size + 2 * vision.intermediate_size) * vision.hidden_size
    linear = [m for m in model.get_model().mm_projector.modules() if isinstance(m, torch.nn.Linear)]
    return ModelSize(
        decoder=config.num_hidden_layers * layer,
        output=width * config.vocab_size,
        attention=config.num_hidden_layers * heads * head,
        tower=vision.num_hidden_layers * vision_layer,
        projector=sum(m.in_features * m.out_features for m in linear),
        patches=tower.tokens_per_image,
    )


@torch.no_grad()
def encode_in_batches(
    tower: Any, pixels: Mapping[ImageRef, Tensor], dtype: torch.dtype, calls: int | None = None
) -> dict[ImageRef, Tensor]:
    """The frozen tower's features of every image, in batches.

    Args:
        pixels: name -> [3, H, W], or [F, 3, H, W] for an image in crops.
        dtype: of the features.
        calls: how often to call the tower; under ZeRO-3, where each call is a collective, the same on all ranks.

    Returns:
        name -> [P, width], or [F, P, width].
    """
    names = list(pixels)
    pieces = -(-len(names) // IMAGES_AT_ONCE) if calls is None else calls
    features: dict[ImageRef, Tensor] = {}
    for piece in range(pieces):
        batch = names[piece::pieces] or names[:1]
        crops = [pixels[name] if pixels[name].ndim == 4 else pixels[name][None] for name in batch]
        encoded = tower(torch.cat(crops).to(tower.device, dtype)).split([len(crop) for crop in crops])
        features |= {name: part if pixels[name].ndim == 4 else part[0] for name, part in zip(batch, encoded)}
    return features
