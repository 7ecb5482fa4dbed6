"""A conversation for the clipboard and for a file, as plain text and as JSON; and the scripts that take it there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# Both run in the browser, with what `as_json` returns. Without https or a local address a page has no clipboard: there
# a field is selected and copied.
COPY = """async (conversation) => {
    const { text } = JSON.parse(conversation);
    try {
        await navigator.clipboard.writeText(text);
    } catch {
        const field = document.createElement("textarea");
        field.value = text;
        document.body.append(field);
        field.select();
        document.execCommand("copy");
        field.remove();
    }
    const button = document.getElementById("copy");
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
}"""
DOWNLOAD = """(conversation) => {
    const text = JSON.stringify(JSON.parse(conversation).record, null, 2) + "\\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def as_json(image: str, objects: str, models: Sequence[str], turns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A conversation as JSON: `text` for people, `record` for programs.

    Args:
        image: name of the image's file, empty without an image.
        objects: the objects in the image, as the user lists them.
        models: names of the models.
        turns: each question with one answer from each model.
    """
    record: dict[str, Any] = {
        "image": image,
        "objects": objects,
        "turns": [
            {"question": question, "answers": [{"model": m, "answer": a} for m, a in zip(models, answers)]}
            for question, answers in turns
        ],
    }
    return json.dumps({"text": as_text(record), "record": record})


def as_text(record: dict[str, Any]) -> str:
    """Paragraphs: the image, then every question with its answers."""
    parts = [f"{name.capitalize()}: {record[name]}" for name in ("image", "objects") if record[name]]
    for turn in record["turns"]:
        parts.append(f"User: {turn['question']}")
        parts.extend(f"{answer['model']}: {answer['answer']}" for answer in turn["answers"])
    return "\n\n".join(parts) + "\n"
