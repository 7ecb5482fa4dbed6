"""Loads a Hugging Face model and its processor for training: precision, adapters, which parts learn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed

from dama.console import log
from dama.models.families import family_of
from dama.models.family import HubFamily
from dama.models.files import files_of, validate_complete
from dama.notices import without_loading_bars
from dama.train.setup import (
    drop_unused_decoding,
    join_ranks,
    keep_packing,
    loading_options,
    precision_of_weights,
    with_adapters,
)

HEAD = "lm_head"

OF_LOADING = ("backend", "use_fast")  # options that choose an image processor's class


def setup_family(arguments: Any, *, dtype: torch.dtype | None = None) -> HubFamily:
    """The family that (model_args, data_args, args) describe; its model may be a PeftModel.

    Args:
        dtype: of the weights, in place of what training would choose.

    Raises:
        ValueError: flags that do not fit the model, a processor without chat template, or missing weights.
    """
    model_args, data_args, args = arguments
    name = str(model_args.model_name_or_path)
    join_ranks(args)
    set_seed(args.seed)  # new adapters start alike in every run
    options = loading_options(args, [HEAD])
    with files_of(name), without_loading_bars():
        kind = family_of(AutoConfig.from_pretrained(name, cache_dir=args.cache_dir, trust_remote_code=False))
        processor = load_processor(name, model_args, args.cache_dir, adapt=kind.adapted_processor)
        model, found = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype or precision_of_weights(args), cache_dir=args.cache_dir, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    validate_complete(name, found)
    drop_unused_decoding(model)
    keep_packing(model)
    model.config.use_cache = False
    if args.lora_enable:
        model = with_lora(model, args)
    else:
        choose_trained(model, model_args, args)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    family = kind(
        model, processor, args, name=name, image_folder=data_args.image_folder or [], system=model_args.system_prompt
    )
    if args.compile_layers and not args.gradient_checkpointing:
        layers: Any = decoder_of(family.model).layers
        for layer in layers:
            layer.compile(dynamic=True)
    log(f"model: {type(family.model).__name__}, read by {family.decided}")
    return family


def load_processor(
    name: str,
    model_args: Any,
    cache_dir: str | None = None,
    *,
    adapt: Callable[[Any], Any] = HubFamily.adapted_processor,
) -> Any:
    """The checkpoint's processor with the flags' options.

    Args:
        adapt: adds what the files lack, `adapted_processor` of the model's family.

    Raises:
        ValueError: an option is no NAME=VALUE or has no effect, or it is no processor of images and text.
    """
    options: dict[str, Any] = {"min_pixels": model_args.min_pixels, "max_pixels": model_args.max_pixels}
    options = {key: value for key, value in options.items() if value is not None} | parsed(model_args.processor_option)
    processor = adapt(AutoProcessor.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False, **options))
    if getattr(processor, "image_token", None) is None or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor of '{name}': expected one of images and text, with an image_token, got "
            f"{type(processor).__name__}"
        )
    check_options(processor, options)
    drop_repeated_limits(processor)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def check_options(processor: Any, options: dict[str, Any]) -> None:
    """Raise ValueError for options that a processor drops without a word, and for limits that no image can keep."""
    images, limits = processor.image_processor, limits_of(processor)
    known = images.to_dict()
    for name, value in options.items():
        is_kept = name in limits and limits[name] == value
        if not (is_kept or name in known or name in OF_LOADING or hasattr(processor, name)):
            flag = f"--{name} {value}" if name in limits else f"--processor_option {name}={json.dumps(value)}"
            settings = ", ".join(sorted(known.keys() - {"image_processor_type", "processor_class"}))
            raise ValueError(
                f"{flag}: expected a setting of this model's {type(images).__name__}, which has none of that name; its "
                f"settings, for --processor_option NAME=VALUE, are {settings}"
            )
    least, most = limits.values()
    if options.keys() & limits and least and most and least > most:
        raise ValueError(f"--min_pixels, --max_pixels: expected the least at most the most, got {least} and {most}")


def drop_repeated_limits(processor: Any) -> None:
    """Remove min_pixels and max_pixels from a tokenizer's options where the size of the image processor has them too.

    from_pretrained gives its options to both. Qwen2-VL's processor and its kin write them into `size`; the tokenizer
    keeps them, and each call would pass them to the image processor again, which is deprecated and changes nothing.
    """
    kept = processor.tokenizer.init_kwargs
    for name, value in limits_of(processor).items():
        if name in kept and value == kept[name]:
            del kept[name]


def limits_of(processor: Any) -> dict[str, Any]:
    """The least and the most pixels of an image, by flag, where Qwen2-VL and its kin have them; else other numbers."""
    size = dict(getattr(processor.image_processor, "size", None) or {})
    return {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE, each value read as JSON."""
    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--processor_option {option}: expected NAME=VALUE with a value in JSON, as in do_resize=false"
            ) from error
        if not equals or not name:
            raise ValueError(f"--processor_option {option}: expected NAME=VALUE")
    return found


# --- What learns -----------------------------------------------------------------------------------------------------


def decoder_of(model: Any) -> torch.nn.Module:
    """The language model inside a vision-language model, as transformers finds it."""
    return model.get_decoder()


def vision_of(model: Any) -> torch.nn.Module | None:
    """The vision encoder; None where the model names none."""
    found = model.get_encoder(modality="image")
    return None if found is model or found is model.base_model else found


def choose_trained(model: Any, model_args: Any, args: Any) -> None:
    """Freeze what the flags freeze: the vision encoder, the language model, what lies between them.

    Raises:
        ValueError: nothing is left to train.
    """
    vision = vision_of(model)
    if model_args.freeze_vision and vision is not None:
        vision.requires_grad_(False)
    if model_args.freeze_backbone:
        decoder_of(model).requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if args.freeze_mm_mlp_adapter:
        others = {id(p) for part in (vision, decoder_of(model), model.get_output_embeddings()) if part is not None
                  for p in part.parameters()}  # fmt: skip
        for parameter in model.parameters():
            if id(parameter) not in others:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("flags: expected something to train, got everything frozen; see --freeze_backbone")


def with_lora(model: Any, args: Any) -> Any:
    """The model under LoRA adapters on all linear layers of its language model; nothing else trains."""
    from peft import LoraConfig

    prefix, names = adapted_layers(model)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=rf"{re.escape(prefix)}.*\.({'|'.join(map(re.escape, names))})",
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
    )
    log(f"LoRA: rank {config.r} on {', '.join(names)}")
    return with_adapters(model, config, args)


def adapted_layers(model: Any) -> tuple[str, list[str]]:
    """(name of the language model, last names of its linear layers)."""
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    return prefix, sorted({name.rpartition(".")[2] for name in linear} - {HEAD})
