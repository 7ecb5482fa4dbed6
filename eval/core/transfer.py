"""Files from untrusted sources: one over HTTP, continued where it broke off and checked; or out of an archive.

A server may send neither more bytes than a file has, nor at a pace that never ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import stat
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Timer
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener

from dama.console import DiskFullError, regular_file, write_atomic, writing

ATTEMPTS = 3  # in a row that bring no byte
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 0.25  # seconds after an attempt, doubled with each
LARGEST_MEMBER = 1 << 29  # bytes of a file in an archive
LARGEST_FILE = 1 << 31  # bytes of a download whose size is not known
PATIENCE = 60.0  # seconds before the pace counts, and until a reply's headers are there
LEAST_PACE = 1000.0  # bytes a second, over all attempts
_BLOCK = 1 << 18
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_BROKEN = (OSError, http.client.HTTPException)

Report = Callable[[int, int | None], Any]
"""(bytes that came, bytes that are still expected or None where the server does not say)."""


class TransferError(OSError):
    """What is wrong, without the file's name."""


class RefusedError(TransferError):
    """What another attempt cannot mend: too many bytes, or too slow."""


@dataclass(frozen=True)
class Received:
    """revision: the commit that a hub names for the file, or ""."""

    sha256: str
    size: int
    revision: str


def download(
    url: str,
    target: Path,
    sha256: str | None = None,
    *,
    size: int | None = None,
    check: Callable[[Path], Any] | None = None,
    report: Report = lambda new, left: None,
) -> Received:
    """Download `url` to `target`, which appears when it is complete and right and not before.

    What arrived before a cut is stored in TARGET.part and continued, in this run or a later one, provided that the file
    at its source is still the same. size: bytes that it may have, LARGEST_FILE if None; more are not read. check:
    raises where the content is of no use. Raises TransferError.
    """
    if not url.startswith(("http://", "https://")):
        raise TransferError(f"no http or https address: {url!r}")
    part = target.with_name(target.name + ".part")
    if part.is_symlink():  # not ours: what it leads to must be neither continued nor overwritten
        _forget(part)
    largest = LARGEST_FILE if size is None else size
    revision = _until_whole(url, part, sha256 is not None, largest, report)
    found = digest(part)
    try:
        if sha256 not in (None, found):
            raise TransferError(f"expected SHA-256 {sha256}, got {found}")
        if check is not None:
            check(part)
    except Exception:
        _forget(part)
        raise
    os.replace(part, target)
    _validator(part).unlink(missing_ok=True)
    return Received(found, target.stat().st_size, revision)


def digest(path: Path) -> str:
    """SHA-256 in hex, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Limits:
    """What a download may take: `largest` bytes in all, and a pace, which is measured over all attempts."""

    def __init__(self, largest: int, held: int) -> None:
        self.largest, self._held, self._started = largest, held, time.monotonic()
        self.exceeded = False

    def check(self, size: int) -> None:
        """Raises RefusedError. size: bytes that are there now."""
        if size > self.largest:
            self.exceeded = True
            raise RefusedError(f"expected at most {self.largest} bytes, got more")
        seconds = time.monotonic() - self._started
        if seconds > PATIENCE and max(0, size - self._held) < LEAST_PACE * (seconds - PATIENCE):
            came = f"{size - self._held} in {seconds:.0f} seconds"
            raise RefusedError(f"slower than {LEAST_PACE:g} bytes a second: {came}")


def _until_whole(url: str, part: Path, pinned: bool, largest: int, report: Report) -> str:
    """Tries until all is there; gives up after ATTEMPTS in a row without a new byte. Returns the revision."""
    idle, limits = 0, _Limits(largest, _size(part))
    while True:
        before = _size(part)
        try:
            limits.check(min(before, largest))
            return _continue(url, part, pinned, limits, report)
        except RefusedError as error:
            if limits.exceeded:  # what came is no part of the file
                _forget(part)
            raise error
        except HTTPError as error:
            if error.code == 416:  # what we hold is no beginning of it
                _forget(part)
            elif error.code not in _AGAIN:
                raise TransferError(f"HTTP status {error.code} {error.reason}") from error
            reason: Exception = error
        except DiskFullError:  # trying again makes no room
            raise
        except _BROKEN as error:
            reason = error
        idle = 0 if _size(part) > before else idle + 1
        if idle == ATTEMPTS:
            raise TransferError(f"{type(reason).__name__}: {reason}") from reason
        time.sleep(PAUSE * 2**idle)


def _continue(url: str, part: Path, pinned: bool, limits: _Limits, report: Report) -> str:
    """One request for what is missing. Raises where the connection ends too early."""
    held, validator = _size(part), _validator(part)
    headers = {"User-Agent": "dama-mllm"}
    if held and (validator.is_file() or pinned):
        headers["Range"] = f"bytes={held}-"
        if validator.is_file():
            headers["If-Range"] = validator.read_text()
    with _open(Request(url, headers=headers)) as reply:
        if reply.status != 206 or not reply.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            if reply.status == 206:
                _forget(part)
                raise TransferError(f"asked for bytes from {held}, got {reply.headers.get('Content-Range')}")
            held = 0
            part.parent.mkdir(parents=True, exist_ok=True)
            _remember_validator(validator, reply.headers)
        left = reply.length
        limits.check(held + (left or 0) if held + (left or 0) > limits.largest else held)
        with writing(part, left or 0), open(part, "ab" if held else "wb", opener=regular_file) as file:
            report(0, left)
            while block := reply.read1(_BLOCK):  # what is there: a whole block may take for ever
                limits.check(file.tell() + len(block))
                file.write(block)
                report(len(block), None)
        if left is not None and _size(part) < held + left:
            raise TransferError(f"the connection ended after {_size(part)} of {held + left} bytes")
        return reply.headers.get("X-Repo-Commit", "")


def _open(request: Request) -> Any:
    """The reply once its headers are there, for which a server has PATIENCE, however many bytes it sends meanwhile."""
    sockets: list[socket.socket] = []

    def handler(base: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Connection(base):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        return Connection

    class Plain(HTTPHandler):
        def http_open(self, req: Request) -> Any:
            return self.do_open(handler(http.client.HTTPConnection), req)

    class Secure(HTTPSHandler):
        def https_open(self, req: Request) -> Any:
            return self.do_open(handler(http.client.HTTPSConnection), req)

    timer = Timer(PATIENCE, _shut, [sockets])
    timer.daemon = True
    timer.start()
    try:
        return build_opener(Plain, Secure).open(request, timeout=TIMEOUT)
    finally:
        timer.cancel()


def _shut(sockets: Sequence[socket.socket]) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):  # closed already
            each.shutdown(socket.SHUT_RDWR)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _validator(part: Path) -> Path:
    """Return the file that stores the ETag or date of a download, which distinguish its versions."""
    return part.with_name(part.name + ".version")


def _remember_validator(path: Path, headers: Any) -> None:
    etag = headers.get("ETag", "")
    value = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    path.unlink(missing_ok=True)
    if value:
        write_atomic(path, value)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def members(archive: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a zip archive whose paths end with these names, in whatever folder they are.

    A name may have folders of its own, as in "VD/map/0_0.png". Raises TransferError, before anything is read, where the
    archive is damaged, or has a path that leaves a folder, a link, or two files of one of the names.
    """
    wanted_names = frozenset(names)
    try:
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
            wanted = [(name, info) for info in infos if (name := _name_in(info.filename, wanted_names)) is not None]
            _refuse_members(infos, wanted)
            for name, info in wanted:
                yield name, file.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise TransferError(f"{archive.name} is no zip archive that can be read ({error})") from error


def _name_in(path: str, names: Collection[str]) -> str | None:
    """Return the name that the path ends with, the longest of several."""
    parts = PurePosixPath(path).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in names), None)


def _refuse_members(infos: Collection[zipfile.ZipInfo], wanted: Sequence[tuple[str, zipfile.ZipInfo]]) -> None:
    for info in infos:
        path = PurePosixPath(info.filename)
        windows = PureWindowsPath(info.filename)
        if path.is_absolute() or windows.drive or windows.root or ".." in (*path.parts, *windows.parts):
            raise TransferError(f"its member {info.filename!r} leaves the folder; nothing was taken out")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise TransferError(f"its member {info.filename!r} is a link; nothing was taken out")
    times = Counter(name for name, _ in wanted)
    twice = sorted(name for name, count in times.items() if count > 1)
    if twice:
        raise TransferError(f"it has two files named {twice[0]!r}; nothing was taken out")
    large = [info.filename for _, info in wanted if info.file_size > LARGEST_MEMBER]
    if large:
        raise TransferError(f"its member {large[0]!r} has more than {LARGEST_MEMBER} bytes; nothing was taken out")
