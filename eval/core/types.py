"""The one type that every benchmark meets: a model's answer to a prompt about a picture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """`id` is unique in its file; `image_id` is empty where the file names no picture; both are text, never numbers."""

    id: str
    image_id: str
    prompt: str
    text: str
    model_id: str = ""
