"""LLaVA-Bench: the authors' reviews give the authors' figures; and the original's bugs that ours does not have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from eval import llavabench
from eval.core.judge import JudgeRun, Verdict, replay
from eval.core.store import read_answers
from eval.core.types import Answer, BenchmarkData, Question
from tests.openai_server import ScriptedServer, failure

pytestmark = pytest.mark.fast

BENCH = os.environ.get("DAMA_BENCH_DATA", "")
official = pytest.mark.skipif(not BENCH, reason="DAMA_BENCH_DATA not set")


def benchmark_of(*kinds: str) -> BenchmarkData:
    questions = (
        Question(str(i), f"{i:03d}.jpg", f"What is {i}?", f"reference {i}", (kind,), f"context {i}")
        for i, kind in enumerate(kinds)
    )
    return BenchmarkData(tuple(questions), "Give two scores.")


def answers_of(benchmark):
    return [Answer(q.id, q.image_id, q.prompt, f"answer {q.id}") for q in benchmark.questions]


def score_of(benchmark, *texts, **others):
    verdicts = (Verdict(q.id, 0, "", text, None, "v") for q, text in zip(benchmark.questions, texts))
    return llavabench.score(benchmark, answers_of(benchmark), JudgeRun("gpt", 0.2, "d", tuple(verdicts)), **others)


# ------------------------------------------------------------------------------------------------- the real reviews


def golden() -> tuple[BenchmarkData, list[Answer]]:
    """The questions as far as they are known (no pictures, contexts and references) and LLaVA-1.5-7B's answers."""
    home = Path(BENCH, "llava_bench")
    rows = [json.loads(line) for line in (home / "questions_recovered.jsonl").read_text().splitlines()]
    questions = (
        Question(str(r["question_id"]), "", r["text"], "", (r["category"].removeprefix("llava_bench_"),)) for r in rows
    )
    answers = read_answers(home / "golden/answers/llava-v1.5-7b.jsonl")
    return BenchmarkData(tuple(questions), llavabench._rule(home / "rule.json")), answers


def review(number: int) -> Path:
    return Path(BENCH, f"llava_bench/golden/reviews/llava-v1.5-7b-eval{number}.jsonl")


@official
@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("number, relative", [(1, 64.8), (2, 65.3), (3, 66.3)])
def test_the_authors_reviews_give_the_authors_figures(number, relative, quirks):
    benchmark, answers = golden()
    score = llavabench.score(benchmark, answers, llavabench.read_reviews(review(number)), official_quirks=quirks)
    assert round(score.metrics["relative"], 1) == relative
    assert score.counts == {"answers": 60, "missing": 0, "verdicts": 60, "unparsed": 0, "failed": 0}


@official
def test_the_authors_first_review_by_kind():
    benchmark, answers = golden()
    metrics = llavabench.score(benchmark, answers, llavabench.read_reviews(review(1))).metrics
    by_kind = [round(metrics[f"relative_{kind}"], 1) for kind in ("complex", "conv", "detail")]
    assert by_kind == [77.6, 59.3, 47.7]
    # Sums of the reviews' own first lines: 522 for the references and 338 for the answers, of 60.
    assert metrics["reference_score"] == pytest.approx(522 / 60)
    assert metrics["answer_score"] == pytest.approx(338 / 60)


@official
def test_three_reviews_are_three_runs():
    benchmark, answers = golden()
    score = llavabench.score(benchmark, answers, llavabench.read_reviews(*(review(n) for n in (1, 2, 3))))
    assert [round(value, 1) for value in score.by_run] == [64.8, 65.3, 66.3]
    assert score.metrics["relative"] == pytest.approx(100 * (338 + 341 + 345) / (522 + 522 + 520))
    assert score.metrics["relative_std"] == pytest.approx(0.8079, abs=1e-4)
    assert "65.5 [" in llavabench.format_table({"7B": score})


@official
def test_the_reviews_may_come_in_any_order(tmp_path):
    """Official bug: three files are walked line by line together."""
    benchmark, answers = golden()
    (tmp_path / "reviews.jsonl").write_text("".join(reversed(review(1).read_text().splitlines(keepends=True))))
    straight = llavabench.score(benchmark, answers, llavabench.read_reviews(review(1)))
    shuffled = llavabench.score(benchmark, answers[::-1], llavabench.read_reviews(tmp_path / "reviews.jsonl"))
    assert shuffled == straight


# --------------------------------------------------------------------------------------------------- official files


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def folder_of(tmp_path, **others):
    """A folder in the official layout with two questions, its lists in different orders."""
    home = tmp_path / "llava_bench"
    home.mkdir()
    lists = {
        "questions": [
            {"question_id": i, "image": f"00{i}.jpg", "text": f"What is {i}?", "category": ("conv", "detail")[i]}
            for i in range(2)
        ],
        "context": [
            {"id": f"00{i}", "image": f"00{i}.jpg", "caption": [f"context {i}", "more"] if i else "context 0"}
            for i in (1, 0)
        ],
        "answers_gpt4": [{"question_id": i, "text": f"reference {i}"} for i in (1, 0)],
    }
    for name, content in (lists | others).items():
        write_lines(home / f"{name}.jsonl", content)
    return tmp_path


@official
def test_the_official_layout(tmp_path):
    """Contexts by picture and references by id, whatever the order of the lines."""
    folder = folder_of(tmp_path)
    shutil.copy(Path(BENCH, "llava_bench/rule.json"), folder / "llava_bench")
    benchmark = llavabench.load(folder)
    question = Question("1", "001.jpg", "What is 1?", "reference 1", ("detail",), "context 1\nmore")
    assert benchmark.questions[1] == question
    assert benchmark.prompt_digest == "2ce22b562d600886"
    request = benchmark.requests()[1]
    assert (request.id, request.prompt, request.image, request.image_id) == ("1", "What is 1?", "001.jpg", "001")


def test_the_judge_s_messages():
    benchmark = benchmark_of("conv", "detail")
    request = llavabench.judge_requests(benchmark, answers_of(benchmark))[1]
    system, user = request.messages
    assert system["content"].startswith("You are a helpful and precise assistant")
    assert user == {
        "role": "user",
        "content": "[Context]\ncontext 1\n\n[Question]\nWhat is 1?\n\n"
        "[Assistant 1]\nreference 1\n\n[End of Assistant 1]\n\n[Assistant 2]\nanswer 1\n\n[End of Assistant 2]\n\n"
        "[System]\nGive two scores.\n\n",
    }


def test_faults_name_file_and_field(tmp_path):
    questions = [
        {"question_id": 0, "image": "000.jpg", "text": "a", "category": "llava_bench_conv"},
        {"question_id": 0, "image": "009.jpg", "text": "b", "category": "chat"},
        {"question_id": 7, "image": "001.jpg", "text": "c", "category": "detail"},
    ]
    with pytest.raises(ValueError) as caught:
        llavabench.load(folder_of(tmp_path, questions=questions))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].endswith("questions.jsonl: 4 errors")
    assert lines[1:5] == [
        "record 1: field 'question_id': '0' is used before",
        "record 1: field 'category': expected one of conv, detail, complex, got 'chat'",
        "record 1: field 'image': '009.jpg' is not in context.jsonl",
        "record 2: field 'question_id': '7' is not in answers_gpt4.jsonl",
    ]


def test_another_rule_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    with pytest.raises(ValueError, match="rule.json: missing"):
        llavabench.load(folder)
    rule = {"llava_bench_conv": {"prompt": "Be kind."}}
    (folder / "llava_bench/rule.json").write_text(json.dumps(rule))
    with pytest.raises(ValueError, match="(?s)rule.json: 3 errors.*'llava_bench_conv': .*2ce22b56.* got 'Be kind.'"):
        llavabench.load(folder)


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "text, scores, as_original",
    [
        ("7 9\nBecause ...", (7, 9), (7, 9)),
        ("8.5 10", (8.5, 10), (8.5, 10)),
        ("8,6", (8, 6), (8, 6)),
        ("8, 6\nBecause", (8, 6), None),
        ("**8 6**", (8, 6), None),
        ("\n8 6", (8, 6), None),
        ("8 6 ", (8, 6), None),
        ("8/10 6/10", None, None),
        ("8/10", None, None),
        ("8 6 7", None, None),
        ("80 60", None, (80, 60)),
        ("-1 -1", None, (-1, -1)),
        ("nan nan", None, None),
        ("Assistant 1: 8, Assistant 2: 6", None, None),
        ("<think>9 9</think>7 5", (7, 5), None),
        ("", None, None),
    ],
)
def test_scores(text, scores, as_original):
    assert llavabench.parse(text) == scores
    assert llavabench.parse_official(text) == as_original


def test_metrics_on_paper():
    """(8, 4), (10, 10), (7, 9): 100 x 23 / 25 = 92, a ratio of sums; the mean of the three ratios would be 92.86.

    conv: 100 x 14 / 18; detail: 100 x 9 / 7.
    """
    score = score_of(benchmark_of("conv", "conv", "detail"), "8 4", "10 10", "7 9")
    assert score.metrics == {
        "relative": 92.0,
        "relative_conv": pytest.approx(1400 / 18),
        "relative_detail": pytest.approx(900 / 7),
        "relative_complex": None,
        "reference_score": pytest.approx(25 / 3),
        "answer_score": pytest.approx(23 / 3),
        "relative_std": None,
    }
    assert [item["wrong"] for item in score.items] == [True, False, False]


def test_an_unreadable_review_is_not_averaged_in():
    """Official bug: it counts as (-1, -1). With (8, 4) beside it: ours 50, there 100 x 3 / 7."""
    benchmark = benchmark_of("conv", "detail")
    ours = score_of(benchmark, "8 4", "Both are fine.")
    assert (ours.metrics["relative"], ours.counts["unparsed"]) == (50.0, 1)
    theirs = score_of(benchmark, "8 4", "Both are fine.", official_quirks=True)
    assert (theirs.metrics["relative"], theirs.counts["unparsed"]) == (pytest.approx(300 / 7), 1)
    assert theirs.protocol == "llava-bench-in-the-wild-official-quirks"


def test_a_judge_that_fails_every_time_gives_no_score(tmp_path):
    """Official bug: where every call failed the score was a good one, 100 x (-1) / (-1)."""
    benchmark = benchmark_of("conv", "detail")
    with ScriptedServer(lambda call: failure(500)) as base_url:
        settings = llavabench.JUDGE.settings(base_url, retries=1)
        run = llavabench.JUDGE.ask(benchmark, answers_of(benchmark), settings, tmp_path)
    ours = llavabench.score(benchmark, answers_of(benchmark), run)
    assert (ours.metrics["relative"], ours.counts["failed"]) == (None, 2)
    theirs = llavabench.score(benchmark, answers_of(benchmark), run, official_quirks=True)
    assert theirs.metrics["relative"] == 100.0


def test_judged_resumed_and_scored_over_http(tmp_path):
    """Official bugs: lines are aligned by position, and a run resumes at the number of reviews that are there.

    Interrupted after the last answer was judged, and resumed in another order: every answer keeps its own review.
    """
    benchmark = benchmark_of("conv", "detail", "complex")
    server = ScriptedServer(lambda call: f"9 {call.text.split('answer ')[1][0]}\nBecause.")
    answers = answers_of(benchmark)
    with server as base_url:
        settings = llavabench.JUDGE.settings(base_url, "local")
        llavabench.JUDGE.ask(benchmark, answers[2:], settings, tmp_path)
        run = llavabench.JUDGE.ask(benchmark, answers[::-1], settings, tmp_path)
    assert len(server.calls) == 3
    assert {"model": "local", "temperature": 0.2, "max_tokens": 1024}.items() <= server.calls[0].body.items()
    score = llavabench.score(benchmark, answers, run)
    assert [item["values"] for item in score.items] == [[(9.0, 0.0)], [(9.0, 1.0)], [(9.0, 2.0)]]
    again = replay(tmp_path, llavabench.judge_requests(benchmark, answers))
    assert llavabench.score(benchmark, answers, again) == score


def test_decoding_is_the_published_one():
    assert llavabench.DECODING == {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}
