"""Which checkpoints this repository runs, seen in their config.json before anything large is imported or fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dama.hub import go_offline_without_hub

OWN = ("llava_llama", "llama")  # LLaVA's layout, and a language model to start LLaVA from
SUPPORTED = ("llava_llama", "llava", "llama")  # LLaVA's layout, llava-hf's, and a language model to start LLaVA from


def validate_supported_model(source: str | None, flag: str) -> None:
    """Raise ValueError where a checkpoint's config.json, or that of the base of an adapter, is of another model.

    A checkpoint without config.json, or out of reach, is left to the loading itself, which names it.

    Args:
        source: folder or hub name; nothing is done for None. flag: what to call it in the error.
    """
    kind = model_type_of(source)
    if kind is not None and kind not in SUPPORTED:
        raise ValueError(
            f"{flag} '{source}': expected a LLaVA-1.5 model in LLaVA's layout (model_type llava_llama; llama for the "
            f"language model to start from) or llava-hf's (model_type llava), got model_type {kind}. Other models are "
            "not supported; give for example liuhaotian/llava-v1.5-7b or llava-hf/llava-1.5-7b-hf"
        )


def is_hub_model(source: str | None, flag: str | None = None) -> bool:
    """Return whether a checkpoint is one of transformers' image-text-to-text models, LLaVA's own layout aside.

    Args:
        flag: what to call it in the error where it is another model still; None for no error.

    Raises:
        ValueError: transformers does not know it as a model of images and text.
    """
    kind = model_type_of(source)
    if kind is None or kind in OWN:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    known = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if not known and flag is not None:
        raise ValueError(
            f"{flag} '{source}': expected LLaVA-1.5, or a model of images and text that transformers loads "
            f"(AutoModelForImageTextToText), got model_type {kind}"
        )
    return known


def answers_by_hub(source: str, base: str | None = None, flag: str = "--model-path") -> bool:
    """Return whether a checkpoint answers through dama.models, not through LLaVA's own code.

    LLaVA-1.5 in llava-hf's layout answers through LLaVA's own code, except for an adapter that names its layers as
    transformers does.

    Args:
        source: folder or hub name. base: the model under an adapter, where it is not the one that its config names.

    Raises:
        ValueError: a model that nothing here runs.
    """
    is_adapter = "model_type" not in read_small_file(source, "config.json")
    model = base if base and is_adapter else source
    config = config_of(model)
    if is_llava_hf(config):
        return is_adapter and any("language_model." in name for name in adapter_weights(source))
    return is_hub_model(model, flag)


def is_llava_hf(config: dict[str, Any]) -> bool:
    """Whether a config.json is of LLaVA-1.5 in llava-hf's layout: LLaMA and CLIP, as in LLaVA's own code."""
    parts = {"text_config": "llama", "vision_config": "clip_vision_model"}
    return config.get("model_type") == "llava" and all(
        (config.get(part) or {}).get("model_type", kind) == kind for part, kind in parts.items()
    )


def adapter_weights(source: str) -> list[str]:
    """Names of an adapter's weights; empty where there are none at hand."""
    from safetensors import SafetensorError, safe_open

    name = "adapter_model.safetensors"
    try:
        path = Path(source, name) if Path(source).is_dir() else download(source, name)
        with safe_open(path, "pt") as weights:
            return list(weights.keys())
    except (OSError, ValueError, SafetensorError):
        return []


def validate_trained_model(source: str | None, flag: str) -> None:
    """Raise ValueError where preference training knows no way to read a checkpoint, or where it is an adapter's alone.

    Args:
        source: folder or hub name. flag: what to call it in the error.
    """
    if not is_hub_model(source, flag):
        validate_supported_model(source, flag)
    elif source and "model_type" not in read_small_file(source, "config.json"):
        base = read_small_file(source, "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{flag} '{source}': expected a full model, got an adapter of '{base}'; merge it first with "
            f"python scripts/merge_lora_weights.py --model-path {source} --model-base {base} --save-model-path NEW"
        )


def model_type_of(source: str | None) -> str | None:
    """model_type of a checkpoint's config.json, or of the base of an adapter; None where there is none at hand."""
    return config_of(source).get("model_type") if source else None


def config_of(source: str) -> dict[str, Any]:
    """config.json of a checkpoint, or of the base of an adapter; empty where there is none at hand."""
    config = read_small_file(source, "config.json")
    if "model_type" in config:
        return config
    base = read_small_file(source, "adapter_config.json").get("base_model_name_or_path")
    return read_small_file(str(base), "config.json") if base else {}


def read_small_file(source: str, name: str) -> dict[str, Any]:
    """A JSON object from a checkpoint's folder or hub repository; empty where there is none that can be read."""
    try:
        path = Path(source, name) if Path(source).is_dir() else download(source, name)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def download(source: str, name: str) -> Path:
    """A file of a hub repository in the cache. Raises OSError or ValueError where it is out of reach."""
    if source.count("/") > 1 or source.startswith((".", "/")):
        raise FileNotFoundError(source)
    from huggingface_hub import hf_hub_download

    go_offline_without_hub(source)
    return Path(hf_hub_download(source, name))
