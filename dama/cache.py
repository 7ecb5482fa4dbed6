"""This user's folder of results that can be computed again: image tables, parsed pairs, token ids, finished calls.

Of several processes that need an entry at the same time one makes it while the others wait. Only what takes long is
kept. A folder that cannot be written, or that others can write to, is not used: then every process computes for itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dama.console import digest_of, digest_of_file, log, regular_file

T = TypeVar("T")
FOLDER_ENVIRONMENT = "DAMA_CACHE_HOME"
MAX_BYTES = 8 << 30  # the entries used least recently go first
LOCKS = 64
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems without flock


def cache_folder() -> Path | None:
    """$DAMA_CACHE_HOME, else $XDG_CACHE_HOME/dama, else ~/.cache/dama; None where it cannot be used safely."""
    named = os.environ.get(FOLDER_ENVIRONMENT)
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dama"
    try:
        (folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return None
    return folder if about.st_uid == os.getuid() and not stat.S_IMODE(about.st_mode) & 0o022 else None


def cache_name(kind: str, *parts: object) -> str:
    """The name of an entry that depends on these JSON values and on nothing else."""
    return f"{kind}-{digest_of(list(parts))}"


def code_digest(*names: str) -> str:
    """A digest of source files, of all of this repository's packages where none is named: part of an entry's name.

    Args:
        names: paths from the folder that holds the packages.
    """
    root = Path(__file__).resolve().parents[1]
    paths = [root / name for name in names] or sorted((*root.glob("dama/**/*.py"), *root.glob("llava/**/*.py")))
    return digest_of([digest_of_file(path) for path in paths])


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """A block that one process at a time enters while the others wait; a process that ends releases the lock."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a", opener=regular_file) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def shared(name: str, make: Callable[[], T], read: Callable[[Path], T | None], write: Callable[[T, Path], None]) -> T:
    """An entry's value: read where it is there, else made and written by one process while the others wait.

    Args:
        name: of `cache_name`. make: computes the value; its errors pass.
        read: the value of a file or folder, None where it is absent or damaged. write: the value to that path.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    with only_one(lock_of(folder, name)):
        path = folder / name
        value = read(path)
        if value is None:
            value = make()
            save(value, path, write)
        else:
            mark_used(path)
    return value


def mark_used(path: Path) -> None:
    """Note the time of use, by which `prune` decides."""
    with suppress(OSError):
        os.utime(path)


def lock_of(folder: Path, name: str) -> Path:
    """The lock file of an entry; a few files are shared by all entries. A block must not lock another entry."""
    return folder / "locks" / str(int(hashlib.sha256(name.encode()).hexdigest(), 16) % LOCKS)


def save(value: T, path: Path, write: Callable[[T, Path], None]) -> bool:
    """Write an entry and remove old ones; whether there was room. A full disk is logged and is no error."""
    try:
        write(value, path)
        prune(path.parent, keep=path)
    except OSError as error:
        log(f"cache: {path} is not kept ({error})")
        return False
    return True


def prune(folder: Path, keep: Path) -> None:
    """Remove the entries used least recently until the others take at most MAX_BYTES."""
    others = [path for path in folder.iterdir() if path.name != "locks" and path != keep]
    found = [(path, about) for path in others if (about := _use_and_size(path)) is not None]
    left = MAX_BYTES - (_use_and_size(keep) or (0, 0))[1]
    for path, (_, size) in sorted(found, key=lambda entry: entry[1][0], reverse=True):
        left -= size
        if left < 0:
            with suppress(FileNotFoundError):  # another process prunes, too
                remove(path)


def _use_and_size(entry: Path) -> tuple[int, int] | None:
    """(when it was used last, in nanoseconds; bytes) of a file or a folder of files; None where it is gone."""
    try:
        files = list(entry.iterdir()) if entry.is_dir() else [entry]
        return entry.stat().st_mtime_ns, sum(path.stat().st_size for path in files)
    except FileNotFoundError:
        return None


def remove(entry: Path) -> None:
    """Remove a file, or a folder with its files; whoever has opened them goes on reading."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
