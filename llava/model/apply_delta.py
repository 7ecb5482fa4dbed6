"""Puts a model together from its base and a delta that make_delta wrote.

python -m llava.model.apply_delta --base-model-path BASE --target-model-path NEW --delta-path DELTA
"""

from __future__ import annotations

import argparse

from dama.console import log
from llava.model.builder import read_checkpoint
from llava.model.make_delta import combined
from llava.model.utils import auto_upgrade
from llava.model.write import new_folder, write_llava


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    """Writes base + delta in float16 to the new folder `target_model_path`.

    Raises:
        ValueError: the two are not of one architecture.
    """
    auto_upgrade(delta_path)
    base, _ = read_checkpoint(base_model_path)
    delta, tokenizer = read_checkpoint(delta_path)
    delta.weights = combined(delta, base.weights, sign=1, subject=f"'{delta_path}' on '{base_model_path}'")
    with new_folder(target_model_path) as folder:
        write_llava(delta, tokenizer, folder)
    log(f"written: {target_model_path}")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model-path", type=str, required=True, help="folder or hub name")
    parser.add_argument("--target-model-path", type=str, required=True, help="new folder")
    parser.add_argument("--delta-path", type=str, required=True, help="folder or hub name")
    args = parser.parse_args(argv)
    apply_delta(args.base_model_path, args.target_model_path, args.delta_path)


if __name__ == "__main__":
    main()
