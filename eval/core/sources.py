"""Where a benchmark's official files come from: revisions, digests, checks of the content, and COCO's files."""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from eval.core.transfer import members


@dataclass(frozen=True)
class File:
    """One file of the data folder and its source.

    sha256, size (bytes): None where nobody has published them. instead: another file that serves as well. package: the
    file that it is made from, by `make`: (package, data folder) -> content. by_hand: what a person does where no direct
    link leads to it. judge_only: whether rules do without it. check: for a file without a published digest; raises
    ValueError where the content is not as expected.
    """

    path: str
    url: str = ""
    sha256: str | None = None
    size: int | None = None
    instead: str = ""
    package: File | None = None
    make: Callable[[Path, Path], bytes] | None = None
    by_hand: str = ""
    judge_only: bool = False
    check: Callable[[Path], None] | None = None

    @property
    def source(self) -> str:
        """Where the file comes from, in words."""
        if self.package is not None:
            return f"made from {self.package.path}, {self.package.source}"
        return self.by_hand or f"from {self.url}"


@dataclass(frozen=True)
class ImageSource:
    """A benchmark's images: their folder, and a function from the data folder to name -> URL ("" for no URL).

    source: where each comes from, in words. package: a file that contains them, which `take` unpacks: (package, names)
    -> (name, content). url_of: name -> URL of an image beyond these that may be asked for.
    """

    folder: str
    urls: Callable[[Path], dict[str, str]]
    source: str
    package: File | None = None
    take: Callable[[Path, Collection[str]], Iterator[tuple[str, bytes]]] = members
    url_of: Callable[[str], str] | None = None


# ---------------------------------------------------------------------------------------------------------- content
# A login page, a quota notice or an error in JSON may come with status 200 in place of a file.


def rows_with(*names: str) -> Callable[[Path], None]:
    """Return a check for JSON objects, one per line, that all have these fields."""

    def check(path: Path) -> None:
        expected = f"expected lines of objects with {', '.join(names)}"
        empty = True
        with open(path, encoding="utf-8") as file:
            for line in filter(str.strip, file):
                row, empty = _object(line), False
                if not all(name in row for name in names):
                    raise ValueError(f"{expected}, got {line[:60]!r}")
        if empty:
            raise ValueError(f"{expected}, got an empty file")

    return check


def questions_with(*names: str) -> Callable[[Path], None]:
    """Return a check for a JSON object of objects that all have these fields."""

    def check(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        rows = _object(text)
        if not rows or not all(isinstance(row, dict) and row.keys() >= set(names) for row in rows.values()):
            raise ValueError(f"expected an object of questions with {', '.join(names)}, got {text[:60]!r}")

    return check


def archive_with(*names: str) -> Callable[[Path], None]:
    """Return a check for a zip archive that contains files of these names, in any folder."""

    def check(path: Path) -> None:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                raise ValueError(f"expected a zip archive, got {file.read(60)!r}")
        with zipfile.ZipFile(path) as archive:
            held = {PurePosixPath(name).name for name in archive.namelist()}
        if missing := sorted(set(names) - held):
            raise ValueError(f"expected a zip archive with {', '.join(missing)}, got one of {len(held)} other files")

    return check


def is_script(path: Path) -> None:
    """Check for a Python script. Raises ValueError for other text, and for a lone value such as an error in JSON."""
    text = path.read_text(encoding="utf-8")
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a Python script, got {text[:60]!r}") from error
    if all(isinstance(statement, ast.Expr) for statement in body):
        raise ValueError(f"expected a Python script, got {text[:60]!r}")


def _object(text: str) -> dict[str, Any]:
    """Parse a JSON object; ValueError for other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got {text[:60]!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text[:60]!r}")
    return value


def files_of(folder: str, source: str, known: Mapping[str, tuple[int, str]]) -> tuple[File, ...]:
    """Return files that a repository has in a folder of the same layout. known: name -> (bytes, SHA-256)."""
    return tuple(File(f"{folder}/{name}", f"{source}/{name}", digest, size) for name, (size, digest) in known.items())


# -------------------------------------------------------------------------------------------------------- COCO 2014

GITHUB_RAW = "https://raw.githubusercontent.com"
COCO = "http://images.cocodataset.org"
COCO_FOLDER = "coco/val2014"
COCO_NAME = "COCO_val2014_{:012d}.jpg"
COCO_SOURCE = f"each from {COCO}/val2014/NAME"
INSTANCES, CAPTIONS = "instances_val2014.json", "captions_val2014.json"
COCO_ANNOTATIONS = File(
    "coco/annotations_trainval2014.zip",
    f"{COCO}/annotations/annotations_trainval2014.zip",
    check=archive_with(INSTANCES, CAPTIONS),
)


def coco_urls(names: Iterable[str]) -> dict[str, str]:
    """Map file names of COCO's val2014 images to their URLs."""
    return {name: f"{COCO}/val2014/{name}" for name in names}
