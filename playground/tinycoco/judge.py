r"""An OpenAI-compatible judge on loopback that rates TinyCOCO's MMHal-Bench and HallusionBench by rules.

    python -m playground.tinycoco benchmarks --out runs/bench
    python -m playground.tinycoco judge --port 8765 &
    DAMA_BENCH_DATA=runs/bench bash scripts/eval_mmhal.sh playground/tinycoco/weights/llava \
        --judge-base-url http://127.0.0.1:8765/v1 --judge-model rules

It serves one model, "rules", which is no language model: the rating follows from what is drawn in the scene and what
the answer says (playground.tinycoco.mmhal, playground.tinycoco.hallusionbench). Any other model or prompt is refused.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dama.console import log
from playground.tinycoco.hallusionbench import judge_prompt
from playground.tinycoco.mmhal import rate_prompt

HOST = "127.0.0.1"
MODEL = "rules"
VERSION = "TinyCOCO rules 1, no language model"
LARGEST_REQUEST = 1 << 20  # bytes
SILENCE = 30  # seconds that a client may be silent


class RequestError(ValueError):
    """A request that gets an error status instead of a verdict."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class JudgeServer(ThreadingHTTPServer):
    """Serve the rules on 127.0.0.1; port 0 takes a free one. Raises OSError, naming the port, where it is in use."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"judge: expected a free port on {HOST}, got {port} ({reason})\n"
                "Remedy: stop what uses it, or give another --port; 0 takes a free one"
            ) from error

    @property
    def url(self) -> str:
        """What --judge-base-url takes."""
        return f"http://{HOST}:{self.server_port}/v1"


def serve(port: int) -> None:
    """Serve until interrupted."""
    with JudgeServer(port) as server:
        log(f"judge: rules of TinyCOCO, no language model, at {server.url}; Ctrl-C ends it")
        log(f"judge: use it by --judge-base-url {server.url} --judge-model {MODEL}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log("judge: ended")


def completion(body: Any) -> dict[str, Any]:
    """The reply to the body of a chat completion request. Raises RequestError naming what is wrong with it."""
    if not isinstance(body, dict):
        raise RequestError(400, f"request: expected a JSON object, got {type(body).__name__}")
    if body.get("model") != MODEL:
        message = f"model: expected {MODEL!r}, got {body.get('model')!r}; this judge is no language model"
        raise RequestError(404, f"{message}\nRemedy: add --judge-model {MODEL}")
    if body.get("stream") or body.get("n") not in (None, 1):
        raise RequestError(400, "request: expected n 1 and stream false, got other settings")
    prompt = _prompt(body.get("messages"))
    try:
        text = judge_prompt(prompt) or rate_prompt(prompt).text()
    except ValueError as error:
        raise RequestError(400, str(error)) from error
    tokens = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}  # words stand for tokens
    reply = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-rules",
        "object": "chat.completion",
        "created": 0,
        "model": VERSION,
        "choices": [{"index": 0, "finish_reason": "stop", "message": reply}],
        "usage": tokens | {"total_tokens": sum(tokens.values())},
    }


def _prompt(messages: Any) -> str:
    """The text of the one user message."""
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        content = messages[0].get("content")
        if isinstance(content, str):
            return content
    raise RequestError(400, "messages: expected one message whose content is text, got another form")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SILENCE

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            listed = {"id": MODEL, "object": "model", "created": 0, "owned_by": VERSION}
            self._send(200, {"object": "list", "data": [listed]})
        else:
            self._refuse(RequestError(404, f"path: expected /v1/models or /v1/chat/completions, got {self.path}"))

    def do_POST(self) -> None:
        try:
            self._send(200, completion(self._body()))
        except RequestError as error:
            self._refuse(error)

    def _body(self) -> Any:
        """The request's JSON. An unread body would be taken for the next request: the connection ends after errors."""
        if self.path != "/v1/chat/completions":
            raise RequestError(404, f"path: expected /v1/chat/completions, got {self.path}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(411, "request: expected a Content-Length, got none")
        if len(length) > 9 or int(length) > LARGEST_REQUEST:
            self.rfile.read(min(int(length[:9]), 4 * LARGEST_REQUEST))  # or a client that still sends sees no answer
            raise RequestError(413, f"request: expected at most {LARGEST_REQUEST} bytes, got {length[:20]}")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"request: expected JSON, got {type(error).__name__}") from error

    def _refuse(self, error: RequestError) -> None:
        self.close_connection = True
        self._send(error.status, {"error": {"message": str(error), "type": "invalid_request_error"}})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the evaluation reports its requests."""
