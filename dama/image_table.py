"""A table of the images that pairs show: which can be used, and the digests of their bytes, from one opening of each.

The table of many images is kept in the user's cache (dama/cache.py). A later run, of any command, opens only the images
whose size, time of modification or inode changed, and of several processes that start together one makes the table
while the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dama.cache import cache_folder, cache_name, lock_of, only_one, save
from dama.console import digest_of, write_atomic
from dama.images import ImageError, ImageFolder, folders_of, probe_image, resolve_images
from dama.pairs import PreferencePair, all_images

VERSION = 1
MANY = 1000  # images from which on a table is kept
# A file that was modified shortly before it was read may be modified again within the resolution of its time.
SETTLED_NS = 2_000_000_000


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

    @property
    def identity(self) -> str:
        """A digest of what a run depends on: the bytes of images that can be used, and what is wrong with others."""
        return digest_of([{name: entry.digest for name, entry in self.good.items()}, self.bad, self.outside])

    def covers(self, names: Sequence[str]) -> bool:
        """Whether the table has an entry for every name."""
        return all(name in self.good or name in self.bad or name in self.outside for name in names)


def table_of_images(names: Sequence[str], folder: ImageFolder, workers: int = 4, progress: bool = False) -> ImageTable:
    """The table of these images, every image checked against the folder now.

    Args:
        names: distinct relative paths. workers: threads that open images. progress: whether to show a bar.
    """
    path = table_path(names, folder)
    if path is None:
        return check_images(names, folder, None, workers, progress)
    return kept_table(names, folder, path, workers, progress)


def table_path(names: Sequence[str], folder: ImageFolder) -> Path | None:
    """Where the table of these images is kept; None for a few images, or where there is no cache."""
    cache = cache_folder() if len(names) >= MANY else None
    return cache and cache / cache_name("images", VERSION, _folders(folder), list(names))


def kept_table(
    names: Sequence[str], folder: ImageFolder, path: Path, workers: int = 4, progress: bool = False
) -> ImageTable:
    """The table of these images, read from and written to the file `path` of the cache.

    Processes that call it at the same time for the same file wait for the first of them, as long as that takes, and
    read what it wrote; where the file system has no locks each makes its own table. Without such a wait every image's
    size and times are compared to the file's, and those that changed are opened.
    """
    called_ns = time.time_ns()
    with only_one(lock_of(path.parent, path.name)):
        known = read_table(path, folder)
        if known is not None and known.finished_ns >= called_ns and known.covers(names):
            return known
        table = check_images(names, folder, known, workers, progress)
        save(table, path, lambda value, place: write_table(value, folder, place))
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
    vouched = {name: _unchanged(name, path, known) for name, path in inside.items()} if known else {}
    good: dict[str, ImageEntry] = {name: entry for name, entry in vouched.items() if entry is not None}
    bad: dict[str, str] = {}
    others = {name: path for name, path in inside.items() if name not in good}
    opened = 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        entries = pool.map(_entry_of, others.values())
        bar = tqdm(entries, "checking images", total=len(others), unit="image", disable=not progress, leave=False)
        for name, (entry, was_opened) in zip(others, bar, strict=True):
            opened += was_opened
            if isinstance(entry, ImageEntry):
                good[name] = entry
            else:
                bad[name] = entry
    return ImageTable(good, bad, outside, time.time_ns(), opened)


def _unchanged(name: str, path: Path, known: ImageTable) -> ImageEntry | None:
    """The entry of an image whose size, time and inode are the same; None where it has to be opened."""
    entry = known.good.get(name)
    if entry is None or entry.modified_ns >= known.finished_ns - SETTLED_NS:
        return None
    try:
        about = os.stat(path)
    except OSError:
        return None
    same = entry[:3] == (about.st_size, about.st_mtime_ns, about.st_ino) and stat.S_ISREG(about.st_mode)
    return entry if same else None


def _entry_of(path: Path) -> tuple[ImageEntry | str, bool]:
    """(entry, or why the image cannot be used; whether it was opened)."""
    if not os.path.exists(path):  # a name too long is no error here, as it is for Path.exists
        return "image is missing", False
    if not path.is_file():
        return "image is a folder", False
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            probe_image(file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except PermissionError:
        return "image is unreadable (permission denied)", True
    except OSError as error:
        return f"image is unreadable ({type(error).__name__}: image file is truncated or damaged)", True
    except ImageError as error:
        return str(error), True
    return ImageEntry(about.st_size, about.st_mtime_ns, about.st_ino, digest), True


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # torn or foreign: made anew
        return None


def _folders(folder: ImageFolder) -> list[str]:
    return [str(each.resolve()) for each in folders_of(folder)]
