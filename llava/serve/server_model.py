"""A model behind an OpenAI-compatible server, whose streamed answers are bounded in bytes and seconds."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import closing
from threading import Event, Thread
from typing import Any

from PIL import Image

from dama.redact import redacted
from llava.conversation import encode_base64
from llava.generation.request import Decoding
from llava.serve.chat import History

MAX_ANSWER = 100_000  # characters
MAX_LINE, MAX_REPLY = 1 << 20, 1 << 26  # bytes of a line of a streamed answer, and of all its lines


class ServerModel:
    """A model behind an OpenAI-compatible server, such as vLLM with an exported checkpoint.

    Args:
        base_url: up to and with "/v1". name: the model's name there. The environment's OPENAI_API_KEY is sent along.
    """

    connect_s = 10.0
    timeout_s = 60.0  # without a byte from the server
    answer_s = 600.0  # of a whole answer, however slowly it comes

    def __init__(self, base_url: str, name: str) -> None:
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"server '{redacted(base_url)}': expected a URL such as http://127.0.0.1:8000/v1")
        self.name, self.base_url, self.address = name, base_url.rstrip("/"), address

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        """Stream the answer so far, see `ChatModel`; ValueError where the server fails or sends too much."""
        body = self._body(history, question, image, decoding)
        finished = Event()
        deadline = time.monotonic() + self.answer_s
        try:
            connection = self._connect()
            # The socket is shut from outside, since a reader that waits for the next line sees no event.
            Thread(target=_shut_when, args=(connection.sock, stop, finished, deadline), daemon=True).start()
            yield from self._texts(connection, body, stop)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not stop.is_set():
                slow = f"no end of the answer within {self.answer_s:g} s" if time.monotonic() > deadline else ""
                problem = slow or error or type(error).__name__
                raise ValueError(redacted(f"server {self.base_url}: {problem}")) from error
        finally:
            finished.set()

    def _body(self, history: History, question: str, image: Image.Image | None, decoding: Decoding) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for asked, answer in [*((q, a) for q, a in history if a), (question, None)]:
            messages.append({"role": "user", "content": asked})
            if answer:
                messages.append({"role": "assistant", "content": answer})
        if image is not None:
            url = {"url": "data:image/png;base64," + encode_base64(image, "PNG")}
            text = {"type": "text", "text": messages[0]["content"]}
            messages[0]["content"] = [{"type": "image_url", "image_url": url}, text]
        body = {"model": self.name, "messages": messages, "stream": True, "max_tokens": decoding.max_new_tokens}
        body["temperature"] = decoding.temperature
        return body | ({"top_p": decoding.top_p} if decoding.top_p is not None else {})

    def _connect(self) -> http.client.HTTPConnection:
        secure = self.address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self.address.hostname or "", self.address.port, timeout=self.connect_s)
        connection.connect()
        connection.sock.settimeout(self.timeout_s)
        return connection

    def _texts(self, connection: http.client.HTTPConnection, body: dict[str, Any], stop: Event) -> Iterator[str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        path = self.address.path.rstrip("/") + "/chat/completions"
        with closing(connection):
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                said = " ".join(response.read(500).decode("utf-8", "replace").split())
                raise ValueError(f"status {response.status} for {self.name!r}: {said}")
            text = ""
            for piece in _pieces(_lines(response)):
                if stop.is_set():
                    return
                text += piece
                if len(text) > MAX_ANSWER:
                    raise ValueError(f"the answer has more than {MAX_ANSWER:,} characters")
                yield text.strip()
            if not text.strip():
                raise ValueError("expected a stream of events with an answer, got none or an answer without text")


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The reply's lines. ValueError: one, or all together, are longer than any answer."""
    received = 0
    while line := response.readline(MAX_LINE + 1):
        received += len(line)
        if len(line) > MAX_LINE or received > MAX_REPLY:
            raise ValueError(f"the server sends without end, {received / 2**20:.0f} MiB so far")
        yield line


def _pieces(lines: Iterable[bytes]) -> Iterator[str]:
    """The new text in each event of a streamed chat completion, up to its [DONE].

    Fields that are null or absent carry no text; ValueError where one has another type than the protocol's.
    """
    for line in lines:
        data = line.decode("utf-8").strip().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if not line.startswith(b"data:") or not data:
            continue  # comments and blank lines
        try:
            event = _field({"event": json.loads(data)}, "event", dict)
        except RecursionError as error:
            raise ValueError("an event of the server is nested too deeply") from error
        if event.get("error"):
            raise ValueError(f"the server broke off: {event['error']}")
        for choice in _field(event, "choices", list):
            delta = _field(_field({"choice": choice}, "choice", dict), "delta", dict)
            if piece := _field(delta, "content", str):
                # Half of a surrogate pair could not be shown or sent on.
                yield piece.encode("utf-8", "replace").decode("utf-8")


def _field(record: dict[str, Any], name: str, kind: type) -> Any:
    """The field; an empty value of the kind where it is null or absent. ValueError: another type."""
    value = record.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        got = f"{type(value).__name__} {str(value)[:60]!r}"
        raise ValueError(f"an event of the server: expected {name} to be {kind.__name__} or null, got {got}")
    return value


def _shut_when(sock: socket.socket, stop: Event, finished: Event, deadline: float) -> None:
    while not finished.wait(0.05):
        if stop.is_set() or time.monotonic() > deadline:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # closed already
            return
