"""Example images of the chat page: scenes of TinyCOCO, written by `python -m playground.tinycoco examples`."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("example_images")
INDEX = "examples.json"


@dataclass(frozen=True)
class Example:
    """An image to click on, with a question about it.

    title: what its button says. file: its name in the folder. objects: what it shows, separated by commas.
    """

    title: str
    file: str
    question: str
    objects: str

    def content(self) -> bytes:
        """The bytes of the image's file."""
        return (FOLDER / self.file).read_bytes()

    def address(self) -> str:
        """A data URL, so that a page can show the image without a file that its server would have to hand out."""
        return f"data:image/png;base64,{b64encode(self.content()).decode('ascii')}"


def read_examples() -> list[Example]:
    """The examples that come with this package."""
    return [Example(**row) for row in json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))]


def style_of(examples: list[Example]) -> str:
    """CSS that shows each image on the button `example-NUMBER`."""
    return "".join(
        f'#example-{i} {{ background-image: url("{e.address()}") !important; }}\n' for i, e in enumerate(examples)
    )
