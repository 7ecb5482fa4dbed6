"""Question files in LLaVA's format: one JSON object a line, or a JSON list, with question_id, text and image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dama.errors import error_list
from dama.pairs import PairsError, read_rows
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.generation.request import Request
from llava.records import image_of_record

TEXTS = ("text", "prompt", "question")
SHOWN = 80  # characters of a bad row


def read_question_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows, each with question_id, text and, where there is an image, image; other fields are left as they are.

    Also read: a JSON list, a byte order mark, `prompt` or `question` for `text`, `id` for `question_id`, `images` with
    one entry for `image`. Fields that are null count as missing.

    Raises:
        PairsError: naming every line that is no question; or the file is missing, empty or cannot be read.
    """
    if not Path(path).is_file():
        raise PairsError(f"{path}: no such file\nRemedy: give a JSONL file of questions")
    rows, errors = [], []
    for place, record in read_rows(path):
        try:
            if isinstance(record, ValueError):
                raise record
            rows.append(question_of_record(record))
        except ValueError as error:
            where = f":{place.removeprefix('line ')}" if place.startswith("line ") else f", {place}"
            errors.append(f"{path}{where}: {error}")
    if errors:
        raise PairsError(error_list(str(path), errors, "correct or remove these questions"))
    if not rows:
        remedy = "expected one JSON object with question_id and text a line"
        raise PairsError(f"{path}: no questions in it\nRemedy: {remedy}")
    return rows


def question_of_record(record: Any) -> dict[str, Any]:
    """One row. Raises ValueError saying which of its fields is missing or wrong."""
    row = {name: value for name, value in record.items() if value is not None} if isinstance(record, dict) else {}
    text = next((row[name] for name in TEXTS if name in row), None)
    id_ = row.get("question_id", row.get("id"))
    if isinstance(id_, bool) or not isinstance(id_, int | str) or not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected question_id and text, got {json.dumps(record, ensure_ascii=False)[:SHOWN]}")
    if any("\ud800" <= character <= "\udfff" for character in f"{id_}{text}"):
        raise ValueError(f"question {id_!a}: contains an unpaired surrogate code point")
    image = image_of_record(row)
    row.pop("images", None)
    row |= {"question_id": id_, "text": text} | ({} if image is None else {"image": image})
    if DEFAULT_IMAGE_TOKEN in prompt_of_row(row):
        expected = f"one {DEFAULT_IMAGE_TOKEN} at an end of the text" if image is not None else "an image"
        raise ValueError(f"question {id_}: expected {expected}, got {int(image is not None)} with {text[:SHOWN]!r}")
    return row


def prompt_of_row(row: dict[str, Any]) -> str:
    """The text without the tag of its image at either end: the prompt template adds one."""
    text = str(row["text"])
    if "image" not in row:
        return text
    stripped = text.strip()
    if stripped.startswith(DEFAULT_IMAGE_TOKEN):
        return stripped.removeprefix(DEFAULT_IMAGE_TOKEN).lstrip()
    if stripped.endswith(DEFAULT_IMAGE_TOKEN):
        return stripped.removesuffix(DEFAULT_IMAGE_TOKEN).rstrip()
    return text


def read_questions(path: str | Path) -> list[Request]:
    """The requests of a question file, see `llava.generation.questions`. image_id is the image where a row has none."""
    return [
        Request(
            str(row["question_id"]),
            prompt_of_row(row),
            row.get("image"),
            str(row.get("image_id", row.get("image", ""))),
        )
        for row in read_question_rows(path)
    ]
