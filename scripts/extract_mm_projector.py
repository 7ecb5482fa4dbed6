"""Takes the projector out of a full checkpoint: an mm_projector.bin as pretraining saves it.

python scripts/extract_mm_projector.py --model-path CHECKPOINT --output FOLDER/mm_projector.bin
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from dama.console import end_on_interrupt, log, write_atomic
from llava.model.utils import read_weights


def extract(model_path: str, output: str) -> None:
    """Writes the weights under `model.mm_projector.*` of a checkpoint in LLaVA's layout to one file.

    Raises:
        ValueError: the checkpoint has no projector.
    """
    found = {name: tensor.clone() for name, tensor in read_weights(model_path).items() if "mm_projector" in name}
    if not found:
        raise ValueError(f"checkpoint '{model_path}': expected weights named model.mm_projector.*, found none")
    buffer = io.BytesIO()
    torch.save(found, buffer)
    write_atomic(Path(output), buffer.getvalue())
    log(f"written: {output} ({', '.join(sorted(found))})")


def main(argv: list[str] | None = None) -> None:
    """Write the projector's weights of a full checkpoint to one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=str, required=True, help="folder of a full checkpoint")
    parser.add_argument("--output", type=str, required=True, help="file to write")
    args = parser.parse_args(argv)
    extract(args.model_path, args.output)


if __name__ == "__main__":
    end_on_interrupt()
    main()
