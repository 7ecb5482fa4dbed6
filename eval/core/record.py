"""The data folder and its downloads.json, the record of files without a published digest."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from dama.errors import error_list
from dama.redact import redacted

DEFAULT_FOLDER = Path("playground/data/eval")
RECORD = "downloads.json"


class DownloadError(ValueError):
    """Everything that is missing or damaged, in one message."""


def data_folder() -> Path:
    """Return the folder that DAMA_BENCH_DATA names, or the default."""
    return Path(os.environ.get("DAMA_BENCH_DATA") or DEFAULT_FOLDER)


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Read downloads.json: path of a file -> its digest and size at the first download. Raises DownloadError."""
    if not path.exists():
        return {}
    remedy = f"delete {path}, which is written anew; files with a published digest are checked against that"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DownloadError(f"{path}: cannot be read ({reason_of(error)})\nRemedy: {remedy}") from error
    if not isinstance(entries, dict):
        raise DownloadError(f"{path}: expected an object of files, got {type(entries).__name__}\nRemedy: {remedy}")
    errors = [
        f"{name}: expected an object with a SHA-256, got {str(entry)[:60]!r}"
        for name, entry in entries.items()
        if not (isinstance(entry, dict) and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))))
    ]
    if errors:
        raise DownloadError(error_list(str(path), errors, remedy))
    return entries


def reason_of(error: Exception) -> str:
    """Return an error's message as one line without secrets, or its type where it has none."""
    return redacted(" ".join(str(error).split())[:300] or type(error).__name__)
