"""How hard are the pairs of your data set? CLIP scores them; a page shows the result.

    python examples/hardness_page.py --data pairs.jsonl --image_folder images --out runs/hardness

Writes OUT/hardness.html and logs the hardest pairs, whose beta DAMA lowers most. A second call with the same inputs
only reads the result. It runs on a GPU if there is one; on a CPU a smaller --clip, such as ViT-B-32-quickgelu, is
faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from dama.cli import main as dama
from dama.console import log
from dama.stage import read_stage
from dama.weighting import alpha_data


def build_parser() -> argparse.ArgumentParser:
    """Flags of this example; `python -m dama hardness --help` lists all that the stage has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="preference pairs: JSON list or JSONL")
    parser.add_argument("--image_folder", required=True, metavar="DIR", help="folder that image paths are relative to")
    parser.add_argument("--out", default="runs/hardness", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--clip", default="ViT-L-14-336-quickgelu", metavar="NAME|DIR", help="default: %(default)s")
    parser.add_argument("--hardest", type=int, default=5, metavar="N", help="pairs that are logged (default: 5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and its page; return the exit status."""
    args = build_parser().parse_args(argv)
    images = ["--image_folder", args.image_folder]
    status = dama(["hardness", "--data", args.data, *images, "--clip", args.clip, "--out", args.out])
    status = status or dama(["hardness", "show", args.out, *images])
    if status == 0:
        log_hardest(args.out, args.hardest)
    return status


def log_hardest(folder: str, count: int) -> None:
    """Log the pairs of the smallest delta, with the factor alpha_D by which DAMA multiplies their beta."""
    manifest, records = read_stage(folder, "hardness")
    records = sorted(records, key=lambda record: record["delta"])[:count]
    delta = torch.tensor([record["delta"] for record in records], dtype=torch.float64)
    for record, alpha_D in zip(records, alpha_data(delta, manifest["summary"]["delta_bar"])):
        log(f"pair {record['id']}: delta {record['delta']:+.4f}, beta times {alpha_D:.3f}")


if __name__ == "__main__":
    sys.exit(main())
