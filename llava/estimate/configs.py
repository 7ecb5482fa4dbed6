"""Configs of a checkpoint and its vision tower, also where the checkpoint is not downloaded yet."""

from __future__ import annotations

from typing import Any

from llava.supported import is_hub_model, model_type_of

SHAPES = {  # of checkpoints that are named before they are downloaded
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
CLIP_NAME = "openai/clip-vit-large-patch14-336"
CLIP_SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def configs_of(model_args: Any, cache_dir: str | None = None) -> tuple[Any, Any]:
    """(LlavaConfig as training will set it up, CLIPVisionConfig).

    Of a checkpoint that is not at hand by its name: LLaVA-v1.5's of 7 and 13 billion parameters are known.

    Raises:
        ValueError: the checkpoint is of another model. OSError: it is not at hand, and its name says nothing.
    """
    from transformers import CLIPVisionConfig

    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.multimodal_encoder.builder import locate_vision_tower

    source = str(model_args.model_name_or_path)
    if is_hub_model(source):
        raise ValueError(f"'{source}' is of type {model_type_of(source)}; memory is estimated for LLaVA-1.5")
    try:
        config = LlavaConfig.from_pretrained(source, cache_dir=cache_dir)
    except OSError as error:
        known = [sizes for name, sizes in SHAPES.items() if f"-{name}" in source.lower()]
        if not known:
            raise OSError(f"'{source}': no config.json at hand, and no sizes known by this name") from error
        config = LlavaConfig(vocab_size=32000, mm_vision_tower=CLIP_NAME, mm_projector_type="mlp2x_gelu", **known[-1])
    for name in ("mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type"):
        setattr(config, name, getattr(model_args, name) or getattr(config, name, None))
    config.mm_projector_type = config.mm_projector_type or "linear"
    config.mm_vision_tower = model_args.vision_tower or getattr(config, "mm_vision_tower", None)
    if config.mm_vision_tower is None:
        raise ValueError(f"'{source}': names no vision tower; give one with --vision_tower")
    try:
        tower = CLIPVisionConfig.from_pretrained(locate_vision_tower(config.mm_vision_tower, source))
    except OSError:
        if not str(config.mm_vision_tower).endswith(CLIP_NAME.partition("/")[2]):
            raise
        tower = CLIPVisionConfig(**CLIP_SHAPE)
    config.mm_vision_select_layer, config.mm_hidden_size = -2, tower.hidden_size  # any layer is as large
    return config, tower
