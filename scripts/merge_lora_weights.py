"""Merges a LoRA folder, or a projector folder, into its base: one full float16 checkpoint in LLaVA's layout.

python scripts/merge_lora_weights.py --model-path LORA --model-base BASE --save-model-path NEW
"""

from __future__ import annotations

import argparse

import torch

from dama.console import end_on_interrupt, log
from llava.model.builder import read_checkpoint
from llava.model.write import new_folder, write_llava


def merge_lora(args: argparse.Namespace) -> None:
    """Merges in the base's own precision and rounds once, at the end."""
    checkpoint, tokenizer = read_checkpoint(args.model_path, args.model_base)
    checkpoint.weights = {name: tensor.to(torch.float16) for name, tensor in checkpoint.weights.items()}
    with new_folder(args.save_model_path) as folder:
        write_llava(checkpoint, tokenizer, folder)
    log(f"written: {args.save_model_path}")


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter or projector folder into its base and save a full checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=str, required=True, help="LoRA or projector folder")
    parser.add_argument("--model-base", type=str, required=True, help="folder or hub name of its base")
    parser.add_argument("--save-model-path", type=str, required=True, help="new folder")
    merge_lora(parser.parse_args(argv))


if __name__ == "__main__":
    end_on_interrupt()
    main()
