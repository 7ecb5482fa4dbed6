"""A checkpoint in this process that streams its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, get_template, image_placeholder
from llava.generation.request import Decoding
from llava.mm_utils import KeywordsStoppingCriteria, encode_prompt, literal, process_images
from llava.model.builder import load_pretrained_model
from llava.serve.chat import DEFAULT_CONV_MODE, History
from llava.serve.streaming import stream_texts


class LocalModel:
    """A checkpoint in this process.

    Args:
        model_path: checkpoint folder or hub name. model_base: the base of a LoRA folder.
        conv_mode: prompt template. device: cuda or cpu; what is there when None.

    Attributes:
        after_image: what a prompt has between an image at its start and the question.
    """

    after_image = "\n"

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        conv_mode: str = DEFAULT_CONV_MODE,
        device: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
    ) -> None:
        self.name, self.template = Path(model_path).name, get_template(conv_mode)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            model_path, model_base, self.name, load_8bit, load_4bit, device=self.device, dtype=self.dtype
        )

    @property
    def roles(self) -> tuple[str, str]:
        """What the template calls the user and the model."""
        user, assistant = (role.split("\n")[0] for role in self.template.roles)
        return user, assistant

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        """Stream the answer so far, see `ChatModel`."""
        prompt = self.prompt(history, question, image is not None)
        return self.stream(prompt, [] if image is None else [image], decoding, stop)

    def prompt(self, history: History, question: str, has_image: bool) -> str:
        """The conversation as the model reads it, the image at its start. Unanswered questions are left out."""
        turns: list[tuple[str, str | None]] = [(asked, answer) for asked, answer in history if answer]
        turns.append((question, None))
        if any(DEFAULT_IMAGE_TOKEN in text for turn in turns for text in turn if text):
            raise ValueError(f"the text holds {DEFAULT_IMAGE_TOKEN}, which stands for an image; write it differently")
        turns = [(self.literal(asked), answer and self.literal(answer)) for asked, answer in turns]
        if has_image:
            turns[0] = (self.image_tokens() + self.after_image + turns[0][0], turns[0][1])
        return self.render(turns)

    def literal(self, text: str) -> str:
        """A user's text for a prompt: the spelling of a special token in it stays text."""
        return literal(text, self.tokenizer)

    def image_tokens(self) -> str:
        """What stands for an image in a prompt of this model."""
        return image_placeholder(getattr(self.model.config, "mm_use_im_start_end", False))

    def render(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the turns as this model's prompt."""
        conversation = self.template.copy()
        for asked, answer in turns:
            conversation.append_message(conversation.roles[0], asked)
            conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def stream(self, prompt: str, images: Sequence[Image.Image], decoding: Decoding, stop: Event) -> Iterator[str]:
        """The answer to a rendered prompt so far, whenever it has grown (with beams, only at its end).

        Raises:
            ValueError: the prompt leaves no room for an answer, or has not one image token for each image.
        """
        inputs = self._inputs(prompt, images, decoding)
        end = self._end()
        marked = [KeywordsStoppingCriteria([end], self.tokenizer, torch.zeros(1, 0))]
        yield from stream_texts(
            self.model.generate,
            inputs,
            lambda ids: self._decode(ids, end),
            stop,
            at_end=decoding.num_beams > 1,
            criteria=marked if end != self.tokenizer.eos_token else [],
        )

    def _decode(self, ids: list[int], end: str) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).split(end)[0].strip()

    def _end(self) -> str:
        """The template's mark at the end of an answer."""
        two = self.template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
        return (self.template.sep2 if two else self.template.sep) or self.tokenizer.eos_token

    def _inputs(self, prompt: str, images: Sequence[Image.Image], decoding: Decoding) -> dict[str, Any]:
        ids = encode_prompt(prompt, self.tokenizer)
        places = prompt.count(DEFAULT_IMAGE_TOKEN)
        if places != len(images):
            raise ValueError(f"expected one {DEFAULT_IMAGE_TOKEN} for each image, got {places} for {len(images)}")
        pixels = self._pixels(images)
        used = len(ids) + sum(self._positions(image) - 1 for image in (() if pixels is None else pixels))
        room = self.context() - used
        if room < 1:
            raise ValueError(f"the conversation has {used} tokens, {self.name} holds {self.context()}: begin a new one")
        return decoding.options() | {
            "inputs": ids[None].to(self.device),
            "images": pixels,
            "image_sizes": [image.size for image in images] or None,
            "pad_token_id": self.tokenizer.pad_token_id,
            "max_new_tokens": min(room, decoding.max_new_tokens),
        }

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        """[N, 3, H, W], for "anyres" [N, crops, 3, H, W] or a list where the numbers of crops differ; None for none."""
        if not images:
            return None
        pixels = process_images(images, self.image_processor, self.model.config)
        if isinstance(pixels, Tensor):
            return pixels.to(self.device, self.dtype)
        return [image.to(self.device, self.dtype) for image in pixels]

    def _positions(self, image: Tensor) -> int:
        """How many positions a processed image takes in the sequence."""
        tower: Any = self.model.get_vision_tower()
        return tower.num_patches * (image.shape[0] if image.dim() == 4 else 1)

    def context(self) -> int:
        """Tokens of prompt, image and answer together."""
        config = self.model.config
        return min(config.max_position_embeddings, getattr(config, "tokenizer_model_max_length", None) or 1 << 30)
