"""A checkpoint loaded in this process, asked in batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama.fingerprint import digest_of_checkpoint
from dama.images import ImageFolder, load_image, resolve_image
from llava.conversation import get_template, image_placeholder
from llava.generation.request import Decoding, Request
from llava.mm_utils import encode_prompt, literal, process_images
from llava.model.builder import load_pretrained_model

READERS = 8  # threads that decode the images of a batch


class Answerer:
    """A checkpoint that answers: loaded when it is first needed, asked in batches.

    Args:
        model_path: checkpoint folder or hub name. model_base: the base of a LoRA folder.
        conv_mode: prompt template. dtype: of all weights; bfloat16 on a GPU and float32 on a CPU when None.
        bits: 16, or 8 or 4 by bitsandbytes.
    """

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        conv_mode: str = "vicuna_v1",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        bits: int = 16,
    ) -> None:
        self.device = device or default_device()
        self.dtype, self.bits = dtype or default_dtype(self.device), bits
        self.name, self.model_path, self.model_base = Path(model_path).name, model_path, model_base
        self.template = get_template(conv_mode)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, image_processor: Any, *, conv_mode: str = "vicuna_v1") -> Answerer:
        """Of a model that is in memory, for instance in training; it answers as it stands when it is asked."""
        answerer = cls("", conv_mode=conv_mode, device=str(model.device), dtype=model.dtype)
        answerer.__dict__["_loaded"] = (tokenizer, model, image_processor)
        return answerer

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        tokenizer, model, image_processor, _ = load_pretrained_model(
            self.model_path, self.model_base, self.name, self.bits == 8, self.bits == 4, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip
        return tokenizer, model, image_processor

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._loaded[0]

    @property
    def model(self) -> Any:
        """The loaded model."""
        return self._loaded[1]

    @property
    def image_processor(self) -> Any:
        """The vision tower's image processor."""
        return self._loaded[2]

    @property
    def pad_token_id(self) -> int:
        """A model may name its end of text; ours stops there and pads with it."""
        return self.tokenizer.pad_token_id

    def identity(self) -> dict[str, Any]:
        """Return checkpoint, digest of its weights, template and precision."""
        return {
            "model": self.model_path,
            "weights": digest_of_checkpoint(self.model_path),
            **({"base": self.model_base} if self.model_base else {}),
            "template": self.template.version,
            "precision": str(self.dtype).removeprefix("torch.") + ("" if self.bits == 16 else f", {self.bits} bits"),
        }

    def length(self, request: Request, image_folder: ImageFolder) -> int:
        """Tokens of the prompt; all images have the same number of them."""
        return len(self.token_ids(request))

    def token_ids(self, request: Request) -> Tensor:
        """[T] ids of the prompt, up to where the answer begins; a "</s>" in the question is encoded as text."""
        question = literal(request.prompt, self.tokenizer)
        if request.image is not None:
            start_end = getattr(self.model.config, "mm_use_im_start_end", False)
            question = f"{image_placeholder(start_end)}\n{question}"
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return encode_prompt(conversation.get_prompt(), self.tokenizer)

    def pixels(self, request: Request, image_folder: ImageFolder) -> tuple[Tensor, tuple[int, int]]:
        """Pixel values [3, H, W], for "anyres" [crops, 3, H, W], and (width, height) of the image as it is."""
        image = load_image(resolve_image(image_folder, str(request.image)))
        return process_images([image], self.image_processor, self.model.config)[0], image.size

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""
        new = self.new_tokens(requests, image_folder, decoding)
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]

    @torch.inference_mode()
    def new_tokens(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> Tensor:
        """[requests x samples, T] ids of the answers, padded at the right behind the end of text."""
        ids = [self.token_ids(request) for request in requests]
        width = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), width), self.pad_token_id)
        mask = torch.zeros((len(ids), width), dtype=torch.bool)
        for i, row in enumerate(ids):
            input_ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        return self.model.generate(
            input_ids.to(self.device),
            **self._images([request for request in requests if request.image is not None], image_folder),
            attention_mask=mask.to(self.device),
            pad_token_id=self.pad_token_id,
            **decoding.options(),
        )

    def _images(self, requests: Sequence[Request], image_folder: ImageFolder) -> dict[str, Any]:
        """images, [N, 3, H, W] or a list of [crops, 3, H, W] ("anyres"), on the model's device, and image_sizes.

        They are decoded side by side, or else short answers wait for the images.
        """
        if not requests:
            return {"images": None}
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
            images, sizes = zip(*readers.map(lambda request: self.pixels(request, image_folder), requests))
        if images[0].dim() == 3:
            return {"images": torch.stack(images).to(self.device, self.dtype)}
        return {"images": [crops.to(self.device, self.dtype) for crops in images], "image_sizes": list(sizes)}


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def default_device() -> str:
    """The GPU that the launcher gave this process, the first one without a launcher, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    # srun may show each process its own GPU only, which then is the first.
    return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
