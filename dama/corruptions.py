"""Second images for objectives that read one: what is taken away from an image, deterministic in (seed, pair).

All act on RGB images before the model's own preparation, so that they mean the same for every model family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from PIL import Image

CROP_AREA = (0.01, 0.2)  # share of the image that a crop keeps (mDPO, arXiv 2406.11839, section 3)
MASKED_SHARE = 0.3  # of the patches (OPA-DPO, arXiv 2501.09695)
PATCHES = 24  # patches along the longer side, as those of 14 pixels at 336
NOISE_STEP, NOISE_STEPS = 500, 1000  # of the diffusion whose forward process adds the noise
BETA_FIRST, BETA_LAST = 1e-4, 0.02  # its linear schedule (DDPM, arXiv 2006.11239)


def blank(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """The image's mean color everywhere."""
    mean = np.asarray(image, dtype=np.float64).mean(axis=(0, 1))
    return Image.new("RGB", image.size, tuple(int(round(channel)) for channel in mean))


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A random part of the image, scaled to its size: 1 to 20 % of the area."""
    share = random.uniform(*CROP_AREA) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (int(random.integers(0, side - part + 1)) for side, part in zip(image.size, (width, height)))
    return image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))


def mask_patches(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """30 % of the patches of a grid in the image's mean color."""
    pixels = np.array(image)
    side = -(-max(image.size) // PATCHES)
    rows, columns = -(-image.height // side), -(-image.width // side)
    masked = random.permutation(rows * columns)[: round(MASKED_SHARE * rows * columns)]
    mean = pixels.mean(axis=(0, 1)).round().astype(np.uint8)
    for row, column in zip(*np.divmod(masked, columns)):
        pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = mean
    return Image.fromarray(pixels)


def noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Gaussian noise of step 500 of 1,000 of a diffusion: sqrt(a) x + sqrt(1 - a) e on pixels scaled to [-1, 1]."""
    betas = np.linspace(BETA_FIRST, BETA_LAST, NOISE_STEPS)
    a = np.prod(1 - betas[:NOISE_STEP])
    x = np.asarray(image, dtype=np.float64) / 127.5 - 1
    noisy = np.sqrt(a) * x + np.sqrt(1 - a) * random.standard_normal(x.shape)
    return Image.fromarray(((noisy.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))


# Those that change the pair's own image. `other_image` and `field` name another file instead.
PIXEL_CORRUPTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "blank": blank,
    "crop": crop,
    "mask_patches": mask_patches,
    "noise": noise,
}
OTHER_IMAGE, FIELD = "other_image", "field"


def names() -> list[str]:
    """All corruptions, as --corruption takes them."""
    return [*PIXEL_CORRUPTIONS, OTHER_IMAGE, FIELD]


def corrupted(image: Image.Image, corruption: str, seed: int, pair: str) -> Image.Image:
    """The image of a pair under one of PIXEL_CORRUPTIONS; the same for the same seed and pair id, wherever it runs."""
    return PIXEL_CORRUPTIONS[corruption](image, generator_of(corruption, seed, pair))


def other_number(own: int, count: int, seed: int, pair: str) -> int:
    """Which of `count` images `other_image` shows for a pair whose own is number `own`."""
    number = int(generator_of(OTHER_IMAGE, seed, pair).integers(count - 1))
    return number + (number >= own)


def generator_of(corruption: str, seed: int, pair: str) -> np.random.Generator:
    """Random numbers that depend on (corruption, seed, pair id) alone."""
    digest = hashlib.sha256(f"{corruption}\0{seed}\0{pair}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
