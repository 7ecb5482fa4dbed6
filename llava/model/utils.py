"""Files of a checkpoint: weights read safely from every form they come in, weights written, old configs upgraded."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama.console import say, write_json

Weights = dict[str, Tensor]


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
    say(f"'{path}' is of LLaVA's first release: model_type 'llama' has to become 'llava_llama'.")
    if input("Change the file now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise SystemExit(f"'{path}' was left as it is; it is needed as 'llava_llama' to go on")
    write_json(path, fields | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]})


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def weight_files(folder: str | Path) -> list[Path]:
    """The files with a full model's weights, safetensors before pickles; none where the folder has no full model.

    Raises:
        FileNotFoundError: the index names files that are not there.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / file for file in sorted(set(read_json(index)["weight_map"].values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise FileNotFoundError(
                    f"checkpoint '{folder}': expected the {len(files)} files that {index.name} lists, {absent} are "
                    "not there. Download or copy them again."
                )
            return files
    return []


def read_weights(folder: str | Path) -> Weights:
    """All tensors of a full checkpoint by name, mapped from the files rather than copied."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_file(file).items()}


def read_file(path: str | Path) -> Weights:
    """The tensors of one file, by the kind that its ending says; no code that a pickle may carry is ever run.

    Raises:
        ValueError: truncated or damaged, or a pickle of more than tensors.
    """
    path = Path(path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
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
