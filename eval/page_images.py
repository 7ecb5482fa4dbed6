"""A page's images: scaled down until all of them together fit the size of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from dama.images import UNREADABLE, ImageFolder, as_rgb, folders_of, open_image, resolve_image, validate_size

SIDE = 400  # pixels of an image's longer side, at most
ALL_IMAGES = 9_000_000  # characters of all images of a page, as far as the smallest of SIZES reaches it
# Longer side in pixels, WebP quality, and the typical share of the first one's bytes; tried until an image fits.
SIZES = (
    (SIDE, 80, 1.0),
    (SIDE, 65, 0.6),
    (320, 60, 0.4),
    (256, 55, 0.25),
    (256, 40, 0.19),
    (208, 45, 0.14),
    (160, 40, 0.08),
    (128, 30, 0.045),
    (96, 20, 0.02),
)


class PageImage(NamedTuple):
    """A WebP file in base64, and its size in pixels so that the page keeps its layout while images load."""

    data: str
    width: int
    height: int


def read_images(
    names: Sequence[str], folder: ImageFolder, all_images: int = ALL_IMAGES
) -> tuple[dict[str, PageImage], list[str]]:
    """Read name -> image, scaled down, and a line for each that cannot be shown.

    all_images: characters of all of them together. Raises ValueError where no image can be shown.
    """
    share = all_images // max(1, len(names)) * 3 // 4  # base64: 4 characters for 3 bytes

    def read(name: str) -> PageImage | str:
        try:
            return shrunk(resolve_image(folder, name), share)
        except UNREADABLE as error:
            return f"{name} ({type(error).__name__}: {error})"

    with ThreadPoolExecutor() as readers:
        results = tqdm(readers.map(read, names), total=len(names), desc="images", disable=len(names) < 100)
        found = dict(zip(names, results))
    errors = [error for error in found.values() if isinstance(error, str)]
    if names and len(errors) == len(names):
        raise ValueError(
            f"{folders_of(folder)[-1]}: expected {len(names)} images, got none that can be shown, e.g. {errors[0]}\n"
            "Remedy: give the benchmark's image folder as --images"
        )
    return {name: image for name, image in found.items() if isinstance(image, PageImage)}, errors


def shrunk(path: Path, largest: int = ALL_IMAGES) -> PageImage:
    """Encode an image with at most `largest` bytes, or the smallest of SIZES; not rotated by EXIF, as the model saw it.

    Raises ImageError or OSError for a file that is no image.
    """
    with open_image(path) as image:
        validate_size(image)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = as_rgb(image)
    content, first = b"", 0
    for side, quality, typical in SIZES:
        if typical * first > 1.25 * largest and side > SIZES[-1][0]:  # hopeless, and encoding takes time
            continue
        small.thumbnail((side, side))
        content = _encoded(small, quality)
        first = first or len(content)
        if len(content) <= largest:
            break
    return PageImage(base64.b64encode(content).decode(), *small.size)


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
