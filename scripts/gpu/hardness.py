"""Images and statements a second of the hardness stage's CLIP on the GPU, without reading of files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import time_of

from dama.hardness.clip import DEFAULT_MODEL, RANDOM, ClipScorer, load_clip
from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report

BATCH = 4 if is_rehearsed() else 64
ROUNDS = 1 if is_rehearsed() else 10
STATEMENT = "A red car is standing next to the wooden table on the left side of picture {}."


def measure(report: Report) -> None:
    """Images and statements per second of CLIP in fp32 and bf16."""
    for precision in ("fp32", "bf16"):
        with report.case(precision) as found, tempfile.TemporaryDirectory() as name:
            scorer = scorer_of(precision, Path(name))
            found["model"] = scorer.identity["model"]
            found["images_per_second"] = images_per_second(scorer)
            found["statements_per_second"] = statements_per_second(scorer)
    report.line = "images/s: " + ", ".join(
        f"{precision} {found.get('images_per_second', 'error')}" for precision, found in report.cases.items()
    )


def scorer_of(precision: str, folder: Path) -> ClipScorer:
    """ViT-L-14-336 with random weights; a tiny one in rehearsals."""
    if not is_rehearsed():
        return load_clip(DEFAULT_MODEL, RANDOM, "cuda", precision)
    from tests.dama.tiny_clip import write_tiny_clip

    return load_clip(str(write_tiny_clip(folder / "clip")), None, "cuda", precision)


def images_per_second(scorer: ClipScorer) -> float:
    """Of batches of pixels in page-locked memory, as the stage's loader gives them."""
    network: Any = scorer.model
    side = network.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    dtype = torch.bfloat16 if scorer.identity["precision"] == "bf16" else torch.float32
    pixels = torch.randn(BATCH, 3, height, width).to(dtype).pin_memory()

    def encode() -> None:
        for _ in range(ROUNDS):
            scorer.encode_pixels(pixels)

    scorer.encode_pixels(pixels)
    return round(BATCH * ROUNDS / time_of(encode, scorer.device).clock, 1)


def statements_per_second(scorer: ClipScorer) -> float:
    """Rate of the text encoder after one warm-up batch."""
    texts = [STATEMENT.format(number) for number in range(BATCH * ROUNDS)]
    scorer.encode_texts(texts[:BATCH])
    return round(len(texts) / time_of(lambda: scorer.encode_texts(texts), scorer.device).clock, 1)
