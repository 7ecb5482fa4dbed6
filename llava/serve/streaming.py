"""A model's `generate` in a thread of its own, read as a growing text that can be stopped."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

Item = int | BaseException | None  # a token, what went wrong, or the end


def stream_texts(
    generate: Callable[..., Tensor],
    options: dict[str, Any],
    decode: Callable[[list[int]], str],
    stop: Event,
    *,
    at_end: bool = False,
    prompt_tokens: int = 0,
    criteria: Sequence[StoppingCriteria] = (),
) -> Iterator[str]:
    """The answer so far, whenever it has grown.

    Generation ends at the next token once `stop` is set or the reader leaves; what fails in it is raised here.

    Args:
        generate: a model's. options: for it, of one row. decode: the text of an answer's ids.
        at_end: the answer is known at its end only, as with beams.
        prompt_tokens: ids of the prompt that `generate` returns before those of the answer.
        criteria: further reasons to end.
    """
    tokens: queue.Queue[Item] = queue.Queue()
    abandoned = Event()
    streamer = None if at_end else TokenQueue(tokens, prompt_tokens)
    stopping = StoppingCriteriaList([Stopped(stop, abandoned), *criteria])
    options = options | {"stopping_criteria": stopping, "streamer": streamer}
    worker = Thread(target=fill, args=(tokens, generate, options, prompt_tokens), daemon=True)
    worker.start()
    try:
        yield from growing_texts(tokens, decode)
    finally:
        abandoned.set()
        worker.join()


def fill(
    tokens: queue.Queue[Item], generate: Callable[..., Tensor], options: dict[str, Any], prompt_tokens: int
) -> None:
    """Put an answer's tokens into the queue, then None or what went wrong."""
    try:
        new = generate(**options)
        if options["streamer"] is None:
            for token in new[0, prompt_tokens:].tolist():
                tokens.put(token)
        tokens.put(None)
    except BaseException as error:  # noqa: B036 - raised again by the reader
        tokens.put(error)


def growing_texts(tokens: queue.Queue[Item], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of the tokens so far, whenever it has changed."""
    ids: list[int] = []
    shown = ""
    while (item := tokens.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        ids.append(item)
        if not tokens.empty():
            continue  # the reader is slower than the model: decode what has come since at once
        text = decode(ids)
        # A character of several tokens shows as U+FFFD until its last one is there.
        if text != shown and not text.endswith("\ufffd"):
            shown = text
            yield shown
    if (text := decode(ids)) != shown:
        yield text


class TokenQueue:
    """A streamer of transformers: puts each new token of the one row into a queue.

    Args:
        skipped: tokens that come first and are the prompt's; none where it is given as embeddings.
    """

    def __init__(self, tokens: queue.Queue[Item], skipped: int) -> None:
        self.tokens, self.skipped = tokens, skipped

    def put(self, value: Tensor) -> None:
        """Take the prompt or the next token."""
        ids = value.flatten().tolist()
        own = ids[self.skipped :]
        self.skipped -= len(ids) - len(own)
        for token in own:
            self.tokens.put(token)

    def end(self) -> None:
        """Take the end of the answer; `fill` says it."""


class Stopped(StoppingCriteria):
    """Stops generation at the next token once one of the events is set."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[rows] bool, whether each ends."""
        stopped = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device, dtype=torch.bool)
