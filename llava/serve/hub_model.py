"""Any checkpoint that transformers loads for images and text, in this process, that streams its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import torch
from PIL import Image

from dama.models.answering import Turn
from dama.models.loading import ProcessorOptions
from dama.texts import IMAGE_TOKEN
from llava.generation.hub import HubAnswerer
from llava.generation.request import Decoding
from llava.serve.chat import History
from llava.serve.streaming import stream_texts


class HubModel:
    """A checkpoint that answers by its own processor and chat template.

    Args:
        model_path: folder or hub name of a full model or a PEFT adapter. model_base: the model under an adapter.
        options: of the processor. device: cuda or cpu; what is there when None.

    Attributes:
        roles: what the terminal calls the user and the model.
        after_image: nothing; the chat template says what stands between an image and the question.
    """

    roles = ("USER", "ASSISTANT")
    after_image = ""

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        options: ProcessorOptions | None = None,
        device: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        bits = 8 if load_8bit else 4 if load_4bit else 16
        answerer = HubAnswerer(model_path, model_base, options=options, device=device, bits=bits)
        self.name, self.prompter, self.generator = answerer.name, answerer.prompter, answerer.generator

    @property
    def model(self) -> Any:
        """The loaded model."""
        return self.generator.model

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        """Stream the answer so far, see `ChatModel`."""
        prompt = self.prompt(history, question, image is not None)
        return self.stream(prompt, [] if image is None else [image], decoding, stop)

    def prompt(self, history: History, question: str, has_image: bool) -> str:
        """The conversation as the model reads it, the image at its start. Unanswered questions are left out.

        A special token that a text spells, a placeholder of an image among them, stays text.
        """
        asked = [*((question, answer) for question, answer in history if answer), (question, "")]
        return self.prompter.prompt(
            [Turn(text, answer, int(has_image and number == 0)) for number, (text, answer) in enumerate(asked)]
        )

    def literal(self, text: str) -> str:
        """A user's text for a prompt: the spelling of a special token in it stays text."""
        return self.prompter.literal(text)

    def image_tokens(self) -> str:
        """What stands for an image in the turns of `render`, for every model."""
        return IMAGE_TOKEN

    def render(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the turns, of literal texts and images, as this model's prompt."""
        return self.prompter.rendered(turns)

    def stream(self, prompt: str, images: Sequence[Image.Image], decoding: Decoding, stop: Event) -> Iterator[str]:
        """The answer to a rendered prompt so far, whenever it has grown (with beams, only at its end).

        Raises:
            ValueError: the prompt leaves no room for an answer, or has not one placeholder for each image.
        """
        ids = self.prompter.token_ids([prompt], [[image.size for image in images]])[0]
        context = self.generator.context() or len(ids) + decoding.max_new_tokens
        room = context - len(ids)
        if room < 1:
            raise ValueError(f"the conversation has {len(ids)} tokens, {self.name} holds {context}: begin a new one")
        options = decoding.options() | {"max_new_tokens": min(room, decoding.max_new_tokens)}
        yield from stream_texts(
            self.model.generate,
            self.generator.call([ids], [self.prompter.images(*images)] if images else [], **options),
            lambda new: self.prompter.texts([new])[0],
            stop,
            at_end=decoding.num_beams > 1,
            prompt_tokens=len(ids),
        )
