"""What every command shares: one line to the user, one file to the disk, one digest of content."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import traceback
from pathlib import Path
from typing import Any


def say(message: str = "") -> None:
    """Writes one line to standard output, on the first process of a distributed run only."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a run after a crash, sees the old content or the new and never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, as any new file
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest_of(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def digest_of_file(path: str | Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def report_error(error: BaseException, program: str) -> None:
    """Says on standard error what went wrong; with a traceback where it was not this repository that said it.

    Ranks of a distributed run mostly fail alike: rank 0 says all, the others their number and the first line.
    """
    rank = int(os.environ.get("RANK", "0"))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(__file__).resolve().parents[1]
    own = Path(frame.filename).resolve().is_relative_to(here) and "site-packages" not in frame.filename
    if not own:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    if rank:
        message = f"(rank {rank}) {message.splitlines()[0]}"
    sys.stderr.write(f"{program}: error: {message}\n")
    sys.stderr.flush()
