"""`python -m dama hardness show`: flags of the page of hardness."""

from __future__ import annotations

import argparse

from dama.console import log
from dama.flags import fail

DESCRIPTION = """\
Page of the results of `python -m dama hardness`: the distribution of delta by source and by kind of pair, how much of
it is only the difference in length of the answers, the easiest, the hardest and the most negative pairs with their
statements and scores, and the second images that each --corruption of the training makes of some of them.

Writes OUT/hardness.html   the page, self-contained
       OUT/hardness.png    the plots as one image
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the page."""
    parser.add_argument("folder", metavar="DIR", help="--out of `python -m dama hardness`")
    parser.add_argument(
        "--image_folder", action="append", metavar="DIR",
        help="image folder, if it moved since the run; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="output folder of the page and the image (default: DIR)")
    parser.add_argument(
        "--corruption_seed", type=int, default=0, metavar="N",
        help="random seed of the second images, as given to the training (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", type=int, default=6, metavar="N", help="number of pairs in each group (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    if args.pairs < 1:
        fail([f"--pairs {args.pairs}: expected 1 or more"])
    from dama.hardness.show import write_hardness_page

    written = write_hardness_page(
        args.folder, args.out or args.folder, args.image_folder, args.pairs, corruption_seed=args.corruption_seed
    )
    log(f"written to {' and '.join(map(str, written))}")
