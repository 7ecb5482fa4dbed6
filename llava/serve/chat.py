"""What the terminal and the browser share: models that stream answers, and several of them at the same time.

A model is a checkpoint in this process (llava.serve.local_model) or one behind an OpenAI-compatible server
(llava.serve.server_model).
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import Protocol

from PIL import Image

from llava.generation.request import Decoding

# What LLaVA's commands choose for a LLaVA-v1.5 checkpoint. They guess it from the folder's name; here it is said.
DEFAULT_CONV_MODE = "llava_v1"

History = Sequence[tuple[str, str]]  # earlier questions and answers


class ChatModel(Protocol):
    """Answers in a conversation about one image, or about none."""

    name: str

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        """The answer so far, whenever it has grown; ends early once `stop` is set. ValueError: cannot be asked."""


def replies_together(replies: Sequence[Iterator[str]], pulse_s: float | None = None) -> Iterator[list[str]]:
    """The texts so far of several answers that are made at the same time, whenever one has grown.

    They are repeated every `pulse_s` seconds without news, so that the reader of a silent model can leave. Raises what
    the first failing one raises; the others go on until they are stopped.
    """
    events: queue.Queue[tuple[int, str | BaseException | None]] = queue.Queue()

    def pump(index: int, reply: Iterator[str]) -> None:
        try:
            for text in reply:
                events.put((index, text))
            events.put((index, None))
        except BaseException as error:  # noqa: B036 - raised again by the reader
            events.put((index, error))

    for index, reply in enumerate(replies):
        Thread(target=pump, args=(index, reply), daemon=True).start()
    texts, running = [""] * len(replies), len(replies)
    while running:
        try:
            index, item = events.get(timeout=pulse_s)
        except queue.Empty:
            yield list(texts)
            continue
        if isinstance(item, BaseException):
            raise item
        if item is None:
            running -= 1
            continue
        texts[index] = item
        if events.empty():  # else the reader is slower than the models: show the latest only
            yield list(texts)
    yield list(texts)
