"""Files of a checkpoint: weights read safely from every form they come in, weights written, old configs upgraded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from dama.console import log, write_json

Weights = dict[str, Tensor]
# First line of the text that Git LFS leaves in a clone in place of a large file, in its three versions.
LFS_HEADERS = (
    b"version https://git-lfs.github.com/",
    b"version https://hawser.github.com/",
    b"version http://git-media",
)
LFS_POINTER_BYTES = 1024  # a pointer is smaller, by Git LFS's specification
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def auto_upgrade(config: str) -> None:
    """Offers to name a LLaVA of the first release, whose config.json still says 'llama', as what it is.

    Args:
        config: the checkpoint's folder; nothing is done for a hub name or for any other kind of model.

    Raises:
        SystemExit: the answer on the terminal is no.
    """
    path = Path(config) / "config.json"
    fields = read_json(path) if path.is_file() else {}
    if fields.get("model_type") != "llama" or not fields.get("mm_vision_tower"):
        return
    log(f"'{path}' is of LLaVA's first release: model_type 'llama' has to become 'llava_llama'.")
    if input("Change the file now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit(f"'{path}' was left as it is; it is needed as 'llava_llama' to go on")
    write_json(path, fields | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]})


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def weight_files(folder: str | Path) -> list[Path]:
    """The files with a full model's weights, safetensors before pickles; none where the folder has no full model.

    Raises:
        FileNotFoundError: the index names files that are not there.
        ValueError: the index is damaged, or names files outside the folder.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / file for file in files_of_index(index)]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise FileNotFoundError(
                    f"checkpoint '{folder}': expected the {len(files)} files that {index.name} lists, {absent} are "
                    "not there. Download or copy them again."
                )
            return files
    return []


def files_of_index(index: str | Path) -> list[str]:
    """The names of the shards that an index file lists, relative to its folder and inside it.

    Raises:
        ValueError: the file is not an index, or a name could lead out of the folder or stand for several files.
    """
    index = Path(index)
    try:
        fields = json.loads(index.read_bytes())
    except ValueError as error:
        raise ValueError(f"index '{index}': expected JSON, got a damaged file ({error}). Download it again.") from error
    names = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"index '{index}': expected weight_map, an object from weights to file names")
    outside = sorted({name for name in names.values() if not is_plain_weight_file(name)})
    if outside:
        raise ValueError(
            f"index '{index}': expected the names of .safetensors or .bin files inside the checkpoint's folder, got "
            f"{outside[:4]}. Such a checkpoint is damaged or made to read other files; do not use it."
        )
    return sorted(set(names.values()))


def is_plain_weight_file(name: str) -> bool:
    """Whether a name is of a weight file at or below the folder that it is relative to."""
    return (
        name.endswith(WEIGHT_SUFFIXES) and name.isprintable() and not set(name) & set("\\:*?[]") and stays_inside(name)
    )


def stays_inside(name: str) -> bool:
    """Whether a relative path, taken as it is written, stays inside the folder that it is relative to."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths)


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is Git LFS's placeholder for its content."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > LFS_POINTER_BYTES:
        return False
    return path.read_bytes().startswith(LFS_HEADERS)


def validate_no_lfs_pointers(*paths: str | Path) -> None:
    """Raise where a file, or a file of a folder, is a Git LFS pointer instead of its content.

    Raises:
        ValueError: naming the files and the remedy.
    """
    files = [file for path in map(Path, paths) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    pointers = [file for file in files if is_lfs_pointer(file)]
    if pointers:
        names = ", ".join(file.name for file in pointers)
        raise ValueError(
            f"'{pointers[0].parent}': expected the content of {names}, got Git LFS pointers of about 130 bytes: the "
            "repository was cloned without its large files. Run `git lfs install && git lfs pull` in that folder, or "
            "download the repository with `hf download`."
        )


def read_weights(folder: str | Path) -> Weights:
    """All tensors of a full checkpoint by name, mapped from the files rather than copied."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_file(file).items()}


def read_file(path: str | Path) -> Weights:
    """The tensors of one file, by the kind that its ending says; no code that a pickle may carry is ever run.

    Raises:
        ValueError: truncated or damaged, a Git LFS pointer, or a pickle of more than tensors.
    """
    path = Path(path)
    validate_no_lfs_pointers(path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(tensors, dict):
        raise ValueError(f"weights '{path}': expected tensors by name, got {type(tensors).__name__}")
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"weights '{path}': expected a tensor under every name, got something else under {others[:4]}")
    return tensors


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, "safetensors", error)) from error


def _read_pickle(path: Path) -> Weights:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        return torch.load(path, mmap=is_zip, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights '{path}': expected tensors only, got a pickle of other Python objects, which could run code and "
            f"is not loaded ({str(error).splitlines()[-1]}). If you trust it, save it as safetensors and remove it."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(_damaged(path, "PyTorch", error)) from error


def _damaged(path: Path, kind: str, error: Exception) -> str:
    return (
        f"weights '{path}': expected a complete {kind} file, got {path.stat().st_size} bytes that are truncated or "
        f"damaged ({str(error).splitlines()[0]}). Download or copy the file again."
    )


def write_weights(folder: str | Path, weights: Weights) -> None:
    """model.safetensors, or shards of 5 GB with their index; every tensor in the dtype that it has."""
    from huggingface_hub import save_torch_state_dict

    # A view of a larger table would drag the whole table into the file.
    whole = {
        name: t if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes else t.contiguous().clone()
        for name, t in weights.items()
    }
    save_torch_state_dict(whole, str(folder), max_shard_size="5GB")
