"""Sizes of Hugging Face models, and lengths of the pairs that they read, without loading weights."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from dama.images import resolve_image, size_of_image
from dama.models.chat import ChatTemplate
from dama.models.encoding import PairEncoder
from dama.models.families import family_of
from dama.models.family import ImageSizes
from dama.models.images import ImageInputs, ProcessorImages
from dama.models.setup import decoder_of, load_processor, vision_of
from dama.models.way import Way, obstacles, way_of
from dama.pairs import PreferencePair
from dama.train.data import ImageChoice
from dama.train.family import PreparedPair, group_lengths
from dama.train.throughput import PairLength
from llava.estimate.sizes import LayerSizes, ModelShape
from llava.train.arguments import Arguments

LOOKED_AT = 64  # of the longest texts, and as many at random: their images may be larger
TYPICAL = (640, 480)  # pixels of an image, without data


@cache
def skeleton(name: str, cache_dir: str | None = None) -> Any:
    """The model on the meta device, without weights. Raises OSError or ValueError where its config is not at hand."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"'{name}' is of type {config.model_type}, which transformers does not load for images and text"
        )
    with torch.device("meta"):
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)


@contextmanager
def whole_weights(args: Any) -> Iterator[None]:
    """Make models of whole parameters, where transformers would spread those of some parts over ZeRO-3's ranks."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


@cache
def processor_of(
    name: str, cache_dir: str | None, min_pixels: int | None, max_pixels: int | None, *processor_option: str
) -> Any:
    """The checkpoint's processor with --min_pixels, --max_pixels and --processor_option."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
    flags = SimpleNamespace(min_pixels=min_pixels, max_pixels=max_pixels, processor_option=processor_option)
    return load_processor(name, flags, cache_dir, adapt=family_of(config).adapted_processor)


def own_processor(arguments: Arguments) -> Any:
    """The processor that a training with these arguments loads."""
    model_args, _, args = arguments
    pixels = model_args.min_pixels, model_args.max_pixels
    return processor_of(str(model_args.model_name_or_path), args.cache_dir, *pixels, *model_args.processor_option)


def hub_shape(arguments: Arguments, pairs: Sequence[PreferencePair]) -> ModelShape:
    """Sizes of a model, with the numbers of the largest image that is looked at.

    Raises:
        ValueError: its vision encoder is trained, or its layers are not plain attention, whose activations are not
            counted. OSError: it is not at hand.
    """
    model_args, data_args, args = arguments
    if not model_args.freeze_vision:
        raise ValueError("the activations of a vision encoder that is trained (--freeze_vision False) are not counted")
    with whole_weights(args):
        model = skeleton(str(model_args.model_name_or_path), args.cache_dir)
    config, decoder, vision = model.config.get_text_config(decoder=True), decoder_of(model), vision_of(model)
    capped = "attention with a soft cap" if getattr(config, "attn_logit_softcapping", None) else None
    if obstacle := next(obstacles(model), capped):
        raise ValueError(f"{obstacle}, whose activations are not counted")
    seen = [image for pair in looked_at(pairs) for image in pair.own_images]
    sizes = [size_of_image(resolve_image(data_args.image_folder or [], name)) for name in dict.fromkeys(seen)]
    inputs = ProcessorImages(own_processor(arguments))(Image.new("RGB", max(sizes or [TYPICAL], key=area)))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tower = getattr(vision, "config", None)
    layers: Sequence[nn.Module] = decoder.layers  # type: ignore[assignment]
    return ModelShape(
        layers=len(layers),
        width=config.hidden_size,
        queries=config.num_attention_heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        parameters=parts_of(model, decoder, vision, layers),
        matrix=max(parameter.numel() for parameter in model.parameters()),
        tower_parameters=count(vision.parameters()) if vision is not None else 0,
        tower_layers=first_of(tower, "num_hidden_layers", "depth"),
        tower_width=first_of(tower, "embed_dim", "hidden_size"),
        tower_intermediate=first_of(tower, "intermediate_size"),
        patches=positions_of(inputs, first_of(tower, "patch_size")),
        normed=numbers_normed(layers[0], config),
        dense_mask=way_of(model, shared_prefix=args.shared_prefix).way is Way.MASK,
        pixels=sum(value.numel() for value in inputs.values() if value.is_floating_point()),
    )


def numbers_normed(layer: nn.Module, config: Any) -> int:
    """Numbers of a token that the norms of a decoder layer read; those of one head's width read all heads."""
    heads = {"q_norm": config.num_attention_heads, "k_norm": getattr(config, "num_key_value_heads", None) or 1}
    names = {name: name.rpartition(".")[2] for name, _ in layer.named_modules()}
    norms = {name: module for name, module in layer.named_modules() if "norm" in names[name]}
    widths = {name: count(norm.parameters()) for name, norm in norms.items()}
    return sum(
        width * (heads.get(names[name], 1) if width < config.hidden_size else 1) for name, width in widths.items()
    )


def area(size: tuple[int, int]) -> int:
    """Pixels of an image of this width and height."""
    return size[0] * size[1]


def parts_of(model: Any, decoder: nn.Module, vision: nn.Module | None, layers: Sequence[nn.Module]) -> LayerSizes:
    """Parameters of a model's parts, each counted once; what is in no other part lies between the two models."""
    embedding = count(model.get_input_embeddings().parameters())
    each = count(parameter for layer in layers for parameter in layer.parameters()) // len(layers)
    own = [*decoder.parameters(), *model.get_output_embeddings().parameters()]
    head = count(own) - embedding - count(p for layer in layers for p in layer.parameters())
    others = {id(p) for p in [*own, *(vision.parameters() if vision is not None else ())]}
    projector = count(parameter for parameter in model.parameters() if id(parameter) not in others)
    return LayerSizes(embedding, projector, each, head)


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in distinct parameters."""
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def first_of(config: Any, *names: str) -> int:
    """The first of these sizes that a config has, the larger side of a pair; 0 where it has none."""
    found = next((value for name in names if (value := getattr(config, name, None))), 0)
    return max(found) if isinstance(found, list | tuple) else int(found)


def positions_of(inputs: ImageInputs, patch: int) -> int:
    """Positions of an image in the vision encoder: rows of patches, or what its crops are cut into."""
    pixels = inputs["pixel_values"]
    return pixels.shape[0] if pixels.dim() == 2 or not patch else pixels.numel() // (3 * patch**2)


# --- Lengths ---------------------------------------------------------------------------------------------------------


def looked_at(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Those with the longest texts, and some at random; the same for the same pairs."""
    longest = sorted(pairs, key=characters, reverse=True)[:LOOKED_AT]
    drawn = random.Random(0).sample(list(pairs), min(LOOKED_AT, len(pairs)))
    return list({pair.id: pair for pair in [*longest, *drawn]}.values())


def characters(pair: PreferencePair) -> int:
    """Characters of a pair's texts."""
    return sum(len(text) for _, text in pair.prompt) + len(pair.chosen) + len(pair.rejected) + len(pair.second or "")


def longest_of(arguments: Arguments, pairs: Sequence[PreferencePair]) -> list[PreparedPair]:
    """About the longest pairs that fit into --model_max_length, encoded, the longest first."""
    model_args, data_args, args = arguments
    processor, views = own_processor(arguments), args.preference_loss().views
    chat = ChatTemplate(processor, model_args.system_prompt)
    encoder = PairEncoder(chat, ProcessorImages(processor), views, ImageSizes(data_args.image_folder or []))
    chosen, choice = looked_at(pairs), ImageChoice.of(pairs, views, args)
    images = [choice.images(pair) for pair in chosen]
    items = [PreparedPair(*row) for row in zip(chosen, encoder.encode(chosen, images), images, strict=True)]
    fitting = [item for item in items if max(map(len_of_row, item.rows)) <= args.model_max_length]
    return sorted(fitting, key=lambda item: -sum(map(len_of_row, item.rows)))[:LOOKED_AT]


def len_of_row(row: Any) -> int:
    """Tokens of an encoded row, its images included."""
    return len(row.input_ids)


def hub_lengths(arguments: Arguments, items: Sequence[PreparedPair]) -> list[PairLength]:
    """Lengths of encoded pairs, in tokens with images included."""
    views = arguments[2].preference_loss().views
    return [PairLength(group_lengths(item.rows, views, lambda ids: ids)) for item in items]
