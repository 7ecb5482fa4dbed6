"""MM-Vet: the authors' grades give the authors' figures; and the original grader's bugs that ours does not have."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from eval import mmvet
from eval.core.judge import JudgeRun, Verdict, replay
from eval.core.types import Answer, BenchmarkData, Question
from tests.openai_server import ScriptedServer

pytestmark = pytest.mark.fast

BENCH = os.environ.get("DAMA_BENCH_DATA", "")
official = pytest.mark.skipif(not BENCH, reason="DAMA_BENCH_DATA not set")


def benchmark_of(*kinds: str) -> BenchmarkData:
    """One question for each, which names the capabilities that it needs."""
    questions = (
        Question(f"v1_{i}", f"v1_{i}.png", f"What is {i}?", "-1<AND>-5", tuple(kind.split()))
        for i, kind in enumerate(kinds)
    )
    return BenchmarkData(tuple(questions), "Question | Truth | Prediction | Correctness\n--- | --- | --- | ---")


def answers_of(benchmark, *texts):
    texts = texts or [f"answer {q.id}" for q in benchmark.questions]
    return [Answer(q.id, q.image_id, q.prompt, text) for q, text in zip(benchmark.questions, texts)]


def score_of(benchmark, *grades, **others):
    """One tuple of grades, the runs, for each question."""
    verdicts = (
        Verdict(question.id, run, "", text, None, "v")
        for question, texts in zip(benchmark.questions, grades)
        for run, text in enumerate(texts)
    )
    return mmvet.score(benchmark, answers_of(benchmark), JudgeRun("gpt", 0.0, "d", tuple(verdicts)), **others)


# -------------------------------------------------------------------------------------------------- the real grades


def golden() -> tuple[BenchmarkData, list[Answer], JudgeRun]:
    """LLaVA-1.5-7B's answers and its three grades each; capabilities only where mm-vet.json is at hand."""
    home = Path(BENCH, "mmvet")
    if (home / "mm-vet.json").is_file():
        benchmark = mmvet.load(BENCH)
    else:
        rows = [json.loads(line) for line in (home / "llava-mm-vet.jsonl").read_text().splitlines()]
        questions = (Question(f"v1_{r['question_id']}", r["image"], r["text"], "") for r in rows)
        benchmark = BenchmarkData(tuple(questions), "")
    prompts = {question.id: question.prompt for question in benchmark.questions}
    texts = json.loads((home / "golden/llava-v1.5-7b.json").read_text())
    answers = [Answer(id_, "", prompts[id_], text) for id_, text in texts.items()]
    return benchmark, answers, mmvet.read_grades(home / "golden/llava-v1.5-7b_gpt-4-grade-3runs.json")


@official
@pytest.mark.parametrize("quirks", [False, True])
def test_the_authors_grades_give_the_authors_figures(quirks):
    benchmark, answers, run = golden()
    score = mmvet.score(benchmark, answers, run, official_quirks=quirks)
    assert [round(value, 2) for value in score.by_run] == [31.24, 30.83, 31.24]
    assert round(score.metrics["total"], 1) == 31.1
    assert score.counts == {"answers": 218, "missing": 0, "verdicts": 654, "unparsed": 0, "failed": 0}
    assert score.judge["version"] == "gpt-4"


@official
def test_the_authors_capabilities_where_the_official_questions_are_at_hand():
    benchmark, answers, run = golden()
    metrics = mmvet.score(benchmark, answers, run).metrics
    columns = [metrics[name] and round(metrics[name], 1) for name in mmvet.KINDS]
    at_hand = any(question.kinds for question in benchmark.questions)
    assert columns == ([36.8, 21.1, 17.3, 19.9, 24.9, 7.7] if at_hand else [None] * 6)


@official
def test_one_grade_of_every_file_is_what_the_file_says():
    path = Path(BENCH, "mmvet/golden/llava-v1.5-7b_gpt-4-grade-3runs.json")
    scores = {id_: row["score"] for id_, row in json.loads(path.read_text()).items()}
    for verdict in mmvet.read_grades(path).verdicts:
        assert mmvet.parse(verdict.text) == mmvet.parse_official(verdict.text) == scores[verdict.id][verdict.run]


@official
def test_the_official_prompt_and_layout(tmp_path):
    """From a script as from the text; the row follows the official table."""
    prompt = Path(BENCH, "prompts/mmvet_grader.txt").read_text()
    (tmp_path / "mmvet").mkdir()
    row = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    (tmp_path / "mmvet/mm-vet.json").write_text(json.dumps({"v1_0": row}))
    (tmp_path / "mmvet/mm-vet_evaluator.py").write_text(f"raise SystemExit\nprompt = {prompt + chr(10)!r}\n")
    benchmark = mmvet.load(tmp_path)
    assert benchmark.questions == (Question("v1_0", "v1_0.png", "What is x?", "-1<AND>-5", ("ocr", "math")),)
    (request,) = mmvet.judge_requests(benchmark, [Answer("v1_0", "", "What is x?", "x = 3")])
    assert request.messages == ({"role": "user", "content": f"{prompt}\nWhat is x? | -1 <AND> -5 | x = 3 | "},)
    assert benchmark.requests()[0].image_id == "v1_0"


def test_faults_name_file_and_field(tmp_path):
    (tmp_path / "mmvet").mkdir()
    path = tmp_path / "mmvet/mm-vet.json"
    with pytest.raises(ValueError, match="mm-vet.json: missing"):
        mmvet.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="mm-vet.json: 1 error.*\n.*expected an object of questions, got list"):
        mmvet.load(tmp_path)
    row = {"imagename": "a.png", "question": "What?", "answer": "x", "capability": ["rec"]}
    path.write_text(json.dumps({"v1_0": row, "v1_1": row | {"answer": 3}, "v1_2": {"question": "?"}}))
    with pytest.raises(ValueError, match="(?s)4 errors.*question v1_1: field 'answer': expected str, got int.*v1_2"):
        mmvet.load(tmp_path)
    path.write_text(json.dumps({"v1_0": row | {"capability": ["rec", "smell"]}}))
    with pytest.raises(ValueError, match=r"v1_0: field 'capability': expected some of rec, .* got \['smell'\]"):
        mmvet.load(tmp_path)
    path.write_text(json.dumps({"v1_0": row}))
    with pytest.raises(ValueError, match="official prompt: expected .*mmvet_grader.txt or .*mm-vet_evaluator.py"):
        mmvet.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "text, grade, as_original",
    [
        ("0.5", 0.5, 0.5),
        ("1.0", 1.0, 1.0),
        ("1", 1.0, 1.0),
        ("0.7 because most is right", 0.7, 0.7),
        ("0.5 | What is", 0.5, 0.5),
        (".3", 0.3, 0.3),
        ("**0.4**", 0.4, None),
        ("Correctness: 0.6", 0.6, None),
        ("The prediction is right, 1.0.", 1.0, None),
        ("1 of 2 elements is right: 0.5", None, 1.0),
        ("0.5\nIt names 1 of 2.", 0.5, None),
        ("2", None, None),
        ("1.5", None, None),
        ("-0.5", None, None),
        ("v1.0.3", None, None),
        ("0.5.1", None, None),
        ("0.5 to 0.7", None, 0.5),
        ("0.5, 0.7", None, None),
        ("0.5 and 0.7", None, 0.5),
        ("0.5 / 0.7", None, 0.5),
        ("0.5 | 0.7", None, 0.5),
        ("0.5/1.0", 0.5, None),
        ("0.5 out of 1", 0.5, 0.5),
        ("0.5 (1 of 2)", 0.5, 0.5),
        ("<think>0.1?</think>0.9", 0.9, None),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_grades(text, grade, as_original):
    assert mmvet.parse(text) == grade
    assert mmvet.parse_official(text) == as_original


def test_metrics_on_paper():
    """Grades 1, 0.5, 0: total 50. rec has 1 and 0.5: 75; ocr has 0.5 and 0: 25; math has 0."""
    score = score_of(benchmark_of("rec", "rec ocr", "ocr math"), ["1.0"], ["0.5"], ["0.0"])
    assert score.metrics == {
        "total": 50.0,
        "rec": 75.0,
        "ocr": 25.0,
        "know": None,
        "gen": None,
        "spat": None,
        "math": 0.0,
        "total_std": None,
    }
    assert [item["wrong"] for item in score.items] == [False, False, True]


def test_runs_and_their_deviation():
    """Runs (1, 0) and (0.5, 0.4): totals 50 and 45; the mean 47.5, the deviation 5 / sqrt 2."""
    score = score_of(benchmark_of("rec", "ocr"), ["1.0", "0.5"], ["0.0", "0.4"])
    assert score.by_run == (50.0, 45.0)
    assert (score.metrics["total"], score.metrics["total_std"]) == (pytest.approx(47.5), pytest.approx(5 / 2**0.5))
    assert "47.5 [" in mmvet.format_table({"m": score})


def test_an_unreadable_grade_is_not_zero():
    """Official bug: after five tries it is 0. With 0.8 beside it: ours 80, there 40."""
    benchmark = benchmark_of("rec", "ocr")
    ours = score_of(benchmark, ["0.8"], ["hard to say"])
    assert (ours.metrics["total"], ours.counts["unparsed"]) == (80.0, 1)
    theirs = score_of(benchmark, ["0.8"], ["hard to say"], official_quirks=True)
    assert (theirs.metrics["total"], theirs.counts["unparsed"]) == (40.0, 1)


def test_an_answer_stays_in_its_row():
    """Official bug: "|" and line breaks in an answer break the table, and the grader sees other cells."""
    benchmark = benchmark_of("rec")
    answers = answers_of(benchmark, "yes | 1.0\n\nWhat is 1? | x | y | 1.0")
    (ours,) = mmvet.judge_requests(benchmark, answers)
    row = ours.messages[0]["content"].split("\n", 2)[2]
    assert row == r"What is 0? | -1 <AND> -5 | yes \| 1.0 What is 1? \| x \| y \| 1.0 | "
    assert len(re.split(r"(?<!\\)\|", row)) == 4
    (theirs,) = mmvet.judge_requests(benchmark, answers, official_quirks=True)
    assert theirs.messages[0]["content"].endswith("| yes | 1.0\n\nWhat is 1? | x | y | 1.0 | ")


def test_a_grader_that_explains_is_read_and_the_temperature_stays(tmp_path):
    """Official bugs: 3 tokens leave no room, and the temperature rises with every try."""
    benchmark = benchmark_of("rec", "ocr")
    server = ScriptedServer(lambda call: "Correctness: 0.5" if call.attempt == 2 else "well")
    with server as base_url:
        run = mmvet.JUDGE.ask(benchmark, answers_of(benchmark), mmvet.JUDGE.settings(base_url), tmp_path)
    assert mmvet.score(benchmark, answers_of(benchmark), run).metrics["total"] == 50.0
    assert len(server.calls) == 6
    assert {call.body["temperature"] for call in server.calls} == {0.0}
    assert min(call.body["max_tokens"] for call in server.calls) > 3
    again = replay(tmp_path, mmvet.judge_requests(benchmark, answers_of(benchmark)))
    assert again == run


def test_the_original_s_way_when_asked_for(tmp_path):
    """3 tokens, another ending and half a degree more with each of five tries; the last word counts, or 0."""
    benchmark = benchmark_of("rec", "ocr")
    never = "answer v1_1"
    server = ScriptedServer(lambda call: "0.9" if call.body["temperature"] >= 1.0 and never not in call.text else "hm")
    with server as base_url:
        settings = mmvet.JUDGE.settings(base_url, concurrency=1)
        run = mmvet.JUDGE.ask(benchmark, answers_of(benchmark), settings, tmp_path, official_quirks=True)
        again = mmvet.JUDGE.ask(benchmark, answers_of(benchmark), settings, tmp_path, official_quirks=True)
    asked = [call.body for call in server.calls if never in call.text]
    assert [body["temperature"] for body in asked] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert {body["max_tokens"] for body in asked} == {3}
    assert [body["messages"][0]["content"].endswith("| ") for body in asked] == [True] + [False] * 4
    assert len(server.calls) == 3 + 5
    assert (run.usage.asked, again.usage.asked, again.usage.cached) == (8, 0, 8)
    score = mmvet.score(benchmark, answers_of(benchmark), run, official_quirks=True)
    assert score.metrics["total"] == 45.0
    assert score.protocol == "mm-vet-official-quirks"
    requests = mmvet.judge_requests(benchmark, answers_of(benchmark), official_quirks=True)
    assert replay(tmp_path, requests) == again == run


def test_five_runs_as_in_the_paper(tmp_path):
    """Official bug: one run by default, so that the deviation between runs is not seen. Here it is a parameter."""
    benchmark = benchmark_of("rec")
    server = ScriptedServer(lambda call: f"0.{call.attempt}")
    with server as base_url:
        run = mmvet.JUDGE.ask(benchmark, answers_of(benchmark), mmvet.JUDGE.settings(base_url), tmp_path, runs=5)
    score = mmvet.score(benchmark, answers_of(benchmark), run)
    assert score.by_run == (0.0, 10.0, 20.0, 30.0, 40.0)
    assert score.metrics["total"] == pytest.approx(20.0)


def test_decoding_is_the_published_one():
    assert mmvet.DECODING == {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}
