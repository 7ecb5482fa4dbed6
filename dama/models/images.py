"""Images as a model's own processor prepares them, one at a time, and joined for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets", "labels"}


class ImageInputs(dict[str, Tensor]):
    """What a model takes for one image: pixel values, and whatever its processor says about them.

    Attributes:
        host: the integers among it on the CPU, which can be read without waiting for a GPU.
    """

    host: dict[str, Tensor]

    def __init__(self, values: Mapping[str, Tensor], host: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(values)
        own = {name: value for name, value in values.items() if not value.is_floating_point()}
        self.host = dict(own if host is None else host)

    def to(self, device: torch.device, non_blocking: bool = False) -> ImageInputs:
        """The same on another device."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.items()}
        return ImageInputs(moved, self.host)


class ProcessorImages:
    """RGB images to the inputs of a model.

    The images of a prompt are prepared together: some processors cut a single image into crops, and several not.

    Args:
        processor: of the model, with `image_token`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._written: dict[tuple[tuple[int, int], ...], list[str]] = {}

    def _call(self, images: Sequence[Image.Image], **options: Any) -> Any:
        placeholders = self.processor.image_token * len(images)
        return self.processor(text=[placeholders], images=[list(images)], **options)

    def __call__(self, *images: Image.Image) -> ImageInputs:
        """All that the processor returns of a prompt's images."""
        found = self._call(images, return_tensors="pt")
        return ImageInputs({name: value for name, value in found.items() if name not in TEXT_KEYS})

    def texts(self, sizes: Sequence[tuple[int, int]]) -> list[str]:
        """What stands for each image of a prompt, all its tokens written out; `sizes` are (width, height) in pixels."""
        found = self._call([Image.new("RGB", size) for size in sizes], return_text_replacement_offsets=True)
        return [replaced["replacement"] for replaced in found["text_replacement_offsets"][0]]

    def written_out(self, prompt: str, sizes: Sequence[tuple[int, int]]) -> str:
        """The prompt with the placeholder of each image replaced by all of its tokens.

        Args:
            sizes: width and height of the images in pixels, in their order.

        Raises:
            ValueError: the prompt has another number of placeholders.
        """
        first, *others = prompt.split(self.processor.image_token)
        if len(others) != len(sizes):
            raise ValueError(
                f"chat template: expected {len(sizes)} image(s) written as {self.processor.image_token!r}, got "
                f"{len(others)}"
            )
        key = tuple(sizes)
        if key and key not in self._written:
            self._written[key] = self.texts(key)
        return first + "".join(written + text for written, text in zip(self._written.get(key, ()), others, strict=True))


def join_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of several images, one after the other; those of other sizes or numbers of crops filled with zeros."""
    return {name: _stacked([image[name] for image in images]) for name in (images[0] if images else ())}


def _stacked(values: Sequence[Tensor]) -> Tensor:
    shapes = torch.tensor([value.shape[1:] for value in values])
    largest = shapes.amax(0).tolist() if shapes.numel() else []
    return torch.cat([_filled(value, largest) for value in values])


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for own, size in zip(value.shape[1:], sizes, strict=True)]
    return pad(value, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else value
