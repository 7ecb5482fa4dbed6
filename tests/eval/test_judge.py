"""Verdicts over HTTP from a scripted judge: errors, resuming after kills, replay, and what enters a mean."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dama.chat import ChatError, ChatRequest, ChatUsage
from eval.core.judge import (
    VERDICTS,
    JudgeRun,
    Verdict,
    after_thoughts,
    ask_judge,
    replay,
)
from eval.core.judged import Judge, score_verdicts
from eval.core.metrics import Metric
from eval.core.scores import Table, TableColumn
from eval.core.types import Answer, BenchmarkData, Question
from tests.openai_server import VERSION, Call, ScriptedServer, completion, failure, malformed, rate_limited

ROOT = Path(__file__).resolve().parents[2]
COUNT = 24
METRICS = tuple(Metric(name, name) for name in ("mean", "even", "odd", "mean_std"))
TABLE = Table(
    (TableColumn("mean", "mean", 2, interval=True), TableColumn("odd", "odd")),
    protocol=False,
    note="unreadable verdicts, in no mean",
)


def benchmark_of(count: int = 3) -> BenchmarkData:
    """Question i is "Which digit is i?", on picture i // 2; its kind is even or odd."""
    questions = (
        Question(f"q{i}", f"{i // 2}.jpg", f"Which digit is {i}?", str(i), (("even", "odd")[i % 2],))
        for i in range(count)
    )
    return BenchmarkData(tuple(questions), "How right is it?")


def answers_of(benchmark: BenchmarkData) -> list[Answer]:
    return [Answer(q.id, q.image_id, q.prompt, f"It is {q.truth}.") for q in benchmark.questions]


def requests_of(
    benchmark: BenchmarkData, answers: list[Answer] | None = None, *, official_quirks: bool = False
) -> list[ChatRequest]:
    answers = answers_of(benchmark) if answers is None else answers
    return [ChatRequest(a.id, ({"role": "user", "content": f"{a.id}: {a.text}"},)) for a in answers]


def number(text: str) -> float | None:
    return float(text) if text.isdigit() else None


JUDGE = Judge(
    "gpt-0", temperature=0.0, max_tokens=8, requests=requests_of, parse=number, parse_official=number, unreadable=0.0
)


def run_of(*texts: str | None, runs: int = 1) -> JudgeRun:
    """Verdicts on q0, q1 ... in this order, `runs` to each; None is a failed request."""
    verdicts = (
        Verdict(f"q{i // runs}", i % runs, "", text, None if text else "500", "v1") for i, text in enumerate(texts)
    )
    return JudgeRun("gpt-0", 0.0, "digest", tuple(verdicts))


def score_of(run: JudgeRun, benchmark: BenchmarkData | None = None, *, official_quirks: bool = False, answers=None):
    """The mean of the digits, in all and by kind."""
    benchmark = benchmark or benchmark_of()
    return score_verdicts(
        "digits",
        JUDGE,
        METRICS,
        benchmark,
        answers_of(benchmark) if answers is None else answers,
        run,
        parts=lambda question, values: {name: [sum(values) / len(values), 1.0] for name in ("mean", *question.kinds)},
        wrong=lambda values: sum(values) / len(values) < 5,
        official_quirks=official_quirks,
    )


def settings_of(base_url, **others):
    return JUDGE.settings(base_url, **({"retries": 2, "timeout": 5.0} | others))


# ---------------------------------------------------------------------------------------------------------- asking


def test_verdicts_and_who_gave_them(tmp_path):
    """An alias is asked for and a version answers: both are recorded, and one call each is enough."""
    server = ScriptedServer(lambda call: call.text[1])
    with server as base_url:
        run = ask_judge(settings_of(base_url), requests_of(benchmark_of()), tmp_path, "digest", parse=number)
    assert [(v.id, v.run, v.text, v.error) for v in run.verdicts] == [(f"q{i}", 0, str(i), None) for i in range(3)]
    assert run.provenance() == {"name": "gpt-0", "version": VERSION, "prompt_digest": "digest", "temperature": 0.0}
    assert len(server.calls) == 3
    body = server.calls[0].body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-0", 0.0, 8)


def test_tokens_and_cost(tmp_path):
    """3 replies of 10 + 5 tokens at 2 and 4 a million: (30 x 2 + 15 x 4) / 10^6 = 0.00012. Then all is cached: 0."""
    with ScriptedServer(lambda call: "1") as base_url:
        first = ask_judge(settings_of(base_url), requests_of(benchmark_of()), tmp_path, "d", parse=number)
        again = ask_judge(settings_of(base_url), requests_of(benchmark_of()), tmp_path, "d", parse=number)
    assert (first.usage.asked, first.usage.prompt_tokens, first.usage.completion_tokens) == (3, 30, 15)
    assert first.cost(2, 4) == pytest.approx(0.00012)
    assert (again.usage.asked, again.usage.cached, again.cost(2, 4)) == (0, 3, 0)
    assert again == first
    assert "cost" not in first.summary()
    assert first.summary((2000, 4000)).endswith("30 prompt and 15 completion tokens, cost 0.12")
    assert "0 replies paid for, 3 from the cache" in again.summary()


def test_no_cost_is_invented_for_a_replay():
    assert run_of("1").usage == ChatUsage()


TROUBLES = [failure(500), rate_limited(), malformed(), completion("late", delay=2.0)]


@pytest.mark.parametrize("trouble", TROUBLES, ids=["500", "429", "malformed", "late"])
def test_a_judge_that_recovers_gives_every_verdict(tmp_path, trouble):
    server = ScriptedServer(lambda call: trouble if call.attempt == 0 else call.text[1])
    with server as base_url:
        run = ask_judge(settings_of(base_url, timeout=0.6), requests_of(benchmark_of()), tmp_path, "d", parse=number)
    assert [v.text for v in run.verdicts] == ["0", "1", "2"]
    assert len(server.calls) == 6


@pytest.mark.parametrize("trouble", TROUBLES, ids=["500", "429", "malformed", "late"])
def test_a_verdict_that_never_comes_is_counted_and_asked_for_in_the_next_run(tmp_path, trouble):
    """q1 fails for good: the mean of 0 and 2 is 1, of two verdicts; with q1's it is (0 + 1 + 2) / 3."""
    benchmark, broken = benchmark_of(), [True]
    server = ScriptedServer(lambda call: trouble if broken[0] and call.text.startswith("q1") else call.text[1])
    with server as base_url:
        settings = settings_of(base_url, retries=1, timeout=0.6)
        score = score_of(ask_judge(settings, requests_of(benchmark), tmp_path, "d", parse=number), benchmark)
        assert (score.metrics["mean"], score.counts["failed"], score.counts["unparsed"]) == (1.0, 1, 0)
        assert [item["wrong"] for item in score.items] == [True, None, True]
        assert score_of(replay(tmp_path, requests_of(benchmark)), benchmark).metrics == score.metrics
        broken[0], before = False, len(server.calls)
        whole = score_of(ask_judge(settings, requests_of(benchmark), tmp_path, "d", parse=number), benchmark)
    assert len(server.calls) == before + 1
    assert (whole.metrics["mean"], whole.counts["failed"]) == (1.0, 0)


def test_a_judge_that_is_not_there_is_one_error_and_writes_nothing(tmp_path):
    with ScriptedServer(lambda call: "1") as base_url:
        pass
    with pytest.raises(ChatError, match="no server answers"):
        ask_judge(settings_of(base_url, retries=0), requests_of(benchmark_of()), tmp_path, "d", parse=number)
    assert not (tmp_path / VERDICTS).exists()


def test_an_unreadable_verdict_is_asked_for_again_with_the_same_settings(tmp_path):
    server = ScriptedServer(lambda call: "well ..." if call.attempt == 0 else call.text[1])
    with server as base_url:
        run = ask_judge(settings_of(base_url), requests_of(benchmark_of()), tmp_path, "d", parse=number, tries=2)
    assert [v.text for v in run.verdicts] == ["0", "1", "2"]
    assert {call.body["temperature"] for call in server.calls} == {0.0}
    assert run.usage.rejected == 3


def test_several_runs_are_asked_for_independently(tmp_path):
    """Draws of the same question differ, and a second look at them finds the same draws."""
    server = ScriptedServer(lambda call: str(call.attempt))
    with server as base_url:
        settings = settings_of(base_url, temperature=0.2)
        run = ask_judge(settings, requests_of(benchmark_of(1)), tmp_path, "d", parse=number, runs=3)
        again = ask_judge(settings, requests_of(benchmark_of(1)), tmp_path, "d", parse=number, runs=3)
    assert [(v.run, v.text) for v in run.verdicts] == [(0, "0"), (1, "1"), (2, "2")]
    assert again == run


def test_resuming_goes_by_content_and_not_by_count(tmp_path):
    """First the last two answers are judged, then all, in another order: every verdict is on its own answer."""
    benchmark = benchmark_of(6)
    server = ScriptedServer(lambda call: call.text[1])
    with server as base_url:
        ask_judge(settings_of(base_url), requests_of(benchmark)[4:], tmp_path, "d", parse=number)
        run = ask_judge(settings_of(base_url), requests_of(benchmark)[::-1], tmp_path, "d", parse=number)
    assert {v.id: v.text for v in run.verdicts} == {f"q{i}": str(i) for i in range(6)}
    assert len(server.calls) == 6


def slow(call: Call):
    digits = call.text.split(":")[0][1:]
    return completion("no digit" if digits == "7" else digits, delay=0.03)


def judge_all(base_url: str, folder: str) -> None:
    """What the killed process runs."""
    requests = requests_of(benchmark_of(COUNT))
    ask_judge(settings_of(base_url, concurrency=2), requests, folder, "d", parse=number, tries=2)


@pytest.mark.kill
def test_two_kills_change_nothing(tmp_path):
    """Killed twice without warning, the run ends with the bytes of an undisturbed one; what was paid for stays paid."""
    server = ScriptedServer(slow)
    program = "import sys; from tests.eval.test_judge import judge_all; judge_all(*sys.argv[1:])"
    with server as base_url:
        for calls in (6, 14):
            process = subprocess.Popen([sys.executable, "-c", program, base_url, str(tmp_path / "a")], cwd=ROOT)
            deadline = time.monotonic() + 60
            while len(server.calls) < calls and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (tmp_path / "a" / VERDICTS).exists()
        judge_all(base_url, str(tmp_path / "a"))
        asked = len(server.calls)
    assert asked <= COUNT + 1 + 2 * 2  # one verdict is asked for twice; a kill costs the two under way
    with ScriptedServer(slow) as base_url:
        judge_all(base_url, str(tmp_path / "b"))
    assert (tmp_path / "a" / VERDICTS).read_bytes() == (tmp_path / "b" / VERDICTS).read_bytes()


# ---------------------------------------------------------------------------------------------------------- replay


def judged(folder) -> BenchmarkData:
    benchmark = benchmark_of()
    with ScriptedServer(lambda call: call.text[1]) as base_url:
        ask_judge(settings_of(base_url), requests_of(benchmark), folder, "d", parse=number, runs=2)
    return benchmark


def test_a_replay_needs_no_server_and_no_cache(tmp_path):
    benchmark = judged(tmp_path)
    (tmp_path / "judge_cache.jsonl").unlink()
    run = replay(tmp_path, requests_of(benchmark))
    assert run.provenance()["version"] == VERSION
    assert score_of(run, benchmark).metrics["mean"] == 1.0


def test_a_replay_refuses_other_answers(tmp_path):
    benchmark = judged(tmp_path)
    answers = answers_of(benchmark)
    answers[1] = Answer("q1", "0", answers[1].prompt, "It is 9.")
    with pytest.raises(ValueError, match="(?s)jsonl: 2 errors.*'q1': on another answer or prompt.*ask the judge"):
        replay(tmp_path, requests_of(benchmark, answers))


def test_a_replay_refuses_answers_without_verdict(tmp_path):
    judged(tmp_path)
    with pytest.raises(ValueError, match="answer 'q3': no verdict"):
        replay(tmp_path, requests_of(benchmark_of(4)))


def test_a_replay_refuses_a_mixture_of_judges(tmp_path):
    benchmark = judged(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / VERDICTS).read_text().splitlines()]
    rows[0]["judge"] = "gpt-1"
    (tmp_path / VERDICTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="expected the verdicts of one judge, got .*gpt-0.*gpt-1"):
        replay(tmp_path, requests_of(benchmark))


def test_nothing_to_replay(tmp_path):
    with pytest.raises(ValueError, match="(?s)verdicts.jsonl: missing.*ask the judge"):
        replay(tmp_path, [])


def test_a_damaged_verdict_names_its_line_and_field(tmp_path):
    benchmark = judged(tmp_path)
    with open(tmp_path / VERDICTS, "a") as file:
        file.write('{"id": "q0", "run": "first"}\n')
    with pytest.raises(ValueError, match="(?s)line 7: field 'run': expected int, got str.*line 7: field 'judge'"):
        replay(tmp_path, requests_of(benchmark))


# --------------------------------------------------------------------------------------------------------- scoring


def test_metrics_are_ratios_of_the_items_parts():
    """Values 3, 5, 4: the mean is 12 / 3, that of q0 and q2 7 / 2, that of q1 5."""
    score = score_of(run_of("3", "5", "4"))
    assert score.metrics == {"mean": 4.0, "even": 3.5, "odd": 5.0, "mean_std": None}
    for name in ("mean", "even", "odd"):
        pairs = [item["parts"][name] for item in score.items]
        assert score.metrics[name] == sum(n for n, _ in pairs) / sum(d for _, d in pairs)
    assert score.interval("mean").value == 4.0


def test_an_item_says_all_that_a_page_shows():
    item = score_of(run_of("3", "5", "4")).items[0]
    assert item == {
        "id": "q0",
        "image_id": "0",
        "image": "0.jpg",
        "prompt": "Which digit is 0?",
        "text": "It is 0.",
        "truth": "0",
        "wrong": True,
        "spans": [],
        "parts": {"mean": [3.0, 1.0], "even": [3.0, 1.0], "odd": [0.0, 0.0]},
        "kinds": ["even"],
        "context": "",
        "verdicts": ["3"],
        "values": [3.0],
    }
    json.dumps(item)


def test_an_unreadable_verdict_is_in_no_mean():
    """3, unreadable, 4: 7 / 2, and nothing is known of the odd ones; never (3 + 0 + 4) / 3."""
    score = score_of(run_of("3", "maybe", "4"))
    assert score.metrics == {"mean": 3.5, "even": 3.5, "odd": None, "mean_std": None}
    assert score.counts == {"answers": 3, "missing": 0, "verdicts": 3, "unparsed": 1, "failed": 0}
    assert score.items[1]["wrong"] is None
    assert score.items[1]["values"] == [None]


def test_the_original_s_value_is_given_only_when_asked_for():
    """3, unreadable as 0, 4: 7 / 3. Counted as unreadable all the same."""
    score = score_of(run_of("3", "maybe", "4"), official_quirks=True)
    assert score.metrics["mean"] == pytest.approx(7 / 3)
    assert (score.counts["unparsed"], score.items[1]["wrong"]) == (1, True)


def test_without_any_readable_verdict_there_is_no_score():
    score = score_of(run_of(None, "maybe", None))
    assert set(score.metrics.values()) == {None}
    assert (score.counts["failed"], score.counts["unparsed"]) == (2, 1)
    assert "n/a" in TABLE({"m": score})


def test_runs_are_averaged_within_an_item_and_compared_between():
    """q0: 1 and 3, q1: 5 and unreadable, q2: 4 and 6. Items 2, 5, 5, mean 4. Run 0: 10/3, run 1: 9/2.

    Their sample deviation is |9/2 - 10/3| / sqrt 2.
    """
    score = score_of(run_of("1", "3", "5", "?", "4", "6", runs=2))
    assert score.metrics["mean"] == 4.0
    assert score.by_run == (pytest.approx(10 / 3), 4.5)
    assert score.metrics["mean_std"] == pytest.approx((9 / 2 - 10 / 3) / math.sqrt(2))
    assert score.items[1]["values"] == [5.0, None]


def test_answers_are_joined_by_id_in_any_order():
    benchmark = benchmark_of()
    shuffled = answers_of(benchmark)[::-1]
    assert score_of(run_of("3", "5", "4"), answers=shuffled) == score_of(run_of("3", "5", "4"))


def test_questions_without_answer_are_counted_and_listed():
    answers = answers_of(benchmark_of())[:2]
    score = score_of(run_of("3", "5"), answers=answers)
    assert (score.counts["answers"], score.counts["missing"], score.missing) == (2, 1, ("q2",))
    assert "m: no answer: 1 of 3: q2" in TABLE({"m": score})


def test_answers_to_other_questions_are_refused():
    answers = answers_of(benchmark_of())
    answers[0] = Answer("q0", "0", "Which letter?", "A")
    answers[1] = Answer("q9", "0", "Which digit is 9?", "9")
    answers.append(answers[2])
    with pytest.raises(ValueError) as caught:
        benchmark_of().answered(answers)
    assert str(caught.value).splitlines()[1:4] == [
        "  answer 'q2': 2 answers to one question",
        "  answer 'q0': to 'Which letter?', but the question is 'Which digit is 0?'",
        "  answer 'q9': no question has this id",
    ]


def test_answers_and_verdicts_belong_together():
    with pytest.raises(ValueError, match="answer 'q2': no verdict"):
        score_of(run_of("3", "5"))
    with pytest.raises(ValueError, match="verdict on 'q3': there is no such answer"):
        score_of(run_of("3", "5", "4", "4"))
    twice = run_of("3", "5", "4").verdicts
    with pytest.raises(ValueError, match="verdict on 'q1': 2 of them in run 0"):
        score_of(JudgeRun("gpt-0", 0.0, "digest", (*twice, twice[1])))


def test_the_table_counts_and_lists_what_it_leaves_out():
    rows = {"base": score_of(run_of("3", "maybe", None)), "aligned": score_of(run_of("9", "9", "9"))}
    lines = TABLE(rows).splitlines()
    assert lines[0].split() == ["mean", "odd", "unparsed"]
    assert lines[1].split() == ["base", "3.00", "[3.00,", "3.00]", "n/a", "2", "of", "3"]
    assert lines[2].split() == ["aligned", "9.00", "[9.00,", "9.00]", "9.0", "0", "of", "3"]
    assert lines[3:] == ["base: unreadable verdicts, in no mean: 2 of 3: q1, q2"]


def test_thoughts_are_no_verdict():
    assert after_thoughts("<think>5 or 6?</think>\n6") == "6"
    assert after_thoughts("<think>5 or") == ""
    assert after_thoughts(" 6\n") == "6"


def test_generation_requests_carry_id_prompt_and_picture():
    request = benchmark_of().requests()[2]
    assert (request.id, request.prompt, request.image, request.image_id) == ("q2", "Which digit is 2?", "1.jpg", "1")
