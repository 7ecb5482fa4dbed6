"""TinyCOCO edition of MMStar: mmstar.parquet with one question about each scene, its image and four options in it.

Capabilities take turns: the setting (coarse perception), a color (fine-grained perception), how many there are
(instance reasoning), what is farthest left (logical reasoning), a sum (math), how many kinds (science & technology).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from playground.tinycoco.captions import SETTINGS
from playground.tinycoco.scenes import Scene, draw
from playground.tinycoco.vocabulary import CATEGORIES, COLOURS

LETTERS = "ABCD"
CAPABILITIES = {
    "coarse perception": "image scene and topic",
    "fine-grained perception": "recognition",
    "instance reasoning": "single-instance reasoning",
    "logical reasoning": "common reasoning",
    "math": "numeric commonsense and calculation",
    "science & technology": "biology & chemistry & physics",
}


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
    question, right, others = question_about(scene, capability)
    rng = random.Random(f"tinycoco/mmstar/{scene.id}")
    options = rng.sample([right, *rng.sample(sorted(set(others) - {right}), 3)], 4)
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options))
    buffer = BytesIO()
    draw(scene).save(buffer, "JPEG", quality=95, subsampling=0)
    return {
        "index": index,
        "question": f"{question}\nOptions: {listed}",
        "image": {"bytes": buffer.getvalue(), "path": f"images/{index}.jpg"},
        "answer": LETTERS[options.index(right)],
        "category": capability,
        "l2_category": CAPABILITIES[capability],
        "meta_info": {"source": "TinyCOCO", "split": "test", "image_path": f"images/{index}.jpg"},
    }


def question_about(scene: Scene, capability: str) -> tuple[str, str, Sequence[str]]:
    """Return a question, the right option, and what the others are drawn from."""
    count = Counter(thing.category for thing in scene.objects)
    left, right = (choose(scene.objects, key=lambda thing: thing.centre[0]) for choose in (min, max))
    absent = sorted(set(CATEGORIES) - set(scene.categories))
    numbers = [str(number) for number in range(1, 10)]
    category = scene.categories[0]
    colored = [thing for thing in scene.objects if thing.colour and count[thing.category] == 1]
    if capability == "fine-grained perception" and colored:
        return f"Which color does the {colored[0].category} have?", colored[0].colour, sorted(COLOURS)
    if capability == "instance reasoning":
        return f"How many objects of the kind {category} are drawn?", str(count[category]), numbers
    if capability == "logical reasoning":
        return "What is farthest to the left?", left.category, [*absent, *({right.category} - {left.category})]
    if capability == "math":
        return "How many objects are drawn, and one more?", str(len(scene.objects) + 1), numbers
    if capability == "science & technology":
        return "How many different kinds of objects are drawn?", str(len(scene.categories)), numbers
    return "What is the setting?", scene.context, sorted(SETTINGS)
