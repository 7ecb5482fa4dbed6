"""Rows of supervised fine-tuning: read in the forms in which they are found, checked before a model is loaded.

A row is {"id"?, "image"?, "conversations": [{"from": "human" or "gpt", "value": text}, ...]}, as in LLaVA's files;
a first turn may be from "system".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dama.errors import error_list
from dama.image_table import table_of_images
from dama.images import ImageFolder, missing_folders
from dama.pairs import FILE_REMEDY, PairsError, image_remedies, read_rows
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Template, default_conversation
from llava.records import Row, image_of_record
from llava.train.preprocess import segments_of

TURNS = ("conversations", "messages")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


@dataclass(frozen=True)
class SftRows:
    """Rows with their names in messages, and what was left out on request: (name, reason)."""

    rows: list[Row]
    names: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- reading


def load_rows(data_path: str | Path) -> tuple[list[tuple[str, Row]], list[str]]:
    """[(name, row), ...] of a JSON list or of JSON lines, and an error for each record that is no row.

    A row is named by its id, or by its place in the file.

    Raises:
        PairsError: the file cannot be read as a whole, or has no records.
    """
    rows, errors = [], []
    for place, record in read_rows(data_path):
        try:
            if isinstance(record, ValueError):
                raise record
            row = row_of_record(record)
        except ValueError as error:
            errors.append(f"{name_of(record, place)}: {error}")
        else:
            rows.append((name_of(row, place), row))
    if not rows and not errors:
        raise PairsError(f"{data_path}: no rows in it\nRemedy: expected a JSON list of conversations, or one a line")
    return rows, errors


def name_of(record: Any, place: str) -> str:
    """`row ID`, or the place where a record has no id."""
    id_ = record.get("id") if isinstance(record, dict) else None
    return place if id_ is None else f"row {id_}"


def row_of_record(record: Any) -> Row:
    """A record in LLaVA's form; fields that are null count as missing.

    Also read: `messages` for `conversations`, role and content for from and value, user and assistant for human and
    gpt, a leading system turn or a field `system`, and `images` with one entry for `image`.

    Raises:
        ValueError: naming the turn or the field that is no part of a conversation.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a record with named fields, got {type(record).__name__}")
    replaced = (*TURNS, "image", "images")
    row = {name: value for name, value in record.items() if value is not None and name not in replaced}
    image = image_of_record(record)
    if image is not None:
        row["image"] = image
    turns = turns_of_record(record)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (turns and turns[0]["from"] == "system"):
        turns = [{"from": "system", "value": system}, *turns]
    return row | {"conversations": turns}


def turns_of_record(record: Row) -> list[dict[str, str]]:
    """Turns of a record as {"from", "value"}."""
    turns = next((record[name] for name in TURNS if record.get(name) is not None), None)
    if not isinstance(turns, list):
        found = f"fields {', '.join(sorted(map(str, record))) or 'none'}" if turns is None else type(turns).__name__
        raise ValueError(f"expected conversations, a list of turns with 'from' and 'value', got {found}")
    return [turn_of(number, turn) for number, turn in enumerate(turns, start=1)]


def turn_of(number: int, turn: Any) -> dict[str, str]:
    """Turn `number`, counted from 1, as {"from", "value"}."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number}: expected 'from' and 'value', got {type(turn).__name__}")
    speaker, text = (
        next((turn[name] for name in names if turn.get(name) is not None), None)
        for names in (("from", "role"), ("value", "content"))
    )
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or (role == "system" and number > 1):
        expected = "human or gpt (user, assistant)" if number > 1 else "system, human or gpt (user, assistant)"
        got = "null" if speaker is None else repr(speaker)
        raise ValueError(f"turn {number}: expected 'from' to be {expected}, got {got}")
    if isinstance(text, list):
        text = text_of_parts(number, text)
    if not isinstance(text, str):
        got = "null" if text is None else type(text).__name__
        raise ValueError(f"turn {number}: expected text in 'value', got {got}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"turn {number}: contains an unpaired surrogate code point")
    return {"from": role, "value": text}


def text_of_parts(number: int, parts: list[Any]) -> str:
    """The text of a message in parts; a part of type image stands for an image tag."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = DEFAULT_IMAGE_TOKEN if kind == "image" else part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"turn {number}: expected parts of type text or image, got {str(part)[:60]}")
        texts.append(text)
    return "\n".join(texts)


# -------------------------------------------------------------------------------------------------------------- checks


def checked_rows(
    data_path: str | Path,
    image_folder: ImageFolder,
    on_bad_image: str = "fail",
    *,
    template: Template = default_conversation,
    progress: bool = False,
) -> SftRows:
    """The rows of a file, every image decoded once; no model is needed.

    Rows whose image is missing or unreadable are left out with on_bad_image="skip".

    Raises:
        PairsError: naming every row that is no conversation of the template, whose image tags and images differ in
            number, or whose image cannot be used.
    """
    for folder in missing_folders(image_folder):
        raise PairsError(f"image folder {folder}: no such folder\nRemedy: give the folder the image paths start from")
    named, errors = load_rows(data_path)
    errors += [f"{name}: {error}" for name, row in named for error in row_errors(row, template)]
    shown = [(name, row["image"]) for name, row in named if "image" in row]
    images = list(dict.fromkeys(image for _, image in shown))
    outside, bad = table_of_images(images, image_folder, progress=progress).errors
    blocking = outside if on_bad_image == "skip" else outside | bad
    errors += [f"{name}: image {image}: {blocking[image]}" for name, image in shown if image in blocking]
    if errors:
        remedies = [FILE_REMEDY, *image_remedies(len(bad) if on_bad_image == "fail" else 0, len(images))]
        raise PairsError(error_list(str(data_path), errors, "; ".join(remedies)))
    good = [(name, row) for name, row in named if row.get("image") not in bad]
    skipped = [(name, f"{bad[image]}: {image}") for name, image in shown if image in bad]
    if not good:
        reasons = [f"{name}: {reason}" for name, reason in skipped]
        raise PairsError(error_list(str(data_path), reasons, "no row is left; is this the right image folder?"))
    return SftRows([row for _, row in good], [name for name, _ in good], skipped)


def row_errors(row: Row, template: Template) -> Iterator[str]:
    """Why a row cannot be rendered, or has another number of image tags than of images."""
    tags = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in row["conversations"])
    images = int("image" in row)
    if tags != images:
        yield (
            f"expected one {DEFAULT_IMAGE_TOKEN} for each image, got {tags} in the text and {images} image(s); "
            f"put {DEFAULT_IMAGE_TOKEN} where an image belongs, and only there"
        )
        return
    try:
        segments_of(turns_of_row(row), template)
    except (ValueError, AssertionError) as error:
        yield str(error)


def turns_of_row(row: Row) -> Sequence[tuple[str, str]]:
    """The turns of a row as (who, text)."""
    return [(turn["from"], turn["value"]) for turn in row["conversations"]]
