"""Questions to a model, how it decodes, and what answers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dama.images import ImageFolder


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one image, or about none."""

    id: str
    prompt: str
    image: str | None = None  # relative to the image folder
    image_id: str = ""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; part of every result. temperature 0 is greedy (or beam search)."""

    max_new_tokens: int = 1024
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    samples: int = 1  # answers to each question; more than one needs a temperature
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "use_cache": True}
        chosen["do_sample"] = self.temperature > 0
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "num_return_sequences": self.samples}
        return chosen


class Reply(NamedTuple):
    """A server's answer. finish: why it ends, as the server says it. missing: why there is no answer, or ""."""

    text: str
    finish: str
    missing: str


class Responder(Protocol):
    """Whatever answers batches of requests: a checkpoint loaded here, or a server."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What the answers depend on besides requests and decoding, for the fingerprint."""

    def length(self, request: Request, image_folder: ImageFolder) -> int:
        """By which prompts are put together in batches. Raises ValueError for a prompt that is too long."""

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""
