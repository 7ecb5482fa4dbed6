"""Loads a checkpoint for inference. What kind it is stands in its own files, never in the folder's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.tokenization import load_tokenizer


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, LlavaLlamaForCausalLM, Any, int]:
    """A checkpoint ready to answer: tokenizer, model in eval mode, image processor, context length in tokens.

    Args:
        model_path: folder of a full checkpoint, or of a LoRA adapter (then `model_base` holds the weights under it).
        model_name: kept for LLaVA's signature; nothing is decided by it.
        dtype (keyword): of all weights. Default as in LLaVA: float16, the vision tower float32 under device_map 'auto'.

    Raises:
        FileNotFoundError: no config.json or adapter_config.json, or the vision tower is nowhere.
        ValueError: the files are of a model that this repository does not run, or weights are missing.
    """
    if load_8bit or load_4bit:
        from transformers import BitsAndBytesConfig

        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_8bit,
            load_in_4bit=load_4bit,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        )
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    weights = model_path
    adapter = (Path(model_path) / "adapter_config.json").is_file()
    if adapter:
        weights = model_base or _base_of(Path(model_path))
    placement = {"device_map": device if device != "cuda" else device_map}
    model = load_llava(weights, dtype=dtype or torch.float16, **placement, **kwargs)
    tokenizer = load_tokenizer(model_path if _has_tokenizer(model_path) else weights, padding_side="right")
    if adapter:
        model = _with_adapter(model, Path(model_path))

    _add_image_tokens(model, tokenizer)
    tower_dtype = dtype or (torch.float32 if device_map == "auto" else torch.float16)
    tower = model.get_model().load_vision_tower(device=model.device, dtype=tower_dtype)
    model.get_model().mm_projector.to(device=model.device)
    return tokenizer, model.eval(), tower.image_processor, context_length(model.config)


def load_llava(source: str, **kwargs: Any) -> LlavaLlamaForCausalLM:
    """The model with its language weights and projector; the vision tower follows by `load_vision_tower`.

    Raises:
        ValueError: another kind of model, or keys are missing from the checkpoint.
    """
    check_kind(source)
    model, report = LlavaLlamaForCausalLM.from_pretrained(
        source, config=LlavaConfig.from_pretrained(source), output_loading_info=True, **kwargs
    )
    missing = sorted(report["missing_keys"])
    if missing and getattr(model.config, "mm_vision_tower", None):
        raise ValueError(
            f"checkpoint '{source}': expected all weights, {len(missing)} are missing, first {missing[:4]}. "
            "A folder with only a projector or an adapter needs --model-base."
        )
    model.generation_config = _valid_generation_config(model.generation_config)
    return model


def check_kind(source: str) -> None:
    """Raises unless the checkpoint says of itself that it is a LLaMA or a LLaVA on LLaMA."""
    if not Path(source).is_dir():
        return
    config = Path(source) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"checkpoint '{source}': expected config.json (full model) or adapter_config.json (LoRA), found neither"
        )
    kind = json.loads(config.read_text()).get("model_type")
    if kind not in ("llava_llama", "llava", "llama"):
        raise ValueError(
            f"checkpoint '{source}': expected model_type 'llava_llama' or 'llama' in config.json, got {kind!r}"
        )


def context_length(config: Any) -> int:
    """Tokens of the longest sequence, 2048 where the config does not say (as in LLaVA)."""
    return getattr(config, "max_sequence_length", None) or 2048


def _base_of(adapter: Path) -> str:
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"LoRA folder '{adapter}': expected its base model, got none. Pass --model-base.")
    return base


def _has_tokenizer(folder: str) -> bool:
    return not Path(folder).is_dir() or any((Path(folder) / f).is_file() for f in ("tokenizer.model", "tokenizer.json"))


def _with_adapter(model: LlavaLlamaForCausalLM, folder: Path) -> LlavaLlamaForCausalLM:
    """Loads what was trained beside the adapter, then merges the adapter into the weights."""
    from peft import PeftModel

    extra = folder / "non_lora_trainables.bin"
    if extra.is_file():
        weights = torch.load(extra, map_location="cpu", weights_only=True)
        weights = {key.removeprefix("base_model.").removeprefix("model.model."): v for key, v in weights.items()}
        weights = {key if key.startswith(("lm_head", "model.")) else f"model.{key}": v for key, v in weights.items()}
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"'{extra}': expected weights of the model, got keys it does not have: {unexpected[:4]}")
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _add_image_tokens(model: LlavaLlamaForCausalLM, tokenizer: Any) -> None:
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", True) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokens and len(tokenizer) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def _valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Vicuna's config names a temperature without sampling, which transformers refuses to save."""
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
