"""Writes a checkpoint of any kind anew, in float16 and LLaVA's layout: safetensors, adapters merged.

python -m llava.model.consolidate --src SRC --dst DST
"""

from __future__ import annotations

import argparse

import torch

from dama.console import log
from llava.model.builder import read_checkpoint
from llava.model.utils import auto_upgrade
from llava.model.write import new_folder, write_llava


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    """Reads `src_path` (folder or hub name) and writes it as one float16 model to the new folder `dst_path`."""
    auto_upgrade(src_path)
    checkpoint, tokenizer = read_checkpoint(src_path)
    checkpoint.weights = {name: tensor.to(torch.float16) for name, tensor in checkpoint.weights.items()}
    with new_folder(dst_path) as folder:
        write_llava(checkpoint, tokenizer, folder)
    log(f"written: {dst_path}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=str, required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument("--dst", type=str, required=True, help="new folder")
    args = parser.parse_args(argv)
    consolidate_ckpt(args.src, args.dst)


if __name__ == "__main__":
    main()
