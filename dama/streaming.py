"""Answers streamed from an OpenAI-compatible server that is not trusted, with the openai client's own streaming."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from threading import Event, Thread
from typing import Any

import httpx
import openai

from dama.bounded_http import TooLargeError
from dama.completion import NoCompletionError, well_formed
from dama.redact import redacted

MAX_ANSWER = 100_000  # characters
MAX_BYTES = 1 << 26  # of all events of an answer
_POLL_S = 0.05  # how often the reader's wish to stop is noticed while the server is silent


def stream_answer(
    base_url: str,
    model: str,
    messages: Sequence[dict[str, Any]],
    stop: Event,
    *,
    silence_s: float = 60.0,
    answer_s: float = 600.0,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the answer so far each time it has grown.

    Args:
        base_url: address up to and including "/v1"; the environment's OPENAI_API_KEY is sent along.
        model: the model's name there.
        messages: conversation in OpenAI's format.
        stop: closes the connection when set, even while the server is silent; the iterator then ends.
        silence_s: seconds that the server may send nothing.
        answer_s: seconds that the whole answer may take.
        sampling: max_tokens, temperature, top_p ...

    Raises:
        ValueError: without the credentials of the URL, if the server cannot be reached, refuses the request, breaks
            off, sends something else than a completion, or sends too much.
    """
    news: queue.Queue[str | Exception | None] = queue.Queue()
    request = {"model": model, "messages": list(messages), **sampling}
    Thread(target=_run, args=(news, stop, base_url, request, silence_s, answer_s), daemon=True).start()
    try:
        while (item := news.get()) is not None:
            if isinstance(item, Exception):
                raise ValueError(redacted(f"server {base_url}: {item}")) from item
            yield item
    finally:
        stop.set()  # an abandoned iterator closes the connection too


def _run(
    news: queue.Queue[str | Exception | None],
    stop: Event,
    base_url: str,
    request: dict[str, Any],
    silence_s: float,
    answer_s: float,
) -> None:
    """Put texts, then an exception or None, into the queue; a reader that stopped gets None."""

    async def pump() -> None:
        async with _client(base_url, silence_s) as server:
            async for text in _texts(server, request):
                news.put(text)

    async def pump_until_stopped() -> None:
        task = asyncio.create_task(pump())
        async with asyncio.timeout(answer_s):
            while not (await asyncio.wait([task], timeout=_POLL_S))[0]:
                if stop.is_set():
                    task.cancel()
        if not task.cancelled():
            task.result()

    try:
        asyncio.run(pump_until_stopped())
        news.put(None)
    except TimeoutError:
        news.put(TimeoutError(f"no end of the answer within {answer_s:g} s"))
    except (openai.OpenAIError, httpx.HTTPError, ValueError, RecursionError) as error:
        news.put(_described(error, request["model"]))


def _client(base_url: str, silence_s: float) -> openai.AsyncOpenAI:
    client = httpx.AsyncClient(transport=_BoundedTransport(), timeout=silence_s, follow_redirects=False)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=silence_s, http_client=client)  # type: ignore[arg-type]


async def _texts(server: openai.AsyncOpenAI, request: dict[str, Any]) -> AsyncIterator[str]:
    text = ""
    async with await server.chat.completions.create(stream=True, **request) as events:
        async for event in events:
            for piece in _pieces(event):
                text += piece
                if len(text) > MAX_ANSWER:
                    raise NoCompletionError(f"the answer has more than {MAX_ANSWER:,} characters")
                yield text.strip()
    if not text.strip():
        raise NoCompletionError("expected a stream of events with an answer, got none or an answer without text")


def _pieces(event: Any) -> Iterator[str]:
    """Yield the new text of an event, any field of which may be missing or of another type."""
    choices = getattr(event, "choices", None) or []
    for choice in choices if isinstance(choices, list) else [choices]:
        delta = getattr(choice, "delta", None)
        piece = getattr(delta, "content", None)
        if not isinstance(piece, str | None) or isinstance(choice, str):
            raise NoCompletionError(f"an event of the server: expected text in delta.content, got {str(event)[:200]!r}")
        if piece:
            yield well_formed(piece)


def _described(error: Exception, model: str) -> Exception:
    """Name the status and the model of a refusal, and what the connection library said of an unreachable server."""
    if isinstance(error, openai.APIStatusError):
        return ValueError(f"status {error.status_code} for {model!r}: {' '.join(str(error.message).split())[:500]}")
    if type(error) is openai.APIError:
        return ValueError(f"the server broke off: {error.message}")
    return ValueError(f"{error} ({error.__cause__})" if error.__cause__ else str(error) or type(error).__name__)


class _BoundedTransport(httpx.AsyncHTTPTransport):
    """Connections whose replies end with TooLargeError after MAX_BYTES."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _BoundedStream(response.stream, request)
        return response


class _BoundedStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, request: httpx.Request) -> None:
        self.stream, self.request = stream, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for block in self.stream:
            received += len(block)
            if received > MAX_BYTES:
                raise TooLargeError(f"the server sends without end, {received >> 20} MiB so far", request=self.request)
            yield block

    async def aclose(self) -> None:
        await self.stream.aclose()
