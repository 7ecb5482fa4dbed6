"""Any model that AutoModelForImageTextToText loads, as a model family of preference training.

The model is not changed: a pack of pairs goes through its own forward pass, with another attention in its decoder
(dama.models.attention). Only the output layer is asked for the answers' tokens alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dama.console import digest_of
from dama.fingerprint import digest_of_checkpoint
from dama.images import ImageFolder, resolve_image, size_of_image
from dama.logps import AnswerLogps, AnswerTokenLogps, chunk_for, float32_head, indexed_logps, indexed_token_logps
from dama.models.attention import PACKED, rows_hold
from dama.models.batch import PairBatch, PairCollator
from dama.models.chat import ChatTemplate
from dama.models.encoding import PairEncoder
from dama.models.head import Finish, finish_of
from dama.models.images import ImageInputs, ProcessorImages, join_images
from dama.models.token_types import TokenTypes, image_token_id
from dama.models.way import Decided, Way, way_of
from dama.pairs import PreferencePair
from dama.shared_prefix import PackedGroup
from dama.train.family import ImageRef, PreparedPair, group_lengths
from dama.train.rows import TableRows
from dama.train.throughput import ModelSize
from dama.views import View

BLANK_SIZE = (56, 56)  # pixels of the image that a batch of texts alone is given
OWN_POSITIONS = "get_rope_index"  # of models whose image tokens have positions in two dimensions


class HubFamily:
    """What preference training needs of a Hugging Face model, see dama.train.family.ModelFamily.

    Args:
        model: a PreTrainedModel for image-text-to-text, or a PeftModel of one.
        processor: its own, with tokenizer, image processor and chat template.
        args: PreferenceArguments.
        name: the checkpoint's folder or hub name, for the fingerprint. image_folder: where image paths start.
        system: a system turn before each question.
    """

    reads_context = reads_conversations = True
    encodes_ahead = False  # a frozen tower makes no gradient, and a pack shows an image once
    files: tuple[str, ...] = ()  # folders besides the checkpoint's that log-probs depend on

    def __init__(
        self,
        model: Any,
        processor: Any,
        args: Any,
        *,
        name: str = "",
        image_folder: ImageFolder = (),
        system: str = "",
    ) -> None:
        self.module, self.processor = model, processor
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.views: tuple[View, ...] = args.views()
        self.name, self.image_folder = name, image_folder
        self.decided: Decided = way_of(self.model, shared_prefix=args.shared_prefix)
        self.chat = ChatTemplate(processor, system)
        images = ProcessorImages(processor)
        self.prepare_image: Callable[..., Any] = images
        (blank,) = self.chat.token_ids([images.texts([BLANK_SIZE])[0] + self.chat.end])
        self.collate = PairCollator(self.decided.way, self.views, torch.tensor(blank))
        config = self.model.config.get_text_config(decoder=True)
        self.max_tokens = min(args.model_max_length, getattr(config, "max_position_embeddings", args.model_max_length))
        install(
            self.model,
            self.decided.way,
            processor=processor,
            blank=images(Image.new("RGB", BLANK_SIZE)),
            float32_logits=getattr(args, "float32_logits", True),
        )

    def with_views(self, views: tuple[View, ...]) -> HubFamily:
        """The same model, reading other views of each pair."""
        other = copy.copy(self)
        other.views, other.collate = views, replace(self.collate, views=views)
        other.__dict__.pop("_encoder", None)
        return other

    @cached_property
    def _encoder(self) -> PairEncoder:
        return PairEncoder(self.chat, ProcessorImages(self.processor), self.views, ImageSizes(self.image_folder))

    def encode(self, pairs: Sequence[PreferencePair], images: Sequence[Sequence[ImageRef]]) -> list[TableRows]:
        """The rows of every pair, one for each view. Raises ValueError naming a pair that cannot be encoded."""
        return self._encoder.encode(pairs, images)

    def tokens(self, ids: int) -> int:
        """Number of tokens of a row with so many ids, which include those of its images."""
        return ids

    def groups(self, item: PreparedPair) -> tuple[PackedGroup, ...]:
        """The lengths of a pair's prefixes and answers, in tokens with images included."""
        return group_lengths(item.rows, self.views, self.tokens)

    def encode_images(self, pixels: Mapping[ImageRef, Any], calls: int | None = None) -> dict[ImageRef, Any]:
        """Never asked for: `encodes_ahead` is False."""
        raise NotImplementedError("images are encoded in the model's own forward pass")

    def answer_logps(
        self,
        model: Any,
        batch: dict[str, Any],
        images: Sequence[Any],
        encoded: bool,
        chunk: int,
        *,
        per_token: bool = False,
    ) -> AnswerLogps | AnswerTokenLogps:
        """Summed log-probs of V x B answers; images are inputs of the model, see ProcessorImages."""
        return model(pairs=batch["pairs"], images=images, chunk=chunk, per_token=per_token)

    def size(self) -> ModelSize:
        """The matrices of the decoder and the output layer; the vision encoder's work is not counted."""
        config = self.model.config.get_text_config(decoder=True)
        decoder = self.model.get_decoder()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return ModelSize(
            decoder=linear_weights(decoder),
            output=config.hidden_size * config.vocab_size,
            attention=config.num_hidden_layers * heads * width,
            tower=0,
            projector=0,
            patches=0,
        )

    @staticmethod
    def adapted_processor(processor: Any) -> Any:
        """The checkpoint's processor with what its files lack, such as a chat template; here as it is."""
        return processor

    def fingerprint(self) -> dict[str, Any]:
        """Whatever a log-prob depends on besides the pairs: weights, tokenizer, template, image preparation."""
        return {
            "model": digest_of_checkpoint(self.name),
            **self.chat.fingerprint(),
            "image_processor": digest_of(self.processor.image_processor.to_dict()),
        }


class ImageSizes:
    """Width and height of the images of a folder in pixels, each header read once."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder
        self.known: dict[str, tuple[int, int]] = {}

    def __call__(self, path: str) -> tuple[int, int]:
        """Of an image as any view shows it; no corruption changes it."""
        if path not in self.known:
            self.known[path] = size_of_image(resolve_image(self.folder, path))
        return self.known[path]


def linear_weights(module: torch.nn.Module) -> int:
    """Weights of all linear layers, those that ZeRO-3 has spread included."""
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.in_features * m.out_features for m in layers)


# --- The model's call ------------------------------------------------------------------------------------------------


def install(
    model: Any, way: Way, *, processor: Any = None, blank: ImageInputs | None = None, float32_logits: bool = True
) -> None:
    """Teach a model's call the keyword `pairs`, and its decoder the attention of its way.

    Calls without it stay what they were. It has to be the model's own call, for what wraps a model (DeepSpeed, PEFT,
    DistributedDataParallel, autocast) acts there.

    Args:
        processor: of the model, which says how it wants tokens marked; not needed where these are image tokens.
        blank: inputs of the image that a batch of texts alone is given, where there may be such batches.
        float32_logits: on GPUs in half precision, whether logits are float32.
    """
    stock, types, finish = model.forward, TokenTypes.of(model, processor), finish_of(model)

    def forward(*args: Any, pairs: PairBatch | None = None, images: Sequence[ImageInputs] = (), **kwargs: Any) -> Any:
        if pairs is None:
            return stock(*args, **kwargs)
        if blank is not None and pairs.blank is not None:
            images = [blank.to(pairs.input_ids.device)]
        return logps_of_pairs(model, pairs, images, types=types, finish=finish, float32_logits=float32_logits, **kwargs)

    forward.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]  # generation reads it
    model.forward = forward
    if way is not Way.ROWS:
        set_decoder_attention(model, PACKED)


def set_decoder_attention(model: Any, name: str) -> None:
    """Choose the attention of the language model; towers keep their own."""
    key = "text_config" if getattr(model.config, "text_config", None) is not None else ""
    model.set_attn_implementation({key: name})


def logps_of_pairs(
    model: Any,
    pairs: PairBatch,
    images: Sequence[ImageInputs],
    chunk: int,
    *,
    types: TokenTypes,
    finish: Finish,
    per_token: bool = False,
    float32_logits: bool = True,
) -> AnswerLogps | AnswerTokenLogps:
    """Summed log-probs of all answers of a batch by a model's own forward pass.

    Args:
        images: of the batch's `shown_images`, or the blank one. chunk: answer tokens whose logits exist at one time.
        types: how the model wants tokens marked. finish: what it does with its output layer's product.
        per_token: whether log-probs of single tokens are returned, too.
        float32_logits: on GPUs in half precision, whether logits are float32.
    """
    inner = model.base_model
    shown = [None if number is None else images[number] for number in pairs.shown]
    joined = join_images([image for image in shown if image is not None])
    inputs = {name: as_dtype(value, model.dtype) for name, value in joined.items()}
    inputs |= types.of_pairs(pairs)
    options: dict[str, Any] = {"pack": pairs.pack} if pairs.pack is not None else {}
    if pairs.position_ids is not None:
        options["position_ids"] = positions(inner, pairs, [image.host if image else {} for image in shown])
    mask = pairs.real.long() if pairs.pack is None else None
    with rows_hold(pairs.layout):
        found = inner(input_ids=pairs.input_ids, attention_mask=mask, use_cache=False, **inputs, **options)
    head = model.get_output_embeddings()
    chunk = chunk_for(head, chunk, pairs.answers.targets)
    compute = indexed_token_logps if per_token else indexed_logps
    hidden, product = found.last_hidden_state, float32_head(head) if float32_logits else head
    sums = compute(hidden, pairs.answers, lambda states: finish(product(states)), chunk)
    return sums if pairs.blank is None else with_part(sums, hidden.flatten(0, 1)[pairs.blank])


def with_part(sums: AnswerLogps | AnswerTokenLogps, hidden: Tensor) -> AnswerLogps | AnswerTokenLogps:
    """The same log-probs, of which a hidden state is a part that counts nothing: its gradient is zero, not absent."""
    nothing = 0 * hidden.float().sum()
    if isinstance(sums, AnswerTokenLogps):
        return sums._replace(logps=sums.logps + nothing, per_token=sums.per_token + nothing)
    return sums._replace(logps=sums.logps + nothing)


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point inputs in the weights' precision, others as they are."""
    return value.to(dtype) if value.is_floating_point() else value


def positions(inner: Any, pairs: PairBatch, images: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """[R, T], or [3, R, T] where the model places image tokens in two dimensions.

    Args:
        images: of each row, on the CPU.
    """
    assert pairs.position_ids is not None
    if not hasattr(inner, OWN_POSITIONS):
        return pairs.position_ids
    token = image_token_id(inner.config)
    parts = [
        positions_of_group(inner, group, ids, token, image)
        for (group, ids), image in zip(pairs.groups, images, strict=True)
    ]
    device = pairs.input_ids.device
    if pairs.pack is not None:
        return torch.cat(parts, dim=1)[:, None].to(device)
    padded = torch.zeros(3, *pairs.input_ids.shape, dtype=torch.long)
    for row, part in enumerate(parts):
        padded[:, row, : part.shape[1]] = part
    return padded.to(device)


def positions_of_group(inner: Any, group: PackedGroup, ids: Tensor, token: int, image: Mapping[str, Tensor]) -> Tensor:
    """[3, T] of [prefix | answer | answer ...]: the model's own for the first answer; others begin where it begins."""
    prefix, (first, *others) = group
    alone = ids[None, : prefix + first]
    grids = {name: value.cpu() for name, value in image.items() if name.endswith("grid_thw")}
    kinds, real = (alone == token).long(), torch.ones_like(alone)
    found, _ = inner.get_rope_index(alone, mm_token_type_ids=kinds, attention_mask=real, **grids)
    found = found[:, 0]
    begin = found[:, prefix : prefix + 1]
    return torch.cat([found, *(begin + torch.arange(length) for length in others)], dim=1)
