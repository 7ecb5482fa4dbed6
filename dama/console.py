"""What every command shares: lines to the user, files on the disk, digests of content, the end by Ctrl-C."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

MIB = 2**20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # exit status of a command that was ended by Ctrl-C
USER_ERROR = 2  # exit status after a wrong flag, file or value
OWN = ("dama", "llava", "eval", "playground", "scripts", "tools", "tests")  # folders whose errors need no traceback

# Characters that command a terminal (C0 but tab and line feed, DEL, C1), turn the direction of the text around, are not
# shown, or cannot be encoded: in a file's or a server's text they could forge what the screen shows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Make text of unknown origin safe for the terminal: control characters become escapes such as \x1b and \u202e.

    Tab and line feed stay; so do letters, marks and symbols of every language.
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class _ConsoleHandler(logging.Handler):
    """Write records as plain lines to standard output, on the first process of a distributed run only."""

    def emit(self, record: logging.LogRecord) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stdout.write(record.getMessage() + "\n")
            sys.stdout.flush()


_LOGGER = logging.getLogger("dama")
_LOGGER.setLevel(logging.INFO)
_LOGGER.propagate = False  # libraries configure the root logger
_LOGGER.addHandler(_ConsoleHandler())


def log(message: str = "") -> None:
    """Log one line to standard output through the logger "dama", on rank 0 only; see `printable`."""
    _LOGGER.info("%s", printable(message))  # escaped for every handler that somebody adds


class DiskFullError(OSError):
    """A file that could not be written for lack of room: its path, the space needed and the space free."""


@contextmanager
def writing(path: str | Path, size: int, *foreign: type[Exception]) -> Iterator[None]:
    """Give a write that fails for lack of room the path and the sizes, which the system's error does not have.

    Args:
        path: the file, or the folder of several.
        size: bytes about to be written, at least.
        *foreign: errors other than OSError by which a library reports that a write failed.

    Raises:
        DiskFullError: the disk, the quota or the limit on a file's size is exhausted. Other errors pass.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *foreign)
    try:
        yield
    except kinds as error:
        if isinstance(error, DiskFullError) or not _lacks_room(error):
            raise
        parent = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        free = shutil.disk_usage(parent).free / MIB
        raise DiskFullError(
            f"{path}: cannot be written, {size / MIB:.1f} MiB are needed and {free:.1f} MiB are free on its disk "
            f"({error}); make room, or raise the quota, and run the same command to continue"
        ) from error


def _lacks_room(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    return any(f"os error {number}" in str(error) for number in NO_ROOM) or "file write failed" in str(error)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a run after a crash, sees the old content or the new and never a part.

    The file gets the rights that the umask leaves. A symbolic link at `path` is replaced, not followed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_file(path, len(data)) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path, size: int) -> Iterator[BinaryIO]:
    """A file to write piece by piece that takes the place of `path` at the end of the block, as in `write_atomic`.

    Args:
        size: bytes about to be written, for the error on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path, size), temporary.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink()
            raise


class UnsafeFileError(ValueError):
    """A file that this program appends to is a symbolic link or no regular file."""


def regular_file(path: str, flags: int) -> int:
    """An `opener` for `open`: never follows a symbolic link in the file's own name, and takes regular files only.

    A folder of results may come from somebody else, with a link in it to a file of the user's. Links among the parent
    folders are followed. Raises UnsafeFileError.
    """
    try:
        # O_NONBLOCK because opening a pipe would otherwise wait for its other end.
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _unsafe(path, "a symbolic link" if error.errno == errno.ELOOP else "not a regular file") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _unsafe(path, "not a regular file")
    return handle


def _unsafe(path: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(f"{path}: expected a regular file to append to, got {what}\nRemedy: remove it")


def open_fresh(path: str | Path) -> BinaryIO:
    """Open a new, empty file for writing; a file or a symbolic link of that name is removed first, never followed."""
    path = Path(path)
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented by two spaces."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digest_of(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def digest_of_file(path: str | Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def report_error(error: BaseException, program: str) -> None:
    """Say on standard error what went wrong; with a traceback where it was not this repository that said it.

    Ranks of a distributed run mostly fail alike: rank 0 says all, the others their number and the first line.
    """
    rank = int(os.environ.get("RANK", "0"))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not _is_own(Path(frame.filename).resolve()):
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    message = str(error) or type(error).__name__
    if rank:
        message = f"(rank {rank}) {message.splitlines()[0]}"
    sys.stderr.write(printable(f"{program}: error: {message}\n"))
    sys.stderr.flush()


def _is_own(source: Path) -> bool:
    """Whether a file is of this repository's packages, in a checkout or where a wheel installed them."""
    here = Path(__file__).resolve().parents[1]
    return source.is_relative_to(here) and source.relative_to(here).parts[0] in OWN


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process with one line and the exit code 130, where nothing handles it before.

    For commands to call before their long imports, during which people press Ctrl-C too.
    """
    sys.excepthook = _report_uncaught


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait for threads
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write("\ninterrupted; run the same command to continue\n")
    raise SystemExit(INTERRUPTED)
