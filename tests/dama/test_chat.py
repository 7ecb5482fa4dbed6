"""The chat client over HTTP, against a scripted server on loopback."""

import asyncio
import json
import re
import threading
import time

import pytest

from dama.chat import ChatClient, ChatError, ChatRequest, ChatSettings, image_part
from tests.openai_server import (
    VERSION,
    Call,
    ScriptedServer,
    completion,
    failure,
    malformed,
    rate_limited,
    wrong_schema,
)


def ask_of(*questions):
    """ChatRequests q0, q1 ... with one user turn each."""
    return [ChatRequest(f"q{i}", ({"role": "user", "content": text},)) for i, text in enumerate(questions)]


def client_of(base_url, cache=None, **settings):
    return ChatClient(ChatSettings(base_url, "judge", **({"retries": 2, "timeout": 5.0} | settings)), cache)


def echo(call: Call) -> str:
    return f"echo {call.text}"


def test_replies_come_by_id_in_the_order_of_the_requests():
    """The slowest is asked first and answered last; the version is the server's own word, not the name asked for."""
    with ScriptedServer(lambda call: completion(call.text.upper(), delay=0.2 * (call.text == "b"))) as base_url:
        seen = []
        replies = client_of(base_url).ask(ask_of("a", "b", "c"), on_reply=lambda reply: seen.append(reply.id))
    assert [(id_, reply.text) for id_, reply in replies.items()] == [("q0", "A"), ("q1", "B"), ("q2", "C")]
    assert seen == ["q0", "q2", "q1"]
    assert {reply.model for reply in replies.values()} == {VERSION}
    assert not any(reply.cached or reply.error for reply in replies.values())


def test_sampling_settings_reach_the_server_and_unset_ones_stay_out():
    server = ScriptedServer(echo)
    with server as base_url:
        client_of(base_url, temperature=0.2, max_tokens=3).ask(ask_of("a"))
        client_of(base_url, top_p=0.9, seed=5).ask([ChatRequest("x", ask_of("a")[0].messages, sample=2)])
    first, second = (call.body for call in server.calls)
    assert first == {
        "model": "judge",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.2,
        "max_tokens": 3,
    }
    assert (second["top_p"], second["seed"]) == (0.9, 2005)


@pytest.mark.parametrize("trouble", [failure(500), rate_limited(), malformed(), wrong_schema()])
def test_a_server_that_recovers_is_asked_again(trouble):
    server = ScriptedServer(lambda call: trouble if call.attempt == 0 else "fine")
    with server as base_url:
        client = client_of(base_url)
        replies = client.ask(ask_of("a", "b"))
    assert [reply.text for reply in replies.values()] == ["fine", "fine"]
    assert len(server.calls) == 4
    assert (client.usage.asked, client.usage.failed) == (2, 0)


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(monkeypatch):
    pauses, sleep = [], asyncio.sleep

    async def noted(seconds):
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr("dama.chat.asyncio.sleep", noted)
    with ScriptedServer(lambda call: rate_limited(0.4) if call.attempt == 0 else "fine") as base_url:
        assert client_of(base_url).ask(ask_of("a"))["q0"].text == "fine"
    assert max(pauses) >= 0.4


def test_a_late_answer_is_given_up_and_asked_for_again():
    server = ScriptedServer(lambda call: completion("fine", delay=5.0 if call.attempt == 0 else 0.0))
    with server as base_url:
        reply = client_of(base_url, timeout=0.6).ask(ask_of("a"))["q0"]
    assert (reply.text, len(server.calls)) == ("fine", 2)


@pytest.mark.parametrize(
    "trouble, words",
    [
        (failure(500, "out of order"), "InternalServerError.*out of order"),
        (failure(400, "too long"), "BadRequestError.*too long"),
        (rate_limited(), "RateLimitError.*rate limit"),
        (malformed(), "JSONDecodeError"),
        (wrong_schema(), "expected a chat completion"),
        (completion("late", delay=2.0), "APITimeoutError"),
    ],
)
def test_one_failing_request_is_a_reply_with_an_error(trouble, words):
    """Even the first: only this one may be at fault."""
    with ScriptedServer(lambda call: trouble if call.text == "bad" else "fine") as base_url:
        client = client_of(base_url, retries=1, timeout=0.6)
        replies = client.ask(ask_of("bad", "good"))
    assert (replies["q0"].text, replies["q1"].text) == (None, "fine")
    assert re.search(words, replies["q0"].error)
    assert (client.usage.asked, client.usage.failed) == (1, 1)


@pytest.mark.parametrize(
    "status, words",
    [(401, "the key is refused.*OPENAI_API_KEY"), (403, "key is refused"), (404, "no such model or address.*/models")],
)
def test_a_refused_key_or_model_is_one_error(status, words):
    server = ScriptedServer(lambda call: failure(status, "no"))
    with server as base_url, pytest.raises(ChatError, match="(?s)" + words):
        client_of(base_url).ask(ask_of("a", "b", "c"))
    assert len(server.calls) == 1


def test_an_absent_server_is_one_error():
    with ScriptedServer(echo) as base_url:
        pass
    with pytest.raises(ChatError, match="(?s)no server answers.*judge.*start the server"):
        client_of(base_url, retries=0).ask(ask_of("a", "b"))


def test_a_key_refused_later_costs_only_that_request():
    with ScriptedServer(lambda call: failure(401) if call.number else "fine") as base_url:
        replies = client_of(base_url).ask(ask_of("a", "b"))
    assert replies["q0"].text == "fine"
    assert "AuthenticationError" in replies["q1"].error


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = ScriptedServer(echo)
    with server as base_url:
        client_of(base_url, tmp_path / "cache.jsonl").ask(ask_of("a"))
    headers = {name.lower(): value for name, value in server.calls[0].headers.items()}
    assert headers["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in (tmp_path / "cache.jsonl").read_text()


def test_a_second_run_asks_nothing(tmp_path):
    server = ScriptedServer(echo)
    with server as base_url:
        first = client_of(base_url, tmp_path / "cache.jsonl").ask(ask_of("a", "b"))
    client = client_of(base_url, tmp_path / "cache.jsonl")  # whose server is gone
    second = client.ask(ask_of("a", "b"))
    assert [reply.text for reply in second.values()] == [reply.text for reply in first.values()]
    assert all(reply.cached for reply in second.values())
    usage = client.usage
    assert (usage.asked, usage.cached, usage.prompt_tokens, usage.cached_prompt_tokens) == (0, 2, 0, 20)
    assert (usage.completion_tokens, usage.cached_completion_tokens) == (0, 10)


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 9}, {"top_p": 0.5}, {"seed": 1}])
def test_other_settings_are_another_question(tmp_path, change):
    server = ScriptedServer(echo)
    with server as base_url:
        client_of(base_url, tmp_path / "cache.jsonl").ask(ask_of("a"))
        client_of(base_url, tmp_path / "cache.jsonl", **change).ask(ask_of("a"))
    assert len(server.calls) == 2


def test_equal_requests_are_asked_once_and_samples_apart(tmp_path):
    """A run whose equal questions got different answers could not be repeated from its cache."""
    server = ScriptedServer(lambda call: f"draw {call.number}")
    messages = ask_of("a")[0].messages
    with server as base_url:
        client = client_of(base_url, tmp_path / "cache.jsonl")
        same = client.ask([ChatRequest("x", messages), ChatRequest("y", messages)])
        other = client.ask([ChatRequest("z", messages, sample=1)])
    assert (same["x"].text, same["y"].text, other["z"].text) == ("draw 0", "draw 0", "draw 1")


def test_a_reply_not_accepted_is_asked_for_again(tmp_path):
    server = ScriptedServer(lambda call: f"{call.text} {call.attempt}")
    with server as base_url:
        client = client_of(base_url, tmp_path / "cache.jsonl", seed=7)
        replies = client.ask(ask_of("a", "b"), accept=lambda text: text in ("a 1", "b 0"), tries=3)
    assert [reply.text for reply in replies.values()] == ["a 1", "b 0"]
    assert sorted(call.body["seed"] for call in server.calls) == [7, 7, 8]
    assert (client.usage.rejected, client.usage.asked, client.usage.prompt_tokens) == (1, 3, 30)


def test_where_none_is_accepted_the_last_is_returned_and_more_tries_go_on_from_there(tmp_path):
    server = ScriptedServer(lambda call: str(call.attempt))
    with server as base_url:
        first = client_of(base_url, tmp_path / "c").ask(ask_of("a"), accept=lambda text: text == "3", tries=2)
        assert (first["q0"].text, first["q0"].error) == ("1", None)
        again = client_of(base_url, tmp_path / "c").ask(ask_of("a"), accept=lambda text: text == "3", tries=2)
        assert (again["q0"].text, again["q0"].cached, len(server.calls)) == ("1", True, 2)
        more = client_of(base_url, tmp_path / "c").ask(ask_of("a"), accept=lambda text: text == "3", tries=5)
    assert (more["q0"].text, len(server.calls)) == ("3", 4)


def test_a_torn_cache_loses_that_line_only(tmp_path, capsys):
    server = ScriptedServer(echo)
    cache = tmp_path / "cache.jsonl"
    with server as base_url:
        client_of(base_url, cache).ask(ask_of("a", "b"))
        cache.write_bytes(cache.read_bytes()[:-20])
        client_of(base_url, cache).ask(ask_of("a", "b"))
        assert "1 unreadable lines skipped, 1 replies kept" in capsys.readouterr().out
        client_of(base_url, cache).ask(ask_of("a", "b"))
    assert len(server.calls) == 3
    rows = [line for line in cache.read_text().splitlines() if line.endswith("}")]
    assert {json.loads(row)["text"] for row in rows} == {"echo a", "echo b"}


def test_an_interruption_keeps_what_has_come(tmp_path):
    """The caller is stopped at the third reply; the next run asks for the rest only."""

    def stop(reply):
        if reply.text == "echo c":
            raise OSError("disk full")

    questions = ask_of("a", "b", "c", "d", "e")
    server = ScriptedServer(echo)
    with server as base_url:
        with pytest.raises(OSError, match="disk full"):
            client_of(base_url, tmp_path / "cache.jsonl", concurrency=1).ask(questions, on_reply=stop)
        before = len(server.calls)
        replies = client_of(base_url, tmp_path / "cache.jsonl").ask(questions)
    assert [reply.cached for reply in replies.values()][:3] == [True] * 3
    assert len(server.calls) == before + sum(not reply.cached for reply in replies.values())
    assert len(server.calls) <= 6  # at most the one under way is asked twice


def test_as_many_requests_at_once_as_the_setting_says():
    lock, now, most, three = threading.Lock(), [0], [0], threading.Barrier(3)

    def count(call):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if 1 <= call.number <= 3:  # the first goes alone; the next three wait for each other, and a moment for a fourth
            three.wait()
            time.sleep(0.1)
        with lock:
            now[0] -= 1
        return "ok"

    with ScriptedServer(count) as base_url:
        client_of(base_url, concurrency=3).ask(ask_of(*"abcdefg"))
    assert most[0] == 3


def test_an_empty_completion_is_an_empty_text():
    """A model may spend all its tokens before it says anything."""
    with ScriptedServer(lambda call: completion(None)) as base_url:
        assert client_of(base_url).ask(ask_of("a"))["q0"].text == ""


def test_nothing_to_ask_needs_no_server():
    assert client_of("http://127.0.0.1:9/v1").ask([]) == {}


def test_ids_are_unique():
    with pytest.raises(ValueError, match="1 ids are used more than once, e.g. 'x'"):
        client_of("http://127.0.0.1:9/v1").ask([ChatRequest("x", ()), ChatRequest("x", ())])


def test_all_faults_of_the_settings_at_once():
    with pytest.raises(ValueError, match="base_url: expected http.*got 'here'; model: .*; concurrency: .* got 0"):
        ChatSettings("here", "", concurrency=0)


def test_a_picture_travels_as_a_data_url():
    server = ScriptedServer(echo)
    turn = {"role": "user", "content": [image_part(b"\xff\xd8"), {"type": "text", "text": "What is it?"}]}
    with server as base_url:
        reply = client_of(base_url).ask([ChatRequest("x", (turn,))])["x"]
    assert reply.text == "echo What is it?"
    part = server.calls[0].body["messages"][0]["content"][0]
    assert part == {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9g="}}
