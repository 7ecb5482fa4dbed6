"""Loads a checkpoint for inference. What kind it is stands in its own files, never in the folder's name."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, GenerationConfig, PretrainedConfig

from dama.console import say
from llava.constants import DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.export import (
    EMBEDDINGS,
    VOCABULARY_TABLES,
    Parts,
    collapsed,
    grown,
    is_hf_layout,
    llava_tokenizer,
    read_parts,
    split_tower,
)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.llava_arch import IMAGE_BRACKETS
from llava.model.multimodal_encoder.builder import locate_vision_tower
from llava.model.multimodal_encoder.clip_encoder import refuse_other_towers
from llava.model.utils import (
    Weights,
    files_of_index,
    read_file,
    read_json,
    refuse_lfs_pointers,
    stays_inside,
    weight_files,
)
from llava.notices import QUANTIZATION_NOTICES
from llava.supported import refuse_unsupported_model
from llava.tokenization import load_tokenizer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE_ADAPTER = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
SMALL_FILES = ["*.json", "*.model"]  # of a hub repository: configs, indexes, tokenizers


class Kind(Enum):
    """What a checkpoint folder holds."""

    FULL = "LLaVA's layout"
    HF = "llava-hf's layout"
    LORA = "a LoRA adapter"
    PROJECTOR = "a projector"


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
        kwargs["quantization_config"] = quantisation(load_8bit)
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    placement = {"device_map": device if device != "cuda" else device_map}
    model, parts, tokenizer = _assemble(model_path, model_base, dtype=dtype or torch.float16, **placement, **kwargs)
    fit_tokenizer(model, tokenizer, model_path)

    tower_dtype = torch.float32 if device_map == "auto" else torch.float16
    tower_dtype = model.dtype if dtype == "auto" else dtype or tower_dtype
    load_tower(model, parts, tower_dtype)
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
    parts = read_parts(_full_folder(source, cache_dir))
    if parts.tower:
        raise ValueError(
            f"checkpoint '{source}': expected a vision tower in a folder of its own, got its weights among the others. "
            f"Convert it first: python -m llava.model.export --to llava {source} NEW_FOLDER"
        )
    return _model(source, parts, **kwargs)


def take_apart(source: str, base: str | None = None) -> tuple[Parts, Any]:
    """(parts in LLaVA's names and the checkpoint's precision, tokenizer); adapters are merged, projectors set in."""
    folder = fetch(source)
    if kind_of(folder) in (Kind.FULL, Kind.HF):
        parts = read_parts(folder)
        tokenizer = _tokenizer(folder, parts.config)
    else:
        model, parts, tokenizer = _assemble(source, base, dtype="auto")
        parts.weights, parts.config = model.state_dict(), model.config
    check_weights(source, parts)
    return parts, tokenizer


# --- What a folder holds ---------------------------------------------------------------------------------------------


def fetch(source: str, cache_dir: str | None = None, *, is_tower: bool = False) -> Path:
    """The folder of a checkpoint: itself, or its copy in the hub's cache, downloaded where it is not there yet.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        ValueError: the checkpoint is of another model; nothing large is downloaded then.
    """
    if not is_tower:
        refuse_unsupported_model(str(source), "checkpoint")
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if str(source).count("/") > 1 or str(source).startswith((".", "/")):
            raise HFValidationError("no such folder")
        return _download(str(source), cache_dir)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"checkpoint '{source}': expected a folder or the name of a hub repository, found no such folder and the "
            f"hub says: {str(error).splitlines()[0]}"
        ) from error


def _download(source: str, cache_dir: str | None) -> Path:
    """A hub repository's files in the cache, as far as they are needed: pickles only where there is nothing else."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=SMALL_FILES, cache_dir=cache_dir))
    for wanted in _weights_wanted(folder):
        snapshot_download(source, allow_patterns=wanted, cache_dir=cache_dir)
        if (folder / wanted[0]).is_file():
            break
    if tower := _tower_inside(folder):
        # A tower in a folder of its own inside the repository, weights of either kind.
        snapshot_download(source, allow_patterns=[f"{tower}/*"], cache_dir=cache_dir)
    return folder


def _weights_wanted(folder: Path) -> list[list[str]]:
    """Files to ask a hub for, by its configs and indexes: groups, of which the first that exists is enough."""
    if (folder / ADAPTER_CONFIG).is_file():
        return [[ADAPTER_FILES[0], BESIDE_ADAPTER], [ADAPTER_FILES[1], BESIDE_ADAPTER]]
    groups: list[list[str]] = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        groups.append([name])
        if (index := folder / f"{name}.index.json").is_file():
            groups.append(files_of_index(index))
    return [*groups, [PROJECTOR_FILE]]


def _tower_inside(folder: Path) -> str | None:
    """The folder of a vision tower inside a checkpoint's, as its config names it."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = config.get("mm_vision_tower")
    return name if isinstance(name, str) and stays_inside(name) and (folder / name / "config.json").is_file() else None


def kind_of(folder: str | Path) -> Kind:
    """The kind by the files inside.

    Raises:
        FileNotFoundError: neither a full model's files nor an adapter's nor a projector's.
        ValueError: a full model that this repository does not run, or Git LFS pointers instead of its files.
    """
    folder = Path(folder)
    refuse_lfs_pointers(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return Kind.LORA
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint '{folder}': expected config.json (full model) or adapter_config.json (LoRA), found neither"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in ("llava_llama", "llava", "llama"):
        raise ValueError(
            f"checkpoint '{folder}': expected model_type 'llava_llama' or 'llama' in config.json, "
            f"got {config.get('model_type')!r}"
        )
    if weight_files(folder):
        return Kind.HF if is_hf_layout(config) else Kind.FULL
    if (folder / PROJECTOR_FILE).is_file():
        return Kind.PROJECTOR
    raise FileNotFoundError(
        f"checkpoint '{folder}': expected weights (model.safetensors or pytorch_model.bin, in shards with their index, "
        f"or {PROJECTOR_FILE}), found none. Was the download or the training interrupted?"
    )


def _full_folder(source: str, cache_dir: str | None = None) -> Path:
    folder = fetch(source, cache_dir)
    kind = kind_of(folder)
    if kind in (Kind.LORA, Kind.PROJECTOR):
        raise ValueError(
            f"checkpoint '{source}': expected a full model, got {kind.value} only. Load it with --model-base, "
            "or merge it first with scripts/merge_lora_weights.py."
        )
    return folder


def context_length(config: Any) -> int:
    """Tokens of the longest sequence, 2048 where the config does not say (as in LLaVA)."""
    return getattr(config, "max_sequence_length", None) or 2048


# --- Putting a model together ----------------------------------------------------------------------------------------


def _assemble(
    source: str, base: str | None, *, cache_dir: str | None = None, **kwargs: Any
) -> tuple[LlavaLlamaForCausalLM, Parts, Any]:
    """(model without its tower, what it was made of, tokenizer) of any kind of checkpoint."""
    folder = fetch(source, cache_dir)
    kind = kind_of(folder)
    if kind in (Kind.FULL, Kind.HF):
        if base:
            say(f"checkpoint '{source}' is a full model: the base '{base}' is not used")
        parts = read_parts(folder)
        return _model(source, parts, **kwargs), parts, _tokenizer(folder, parts.config)

    base = base or _base_named_by(folder, kind)
    parts = _parts_on_base(folder, kind, _full_folder(base, cache_dir))
    # Before the tower is there: adapters are found by layer names that CLIP has, too.
    model = _model(base, parts, **kwargs)
    if kind is Kind.LORA:
        model = merge_adapter(model, folder)
    model.config._name_or_path = model.name_or_path = source
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return model, parts, load_tokenizer(folder) if has_tokenizer else _tokenizer(fetch(base, cache_dir), parts.config)


def _parts_on_base(folder: Path, kind: Kind, base: Path) -> Parts:
    """The base's parts with the folder's config (LLaVA's fields over those of a bare LLaMA) and what trained in it."""
    parts = read_parts(base)
    if (folder / "config.json").is_file():
        of_base, parts.config = parts.config, LlavaConfig.from_pretrained(folder)
        parts.config.vocab_size, parts.config._name_or_path = of_base.vocab_size, str(base)
    elif kind is Kind.PROJECTOR:
        raise FileNotFoundError(f"projector folder '{folder}': expected config.json beside {PROJECTOR_FILE}")
    inside = Path(str(getattr(parts.config, "mm_vision_tower", None)))
    if not (folder / inside / "config.json").is_file() and (base / inside / "config.json").is_file():
        parts.config.mm_vision_tower = str((base / inside).resolve())
    extra, tower = read_beside(folder, kind)
    parts.weights, parts.tower = parts.weights | complete_tables(parts.weights, extra), tower or parts.tower
    parts.config.vocab_size = len(parts.weights[EMBEDDINGS])
    return parts


def complete_tables(base: Weights, extra: Weights) -> Weights:
    """`extra` with whole vocabulary tables: rows that were saved alone follow the base's, a missing table gets means.

    LLaVA saves the rows of <im_start> and <im_end> beside a projector: the input table alone, in full or these rows.
    """
    tables = {name: extra[name] for name in VOCABULARY_TABLES if name in extra}
    whole = {
        name: torch.cat([base[name], table.to(base[name])]) if len(table) < len(base[name]) else table
        for name, table in tables.items()
    }
    rows = max((len(table) for table in whole.values()), default=0)
    missing = [name for name in VOCABULARY_TABLES if name in base and name not in whole and rows > len(base[name])]
    return extra | whole | {name: grown(base[name], rows) for name in missing}


def _base_named_by(folder: Path, kind: Kind) -> str:
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") if kind is Kind.LORA else None
    if not base:
        raise ValueError(f"'{folder}' holds {kind.value}: expected its base model, got none. Pass --model-base.")
    try:
        fetch(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"LoRA folder '{folder}': its {ADAPTER_CONFIG} names the base '{base}', which is not there. "
            f"Pass --model-base. ({error})"
        ) from error
    return base


def read_beside(folder: Path, kind: Kind) -> tuple[Weights, Weights]:
    """What was trained beside an adapter, or the projector: (language model and projector, vision tower)."""
    file = folder / (PROJECTOR_FILE if kind is Kind.PROJECTOR else BESIDE_ADAPTER)
    if not file.is_file():
        return {}, {}
    named = {}
    for name, tensor in read_file(file).items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        named[name.removeprefix("model.") if name.startswith("model.model.") else name] = tensor
    return split_tower(named)


def _model(source: str, parts: Parts, **kwargs: Any) -> LlavaLlamaForCausalLM:
    """The model of these parts, without its tower, under the name of its source."""
    check_weights(source, parts)
    if kwargs.get("dtype", "auto") == "auto":
        kwargs["dtype"] = parts.weights[EMBEDDINGS].dtype
    folder, tower = parts.config._name_or_path, getattr(parts.config, "mm_vision_tower", None)
    if tower and folder and not Path(source).is_dir() and (Path(folder) / tower / "config.json").is_file():
        parts.config.mm_vision_tower = str(Path(folder) / tower)  # inside a hub repository
    model = LlavaLlamaForCausalLM.from_pretrained(None, config=parts.config, state_dict=parts.weights, **kwargs)
    if folder and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.generation_config = _valid_generation_config(model.generation_config)
    model.config._name_or_path = model.name_or_path = source
    return model


def check_weights(source: str, parts: Parts) -> None:
    """Raises, every key named, unless the weights are just those that the config describes."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in LlavaLlamaForCausalLM(parts.config).state_dict().items()}
    if parts.config.tie_word_embeddings:  # saved under both names by some; it is one table
        expected.pop("lm_head.weight")
        parts.weights.pop("lm_head.weight", None)
    got = {name: tuple(t.shape) for name, t in parts.weights.items()}
    missing, unexpected = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    shapes = [f"{name} {expected[name]} got {got[name]}" for name in expected.keys() & got.keys()
              if expected[name] != got[name]]  # fmt: skip
    faults = [f"{len(missing)} are missing: {collapsed(missing)}"] * bool(missing)
    faults += [f"{len(unexpected)} are unknown to the model: {collapsed(unexpected)}"] * bool(unexpected)
    faults += [f"{len(shapes)} have another shape: {'; '.join(sorted(shapes))}"] * bool(shapes)
    if faults:
        raise ValueError(
            f"checkpoint '{source}': expected just the weights that its config.json describes; {'. '.join(faults)}. "
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
            f"missing: {collapsed(wanted - given) or 'none'}; unknown: {collapsed(given - wanted) or 'none'}. "
            "Pass the base that the adapter was trained on with --model-base."
        )
    return adapted.merge_and_unload()


def load_tower(model: LlavaLlamaForCausalLM, parts: Parts, dtype: torch.dtype) -> None:
    """Brings the vision tower: the checkpoint's own weights where it has them, else those it names.

    Raises:
        ValueError: the tower is no CLIP, or the checkpoint's own weights are not those of its tower.
    """
    tower = model.get_model().get_vision_tower()
    if tower is None or parts.image_processor is None:
        check_tower(model.config)
        tower = model.get_model().load_vision_tower(device=model.device, dtype=dtype)
    if parts.tower:
        config = parts.tower_config or tower.vision_tower.config
        tower.vision_tower = _clip(config, parts.tower, model.config._name_or_path, dtype).to(model.device)
    if parts.image_processor is not None:
        tower.image_processor, tower.is_loaded = parts.image_processor, True
        tower.folder = parts.config.mm_vision_tower


def check_tower(config: PretrainedConfig) -> None:
    """Raises where the tower's folder holds another model than CLIP, whose weights would be left at random."""
    name = getattr(config, "mm_vision_tower", None)
    folder = Path(locate_vision_tower(name, config._name_or_path)) if name else Path()
    kind = read_json(folder / "config.json").get("model_type") if name and folder.is_dir() else "clip"
    refuse_other_towers(kind, f"{folder}' of checkpoint '{config._name_or_path}")


def _clip(config: Any, weights: dict[str, Tensor], source: str, dtype: torch.dtype) -> CLIPVisionModel:
    network, report = CLIPVisionModel.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing or unexpected:
        raise ValueError(
            f"checkpoint '{source}': expected all weights of its vision tower; missing: "
            f"{collapsed(missing) or 'none'}; unknown: {collapsed(unexpected) or 'none'}"
        )
    return network.requires_grad_(False)


def quantisation(
    load_8bit: bool,
    *,
    compute_dtype: torch.dtype = torch.float16,
    double_quant: bool = True,
    quant_type: str = "nf4",
) -> Any:
    """4 or 8 bits through bitsandbytes, the projector and the output layer left in full precision."""
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"loading in {8 if load_8bit else 4} bits: expected the package bitsandbytes, which is not installed. "
            "`pip install bitsandbytes`, or load in 16 bits."
        )
    from transformers import BitsAndBytesConfig

    QUANTIZATION_NOTICES.release()
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=not load_8bit,
        llm_int8_skip_modules=["model.mm_projector", "lm_head"],
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )


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


def _valid_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Vicuna's config names a temperature without sampling, which transformers refuses to save."""
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
