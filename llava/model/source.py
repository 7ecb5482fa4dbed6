"""Find a checkpoint's files in a folder or on the hub, and tell which kind of checkpoint they are."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from dama.hub import go_offline_without_hub
from llava.model.utils import files_of_index, read_json, stays_inside, validate_no_lfs_pointers, weight_files
from llava.supported import validate_supported_model

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE_ADAPTER = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
SMALL_FILES = ["*.json", "*.model"]  # of a hub repository: configs, indexes, tokenizers


def is_hf_layout(config: dict[str, Any]) -> bool:
    """Whether a config.json is of LlavaForConditionalGeneration (LLaVA's first release also said 'llava')."""
    return config.get("model_type") == "llava" and "text_config" in config


class Kind(Enum):
    """What a checkpoint folder holds."""

    FULL = "LLaVA's layout"
    HF = "llava-hf's layout"
    LORA = "a LoRA adapter"
    PROJECTOR = "a projector"


def fetch(source: str, cache_dir: str | None = None, *, is_tower: bool = False) -> Path:
    """The folder of a checkpoint: itself, or its copy in the hub's cache, downloaded where it is not there yet.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        ValueError: the checkpoint is of another model; nothing large is downloaded then.
    """
    if not is_tower:
        validate_supported_model(str(source), "checkpoint")
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

    go_offline_without_hub(source)
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
    validate_no_lfs_pointers(folder)
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


def full_folder(source: str, cache_dir: str | None = None) -> Path:
    """Return the folder of a full checkpoint; ValueError for an adapter or a projector alone."""
    folder = fetch(source, cache_dir)
    kind = kind_of(folder)
    if kind in (Kind.LORA, Kind.PROJECTOR):
        raise ValueError(
            f"checkpoint '{source}': expected a full model, got {kind.value} only. Load it with --model-base, "
            "or merge it first with scripts/merge_lora_weights.py."
        )
    return folder
