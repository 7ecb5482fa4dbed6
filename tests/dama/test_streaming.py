"""Streamed answers from a scripted server: text as it grows, stops, limits, and everything that can go wrong."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dama import streaming
from dama.streaming import stream_answer


def event(content):
    return {"choices": [{"index": 0, "delta": {"content": content}}]}


SCRIPTS = {
    "short": [event("word 0 "), {"choices": []}, event(None), event("word 1")],
    "half": [event("a\ud800b")],
    "empty": [event(" ")],
    "breaks": [event("a"), {"error": {"message": "engine died"}}],
    "other types": [event({"text": 1})],
    "no object": [["a", "list"]],
    "endless": [event("word ")] * 100,
}


class Handler(BaseHTTPRequestHandler):
    """Streams SCRIPTS[model]; "hangs" sends one event and then nothing."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        if body["model"] == "absent":
            return self.refuse()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for one in SCRIPTS.get(body["model"], [event("word 0")]):
            self.send(json.dumps(one))
        if body["model"] == "hangs":
            self.server.released.wait(20)
            return None
        return self.send("[DONE]")

    def send(self, data):
        self.wfile.write(f": comment\n\ndata: {data}\n\n".encode())
        self.wfile.flush()

    def refuse(self):
        content = json.dumps({"error": {"message": "no such model"}}).encode()
        self.send_response(404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Log nothing."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked, found.released = [], threading.Event()
        found.url = f"http://user:pass@127.0.0.1:{found.server_port}/v1"
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield found
        found.released.set()
        found.shutdown()


def answers(server, model, stop=None, **limits):
    messages = [{"role": "user", "content": "why?"}]
    return stream_answer(server.url, model, messages, stop or threading.Event(), max_tokens=7, **limits)


def test_the_answer_grows(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.url = server.url.replace("user:pass@", "")
    assert list(answers(server, "short")) == ["word 0", "word 0 word 1"]
    ((path, key, body),) = server.asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["max_tokens"] == 7 and body["stream"] is True and "temperature" not in body


def test_half_a_surrogate_pair_is_replaced(server):
    assert list(answers(server, "half")) == ["a\ufffdb"]


def test_stop_reaches_a_silent_server(server):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begun = time.monotonic()
    assert list(answers(server, "hangs", stop)) == ["word 0"]
    assert time.monotonic() - begun < 10


def test_an_abandoned_iterator_stops_too(server):
    stop = threading.Event()
    texts = answers(server, "hangs", stop)
    assert next(texts) == "word 0"
    texts.close()
    assert stop.is_set()


@pytest.mark.parametrize(
    ("model", "limits", "message"),
    [
        ("absent", {}, "status 404 for 'absent': .*no such model"),
        ("breaks", {}, "the server broke off: .*engine died"),
        ("empty", {}, "got none or an answer without text"),
        ("other types", {}, "expected text in delta.content, got "),
        ("no object", {}, "server http://"),
        ("hangs", {"silence_s": 0.3}, "[Tt]imed? ?out"),
        ("hangs", {"answer_s": 0.5}, "no end of the answer within 0.5 s"),
    ],
)
def test_failures_are_named_without_credentials(server, model, limits, message):
    with pytest.raises(ValueError, match=message) as error:
        list(answers(server, model, **limits))
    assert "pass" not in str(error.value)


def test_answers_and_replies_are_bounded(server, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_ANSWER", 20)
    with pytest.raises(ValueError, match="the answer has more than 20 characters"):
        list(answers(server, "endless"))
    monkeypatch.setattr(streaming, "MAX_ANSWER", 100_000)
    monkeypatch.setattr(streaming, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="the server sends without end"):
        list(answers(server, "endless"))


def test_an_unreachable_server_is_named():
    with pytest.raises(ValueError, match="server http://127.0.0.1:9/v1: Connection error"):
        list(stream_answer("http://127.0.0.1:9/v1", "m", [], threading.Event()))
