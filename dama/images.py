"""Opening image files from untrusted sources: one list of accepted formats, and errors in this program's own words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
"""Formats that are accepted, by Pillow's names. Some others start foreign programs (EPS runs Ghostscript)."""
KNOWN_STARTS = (
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the image; run `git lfs pull`"),
    (0, b"%!PS", "PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript"),
    (0, b"%PDF", "PDF"),
    (4, b"ftyp", "HEIC, AVIF or a video"),
    (0, b"<", "HTML, SVG or other XML"),
    (0, b"{", "JSON"),
)
"""(offset, bytes, what such a file is), to say more than that it is no image."""


class ImageFault(ValueError):
    """An image that cannot be used, and why: the same words for the same file, whatever its path or the machine."""


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image file of an accepted format; as with Image.open, its pixels are decoded later.

    Every image that this repository reads is opened here. Raises ImageFault for a file that is no image of these
    formats, OSError where it cannot be read.
    """
    try:
        return Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        # Pillow's own message holds the path, or a memory address.
        got = _kind_of(source)
    expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    raise ImageFault(f"image is unreadable (UnidentifiedImageError: expected {expected}, got {got})")


def _kind_of(source: str | Path | BinaryIO) -> str:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            start = file.read(32)
    else:
        source.seek(0, io.SEEK_SET)
        start = source.read(32)
    if not start:
        return "an empty file"
    found = (what for offset, bytes_, what in KNOWN_STARTS if start.lstrip()[offset:].startswith(bytes_))
    return next(found, "another format or a damaged file")
