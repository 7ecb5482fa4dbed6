"""What a model adds to its base, for publishing without the base's weights; apply_delta puts them together again.

python -m llava.model.make_delta --base-model-path BASE --target-model-path MODEL --delta-path DELTA
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from dama.console import log
from llava.model.builder import read_checkpoint
from llava.model.checkpoint import VOCABULARY_TABLES, Checkpoint
from llava.model.utils import Weights, auto_upgrade
from llava.model.write import new_folder, write_llava


def make_delta(base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None) -> None:
    """Writes target - base in float16 to the new folder `delta_path`, and to the hub where a repository is named.

    The projector and rows of the vocabulary that the base does not have are kept as they are.

    Raises:
        ValueError: the two are not of one architecture.
    """
    auto_upgrade(target_model_path)
    base, _ = read_checkpoint(base_model_path)
    target, tokenizer = read_checkpoint(target_model_path)
    target.weights = combined(target, base.weights, sign=-1, subject=f"'{target_model_path}' on '{base_model_path}'")
    with new_folder(delta_path) as folder:
        write_llava(target, tokenizer, folder)
    log(f"written: {delta_path}")
    if hub_repo_id:
        from huggingface_hub import HfApi

        HfApi().create_repo(hub_repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=hub_repo_id, folder_path=delta_path)


def combined(model: Checkpoint, base: Weights, sign: int, subject: str) -> Weights:
    """Model + sign * base by name, float16; where the model has more rows of vocabulary, only the base's rows change.

    Raises:
        ValueError: the base lacks a weight of the language model, has one more, or one of another shape.
    """
    own = {name for name in model.weights if "mm_projector" in name and name not in base}
    strangers = sorted((model.weights.keys() - own) ^ base.keys())
    if strangers:
        raise ValueError(f"delta of {subject}: expected the same weights in both, only one of them has {strangers[:4]}")

    def one(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(torch.float16)
        if name in own:
            return tensor
        rows, other = len(base[name]), base[name].to(torch.float16)
        fits = tensor.shape[1:] == other.shape[1:] and (
            len(tensor) == rows or (name in VOCABULARY_TABLES and len(tensor) > rows)
        )
        if not fits:
            raise ValueError(
                f"delta of {subject}: expected {name} of the base's shape {tuple(other.shape)}, or with more rows of "
                f"vocabulary, got {tuple(tensor.shape)}"
            )
        return torch.cat([tensor[:rows] + sign * other, tensor[rows:]])

    return {name: one(name, tensor) for name, tensor in model.weights.items()}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model-path", type=str, required=True, help="folder or hub name")
    parser.add_argument("--target-model-path", type=str, required=True, help="folder or hub name")
    parser.add_argument("--delta-path", type=str, required=True, help="new folder")
    parser.add_argument("--hub-repo-id", type=str, default=None, help="also upload the delta there")
    args = parser.parse_args(argv)
    make_delta(args.base_model_path, args.target_model_path, args.delta_path, args.hub_repo_id)


if __name__ == "__main__":
    main()
