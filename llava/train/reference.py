"""The reference stage on LLaVA-1.5: the training's own model set-up, then dama.train.reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dama.pairs import PreferencePair, SkippedPair
from dama.stage import WHOLE, Record, Shard
from dama.train import reference
from llava.train.arguments import Arguments
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model


def run_reference(
    arguments: Arguments,
    pairs: Sequence[PreferencePair],
    skipped: Sequence[SkippedPair],
    out: str | Path,
    batch_size: int,
    *,
    shard: Shard = WHOLE,
    overwrite: bool = False,
    progress: bool = True,
) -> Record | None:
    """Load pi_ref as `model_name_or_path` names it and compute; see dama.train.reference.run_reference."""
    _, data_args, args = arguments
    model, tokenizer, _ = setup_model(arguments, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # from here on each rank works alone, and may end before the others
    family = LlavaFamily.of(arguments, model.to(args.device).eval(), tokenizer)
    return reference.run_reference(
        family, data_args, args, pairs, skipped, out, batch_size, shard=shard, overwrite=overwrite, progress=progress
    )
