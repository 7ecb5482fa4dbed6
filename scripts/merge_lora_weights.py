"""Merges a LoRA folder, or a projector folder, into its base: one full checkpoint in the layout of its base.

python scripts/merge_lora_weights.py --model-path LORA --model-base BASE --save-model-path NEW
"""

from __future__ import annotations

import argparse

import torch

from dama.console import end_on_interrupt, log
from dama.models.loading import HubCheckpoint, ProcessorOptions
from dama.train.setup import drop_unused_decoding
from llava.model.builder import read_checkpoint
from llava.model.write import new_folder, write_llava
from llava.supported import answers_by_hub


def merge_lora(args: argparse.Namespace) -> None:
    """Merges in the base's own precision and rounds once, at the end."""
    dtype = getattr(torch, args.dtype)
    if answers_by_hub(args.model_path, args.model_base):
        merge_hub_adapter(HubCheckpoint(args.model_path, args.model_base), args.save_model_path, dtype)
    else:
        checkpoint, tokenizer = read_checkpoint(args.model_path, args.model_base)
        checkpoint.weights = {name: tensor.to(dtype) for name, tensor in checkpoint.weights.items()}
        with new_folder(args.save_model_path) as folder:
            write_llava(checkpoint, tokenizer, folder)
    log(f"written: {args.save_model_path}")


def merge_hub_adapter(checkpoint: HubCheckpoint, path: str, dtype: torch.dtype) -> None:
    """Write a Hugging Face model with the adapter in its weights, merged in fp32, and its processor.

    Raises:
        ValueError: there is no adapter to merge.
    """
    if checkpoint.adapter is None:
        raise ValueError(f"--model-path '{checkpoint.source}': expected an adapter, found no adapter_config.json")
    with new_folder(path) as folder:
        model = checkpoint.model(device="cpu", dtype=torch.float32)
        drop_unused_decoding(model)
        model.to(dtype).save_pretrained(folder)
        checkpoint.processor(ProcessorOptions()).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter or projector folder into its base and save a full checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=str, required=True, help="LoRA or projector folder")
    parser.add_argument("--model-base", type=str, required=True, help="folder or hub name of its base")
    parser.add_argument("--save-model-path", type=str, required=True, help="new folder")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16",
                        help="precision of the weights that are written (default: %(default)s)")  # fmt: skip
    merge_lora(parser.parse_args(argv))


if __name__ == "__main__":
    end_on_interrupt()
    main()
