"""What every command shares: one line to the user, one file to the disk, one digest of content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# Characters that command a terminal (C0 but tab and line feed, DEL, C1), turn the direction of the text around, are not
# shown, or cannot be encoded: in a file's or a server's text they could forge what the screen shows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """Text of unknown origin for the terminal: control characters become escapes such as \\x1b and \\u202e.

    Tab and line feed stay; so do letters, marks and symbols of every language.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def say(message: str = "") -> None:
    """Writes one line to standard output, on the first process of a distributed run only; see `printable`."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(printable(message) + "\n")
        sys.stdout.flush()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a run after a crash, sees the old content or the new and never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
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
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    message = str(error) or type(error).__name__
    if rank:
        message = f"(rank {rank}) {message.splitlines()[0]}"
    sys.stderr.write(printable(f"{program}: error: {message}\n"))
    sys.stderr.flush()
