"""A scripted OpenAI-compatible server on loopback: verdicts, refusals, rate limits, late and malformed answers.

    with ScriptedServer(lambda call: "7 9") as base_url:
        ChatClient(ChatSettings(base_url, "judge-model")).ask(...)

The handler is given a `Call` and returns the text of a normal completion, or a `Scripted` made by one of the functions
below. It may run in several threads at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

VERSION = "scripted-judge-0001"  # the version that the server names, whatever model is asked for


@dataclass(frozen=True)
class Call:
    """One request as it arrived. number: counts all of them from 0; attempt: those with the same messages from 0."""

    body: dict[str, Any]
    headers: dict[str, str]
    number: int
    attempt: int

    @property
    def text(self) -> str:
        """The last turn, its text parts joined."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class Scripted:
    """A response to the letter. delay: seconds before it is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def completion(
    text: str | None, *, prompt_tokens: int = 10, completion_tokens: int = 5, delay: float = 0.0
) -> Scripted:
    body = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": VERSION,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return Scripted(200, json.dumps(body).encode(), delay=delay)


def failure(status: int, message: str = "scripted failure", **headers: str) -> Scripted:
    """An error status. Told to come again in 10 ms, so that tests need not sit through the usual pauses."""
    body = {"error": {"message": message, "type": "scripted", "param": None, "code": None}}
    return Scripted(status, json.dumps(body).encode(), {"retry-after-ms": "10", **headers})


def rate_limited(seconds: float = 0.05) -> Scripted:
    return Scripted(429, failure(429, "rate limit reached").body, {"Retry-After": str(seconds)})


def malformed() -> Scripted:
    """Status 200, but the JSON breaks off."""
    return Scripted(200, b'{"id": "chatcmpl-0", "choices": [{"mess')


def wrong_schema() -> Scripted:
    """Status 200 and JSON, but no completion."""
    return Scripted(200, json.dumps({"result": "fine", "choices": None}).encode())


class ScriptedServer:
    """`with ScriptedServer(handler) as base_url`; `calls` lists every request that arrived, in order."""

    def __init__(self, handler: Callable[[Call], str | Scripted]) -> None:
        self.handler = handler
        self.calls: list[Call] = []
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> str:
        self._server = _Loopback(("127.0.0.1", 0), _responder(self))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def register(self, body: dict[str, Any], headers: dict[str, str]) -> Call:
        same = json.dumps(body["messages"], sort_keys=True)
        with self._lock:
            call = Call(body, headers, len(self.calls), self._seen[same])
            self._seen[same] += 1
            self.calls.append(call)
        return call


class _Loopback(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a late answer's thread may still sleep when the test is over

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is part of the script, not an error to report."""


def _responder(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Responder(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self.send(failure(404, f"no such path: {self.path}"))
            answer = server.handler(server.register(body, dict(self.headers.items())))
            self.send(completion(answer) if isinstance(answer, str) else answer)

        def send(self, scripted: Scripted) -> None:
            time.sleep(scripted.delay)
            self.send_response(scripted.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(scripted.body))}
            for name, value in (headers | scripted.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(scripted.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Responder
