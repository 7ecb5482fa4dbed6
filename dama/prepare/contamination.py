"""Rows whose image is among the evaluation images, known by the COCO id in the picture's name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

IDS_FILE = Path(__file__).with_name("evaluation_images.json")
PADDED = re.compile(r"(?<!\d)\d{12}(?!\d)")  # 000000339761.jpg, COCO_val2014_000000339761.jpg
BARE = re.compile(r"(?:^|[^0-9A-Za-z])(\d{1,11})$")  # val2014/339761.jpg, coco_339761.png
ON_COCO = re.compile(r"coco|vqa", re.IGNORECASE)
"""A bare number is taken for a COCO id only where path or data set names COCO, or VQAv2 or OKVQA, built on it."""

Benchmarks = Mapping[str, frozenset[int]]
"""Benchmark -> COCO ids of its pictures."""


def evaluation_images() -> Benchmarks:
    """The images of Object HalBench (300) and POPE (500), all of COCO val2014."""
    lists = json.loads(IDS_FILE.read_text(encoding="utf-8"))
    return {benchmark: frozenset(ids) for benchmark, ids in lists.items()}


def coco_ids(name: str, dataset: str = "") -> set[int]:
    """COCO ids in a picture's path, as `COCO_val2014_000000339761.jpg` carries 339761."""
    path = PurePosixPath(name.replace("\\", "/"))
    padded = PADDED.findall(path.name)
    if not padded and ON_COCO.search(f"{name} {dataset}"):
        padded = BARE.findall(path.stem)
    return {int(number) for number in padded}


def contamination(names: Iterable[str], dataset: str, benchmarks: Benchmarks) -> str | None:
    """`COCO image 339761 is in Object HalBench` where a name leads to an evaluation image, else None."""
    for number in sorted({number for name in names for number in coco_ids(name, dataset)}):
        found = [benchmark for benchmark, ids in benchmarks.items() if number in ids]
        if found:
            return f"COCO image {number} is in {' and '.join(found)}"
    return None
