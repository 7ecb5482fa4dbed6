"""Any checkpoint that transformers loads for images and text, in this process, asked in batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dama.images import ImageFolder, load_image, resolve_image, size_of_image
from dama.models.answering import ChatGenerator, Prompter, Turn
from dama.models.images import ImageInputs
from dama.models.loading import HubCheckpoint, ProcessorOptions
from llava.generation.local import READERS, default_device, default_dtype
from llava.generation.request import Decoding, Request


class HubAnswerer:
    """A checkpoint of any family that answers by its own processor and chat template.

    Its processor is loaded when prompts are measured or the fingerprint is asked for, its weights when it answers.

    Args:
        model_path: folder or hub name of a full model or a PEFT adapter. model_base: the model under an adapter.
        options: of the processor. dtype: of all weights; bfloat16 on a GPU and float32 on a CPU when None.
        bits: 16, or 8 or 4 by bitsandbytes.
    """

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        options: ProcessorOptions | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        bits: int = 16,
    ) -> None:
        self.device = device or default_device()
        self.dtype, self.bits = dtype or default_dtype(self.device), bits
        self.name, self.model_path, self.model_base = Path(model_path).name, model_path, model_base
        self.options = options or ProcessorOptions()
        self._sizes: dict[Path, tuple[int, int]] = {}

    @cached_property
    def checkpoint(self) -> HubCheckpoint:
        """The files."""
        return HubCheckpoint(self.model_path, self.model_base)

    @cached_property
    def prompter(self) -> Prompter:
        """Processor and chat template."""
        return Prompter(self.checkpoint.processor(self.options), self.options.system_prompt)

    @cached_property
    def generator(self) -> ChatGenerator:
        """The loaded model."""
        model = self.checkpoint.model(device=self.device, dtype=self.dtype, bits=self.bits)
        return ChatGenerator(model, self.prompter)

    @cached_property
    def context(self) -> int | None:
        """Most tokens of prompt, image and answer; None where the config does not say."""
        return self.checkpoint.context()

    def identity(self) -> dict[str, Any]:
        """Return checkpoint, digests of its weights, tokenizer, template and image preparation, and precision."""
        bits = "" if self.bits == 16 else f", {self.bits} bits"
        return {
            "model": self.model_path,
            **self.checkpoint.identity(),
            "template": "the model's own",
            **self.prompter.fingerprint(),
            "precision": str(self.dtype).removeprefix("torch.") + bits,
        }

    def length(self, request: Request, image_folder: ImageFolder) -> int:
        """Tokens of the prompt, those of its image included. Raises ValueError where none are left for an answer."""
        tokens = len(self.token_ids([request], image_folder)[0])
        if self.context is not None and tokens >= self.context:
            raise ValueError(
                f"question {request.id}: expected fewer tokens than the {self.context} that {self.name} holds, got "
                f"{tokens} with those of its image; give a smaller --max_pixels, or other image settings by "
                "--processor_option"
            )
        return tokens

    def token_ids(self, requests: Sequence[Request], image_folder: ImageFolder) -> list[list[int]]:
        """Ids of each prompt, all tokens of its image included, up to where the answer begins."""
        shown = [[] if r.image is None else [self._size(resolve_image(image_folder, r.image))] for r in requests]
        turns = [Turn(r.prompt, "", len(sizes)) for r, sizes in zip(requests, shown, strict=True)]
        return self.prompter.token_ids([self.prompter.prompt([turn]) for turn in turns], shown)

    def _size(self, path: Path) -> tuple[int, int]:
        """Width and height of an image file; its header is read once."""
        if path not in self._sizes:
            self._sizes[path] = size_of_image(path)
        return self._sizes[path]

    def pixels(self, request: Request, image_folder: ImageFolder) -> ImageInputs:
        """What the model takes for the request's image."""
        return self.prompter.images(load_image(resolve_image(image_folder, str(request.image))))

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""
        rows = self.token_ids(requests, image_folder)
        having = [request for request in requests if request.image is not None]
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
            images = list(readers.map(lambda request: self.pixels(request, image_folder), having))
        options = decoding.options()
        options.pop("num_return_sequences", None)
        new = self.generator.generate(rows, images, samples=decoding.samples, **options)
        texts = self.prompter.texts(new)
        return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]
