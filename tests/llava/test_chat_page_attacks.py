"""Attacks on the chat page over HTTP: foreign names and pages, floods of uploads, hung and malformed answers."""

import asyncio
import http.client
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from gradio import processing_utils

from llava.generation.request import Decoding
from llava.serve import gradio_web_server as page
from llava.serve.chat import replies_together
from llava.serve.guard import Guard
from llava.serve.server_model import MAX_LINE, ServerModel


class Upstream(BaseHTTPRequestHandler):
    """Streams the lines that the question names in `server.scripts`; "hang" never answers, "drip" never ends."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        self.server.asked.append(question)
        self.server.open += 1
        try:
            self.answer(question)
        except OSError:
            pass
        finally:
            self.server.open -= 1

    def answer(self, question):
        if question == "hang":
            self.connection.recv(1)
            return
        self.send_response(200)
        self.end_headers()
        while question == "drip":
            self.wfile.write(b" ")
            time.sleep(0.05)
        for line in self.server.scripts[question]:
            self.wfile.write(line)

    def log_message(self, *args):
        pass


def event(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


FINE = [event(choices=[{"delta": {"content": "fine"}}]), b"data: [DONE]\n\n"]
NULLS = [
    event(choices=None),
    event(choices=[]),
    event(choices=[None]),
    event(choices=[{"delta": None}]),
    event(),
    b"data:\n",
    event(choices=[{"delta": {"content": None}}]),
    event(choices=[{}]),
    event(error=None),
    event(usage=None),
]
BAD = {
    "no object": (
        [event(choices=[{"delta": {"content": "a"}}]), b"data: [1]\n\n"],
        "expected event to be dict or null",
    ),
    "null event": ([b"data: null\n\n", b"data: [DONE]\n\n"], "answer without text"),
    "choices": ([event(choices={"0": 1})], "expected choices to be list or null, got dict"),
    "choice": ([event(choices=["a"])], "expected choice to be dict or null, got str"),
    "delta": ([event(choices=[{"delta": "a"}])], "expected delta to be dict or null, got str"),
    "content": ([event(choices=[{"delta": {"content": 7}}])], "expected content to be str or null, got int"),
    "no json": ([b"data: {torn\n\n"], "Expecting property name"),
    "no utf-8": ([b"data: \xff\n\n"], "can't decode byte"),
    "deep": ([b"data: " + b"[" * 100_000 + b"\n\n"], "nested too deeply"),
    "digits": ([b"data: " + b"9" * 5000 + b"\n\n"], "Exceeds the limit"),
    "error": (
        [event(error={"message": "engine died, Authorization: Bearer S3CRET"})],
        "the server broke off: .*engine died",
    ),
    "silent": ([b"data: [DONE]\n\n"], "answer without text"),
    "nulls": (NULLS, "answer without text"),
    "no stream": ([json.dumps({"choices": [{"message": {"content": "a"}}]}).encode()], "expected a stream of events"),
    "long line": ([b"data: " + b"x" * (MAX_LINE + 9)], "sends without end"),
    "long answer": ([event(choices=[{"delta": {"content": "x" * 60_000}}])] * 2, "more than 100,000 characters"),
}


@pytest.fixture(scope="module")
def upstream():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.daemon_threads, server.asked, server.open = True, [], 0
    server.scripts = {name: lines for name, (lines, _) in BAD.items()}
    server.scripts |= {"fine": FINE, "with nulls": [*NULLS, *FINE]}
    server.scripts["half"] = [b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n']
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()


def asked(upstream, question, base=None):
    model = ServerModel(base or upstream.url, "m")
    return list(model.reply([], question, None, Decoding(max_new_tokens=7), threading.Event()))


# --------------------------------------------------------------------------------------------------- streamed answers


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_an_error(name, upstream):
    """So each reaches the visitor as a note; nothing ends the chat in silence, and no credentials are in it."""
    with pytest.raises(ValueError, match=BAD[name][1]) as caught:
        asked(upstream, name, upstream.url.replace("//", "//user:S3CRET@"))
    assert "S3CRET" not in str(caught.value)


def test_nulls_between_words_are_no_error(upstream):
    assert asked(upstream, "with nulls") == ["fine"] and asked(upstream, "half") == ["a?"]


def test_an_answer_that_drips_ends(upstream, monkeypatch):
    monkeypatch.setattr(ServerModel, "answer_s", 0.5)
    with pytest.raises(ValueError, match="no end of the answer within 0.5 s"):
        asked(upstream, "drip")


def test_the_reader_of_silent_models_may_leave():
    forever = threading.Event()
    texts = replies_together([iter(forever.wait, True)], pulse_s=0.02)
    assert [next(texts) for _ in range(3)] == [[""]] * 3


# ---------------------------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def site(upstream):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")
        with page.private_cache() as folder:
            demo = page.build_demo([ServerModel(upstream.url, "m")])
            address = page.serve(demo, "127.0.0.1", None, wait=False, names=["Chat.example.org"])
            yield address.split("//")[1].strip("/"), folder
            demo.close(verbose=False)


def call(site, method, path, body=None, headers=()):
    connection = http.client.HTTPConnection(site[0], timeout=30)
    connection.putrequest(method, path, skip_host=True)
    headers = [*headers] if any(name == "Host" for name, _ in headers) else [("Host", site[0]), *headers]
    for name, value in headers if body is None else [*headers, ("Content-Length", str(len(body)))]:
        connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply, connection


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "",
    "[::2]", "[", "evil.example@127.0.0.1x", "chat.example.org.evil.example",
])  # fmt: skip
def test_a_name_that_is_not_the_pages_is_refused(site, host):
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload")):
        reply, _ = call(site, method, path, headers=[("Host", host)])
        assert reply.status in (400, 421) and b"gradio" not in reply.read()


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost", "LOCALHOST:7", "127.9.9.9", "[::1]:7860", "chat.example.org"]
)
def test_the_pages_own_names(site, host):
    reply, _ = call(site, "GET", "/config", headers=[("Host", host)])
    assert reply.status == 200 and "default-src 'self'" in reply.headers["Content-Security-Policy"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "file://",
                                    "http://[", "http://evil.example/chat.example.org"])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_requests_of_other_pages_are_refused(site, origin, method):
    before = len(os.listdir(site[1]))
    headers = [
        ("Origin", origin),
        ("Access-Control-Request-Method", "POST"),
        ("Content-Type", "multipart/form-data; boundary=b"),
    ]
    reply, _ = call(site, method, "/gradio_api/upload", upload_body(b"x"), headers)
    assert reply.status == 403 and reply.headers["Access-Control-Allow-Origin"] is None
    assert len(os.listdir(site[1])) == before


def test_the_pages_own_requests_pass(site):
    for headers in (
        [("Origin", f"http://{site[0]}")],
        [("Host", "chat.example.org"), ("Origin", "https://chat.example.org")],
    ):
        assert call(site, "GET", "/config", headers=headers)[0].status == 200


def upload_body(data, name="a.png"):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--b--\r\n"


def test_a_large_request_is_refused_at_its_head(site):
    for path, size in (("/gradio_api/upload", page.MAX_BYTES + (1 << 17)), ("/gradio_api/queue/join", 2 << 20)):
        reply, _ = call(site, "POST", path, headers=[("Content-Length", str(size))])
        assert reply.status == 413


def events(site, fn, data, session):
    join = json.dumps(
        {"data": data, "fn_index": fn, "session_hash": session, "trigger_id": 1, "event_data": None}
    ).encode()
    reply, _ = call(site, "POST", "/gradio_api/queue/join", join, [("Content-Type", "application/json")])
    assert reply.status == 200
    return call(site, "GET", f"/gradio_api/queue/data?session_hash={session}")


def ask_function(site):
    config = json.loads(call(site, "GET", "/config")[0].read())
    return next(
        d["id"] for d in config["dependencies"] if any(t[1] == "submit" for t in d["targets"]) and len(d["inputs"]) == 6
    )


def until_done(reply):
    said = ""
    for line in reply:
        said += line.decode()
        if "process_completed" in said:
            break
    return said


@pytest.mark.parametrize("data", [
    [None, "x" * 8001, "", 0, 0.7, 64], [None, "fine", "x" * 2001, 0, 0.7, 64],
    [None, "fine", "", 5, 0.7, 64], [None, "fine", "", "x", 0.7, 64], [None, "fine", "", 0, 0.7, 10**9],
    [None, "fine", "", 0, -1, 64], [None, "fine", "", None, 0.7, 64],
])  # fmt: skip
def test_limits_hold_without_the_browser(site, upstream, data):
    before = len(upstream.asked)
    until_done(events(site, ask_function(site), data, f"limits-{time.monotonic()}")[0])
    assert len(upstream.asked) == before


@pytest.mark.parametrize("listed", [None, ""])
def test_a_page_without_vocabulary_answers(site, upstream, listed):
    """A browser sends None for the field that such a page does not show."""
    before = len(upstream.asked)
    until_done(events(site, ask_function(site), [None, "fine", listed, 0, 0.7, 64], f"listed-{listed}")[0])
    assert upstream.asked[before:] == ["fine"]


@pytest.mark.parametrize(
    "path", ["http://127.0.0.1:9/a.png", "https://evil.example/a.png", "HTTP://evil.example/a.png"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_page_fetches_no_address(site, path, stream, monkeypatch):
    """Gradio would download a "file" that names an address, of any size; only what was uploaded is a picture."""
    fetched = []
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", lambda url, cache_dir: fetched.append(url))
    config = json.loads(call(site, "GET", "/config")[0].read())
    choose = next(d["id"] for d in config["dependencies"] if any(t[1] == "upload" for t in d["targets"]))
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}, "is_stream": stream}
    said = until_done(events(site, choose, [None, picture], f"address-{time.monotonic()}")[0])
    assert fetched == [] and '"success":false' in said


def test_hung_answers_free_their_places_when_their_readers_leave(site, upstream):
    fn = ask_function(site)
    hung = [events(site, fn, [None, "hang", "", 0, 0.7, 64], f"hung-{i}") for i in range(4)]
    while upstream.open < 4:
        time.sleep(0.05)
    for reply, connection in hung:
        reply.close()
        connection.close()
    assert "fine" in until_done(events(site, fn, [None, "fine", "", 0, 0.7, 64], "fifth")[0])
    while upstream.open:
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------------------- guard


def guarded(folder, chunks, delay=0.0, headers=(), path="/gradio_api/upload", **limits):
    """(status, bytes that reached the page) of one POST of these chunks through a Guard."""
    reached, sent = bytearray(), []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            reached.extend(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    pending = list(chunks)

    async def receive():
        await asyncio.sleep(delay)
        return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"host", b"localhost"), *headers],
    }
    asyncio.run(Guard(app, folder, 1000, names=set(), **limits)(scope, receive, send))
    return (sent[0]["status"] if sent else None), len(reached)


def test_a_body_without_length_ends_at_the_limit(tmp_path):
    assert guarded(tmp_path, [b"x" * 100] * 3) == (200, 300)
    status, reached = guarded(tmp_path, [b"x" * 10_000] * 50)
    assert status is None and reached <= 1000 + (1 << 16)


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/"])
def test_a_slow_upload_ends(tmp_path, path):
    """So does any other request whose body comes byte by byte."""
    assert guarded(tmp_path, [b"x"] * 200, delay=0.02, path=path, upload_s=0.2)[0] is None


def test_the_disk_quota(tmp_path):
    """A quota of 10 kB: what has expired makes room, what has not does not; links are not followed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.png").write_bytes(b"x" * 9500)
    assert guarded(tmp_path, [b"x"], quota=10_000)[0] == 507
    os.utime(tmp_path / "a" / "old.png", (1, 1))
    (tmp_path / "outside").symlink_to(__file__)
    assert guarded(tmp_path, [b"x"], quota=10_000) == (200, 1)
    assert not (tmp_path / "a" / "old.png").exists() and os.path.exists(__file__)
    assert guarded(tmp_path, [b"x"], at_once=0)[0] == 503


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"99999999999999999999999999", "٣".encode(), b""])
def test_a_length_that_is_no_number_is_refused(tmp_path, length):
    assert guarded(tmp_path, [b"x"], headers=[(b"content-length", length)]) == (413, 0)
