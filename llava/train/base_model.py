"""What can be wrong with the checkpoint that a training starts from, found in its small files before weights are read.

`follow_base` completes the flags from its config, `validate_base` reports every error at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.utils import cached_file

from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.builder import check_tokenizer
from llava.model.llava_arch import IMAGE_BRACKETS, bracket_rows, projector_weights
from llava.model.multimodal_encoder.builder import locate_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.utils import read_file, read_json, validate_no_lfs_pointers
from llava.tokenization import load_tokenizer
from llava.train.arguments import Arguments, ModelArguments

Config = dict[str, Any]
FOLLOWED = ("mm_use_im_start_end", "mm_use_im_patch_token")


def follow_base(model_args: ModelArguments, config: Config) -> None:
    """Set the flags about image tokens that were not given to what the checkpoint's config says, else False."""
    for name in FOLLOWED:
        if getattr(model_args, name) is None:
            setattr(model_args, name, bool(config.get(name)))


def validate_base(arguments: Arguments) -> None:
    """Complete the flags from the checkpoint and refuse a training that would fail or save what cannot be loaded.

    A checkpoint without config.json, or out of reach, is left to the loading itself.

    Raises:
        ValueError: listing every error.
    """
    model_args, _, args = arguments
    source = str(model_args.model_name_or_path)
    if Path(source).is_dir():
        validate_no_lfs_pointers(source)
    config = read_base_config(source, args.cache_dir)
    if config is None:
        return
    follow_base(model_args, config)
    errors = list(collect_errors(arguments, config))
    if errors:
        head = f"{len(errors)} error(s) of the checkpoint '{source}' for this training:"
        raise ValueError("\n  ".join([head, *errors]))


def read_base_config(source: str, cache_dir: str | None = None) -> Config | None:
    """config.json of a folder or hub repository; None where there is none."""
    try:
        path = Path(source, "config.json") if Path(source).is_dir() else cached_file(
            source, "config.json", cache_dir=cache_dir
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return read_json(path) if path is not None and Path(path).is_file() else None


def collect_errors(arguments: Arguments, config: Config) -> Iterator[str]:
    """Every way in which flags, checkpoint, tokenizer, tower and projector file do not fit together."""
    model_args, data_args, args = arguments
    source = str(model_args.model_name_or_path)

    def chosen(name: str, default: Any = None) -> Any:
        values = getattr(model_args, name, None), getattr(data_args, name, None), config.get(name), default
        return next((value for value in values if value is not None), None)

    yield from image_errors(chosen, args.task)
    if model_args.tune_mm_mlp_adapter and model_args.mm_use_im_start_end:
        yield "--tune_mm_mlp_adapter True: not supported with mm_use_im_start_end, which the checkpoint's config sets"
    checks: list[Callable[[], None]] = [
        lambda: check_base_tokenizer(source, config, model_args),
        lambda: check_projector(chosen, model_args, config),
        lambda: check_tower(chosen, source),
    ]
    for check in checks:
        try:
            check()
        except (ValueError, FileNotFoundError) as error:
            yield str(error)


def image_errors(chosen: Callable[..., Any], task: str) -> Iterator[str]:
    """What the model does with images, whether flags or the checkpoint say so."""
    aspect, merge = chosen("image_aspect_ratio"), chosen("mm_patch_merge_type", "flat")
    feature = chosen("mm_vision_select_feature", "patch")
    if aspect not in (None, "pad", "square", "anyres"):
        yield f"image_aspect_ratio: expected pad, square or anyres, got {aspect!r}; give --image_aspect_ratio pad"
    if merge not in ("flat", "spatial", "spatial_unpad"):
        yield f"mm_patch_merge_type: expected flat, spatial or spatial_unpad, got {merge!r}; give --mm_patch_merge_type"
    if feature not in ("patch", "cls_patch"):
        yield f"mm_vision_select_feature: expected patch or cls_patch, got {feature!r}; give --mm_vision_select_feature"
    if aspect == "anyres" and task == "DPO":
        yield (
            "image_aspect_ratio anyres: not supported for --task DPO; give --image_aspect_ratio pad and "
            "--mm_patch_merge_type flat"
        )
    elif aspect == "anyres" and merge != "flat":
        yield (
            f"image_aspect_ratio anyres with mm_patch_merge_type {merge}: not supported for training; give "
            "--mm_patch_merge_type flat or --image_aspect_ratio pad"
        )


def check_base_tokenizer(source: str, config: Config, model_args: ModelArguments) -> None:
    """Raise ValueError unless every token of the tokenizer has, or can be given, a row of the embedding table."""
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError):
        return  # the loading itself will name it
    known, rows = len(tokenizer), config.get("vocab_size")
    if "text_config" in config or not isinstance(rows, int):
        return  # llava-hf's layout, which is refused with the command that converts it
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] * bool(model_args.mm_use_im_patch_token)
    tokens += IMAGE_BRACKETS * bool(model_args.mm_use_im_start_end)
    check_tokenizer(tokenizer, rows, source)
    tokenizer.add_tokens(tokens, special_tokens=True)
    check_tokenizer(tokenizer, rows, source, known)
    if model_args.pretrain_mm_mlp_adapter and model_args.mm_use_im_start_end:
        bracket_rows(model_args.pretrain_mm_mlp_adapter, max(rows, len(tokenizer)))


def check_projector(chosen: Callable[..., Any], model_args: ModelArguments, config: Config) -> None:
    """Raise ValueError unless the projector's kind is known and the file to start it from, if any, holds one."""
    kind = chosen("mm_projector_type", "linear")
    sizes = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=1, hidden_size=1)
    wanted = {name for name, _ in build_vision_projector(sizes).named_parameters()}
    path = model_args.pretrain_mm_mlp_adapter
    if path is None:
        return
    given = projector_weights(read_file(path))
    if given.keys() != wanted:
        raise ValueError(
            f"--pretrain_mm_mlp_adapter '{path}': expected the weights of a {kind} projector, {sorted(wanted)}, got "
            f"{sorted(given)}. Name its kind with --mm_projector_type."
        )
    widths = {len(tensor) for name, tensor in given.items() if name.endswith("bias")}
    if widths - {config.get("hidden_size")}:
        raise ValueError(
            f"--pretrain_mm_mlp_adapter '{path}': expected a projector to the language model's width "
            f"{config.get('hidden_size')}, got {sorted(widths)}. The file is of a model of another size."
        )


def check_tower(chosen: Callable[..., Any], source: str) -> None:
    """Raise ValueError unless the tower at hand has the hidden layer that is selected."""
    name = chosen("vision_tower") or chosen("mm_vision_tower")
    if not name or not (Path(source).is_dir() or Path(name).is_dir()):
        return  # on the hub, or in a folder of a repository there
    folder = Path(locate_vision_tower(str(name), source))
    if not (folder / "config.json").is_file():
        return
    validate_no_lfs_pointers(folder)
    config = read_json(folder / "config.json")
    layers = config.get("vision_config", config).get("num_hidden_layers")
    layer = chosen("mm_vision_select_layer", -1)
    if isinstance(layers, int) and isinstance(layer, int) and not -layers - 1 <= layer <= layers:
        raise ValueError(
            f"mm_vision_select_layer: expected {-layers - 1} to {layers}, the hidden states of the vision tower "
            f"'{folder}', got {layer}"
        )
