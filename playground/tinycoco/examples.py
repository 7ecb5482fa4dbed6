"""Example images of the chat page, with the objects that are drawn in them."""

from __future__ import annotations

from pathlib import Path

from dama.console import write_json
from llava.serve.examples import FOLDER, INDEX
from playground.tinycoco.captions import QUESTIONS
from playground.tinycoco.scenes import draw, sample_scene

# Validation scenes in which several things are plain to see.
SCENES = {"Street": 1, "Table": 16, "Beach": 23, "Kitchen": 34}


def write_examples(folder: Path = FOLDER) -> None:
    """Write a small PNG of each scene, and INDEX with its question and objects."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for title, index in SCENES.items():
        scene, file = sample_scene(index, "validation"), f"{title.lower()}.png"
        draw(scene).save(folder / file, optimize=True)
        objects = ", ".join(scene.categories)
        rows.append({"title": title, "file": file, "question": QUESTIONS[0], "objects": objects})
    write_json(folder / INDEX, rows)
