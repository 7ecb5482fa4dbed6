"""Image files from untrusted sources: folders and paths, accepted formats, size limits, checks, errors.

Every image that this repository reads is opened here.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dama.image_roots import resolve_below, resolved_folders

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


MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: above it a small file can fill the memory
# Padding squares the longer side, and resizing multiplies by the ratio of the sides: both are bounded, as the area is.
MAX_SIDE = int(MAX_PIXELS**0.5)
MAX_RATIO = 200
BOMB = Image.DecompressionBombError
# What Pillow raises for damaged files; SyntaxError is its way of saying "broken PNG".
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, struct.error, BOMB)

ImageFolder = str | Path | Sequence[str | Path]  # where image paths start; links may lead into any of several


class ImageError(ValueError):
    """An image that cannot be used, and why: the same words for the same file, whatever its path or the machine."""


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image file of an accepted format; as with Image.open, its pixels are decoded later.

    Every image that this repository reads is opened here. Raises ImageError for a file that is no image of these
    formats, OSError where it cannot be read.
    """
    try:
        return Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        # Pillow's own message holds the path, or a memory address.
        got = _kind_of(source)
    expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    raise ImageError(f"image is unreadable (UnidentifiedImageError: expected {expected}, got {got})")


def _kind_of(source: str | Path | BinaryIO) -> str:
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            start = file.read(32)
    else:
        source.seek(0, io.SEEK_SET)
        start = source.read(32)
    if not start:
        return "an empty file"
    found = (what for offset, bytes_, what in KNOWN_STARTS if start.lstrip()[offset:].startswith(bytes_))
    return next(found, "another format or a damaged file")


def folders_of(image_folder: ImageFolder) -> list[Path]:
    """The folder, or each of several."""
    return [Path(folder) for folder in ([image_folder] if isinstance(image_folder, str | Path) else image_folder)]


def missing_folders(image_folder: ImageFolder) -> list[Path]:
    """Those of the image folders that are no folders."""
    return [folder for folder in folders_of(image_folder) if not folder.is_dir()]


def plain_folder(image_folder: ImageFolder) -> str | list[str]:
    """The folder as text, or a list of several, for a JSON file."""
    folders = [str(folder) for folder in folders_of(image_folder)]
    return folders[0] if len(folders) == 1 else folders


def resolve_image(folder: ImageFolder, relative: str) -> Path:
    """The image's path, symbolic links followed; it need not exist.

    Of several folders the last that holds the path counts, as a flag given later does; links may lead from one into
    another.

    Raises:
        ValueError: the path leaves the folders. It does where ".." takes it out of the folder that it starts from.
    """
    return _resolve_below(resolved_folders(folders_of(folder)[::-1]), relative)


def _resolve_below(roots: Sequence[Path], relative: str) -> Path:
    """`resolve_image` of resolved folders, of which the first that holds the path counts."""
    if not relative or "\0" in relative:
        raise ValueError(f"image path {relative!r} names no file")
    plain = _is_plain(relative)
    if plain and len(roots) == 1 and _is_inside(path := resolve_below(roots[0], relative), roots):
        return path  # most images, quickly
    if not plain and (PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).is_absolute()):
        raise ValueError(f"image path {relative} is absolute, expected one relative to the image folder")
    climbs = not plain and ".." in PurePosixPath(relative).parts
    paths = [resolve_below(root, relative) for root in roots]
    outside = [p for root, p in zip(roots, paths) if not _is_inside(p, [root] if climbs else roots)]
    found = [p for p in paths if p not in outside and (len(roots) == 1 or p.exists())]
    if outside and not found:
        remedy = "" if climbs else "; to follow this link, add the folder it leads into by a further --image_folder"
        raise ValueError(f"image path {relative} leaves the image folder (it leads to {outside[0]}){remedy}")
    return (found or paths)[0]


def _is_plain(relative: str) -> bool:
    """Whether a path is plainly relative, on POSIX and on Windows, and climbs nowhere; quicker than by pathlib."""
    return relative[0] not in "/\\" and ":" not in relative and ".." not in relative


def _is_inside(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a resolved path is one of the resolved folders or below one."""
    return any(path == folder or str(path).startswith(f"{str(folder).rstrip('/')}/") for folder in folders)


def exceeded_limit(size: tuple[int, int]) -> str | None:
    """The limit that an image of this width and height exceeds, None where it can be padded and resized."""
    short, long = sorted(size)
    limits = [
        (short * long > MAX_PIXELS, f"more than {MAX_PIXELS:,} pixels"),
        (long > MAX_SIDE, f"a side longer than {MAX_SIDE:,} pixels"),
        (long > MAX_RATIO * short, f"one side more than {MAX_RATIO} times the other"),
    ]
    return next((limit for exceeded, limit in limits if exceeded), None)


def validate_size(image: Image.Image, name: str = "image") -> None:
    """Raise ImageError where an image exceeds a limit; its header is enough, nothing is decoded."""
    limit = exceeded_limit(image.size)
    if limit is not None:
        bomb = " (decompression bomb?)" if image.width * image.height > MAX_PIXELS else ""
        raise ImageError(f"{name} has {image.width} x {image.height} pixels, {limit}{bomb}; make it smaller or crop it")


def size_of_image(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header."""
    with open_image(path) as image:
        return image.size


def load_image(path: str | Path) -> Image.Image:
    """The image as RGB. EXIF rotation is not applied and transparency is dropped: LLaVA's models saw images so.

    Raises:
        ImageError: it is too large or too narrow, see `exceeded_limit`.
    """
    with open_image(path) as image:
        validate_size(image, f"image {path}")
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel. 16-bit gray is scaled, where Pillow would clip it to white; 32 bits are refused."""
    if image.mode in ("I", "F"):
        raise ImageError(f"the image has 32 bits a pixel (mode {image.mode}), expected 8 or 16 a channel")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


class ImageFacts(NamedTuple):
    """What decoding an image tells: its size in pixels and Pillow's name of its format."""

    width: int
    height: int
    format: str


def probe_image(source: Path | BinaryIO) -> ImageFacts:
    """Decode all of the image, a JPEG at an eighth of its size: that is quick, and sees a truncated one.

    Raises ImageError saying what is wrong, in words that do not depend on the path or on Pillow's version.
    """
    try:
        with open_image(source) as image:
            facts = ImageFacts(image.width, image.height, image.format or "")
            validate_size(image)
            image.draft(image.mode, (1, 1))
            as_rgb(image)
    except ImageError:
        raise
    except BOMB as error:
        size = f"more than {2 * MAX_PIXELS} pixels"
        raise ImageError(f"image is unreadable (DecompressionBombError: {size}, a decompression bomb?)") from error
    except PermissionError as error:
        raise ImageError("image is unreadable (permission denied)") from error
    except UNREADABLE as error:
        kind = type(error).__name__  # without its message, which may hold a path or a memory address
        raise ImageError(f"image is unreadable ({kind}: image file is truncated or damaged)") from error
    return facts


def _image_error(path: Path) -> str | None:
    """Why the image cannot be used, or None."""
    if not os.path.exists(path):  # a name too long is no error here, as it is for Path.exists
        return "image is missing"
    if not path.is_file():
        return "image is a folder"
    try:
        probe_image(path)
    except ImageError as error:
        return str(error)
    return None


def resolve_images(names: Sequence[str], folder: ImageFolder) -> tuple[dict[str, Path], dict[str, str]]:
    """Paths of the names inside the folder, and why the others lead out of it, both by name."""
    inside: dict[str, Path] = {}
    outside: dict[str, str] = {}
    roots = resolved_folders(folders_of(folder)[::-1])
    for name in names:
        try:
            inside[name] = _resolve_below(roots, name)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError, OSError: a loop of links, a name too long
            outside[name] = str(error)
    return inside, outside


def find_image_errors(
    names: Sequence[str], folder: ImageFolder, workers: int = 4, progress: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Reasons by relative path: (paths outside the folder, missing or unreadable images inside it)."""
    inside, outside = resolve_images(names, folder)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checks = pool.map(_image_error, inside.values())
        bar = tqdm(checks, "checking images", total=len(inside), unit="image", disable=not progress, leave=False)
        bad = {name: error for name, error in zip(inside, bar, strict=True) if error is not None}
    return outside, bad
