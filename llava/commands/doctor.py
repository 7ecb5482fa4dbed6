"""`python -m dama doctor`: flags of the check of a training on this machine."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
Checks what a training needs of this machine, on one page.

`python -m dama doctor --config-of scripts/dama_7b.sh` checks the flags that the script would train with: libraries,
data, memory, disk, one batch. Every training begins with the short form of these checks.
"""
EXAMPLES = """\
Further flags go to the script, or without a script to training: python -m dama doctor --task DPO --data_path ...
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that are not training's."""
    parser.add_argument("--config-of", metavar="SCRIPT", help="script whose training is checked")
    parser.add_argument(
        "--ranks", type=int, default=1, help="number of processes, without a script (default: %(default)s)"
    )
    parser.add_argument(
        "--rehearse", action="store_true",
        help="run two training steps on a CUDA device without a GPU, and print the memory of each phase",
    )  # fmt: skip
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB",
        help="memory of a GPU in GiB, with --rehearse (default: this machine's GPUs, else 79.25, a card of 80 GB)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the checks; 1 if one failed."""
    from llava.estimate.doctor import run_doctor

    return run_doctor(args, args.rest)
