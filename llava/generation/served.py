"""A model behind an OpenAI-compatible server, asked in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dama.errors import error_list
from dama.images import ImageFolder, open_image, resolve_image

if TYPE_CHECKING:
    from dama.chat import ChatClient, ChatRequest, ChatSettings
from llava.generation.request import Decoding, Reply, Request


class ServedAnswerer:
    """A model behind an OpenAI-compatible server, such as vLLM with an export in llava-hf's layout.

    The server has the prompt template and prepares the images, which travel as they are. Beams are not in this
    protocol.

    Args:
        model: its name, as the server lists it. base_url: of the API, up to and with its version (/v1).
        concurrency: requests under way at once. timeout: seconds that the server may be silent.
        omit: settings that are left to the server, of `dama.completion.SETTINGS`.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        concurrency: int = 8,
        timeout: float = 600.0,
        omit: Sequence[str] = (),
    ) -> None:
        self.name, self.base_url = model, base_url
        self.concurrency, self.timeout, self.omit = concurrency, timeout, tuple(sorted(set(omit)))
        self._clients: dict[Decoding, ChatClient] = {}

    def identity(self) -> dict[str, Any]:
        """Return the served model's name; the server keeps its weights and template to itself."""
        served = {"model": self.name, "weights": "served", "template": "the server's", "precision": "the server's"}
        return served | ({"omitted": list(self.omit)} if self.omit else {})

    def length(self, request: Request, image_folder: ImageFolder) -> int:
        """Characters of the prompt."""
        return len(request.prompt)

    def answer(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[str]]:
        """As `Answerer.answer`, without a reasoning model's thoughts; "" for a missing answer. Raises as `replies`."""
        return [[reply.text for reply in group] for group in self.replies(requests, image_folder, decoding)]

    def replies(self, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding) -> list[list[Reply]]:
        """`decoding.samples` replies to each request.

        Raises ValueError for beams, and for replies that did not come, each with its error.
        """
        client = self._client(decoding)
        asked = [
            self._chat_request(request, image_folder, sample)
            for request in requests
            for sample in range(decoding.samples)
        ]
        replies = list(client.ask(asked, desc=self.name).values())
        errors = [f"{reply.id}: {reply.error}" for reply in replies if reply.text is None]
        if errors:
            server = client.settings.shown_url
            raise ValueError(error_list(f"server {server}", errors, "run the same again, it continues"))
        read = [Reply(reply.answer, reply.finish, reply.missing) for reply in replies]
        return [read[i : i + decoding.samples] for i in range(0, len(read), decoding.samples)]

    def _client(self, decoding: Decoding) -> ChatClient:
        """One for all batches, since it finds out with the first whether the server can be used."""
        from dama.chat import ChatClient

        if decoding not in self._clients:
            self._clients[decoding] = ChatClient(self._settings(decoding))
        return self._clients[decoding]

    def _settings(self, decoding: Decoding) -> ChatSettings:
        from dama.chat import ChatSettings

        if decoding.num_beams > 1:
            raise ValueError(
                f"num_beams: a server decodes without beams, got {decoding.num_beams}; load the checkpoint here "
                "instead, or set --num-beams 1, which is another protocol"
            )
        return ChatSettings(
            self.base_url,
            self.name,
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            top_p=decoding.top_p,
            seed=decoding.seed,
            concurrency=self.concurrency,
            timeout=self.timeout,
            give_up=True,
        ).without(self.omit)

    @staticmethod
    def _chat_request(request: Request, image_folder: ImageFolder, sample: int) -> ChatRequest:
        from dama.chat import ChatRequest, image_part

        content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
        if request.image is not None:
            path = resolve_image(image_folder, request.image)
            with open_image(path) as image:
                kind = str(image.format).lower()
            content.insert(0, image_part(path.read_bytes(), "jpeg" if kind == "mpo" else kind))
        return ChatRequest(f"{request.id}#{sample}", ({"role": "user", "content": content},), sample)
