"""`python -m dama merge`: joins the shards of a stage."""

from __future__ import annotations

import argparse
import importlib

from dama.flags import fail
from dama.stage import merge_shards, stage_of

DESCRIPTION = """\
Merges the shards of a stage into the bytes of an undivided run. The last shard to finish does this by itself; the
command is for shards that were copied together from several disks. Gaps, overlaps and shards of other inputs are
refused by name.
"""
SUMMARIZED_BY = {  # stage -> module whose `summarize` makes its summary
    "hardness": "dama.hardness.score",
    "reference": "dama.train.reference",
    "answers": "llava.generation.answers",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's only argument."""
    parser.add_argument("folder", metavar="DIR", help="--out of the stage, with shards/ in it")


def run(args: argparse.Namespace) -> None:
    """Merge the shards with the summary of their stage."""
    name = stage_of(args.folder)
    if name not in SUMMARIZED_BY:
        fail([f"{args.folder} holds the stage {name}, expected one of {', '.join(SUMMARIZED_BY)}"])
    merge_shards(args.folder, name, importlib.import_module(SUMMARIZED_BY[name]).summarize)
