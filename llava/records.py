"""Fields of LLaVA's records: conversations to train on and questions to answer."""

from __future__ import annotations

import re
from typing import Any

Row = dict[str, Any]
# Fields of other software that hold what a row shows.
MEDIA = re.compile(r"(?:image|img|picture|photo|video|audio)s?(?:_?(?:path|file|filename|url)s?)?", re.IGNORECASE)


def image_of_record(record: Row) -> str | None:
    """The path in `image`, or in `images`, where one entry is expected; None for a row without an image.

    Raises:
        ValueError: several images, no path, or what the row shows is in a field of another name.
    """
    named = {name: record[name] for name in ("image", "images") if record.get(name) not in (None, [])}
    paths = []
    for name, value in named.items():
        entries = value if isinstance(value, list) else [value]
        if len(entries) != 1:
            raise ValueError(f"field {name}: expected one image, got {len(entries)}; several images are not supported")
        entry = entries[0]
        path = entry.get("path") if isinstance(entry, dict) and entry.get("bytes") is None else entry
        if not isinstance(path, str):
            raise ValueError(f"field {name}: expected a path relative to the image folder, got {type(entry).__name__}")
        paths.append(path)
    if len(set(paths)) > 1:
        raise ValueError(f"fields image and images: expected the same path, got {paths[0]!r} and {paths[1]!r}")
    media = sorted(name for name, value in record.items() if MEDIA.fullmatch(str(name)) and value not in (None, "", []))
    if media and not paths:
        raise ValueError(f"field {media[0]}: expected what the row shows in 'image', one path; rename or remove it")
    return paths[0] if paths else None
