"""Pairs and images that the tests of all model families share."""

import pytest
import torch
from PIL import Image

from dama.pairs import PreferencePair
from tests.models.packs import SIZES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three pairs about images of different sizes, answers of different lengths."""
    folder = tmp_path_factory.mktemp("images")
    noise = torch.Generator().manual_seed(0)  # Image.effect_noise draws other images in every process
    for number, (width, height) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=noise)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    texts = [("A cat.", "A cat and two dogs on a mat."), ("Two red boats, a pier", "None"), ("No, it's not.", "Yes!")]
    pairs = [
        PreferencePair(str(i), f"{i}.png", f"What is in image {i}?", chosen, rejected)
        for i, (chosen, rejected) in enumerate(texts)
    ]
    return pairs, folder
