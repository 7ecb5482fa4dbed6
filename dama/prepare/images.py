"""Pictures taken out of rows and folders: each distinct one checked and written once, named by its bytes' SHA-256."""

from __future__ import annotations

import errno
import hashlib
import io
import re
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from dama.console import write_atomic
from dama.images import ImageError, probe_image, resolve_image
from dama.styles import NamedRow

ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
"""Endings of stored images, by Pillow's name of each accepted format."""
MPO = "MPO"  # what Pillow calls a JPEG with further ones behind it, as some cameras write
MAX_BYTES = 64 << 20  # of one image file
OWN_FILE = re.compile(r"\.?[0-9a-f]{64}\.[a-z]+(?:\..+)?")  # a stored image, or what a kill left of one


class RowImage(NamedTuple):
    """What a row says about its image: the bytes where they are inside it, and every name it gives."""

    data: bytes | None
    names: tuple[str, ...]


class StoredImage(NamedTuple):
    """A image in the folder of images; `name` is its path from there."""

    name: str
    width: int
    height: int
    bytes: int


def images_of_row(row: dict[str, Any]) -> tuple[RowImage, ...]:
    """Of a row under our names: one image under `image` and `image_path`, or those in `images`.

    Raises:
        ValueError: an image is something else than a path, bytes, or both.
    """
    if isinstance(row.get("images"), list):
        return tuple(_image(row, "images", image, None) for image in row["images"])
    return (_image(row, "image", row.get("image"), row.get("image_path")),)


def second_image_of_row(row: dict[str, Any]) -> tuple[RowImage, ...]:
    """The image in `rejected_images`, or none. Raises ValueError as `images_of_row` does, and for several images."""
    value = row.get("rejected_images")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > 1:
        raise ValueError(f"field rejected_images: expected one image, or a list of one, got {len(values)}")
    return tuple(_image(row, "rejected_images", image, None) for image in values)


def _image(row: dict[str, Any], name: str, image: Any, path: Any) -> RowImage:
    """RLAIF-V's {bytes, path}, or bytes or a path alone."""
    data = None
    if isinstance(image, dict):
        data, image = image.get("bytes"), image.get("path")
    elif isinstance(image, bytes):
        data, image = image, None
    names = [each for each in (path, image) if each is not None]
    wrong = next((value for value in names if not isinstance(value, str)), None)
    if wrong is not None or not isinstance(data, bytes | None):
        got = type(wrong if wrong is not None else data).__name__
        field = row.name(name) if isinstance(row, NamedRow) else name
        raise ValueError(f"field {field}: expected a path, bytes, or both as {{bytes, path}}, got {got}")
    return RowImage(data, tuple(dict.fromkeys(names)))


def image_bytes(image: RowImage, folder: Path) -> bytes:
    """The picture's bytes, from the row or from the first of its names. Raises ImageError saying why not."""
    if image.data is not None:
        return image.data
    if not image.names:
        raise ImageError("the row has no picture")
    name = image.names[0]
    try:
        path = resolve_image(folder, name)
        if not path.exists():
            raise ImageError(f"image is missing: {name}")
        if not path.is_file():
            raise ImageError(f"image is no regular file: {name}")
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"image has {path.stat().st_size} bytes, more than {MAX_BYTES}: {name}")
        return path.read_bytes()
    except ImageError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise ImageError(_path_error(error, name)) from error


def _path_error(error: Exception, name: str) -> str:
    """Why a path cannot be read, without absolute paths: the list of rows left out must not depend on the folder."""
    if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
        return f"image path is a loop of symbolic links: {name}"
    if isinstance(error, OSError):
        known = {errno.ENAMETOOLONG: "image path is too long", errno.EACCES: "image cannot be read (permission denied)"}
        return f"{known.get(error.errno or 0, 'image cannot be read')}: {name}"
    return re.sub(r" \(it leads to .*$", "", str(error), flags=re.DOTALL)


class ImageStore:
    """The folder of images, images/ab/ab12....jpg. Threads may add at once: the same bytes make the same file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, StoredImage | str] = {}  # by digest; a text says what is wrong

    def add(self, data: bytes, digest: str) -> StoredImage:
        """Check and write the image with these bytes and their SHA-256. Raises ImageError saying what is wrong."""
        if digest not in self._known:
            try:
                self._known[digest] = self._store(data, digest)
            except ImageError as error:
                self._known[digest] = str(error)
        known = self._known[digest]
        if isinstance(known, str):
            raise ImageError(known)
        return known

    def _store(self, data: bytes, digest: str) -> StoredImage:
        if not data:
            raise ImageError("image is empty (0 bytes)")
        if len(data) > MAX_BYTES:
            raise ImageError(f"image has {len(data)} bytes, more than {MAX_BYTES}")
        facts = probe_image(io.BytesIO(data))
        ending = ENDINGS["JPEG" if facts.format == MPO else facts.format]
        name = f"{digest[:2]}/{digest}.{ending}"
        path = self.folder / name
        if not path.exists() or path.stat().st_size != len(data):
            write_atomic(path, data)
        return StoredImage(name, facts.width, facts.height, len(data))

    def remove_unused(self, used: Container[str]) -> int:
        """Delete images stored here that no pair shows, and what a kill left of some; how many there were."""
        own = [path for path in self.folder.glob("[0-9a-f][0-9a-f]/*") if OWN_FILE.fullmatch(path.name)]
        unused = [path for path in own if path.relative_to(self.folder).as_posix() not in used]
        for path in unused:
            path.unlink()
        return len(unused)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes as hex digits."""
    return hashlib.sha256(data).hexdigest()
