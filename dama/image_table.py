"""A table of the images that pairs show: which can be used, and the digests of their bytes, from one opening of each.

The table is kept in a file. A later run opens only the images whose size, time of modification or inode changed, and
of several processes that start together one makes the table while the others wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dama.console import regular_file, write_atomic
from dama.images import ImageError, ImageFolder, folders_of, probe_image, resolve_images
from dama.pairs import PreferencePair, all_images

TABLE_FILE = "image_table.json"
VERSION = 1
# A file that was modified shortly before it was read may be modified again within the resolution of its time.
SETTLED_NS = 2_000_000_000
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems without flock


class ImageEntry(NamedTuple):
    """An image that can be used: what vouches that it has not changed, and the digest of its bytes."""

    size: int
    modified_ns: int
    inode: int
    digest: str  # first 16 hex digits of SHA-256


@dataclass(frozen=True)
class ImageTable:
    """Images by relative path.

    Attributes:
        good: those that can be used. bad: why an image inside the folder cannot be used. outside: why a path leads out
            of the folder.
        finished_ns: when the table was made, nanoseconds since 1970.
        opened: images that were opened for it, the others being unchanged.
    """

    good: dict[str, ImageEntry]
    bad: dict[str, str]
    outside: dict[str, str]
    finished_ns: int
    opened: int = field(default=0, compare=False)

    @property
    def errors(self) -> tuple[dict[str, str], dict[str, str]]:
        """(outside, bad), as `dama.images.find_image_errors` returns them and `check_pairs` takes them."""
        return self.outside, self.bad

    def digests_of(self, pairs: Sequence[PreferencePair]) -> dict[str, str]:
        """Digests of the images of good pairs, as `dama.pairs.image_digests` returns them. Raises KeyError."""
        return {name: self.good[name].digest for name in all_images(pairs)}

    def covers(self, names: Sequence[str]) -> bool:
        """Whether the table has an entry for every name."""
        return all(name in self.good or name in self.bad or name in self.outside for name in names)


def table_of_images(
    names: Sequence[str], folder: ImageFolder, path: Path, workers: int = 4, progress: bool = False
) -> ImageTable:
    """The table of these images, read from or written to the file `path`.

    Processes that call it at the same time for the same file wait for the first of them, as long as that takes, and
    read what it wrote; where the file system has no locks each makes its own table. Without such a wait every image's
    size and times are compared to the file's, and those that changed are opened.

    Args:
        names: distinct relative paths. path: such as TABLE_FILE in the output folder.

    Raises:
        OSError: the file cannot be written.
    """
    called_ns = time.time_ns()
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(path.with_name(f".{path.name}.lock")):
        known = read_table(path, folder)
        if known is not None and known.finished_ns >= called_ns and known.covers(names):
            return known
        table = check_images(names, folder, known, workers, progress)
        write_table(table, folder, path)
    return table


def check_images(
    names: Sequence[str],
    folder: ImageFolder,
    known: ImageTable | None = None,
    workers: int = 4,
    progress: bool = False,
) -> ImageTable:
    """Check every image: one opening gives its digest and whether it can be decoded; none where `known` vouches."""
    inside, outside = resolve_images(names, folder)
    good: dict[str, ImageEntry] = {}
    bad: dict[str, str] = {}
    opened = 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        entries = pool.map(lambda item: _entry_of(item[1], _vouched(item[0], known)), inside.items())
        bar = tqdm(entries, "checking images", total=len(inside), unit="image", disable=not progress, leave=False)
        for name, (entry, was_opened) in zip(inside, bar, strict=True):
            opened += was_opened
            if isinstance(entry, ImageEntry):
                good[name] = entry
            else:
                bad[name] = entry
    return ImageTable(good, bad, outside, time.time_ns(), opened)


def _vouched(name: str, known: ImageTable | None) -> ImageEntry | None:
    """The entry that holds as long as size, time and inode are the same."""
    entry = known.good.get(name) if known else None
    return entry if entry and known and entry.modified_ns < known.finished_ns - SETTLED_NS else None


def _entry_of(path: Path, known: ImageEntry | None) -> tuple[ImageEntry | str, bool]:
    """(entry, or why the image cannot be used; whether it was opened)."""
    if not os.path.exists(path):  # a name too long is no error here, as it is for Path.exists
        return "image is missing", False
    if not path.is_file():
        return "image is a folder", False
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
    if known is not None and known[:3] == stamp:
        return known, False
    try:
        content = path.read_bytes()
        probe_image(io.BytesIO(content))
    except PermissionError:
        return "image is unreadable (permission denied)", True
    except OSError as error:
        return f"image is unreadable ({type(error).__name__}: image file is truncated or damaged)", True
    except ImageError as error:
        return str(error), True
    return ImageEntry(*stamp, hashlib.sha256(content).hexdigest()[:16]), True


# ---------------------------------------------------------------------------------------------------------- the file


def write_table(table: ImageTable, folder: ImageFolder, path: Path) -> None:
    """Write the table as JSON, atomically."""
    content: dict[str, Any] = {
        "version": VERSION,
        "folders": _folders(folder),
        "finished_ns": table.finished_ns,
        "bad": table.bad,
        "outside": table.outside,
        "good": table.good,
    }
    write_atomic(path, json.dumps(content, separators=(",", ":")) + "\n")


def read_table(path: Path, folder: ImageFolder) -> ImageTable | None:
    """The table in a file; None where there is none, or one of another version or of other folders."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION or content["folders"] != _folders(folder):
            return None
        good = {str(name): ImageEntry(*entry) for name, entry in content["good"].items()}
        return ImageTable(good, dict(content["bad"]), dict(content["outside"]), int(content["finished_ns"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # torn or foreign: made anew
        return None


def _folders(folder: ImageFolder) -> list[str]:
    return [str(each.resolve()) for each in folders_of(folder)]


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """A block that one process at a time enters while the others wait; a process that ends releases the lock."""
    with open(lock, "a", opener=regular_file) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
