"""The chat client against servers that attack, err or talk too much, on loopback."""

import gzip
import json
import os
import re
import socket
import threading
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dama import bounded_http
from dama.chat import ChatClient, ChatError, ChatRequest, ChatSettings, after_thoughts
from dama.console import write_atomic
from dama.redact import HIDDEN, redacted
from dama.synth.respond import NO_ANSWER, Question, Sampling, ServedResponder, _records
from dama.synth.rewards import EndpointReward, Judged, read_grade
from tests.openai_server import Scripted, ScriptedServer, completion, failure


def ask_of(*questions):
    return [ChatRequest(f"q{i}", ({"role": "user", "content": text},)) for i, text in enumerate(questions)]


def client_of(base_url, cache=None, **settings):
    settings = {"retries": 1, "timeout": 5.0, "give_up": True} | settings
    return ChatClient(ChatSettings(base_url, "judge", **settings), cache)


def body(message, *, finish="stop", usage=None, **others):
    """A completion to the letter: `message` is its message."""
    fields = {"choices": [{"index": 0, "finish_reason": finish, "message": message}], "usage": usage} | others
    return Scripted(200, json.dumps(fields).encode())


def says(content, **others):
    return body({"role": "assistant", "content": content}, **others)


def reported(error):
    """An error with status 200."""
    return Scripted(200, json.dumps(error).encode())


# ------------------------------------------------------------------------------------------------- thoughts and texts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>no?</think>Yes", "Yes"),
        ("\n<think>\nno\n</think>\n\nYes.\n", "Yes."),
        ("no, wait </think> Yes", "Yes"),  # the template ends with the opening tag
        ("<think>a</think><think>b</think>Yes", "Yes"),
        ("<thinking>no</thinking> Yes", "Yes"),
        ("<THINK>no</THINK> Yes", "Yes"),
        ("<reasoning>no</reasoning>Yes", "Yes"),
        ("[THINK]no[/THINK]Yes", "Yes"),
        ("◁think▷no◁/think▷Yes", "Yes"),
        ("<seed:think>no</seed:think>Yes", "Yes"),
        ("<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>Yes<|return|>", "Yes"),
        ("<|channel|>analysis<|message|>no", ""),
        ("<scratchpad>no</scratchpad>Yes", "Yes"),
        ("<reflection>no</reflection> Yes", "Yes"),
        ("<analysis>no</analysis>Yes", "Yes"),
        ('<think lang="en">no</think>Yes', "Yes"),
        ("<|begin_of_thought|>no<|end_of_thought|><|begin_of_solution|>Yes<|end_of_solution|>", "Yes"),
        ("<|START_THINKING|>no<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Yes"),
        ("<unused94>thought\nno<unused95>Yes", "Yes"),
        ("<think>no</think><answer>Yes</answer>", "Yes"),
        ("<think>no</think>\n<|begin_of_box|>Yes<|end_of_box|>", "Yes"),
        ("<SUMMARY>a</SUMMARY><REASONING>no</REASONING><CONCLUSION>\nYes\n</CONCLUSION>", "Yes"),
        ("analysisIs there a dog? No.assistantfinalYes", "Yes"),  # channels whose markers the server left out
        ('<think lang="en">no', ""),
        ("\ufeff<think>no", ""),
        ("<|begin_of_thought|>no", ""),
        ("<think>no, there is not", ""),
        ("<think>a</think> <think>no", ""),
        ("<think>no</think>", ""),
        ("Yes", "Yes"),
        ("I think <b> so", "I think <b> so"),
        ("Analysis shows a dog.", "Analysis shows a dog."),
        ("The <answer> tag", "The <answer> tag"),
        ("", ""),
    ],
)
def test_thoughts_are_no_answer(text, answer):
    assert after_thoughts(text) == answer


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a dog"}], "a dog"),
        ([{"type": "text", "text": "a "}, {"type": "output_text", "text": "dog"}], "a dog"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "cat"}]}, {"text": "a dog"}], "a dog"),
        (["a ", "dog"], "a dog"),
        ([{"type": "text", "text": {"value": "a dog"}}], "a dog"),
        ([{"type": "text", "text": None}, {"type": "image_url"}], ""),
        ([], ""),
        (None, ""),
    ],
)  # fmt: skip
def test_content_in_chunks_is_read(content, text):
    with ScriptedServer(lambda call: says(content)) as url:
        assert client_of(url).ask(ask_of("a"))["q0"].text == text


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": "12", "completion_tokens": "3"}, (12, 3)),
        ({"prompt_tokens": "12.0", "completion_tokens": 3.0}, (12, 3)),
        ({"prompt_tokens": "many", "completion_tokens": [3]}, (0, 0)),
        ({"prompt_tokens": None}, (0, 0)),
        ({"prompt_tokens": -4, "completion_tokens": 1e999}, (0, 0)),
        ("none", (0, 0)),
        (None, (0, 0)),
    ],
)
def test_usage_of_any_type_is_counted(usage, tokens):
    with ScriptedServer(lambda call: says("fine", usage=usage)) as url:
        client = client_of(url)
        assert client.ask(ask_of("a", "b"))["q1"].text == "fine"
    assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (2 * tokens[0], 2 * tokens[1])


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({"content": None}, "length", "empty reply, finish reason length"),
        ({"content": "", "reasoning_content": "Is it a dog?"}, "length", "empty reply, finish reason length"),
        ({"content": None, "refusal": "I can't help\nwith that."}, "stop", "refusal: I can't help with that."),
        ({"content": " \n"}, "content_filter", "empty reply, finish reason content_filter"),
        ({"content": "<think>A dog"}, "length", "thoughts without an answer, finish reason length"),
        ({}, None, "empty reply, finish reason not named"),
        ({"content": "A dog"}, "length", ""),
    ],
)
def test_a_missing_answer_has_a_reason_which_the_cache_keeps(tmp_path, message, finish, reason):
    with ScriptedServer(lambda call: body(message, finish=finish)) as url:
        first = client_of(url, tmp_path / "cache").ask(ask_of("a"))["q0"]
    again = client_of(url, tmp_path / "cache").ask(ask_of("a"))["q0"]
    assert first.missing == again.missing == reason and again.cached
    assert json.loads((tmp_path / "cache").read_text())["finish"] == again.finish


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d"])
def test_half_a_surrogate_pair_costs_one_character(tmp_path, half):
    """In the text, in the model's name, in a refusal and in an error; whole pairs stay."""
    raw = completion("X \N{GRINNING FACE}").body.replace(b'"X ', f'"{half} '.encode())
    raw = raw.replace(b'"model": "', f'"model": "{half}'.encode())
    error = failure(400, "X").body.replace(b'"X"', f'"{half}"'.encode())
    answers = {"bad": Scripted(200, raw), "error": Scripted(400, error), "good": completion("good")}
    with ScriptedServer(lambda call: answers[call.text]) as url:
        replies = client_of(url, tmp_path / "cache").ask(ask_of("bad", "error", "good"))
        client_of(url, tmp_path / "cache").ask(ask_of("bad", "good"))
    assert replies["q0"].text.endswith(" \N{GRINNING FACE}") and "\N{REPLACEMENT CHARACTER}" in replies["q0"].text
    assert replies["q2"].text == "good" and "\N{REPLACEMENT CHARACTER}" in replies["q0"].model
    for reply in replies.values():
        f"{reply.text} {reply.error} {reply.model}".encode()
    assert len((tmp_path / "cache").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "grade"),
    [("<think>90?</think>80", 80.0), ("<think>90", None), ("-5", None), ("80, 90", None), ("Grade: 80/100", 80.0)],
)
def test_a_grade_is_what_a_judge_says_in_the_end(text, grade):
    assert read_grade(text) == grade


# ---------------------------------------------------------------------------------------------------- hopeless servers

HOPELESS = {
    "max_tokens": (failure(400, "Unsupported parameter: 'max_tokens' with this model."), "--judge-omit max_tokens"),
    "temperature": (failure(422, "temperature must be 1"), "--omit temperature"),
    "parameter by name": (
        Scripted(400, json.dumps({"error": {"message": "not allowed", "param": "max_completion_tokens"}}).encode()),
        "--judge-omit max_tokens",
    ),
    "key, with status 200": (reported({"error": {"message": "bad key", "code": 401}}), "set OPENAI_API_KEY"),
    "model, with status 200": (reported({"error": {"message": "what?", "code": "model_not_found"}}), "/models"),
    "setting, with status 200": (reported({"error": {"message": "max_tokens: too many"}}), "leave it to the server"),
    "no credit": (Scripted(429, b'{"error": {"message": "quota", "code": "insufficient_quota"}}'), "no credit"),
    "login page": (Scripted(200, b"<!doctype html><p>Log in", {"Content-Type": "text/html"}), "web page"),
    "login page, called JSON": (Scripted(200, b"\n<html>Log in</html>"), "web page"),
    "method": (failure(405, "Method Not Allowed"), "correct the base URL"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hopeless_server_ends_it_at_the_first_reply(name):
    trouble, words = HOPELESS[name]
    server = ScriptedServer(lambda call: trouble)
    with server as url, pytest.raises(ChatError, match="(?s)" + re.escape(words).replace(r"\ ", " ")):
        client_of(url, retries=6).ask(ask_of(*"abcdefgh"))
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        failure(400, "upstream is unhappy"),
        failure(500, "out of order"),
        reported({"error": "rate limit"}),
        reported({"detail": "no worker"}),
        reported({"object": "error", "message": "engine died", "code": 500}),
        Scripted(200, b"[]"),
        Scripted(200, b"[" * 100_000),
        Scripted(200, b""),
    ],
)
def test_where_every_request_fails_it_ends_with_the_servers_words(trouble, monkeypatch):
    """Three are asked, one after the other; then it is clear that the others would fail as well."""
    monkeypatch.setattr("dama.chat._LONGEST_PAUSE", 0.01)
    server = ScriptedServer(lambda call: trouble)
    with server as url, pytest.raises(ChatError, match="no request is answered") as error:
        client_of(url).ask(ask_of(*"abcdefgh"))
    assert len({call.text for call in server.calls}) == 3
    said = trouble.body.decode()
    words = [word for word in ("unhappy", "out of order", "rate limit", "no worker", "engine died") if word in said]
    assert all(word in str(error.value) for word in words)


def test_a_single_request_that_fails_is_no_success():
    with ScriptedServer(lambda call: failure(400, "no")) as url, pytest.raises(ChatError, match="request is answered"):
        client_of(url).ask(ask_of("a"))


def test_prompts_that_are_too_long_are_faults_of_their_own():
    """Four of five are refused for what they say, the first three among them."""
    message = "'max_tokens' is too large: 512. This model's maximum context length is 2048 tokens."
    with ScriptedServer(lambda call: "fine" if call.text == "e" else failure(400, message)) as url:
        replies = client_of(url).ask(ask_of(*"abcde"))
    assert [reply.text for reply in replies.values()] == [None] * 4 + ["fine"]
    assert "context length" in replies["q0"].error


def test_without_giving_up_all_failures_are_counted(monkeypatch):
    monkeypatch.setattr("dama.chat._LONGEST_PAUSE", 0.01)
    with ScriptedServer(lambda call: failure(500, "out of order")) as url:
        client = client_of(url, give_up=False)
        replies = client.ask(ask_of(*"abcdefgh"))
    assert len(replies) == client.usage.failed == 8


@pytest.mark.parametrize(
    ("path", "other"), [("/v1", "http://127.0.0.1:{port}"), ("", "http://127.0.0.1:{port}/v1"), ("/api", "/api/v1")]
)
def test_the_remedy_for_an_unknown_address_names_it_with_and_without_v1(path, other):
    server = ScriptedServer(lambda call: failure(404, "no such model"))
    with server as url, pytest.raises(ChatError) as error:
        client_of(url.removesuffix("/v1") + path).ask(ask_of("a", "b"))
    port = url.split(":")[2].split("/")[0]
    assert f"asked was http://127.0.0.1:{port}{path}/chat/completions" in str(error.value)
    assert other.format(port=port) in str(error.value)


def test_settings_can_be_left_out():
    server = ScriptedServer(lambda call: "fine")
    with server as url:
        settings = ChatSettings(url, "judge", top_p=0.5, seed=3)
        ChatClient(settings.without(["max_tokens", "temperature"])).ask(ask_of("a"))
        ChatClient(settings.without(["top_p", "seed"])).ask(ask_of("a"))
    assert [set(call.body) - {"model", "messages"} for call in server.calls] == [
        {"top_p", "seed"}, {"temperature", "max_tokens"},
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected some of max_tokens.*got beams"):
        settings.without(["beams"])


@pytest.mark.parametrize("address", ["ftp://host/v1", "http://", "http://host:port/v1", "http://[::1", "host:8000"])
def test_what_is_no_address_is_refused_at_once(address):
    with pytest.raises(ValueError, match="base_url: expected http"):
        ChatSettings(address, "judge")


# ------------------------------------------------------------------------------------------------------ bytes and time


def deflated(zeros):
    return Scripted(200, zlib.compress(b"0" * zeros), {"Content-Encoding": "deflate"})


@pytest.mark.parametrize(
    "bomb",
    [
        Scripted(200, gzip.compress(b"0" * (1 << 26)), {"Content-Encoding": "gzip"}),
        Scripted(200, gzip.compress(b"0" * (1 << 26)), {"Content-Encoding": "x-gzip"}),
        deflated(1 << 26),
        Scripted(500, gzip.compress(b"0" * (1 << 26)), {"Content-Encoding": "gzip"}),
        Scripted(200, b"0" * (1 << 22)),
    ],
)
def test_a_reply_has_a_largest_size(bomb, monkeypatch):
    """64 MB in 64 kB, and 4 MB as they are: not more than the 1 MB that is allowed here is ever held."""
    monkeypatch.setattr(bounded_http, "LARGEST_REPLY", 1 << 20)
    server = ScriptedServer(lambda call: bomb if call.text == "bomb" else "fine")
    with server as url:
        client = client_of(url)
        client.ask(ask_of("warm-up"))
        tracemalloc.start()
        replies = client.ask(ask_of("bomb", "good"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "more than 1048576 bytes" in replies["q0"].error and replies["q1"].text == "fine"
    assert sum(call.text == "bomb" for call in server.calls) == 1  # another attempt would end alike
    assert peak < 12 << 20


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
def test_other_encodings_are_refused(encoding):
    answers = {"odd": Scripted(200, b"..", {"Content-Encoding": encoding}), "good": completion("fine")}
    with ScriptedServer(lambda call: answers[call.text]) as url:
        replies = client_of(url).ask(ask_of("odd", "good"))
    assert "expected a reply in gzip or plain" in replies["q0"].error and replies["q1"].text == "fine"


def test_a_gzipped_reply_is_read():
    packed = Scripted(200, gzip.compress(completion("fine").body), {"Content-Encoding": "gzip"})
    with ScriptedServer(lambda call: packed) as url:
        assert client_of(url).ask(ask_of("a"))["q0"].text == "fine"


class Dripping:
    """`with Dripping(head) as base_url`: sends `head` at once, and then a byte every 50 ms until the client leaves."""

    def __init__(self, head=b""):
        self.head, self.stopped = head, threading.Event()

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def serve(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.drip, args=(connection,), daemon=True).start()

    def drip(self, connection):
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(self.head)
                while not self.stopped.wait(0.05):
                    connection.sendall(b"a")
            except OSError:  # the client has gone
                return

    def __exit__(self, *_):
        self.stopped.set()
        self.socket.close()


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Padding: ",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n",
    ],
)
def test_a_reply_has_a_longest_time(head):
    """A byte now and then keeps any limit on silence from firing; the attempt ends all the same."""
    with Dripping(head) as url, pytest.raises(ChatError, match="no complete reply within 1 seconds"):
        client_of(url, retries=0, timeout=0.5).ask(ask_of("a"))


def test_a_reward_endpoint_is_bounded_too(tmp_path):
    item = Judged(tmp_path / "none.png", "", "text")
    with Dripping(b"HTTP/1.1 200 OK\r\n\r\n") as url, pytest.raises(ValueError, match="no complete reply within 1 s"):
        EndpointReward(url, sees_image=False, timeout=0.5).score([item])


# ----------------------------------------------------------------------------------------------------------- redirects


def redirect(status, target):
    return Scripted(status, b"", {"Location": target})


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_prompts_stay_on_their_host(status):
    """Another port is another server. Nothing arrives there."""
    other = ScriptedServer(lambda call: "stolen")
    with other as elsewhere:
        target = elsewhere.replace("//", "//user:secret@") + "/chat/completions"
        server = ScriptedServer(lambda call: redirect(status, target))
        with server as url, pytest.raises(ChatError, match="(?s)redirects to another host.*as the base URL") as error:
            client_of(url).ask(ask_of("a", "b"))
    assert len(server.calls) == 1 and not other.calls
    assert elsewhere.split("/")[2] in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    "target", ["//127.0.0.2/v1", "https://127.0.0.1/v1", "ftp://127.0.0.1/", "http://localhost/", "file:///etc"]
)
def test_other_forms_of_another_host(target):
    with ScriptedServer(lambda call: redirect(307, target)) as url, pytest.raises(ChatError, match="another host"):
        client_of(url).ask(ask_of("a"))


def test_redirects_on_the_same_host_are_followed_and_end():
    server = ScriptedServer(lambda call: redirect(307, "/v1/chat/completions") if call.attempt < 2 else "fine")
    with server as url:
        assert client_of(url).ask(ask_of("a"))["q0"].text == "fine"
    assert [call.body["messages"][0]["content"] for call in server.calls] == ["a"] * 3
    loop = ScriptedServer(lambda call: redirect(308, "/v1/chat/completions"))
    with loop as url, pytest.raises(ChatError, match="more than 3 redirects"):
        client_of(url).ask(ask_of("a"))
    assert len(loop.calls) == 4


# --------------------------------------------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    "text",
    [
        "http://user:SECRET12@host/v1", "https://SECRET12@host", "http://us@er:SECRET12@host/",
        "Authorization: Bearer SECRET12", '{"authorization": "Bearer SECRET12"}', "authorization=SECRET12",
        "Proxy-Authorization: Basic dXNlcjpTRUNSRVQxMg==", "Basic dXNlcjpTRUNSRVQxMg==", "bearer SECRET12",
        "x-api-key: SECRET12", '"api_key": "SECRET12"', "http://host/?token=SECRET12&a=b", "?api-key=SECRET12",
        "Incorrect API key provided: sk-SECRET12", "Cookie: session=SECRET12; other=SECRET12", "hf_SECRET12345",
        "password=SECRET12", "Set-Cookie: a=SECRET12",
    ],
)  # fmt: skip
def test_credentials_are_hidden(text):
    shown = redacted(text)
    assert HIDDEN in shown and "SECRET12" not in shown and "dXNlcjpTRUNSRVQxMg" not in shown


@pytest.mark.parametrize(
    "text", ["http://host:8000/v1?page=3", "a basic understanding", "mail me@host", "bearer of news", "The key is red."]
)
def test_other_text_stays(text):
    assert redacted(text) == text


def test_a_server_that_echoes_credentials_gets_them_neither_shown_nor_stored(tmp_path, monkeypatch, capsys):
    """In errors of any status, in replies, in a refusal and in the version; from the URL and from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "own-key-4711")
    old = os.umask(0o077)

    def echo(call):
        sent = {name.lower(): value for name, value in call.headers.items()}["authorization"]
        said = f"you sent {sent}, i.e. user:pass-word-42 or own-key-4711"
        forms = {
            "error": failure(400, said),
            "reported": reported({"error": {"message": said}}),
            "text": says(said, model=said),
            "refusal": body({"content": None, "refusal": said}),
        }
        return forms[call.text]

    try:
        with ScriptedServer(echo) as url:
            client = client_of(url.replace("//", "//user:pass-word-42@"), tmp_path / "cache")
            replies = client.ask(ask_of("text", "error", "reported", "refusal"))
        assert Path(tmp_path / "cache").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)
    everything = f"{replies} {(tmp_path / 'cache').read_text()} {capsys.readouterr()}"
    for secret in ("pass-word-42", "own-key-4711", "dXNlcjpwYXNzLXdvcmQtNDI"):
        assert secret not in everything
    assert replies["q0"].text.startswith("you sent ") and HIDDEN in replies["q0"].text


def test_the_servers_address_is_shown_without_credentials():
    with ScriptedServer(lambda call: failure(401, "no")) as url, pytest.raises(ChatError) as error:
        client_of(url.replace("//", "//user:pass-word-42@")).ask(ask_of("a"))
    assert "pass-word-42" not in str(error.value) and "127.0.0.1" in str(error.value)
    with pytest.raises(ValueError) as refused:
        ChatSettings("ftp://user:pass-word-42@host/v1", "judge")
    assert "pass-word-42" not in str(refused.value)
    reward = EndpointReward("http://user:pass-word-42@127.0.0.1:9/?token=pass-word-42", sees_image=False, timeout=0.5)
    with pytest.raises(ValueError) as failed:
        reward.score([Judged(Path("none.png"), "", "text")])
    assert "pass-word-42" not in f"{failed.value} {reward.name} {reward.identity()}"


# -------------------------------------------------------------------------------------------------- answers for pairs


def test_answers_for_pairs_have_no_thoughts_and_missing_ones_are_faults(tmp_path, capsys):
    """A served model that thinks, thinks only, refuses, sends chunks and half a surrogate pair."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    replies = iter(
        [
            says("<think>no</think> A cup. "),
            says("<think>A cup", finish="length"),
            body({"content": None, "refusal": "No."}),
            says([{"type": "text", "text": "A red cup."}]),
            Scripted(200, says("A XX cup.").body.replace(b"XX", b"\\ud83d")),
        ]
    )
    questions = [Question(f"q{i}", "a.png", f"What is it, {i}?") for i in range(5)]
    with ScriptedServer(lambda call: next(replies)) as url:
        served = ServedResponder("m", url, tmp_path / "replies.jsonl", concurrency=1)
        answers = served.answer(questions, tmp_path, Sampling(), 0)
    assert answers == [["A cup."], [""], [""], ["A red cup."], ["A \N{REPLACEMENT CHARACTER} cup."]]
    said = capsys.readouterr().out
    assert "2 of 5 requests without answer, e.g. q1#0: thoughts without an answer, finish reason length" in said
    kept = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["finish"] for row in kept] == ["stop", "length", "refusal: No.", "stop", "stop"]
    records = _records("local", questions, [["<think>no</think> A cup."], ["<think>A"], ["a"], [""], ["b"]])
    assert [record["text"] for record in records] == ["A cup.", "", "a", "", "b"]  # local models think as well
    assert [record["fault"] for record in records] == ["", NO_ANSWER, "", NO_ANSWER, ""]


def test_files_with_replies_have_the_rights_of_new_files(tmp_path):
    for umask, rights in ((0o077, 0o600), (0o022, 0o644), (0o027, 0o640)):
        old = os.umask(umask)
        try:
            write_atomic(tmp_path / "verdicts.jsonl", "{}\n")
            with ScriptedServer(lambda call: "fine") as url:
                client_of(url, tmp_path / f"cache{umask}").ask(ask_of("a"))
        finally:
            os.umask(old)
        for name in ("verdicts.jsonl", f"cache{umask}"):
            assert (tmp_path / name).stat().st_mode & 0o777 == rights
