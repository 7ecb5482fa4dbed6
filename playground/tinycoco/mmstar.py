"""TinyCOCO edition of MMStar: mmstar.parquet with one question about each scene, its image and four options in it.

Capabilities take turns: the setting (coarse perception), a color (fine-grained perception), how many there are
(instance reasoning), what is farthest left (logical reasoning), a sum (math), how many kinds (science & technology).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from playground.tinycoco.questions import CAPABILITIES, choice_question
from playground.tinycoco.scenes import Scene, draw


def write_mmstar(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write folder/mmstar/mmstar.parquet with the columns of the official file, images as bytes in it."""
    import pyarrow
    import pyarrow.parquet

    rows = [_row(index, scene) for index, scene in enumerate(scenes)]
    path = folder / "mmstar/mmstar.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _row(index: int, scene: Scene) -> dict[str, Any]:
    capability = list(CAPABILITIES)[index % len(CAPABILITIES)]
    question, letter = choice_question(scene, capability, random.Random(f"tinycoco/mmstar/{scene.id}"))
    buffer = BytesIO()
    draw(scene).save(buffer, "JPEG", quality=95, subsampling=0)
    return {
        "index": index,
        "question": question,
        "image": {"bytes": buffer.getvalue(), "path": f"images/{index}.jpg"},
        "answer": letter,
        "category": capability,
        "l2_category": CAPABILITIES[capability],
        "meta_info": {"source": "TinyCOCO", "split": "test", "image_path": f"images/{index}.jpg"},
    }
