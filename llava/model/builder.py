"""Loads a checkpoint for inference. What kind it is stands in its own files, never in the folder's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, GenerationConfig, PretrainedConfig

from dama.console import log
from dama.notices import without_loading_bars
from dama.train.setup import drop_unused_decoding, keep_packing, quantization_config
from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint import (
    EMBEDDINGS,
    Checkpoint,
    complete_tables,
    llava_tokenizer,
    named_base,
    read_beside,
    read_full_checkpoint,
    summarize_names,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import IMAGE_BRACKETS
from llava.model.multimodal_encoder.builder import locate_vision_tower
from llava.model.multimodal_encoder.clip_encoder import validate_tower_type
from llava.model.source import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    PROJECTOR_FILE,
    Kind,
    fetch,
    full_folder,
    is_hf_layout,
    kind_of,
)
from llava.model.utils import read_file, read_json
from llava.tokenization import load_tokenizer

WHOLE_MODULES = ("model.mm_projector", "lm_head")  # stay in full precision in a quantized model


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
        model_path: folder or hub name of a full checkpoint in LLaVA's or llava-hf's layout, of a LoRA adapter (merged
            here), or of a projector.
        model_base: the weights under an adapter (by default those that it names) or a projector.
        model_name: kept for LLaVA's signature; nothing is decided by it.
        dtype (keyword): of all weights, 'auto' for the checkpoint's own. Default as in LLaVA: float16, the vision
            tower float32 under device_map 'auto'.

    Raises:
        FileNotFoundError: no checkpoint, no base under an adapter or projector, or the vision tower is nowhere.
        ImportError: 4 or 8 bits without bitsandbytes.
        ValueError: the files are damaged, or of a model that this repository does not run, or do not fit together;
            missing and unexpected weights are named.
    """
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = quantization_config(load_8bit, WHOLE_MODULES)
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    placement = {"device_map": device if device != "cuda" else device_map}
    model, checkpoint, tokenizer = _assemble(
        model_path, model_base, dtype=dtype or torch.float16, **placement, **kwargs
    )
    fit_tokenizer(model, tokenizer, model_path)

    tower_dtype = torch.float32 if device_map == "auto" else torch.float16
    tower_dtype = model.dtype if dtype == "auto" else dtype or tower_dtype
    load_tower(model, checkpoint, tower_dtype)
    model.get_model().mm_projector.to(device=model.device)
    processor = model.get_model().load_vision_tower(device=model.device).image_processor
    return tokenizer, model.eval(), processor, context_length(model.config)


def load_llava(source: str, *, cache_dir: str | None = None, **kwargs: Any) -> LlavaLlamaForCausalLM:
    """The model with its language weights and projector; the vision tower follows by `load_vision_tower`.

    Args:
        source: folder or hub name of a full checkpoint, or of a language model alone.
        kwargs: go to from_pretrained.

    Raises:
        ValueError: another kind of model, keys are missing from the checkpoint or unknown to the model, or the tower's
            weights are among the others (llava-hf's layout, a trained tower).
    """
    checkpoint = read_full_checkpoint(full_folder(source, cache_dir))
    if checkpoint.tower:
        raise ValueError(
            f"checkpoint '{source}': expected a vision tower in a folder of its own, got its weights among the others. "
            f"Convert it first: python -m llava.model.export --to llava {source} NEW_FOLDER"
        )
    return _model(source, checkpoint, **kwargs)


def read_checkpoint(source: str, base: str | None = None) -> tuple[Checkpoint, Any]:
    """Read a checkpoint of any kind, with its adapter merged or its projector added.

    Returns:
        the checkpoint under LLaVA's names and in its own precision, and its tokenizer.
    """
    folder = fetch(source)
    if kind_of(folder) in (Kind.FULL, Kind.HF):
        checkpoint = read_full_checkpoint(folder)
        tokenizer = _tokenizer(folder, checkpoint.config)
    else:
        model, checkpoint, tokenizer = _assemble(source, base, dtype="auto")
        checkpoint.weights, checkpoint.config = model.state_dict(), model.config
    check_weights(source, checkpoint)
    return checkpoint, tokenizer


def context_length(config: Any) -> int:
    """Tokens of the longest sequence, 2048 where the config does not say (as in LLaVA)."""
    return getattr(config, "max_sequence_length", None) or 2048


# --- Putting a model together ----------------------------------------------------------------------------------------


def _assemble(
    source: str, base: str | None, *, cache_dir: str | None = None, **kwargs: Any
) -> tuple[LlavaLlamaForCausalLM, Checkpoint, Any]:
    """(model without its tower, what it was made of, tokenizer) of any kind of checkpoint."""
    folder = fetch(source, cache_dir)
    kind = kind_of(folder)
    if kind in (Kind.FULL, Kind.HF):
        if base:
            log(f"checkpoint '{source}' is a full model: the base '{base}' is not used")
        checkpoint = read_full_checkpoint(folder)
        return _model(source, checkpoint, **kwargs), checkpoint, _tokenizer(folder, checkpoint.config)

    base = base or named_base(folder, kind)
    checkpoint = _add_to_base(folder, kind, full_folder(base, cache_dir))
    # Before the tower is there: adapters are found by layer names that CLIP has, too.
    model = _model(base, checkpoint, **kwargs)
    if kind is Kind.LORA:
        model = merge_adapter(model, folder)
    model.config._name_or_path = model.name_or_path = source
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return (
        model,
        checkpoint,
        load_tokenizer(folder) if has_tokenizer else _tokenizer(fetch(base, cache_dir), checkpoint.config),
    )


def _add_to_base(folder: Path, kind: Kind, base: Path) -> Checkpoint:
    """Return the base checkpoint with the folder's config (LLaVA's fields over a bare LLaMA's) and trained weights."""
    checkpoint = read_full_checkpoint(base)
    if (folder / "config.json").is_file():
        of_base, checkpoint.config = checkpoint.config, LlavaConfig.from_pretrained(folder)
        checkpoint.config.vocab_size, checkpoint.config._name_or_path = of_base.vocab_size, str(base)
    elif kind is Kind.PROJECTOR:
        raise FileNotFoundError(f"projector folder '{folder}': expected config.json beside {PROJECTOR_FILE}")
    inside = Path(str(getattr(checkpoint.config, "mm_vision_tower", None)))
    if not (folder / inside / "config.json").is_file() and (base / inside / "config.json").is_file():
        checkpoint.config.mm_vision_tower = str((base / inside).resolve())
    extra, tower = read_beside(folder, kind)
    checkpoint.weights, checkpoint.tower = (
        checkpoint.weights | complete_tables(checkpoint.weights, extra),
        tower or checkpoint.tower,
    )
    checkpoint.config.vocab_size = len(checkpoint.weights[EMBEDDINGS])
    return checkpoint


def _model(source: str, checkpoint: Checkpoint, **kwargs: Any) -> LlavaLlamaForCausalLM:
    """The model of this checkpoint, without its tower, under the name of its source."""
    check_weights(source, checkpoint)
    if kwargs.get("dtype", "auto") == "auto":
        kwargs["dtype"] = checkpoint.weights[EMBEDDINGS].dtype
    folder, tower = checkpoint.config._name_or_path, getattr(checkpoint.config, "mm_vision_tower", None)
    if tower and folder and not Path(source).is_dir() and (Path(folder) / tower / "config.json").is_file():
        checkpoint.config.mm_vision_tower = str(Path(folder) / tower)  # inside a hub repository
    with without_loading_bars():
        model = LlavaLlamaForCausalLM.from_pretrained(
            None, config=checkpoint.config, state_dict=checkpoint.weights, **kwargs
        )
    if folder and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    drop_unused_decoding(model)
    keep_packing(model)
    model.config._name_or_path = model.name_or_path = source
    return model


def check_weights(source: str, checkpoint: Checkpoint) -> None:
    """Raises, every key named, unless the weights are just those that the config describes."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in LlavaLlamaForCausalLM(checkpoint.config).state_dict().items()}
    if checkpoint.config.tie_word_embeddings:  # saved under both names by some; it is one table
        expected.pop("lm_head.weight")
        checkpoint.weights.pop("lm_head.weight", None)
    got = {name: tuple(t.shape) for name, t in checkpoint.weights.items()}
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    shapes = [f"{name} {expected[name]} got {got[name]}" for name in expected.keys() & got.keys()
              if expected[name] != got[name]]  # fmt: skip
    errors = [f"{len(missing)} are missing: {summarize_names(missing)}"] * bool(missing)
    errors += [f"{len(unexpected)} are unknown to the model: {summarize_names(unexpected)}"] * bool(unexpected)
    errors += [f"{len(shapes)} have another shape: {'; '.join(sorted(shapes))}"] * bool(shapes)
    if errors:
        raise ValueError(
            f"checkpoint '{source}': expected just the weights that its config.json describes; {'. '.join(errors)}. "
            "A folder with only a projector or an adapter needs --model-base; else config.json is of another model."
        )


def merge_adapter(model: LlavaLlamaForCausalLM, folder: Path) -> LlavaLlamaForCausalLM:
    """Adds a LoRA adapter to the weights.

    Raises:
        FileNotFoundError: no adapter weights. ValueError: weights that the adapter's config does not describe.
    """
    from peft import PeftModel, get_peft_model_state_dict

    files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"LoRA folder '{folder}': expected {' or '.join(ADAPTER_FILES)}, found neither")
    given = {name.replace(".default.", ".") for name in read_file(files[0])}
    adapted = PeftModel.from_pretrained(model, str(folder))
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if given != wanted:
        raise ValueError(
            f"'{files[0]}': expected the weights that {ADAPTER_CONFIG} describes for this base; "
            f"missing: {summarize_names(wanted - given) or 'none'}; "
            f"unknown: {summarize_names(given - wanted) or 'none'}. "
            "Pass the base that the adapter was trained on with --model-base."
        )
    return adapted.merge_and_unload()


def load_tower(model: LlavaLlamaForCausalLM, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Brings the vision tower: the checkpoint's own weights where it has them, else those it names.

    Raises:
        ValueError: the tower is no CLIP, or the checkpoint's own weights are not those of its tower.
    """
    tower = model.get_model().get_vision_tower()
    if tower is None or checkpoint.image_processor is None:
        check_tower(model.config)
        tower = model.get_model().load_vision_tower(device=model.device, dtype=dtype)
    if checkpoint.tower:
        config = checkpoint.tower_config or tower.vision_tower.config
        tower.vision_tower = _clip(config, checkpoint.tower, model.config._name_or_path, dtype).to(model.device)
    if checkpoint.image_processor is not None:
        tower.image_processor, tower.is_loaded = checkpoint.image_processor, True
        tower.folder = checkpoint.config.mm_vision_tower


def check_tower(config: PretrainedConfig) -> None:
    """Raises where the tower's folder holds another model than CLIP, whose weights would be left at random."""
    name = getattr(config, "mm_vision_tower", None)
    folder = Path(locate_vision_tower(name, config._name_or_path)) if name else Path()
    kind = read_json(folder / "config.json").get("model_type") if name and folder.is_dir() else "clip"
    validate_tower_type(kind, f"{folder}' of checkpoint '{config._name_or_path}")


def _clip(config: Any, weights: dict[str, Tensor], source: str, dtype: torch.dtype) -> CLIPVisionModel:
    with without_loading_bars():
        network, report = CLIPVisionModel.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint '{source}': expected all weights of its vision tower; missing: "
            f"{summarize_names(missing) or 'none'}; unknown: {summarize_names(unexpected) or 'none'}"
        )
    return network.requires_grad_(False)


# --- Tokens ----------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, config: PretrainedConfig) -> Any:
    if is_hf_layout(read_json(folder / "config.json")):
        return llava_tokenizer(folder, config.vocab_size)
    return load_tokenizer(folder, padding_side="right")


def fit_tokenizer(model: LlavaLlamaForCausalLM, tokenizer: Any, source: str) -> None:
    """Adds the image tokens that the config asks for, and rows for tokens that the checkpoint has none for yet.

    Raises:
        ValueError: the tokenizer is of another model than the embedding table.
    """
    tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if getattr(model.config, "mm_use_im_patch_token", True) else []
    if getattr(model.config, "mm_use_im_start_end", False):
        tokens += IMAGE_BRACKETS
    rows, known = model.get_input_embeddings().num_embeddings, len(tokenizer)
    tokenizer.add_tokens(tokens, special_tokens=True)
    check_tokenizer(tokenizer, rows, source, known)
    model.grow_tables(len(tokenizer))


def check_tokenizer(tokenizer: Any, rows: int, source: str, known: int | None = None) -> None:
    """Raise unless the tokenizer can be of a model whose embedding table has that many rows.

    Tokens that were added to a tokenizer may lie beyond the table: the pad token of early Llama 2, LLaVA's image tokens
    of an adapter. More rows than tokens are only right where the table was padded to a multiple of 64.

    Args:
        known: tokens in the files, where others have been added since.

    Raises:
        ValueError: tokens of the vocabulary itself have no row, or too many rows have no token.
    """
    beyond = [index for index in tokenizer.added_tokens_decoder if index >= rows]
    if not len(tokenizer) - len(beyond) <= rows <= -(-len(tokenizer) // 64) * 64:
        raise ValueError(
            f"checkpoint '{source}': expected as many tokens as rows of the embedding table, got a tokenizer of "
            f"{known or len(tokenizer)} and a table of {rows}. The tokenizer's files are of another model; copy those "
            "of the model's own base."
        )
