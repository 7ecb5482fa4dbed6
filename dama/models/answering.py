"""Any model that AutoModelForImageTextToText loads as one that answers, in batches and by its own chat template.

Prompts are rendered and images prepared by the code of training (dama.models.chat, dama.models.images); the model's own
`generate` does the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dama.console import digest_of, log
from dama.models.chat import ChatTemplate
from dama.models.family import as_dtype
from dama.models.images import ProcessorImages, join_images
from dama.models.token_types import TokenTypes
from dama.special_tokens import escaped, placeholders
from dama.styles import ASSISTANT, USER
from dama.texts import IMAGE_TOKEN

# What a checkpoint's generation_config.json may say and stays: which tokens can be written at all.
VOCABULARY_LIMITS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
# What every call says anew, and what is no decoding.
SAID_ANEW = (
    "do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "cache_implementation",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """A question about images, which come first, and an answer to it."""

    question: str
    answer: str
    images: int = 1


class Prompter:
    """Questions about images as the token ids that a model answers to.

    Args:
        processor: the checkpoint's, with tokenizer, image processor and chat template.
        system: text of a system turn before each conversation; none where empty.
    """

    def __init__(self, processor: Any, system: str = "") -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.chat, self.images = ChatTemplate(processor, system), ProcessorImages(processor)

    def fingerprint(self) -> dict[str, str]:
        """Whatever the ids and pixels of a prompt depend on: tokenizer, template, image preparation."""
        images = digest_of([self.processor.image_processor.to_dict(), self.images.texts([(64, 48)])[0]])
        return self.chat.fingerprint() | {"image_processor": images}

    def literal(self, text: str) -> str:
        """A user's text for a template: the spelling of a special token in it stays text."""
        return escaped(text, self.tokenizer, *self.chat.special_texts, *placeholders(self.processor))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation as the template writes it, the last turn without its answer, and a placeholder an image."""
        return self.rendered(
            [(IMAGE_TOKEN * turn.images + self.literal(turn.question), self.literal(turn.answer)) for turn in turns]
        )

    def rendered(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """The same of questions and answers whose texts are literal already, images written as IMAGE_TOKEN."""
        said = [(role, text or "") for turn in turns for role, text in zip((USER, ASSISTANT), turn)]
        return self.chat.prompts([tuple(said[:-1])])[0]

    def token_ids(self, prompts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
        """Ids of prompts, all tokens of their images included.

        Args:
            sizes: width and height in pixels of the images of each prompt.
        """
        written = [self.images.written_out(prompt, shown) for prompt, shown in zip(prompts, sizes, strict=True)]
        return self.chat.token_ids(written)

    def texts(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Answers as text, without special tokens and without white space at both ends."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


class ChatGenerator:
    """A model that answers prompts of its Prompter, in batches padded at the left.

    Args:
        model: a PreTrainedModel for image-text-to-text. prompter: of its processor.
    """

    def __init__(self, model: Any, prompter: Prompter) -> None:
        self.model, self.prompter = model, prompter
        self.config = generation_config(model, prompter)
        self.types = TokenTypes.of(model, prompter.processor)

    def inputs(
        self, rows: Sequence[Sequence[int]], images: Sequence[Mapping[str, Tensor]], copies: int = 1
    ) -> dict[str, Tensor]:
        """Keyword arguments of the model's `generate`, on its device.

        Args:
            rows: ids of prompts. images: of all rows in their order, see `ProcessorImages`.
            copies: of every row and its images; more than one only where all rows have equally many images.
        """
        each = len(images) // len(rows)
        rows = [row for row in rows for _ in range(copies)]
        if copies > 1:
            starts = range(0, len(images), max(1, each))
            images = [image for start in starts for _ in range(copies) for image in images[start : start + each]]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.config.pad_token_id)
        real = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :], real[number, width - len(row) :] = torch.tensor(row), 1
        found = {"input_ids": ids, "attention_mask": real} | self.types.of_prompts(ids, real)
        found |= {name: as_dtype(value, self.model.dtype) for name, value in join_images(images).items()}
        return {name: value.to(self.model.device) for name, value in found.items()}

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        images: Sequence[Mapping[str, Tensor]],
        *,
        samples: int = 1,
        **options: Any,
    ) -> Tensor:
        """[rows x samples, T] ids of the answers, padded at the right behind the token that ends them.

        Args:
            samples: answers to each row. options: of transformers' `generate`.

        Raises:
            ValueError: beams over images in several crops, where transformers would mix the crops up.
        """
        call = self.call(rows, images, samples=samples, **options)
        return self.model.generate(**call)[:, call["input_ids"].shape[1] :]

    def call(
        self,
        rows: Sequence[Sequence[int]],
        images: Sequence[Mapping[str, Tensor]],
        *,
        samples: int = 1,
        **options: Any,
    ) -> dict[str, Any]:
        """The keyword arguments of `generate` for a call of ours.

        Of the checkpoint's decoding only the tokens that end and fill answers count.
        """
        inputs = self.inputs(rows, images, samples)
        if options.get("num_beams", 1) > 1:
            self._validate_beams(inputs)
        return {**inputs, "generation_config": GenerationConfig(**self.config.to_diff_dict() | options)}

    def _validate_beams(self, inputs: Mapping[str, Tensor]) -> None:
        """Before 5.23, and in some families since, transformers repeats crops for each beam one by one."""
        rows = len(inputs["input_ids"])
        encodes_first = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        if not encodes_first and any(len(value) != rows for value in inputs.values()):
            raise ValueError(
                f"num_beams: {type(self.model).__name__} reads an image in several parts, which this version of "
                "transformers mixes up between beams; set --num-beams 1, which is another protocol, or update it"
            )

    def context(self) -> int | None:
        """Most tokens of prompt, images and answer; None where the config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def generation_config(model: Any, prompter: Prompter) -> GenerationConfig:
    """Which tokens end and fill answers; everything else of the checkpoint's generation_config.json is left out.

    A decoding that differs from model to model (Qwen2.5-VL's penalty on repetitions) would not be the one that flags
    and results name. What is left out is logged.
    """
    given, tokenizer = model.generation_config, prompter.tokenizer
    named = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    ends = {*named, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(prompter.chat.end)} - {None}
    rows = model.get_input_embeddings().num_embeddings
    limits = {name: value for name in VOCABULARY_LIMITS if (value := getattr(given, name, None)) is not None}
    others = {
        name: value
        for name, value in given.to_diff_dict().items()
        if value is not None and not name.startswith(("_", "output_")) and name not in (*SAID_ANEW, *limits)
    }
    if others:
        said = ", ".join(f"{name}={value}" for name, value in sorted(others.items()))
        log(f"generation_config.json: {said} not used; answers are decoded as the flags say")
    config = GenerationConfig(
        eos_token_id=sorted(end for end in ends if end < rows), pad_token_id=tokenizer.pad_token_id, **limits
    )
    model.generation_config = config  # `generate` would fill in from there
    return config
