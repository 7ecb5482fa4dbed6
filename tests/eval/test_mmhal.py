"""MMHal-Bench: official file, judge prompt, ratings, and the original scorer's bugs that ours does not have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval import mmhal
from eval.core.judge import JudgeRun, Verdict, replay
from eval.core.types import Answer, BenchmarkData, Question
from tests.openai_server import VERSION, ScriptedServer

pytestmark = pytest.mark.fast

BENCH = os.environ.get("DAMA_BENCH_DATA", "")
official = pytest.mark.skipif(not BENCH, reason="DAMA_BENCH_DATA not set")
TEMPLATE = "{}\nQ {}\nT {}\nA {}"


def benchmark_of(*kinds: str) -> BenchmarkData:
    questions = (
        Question(f"im{i}", f"im{i}.jpg", f"How many on {i}?", f"There are {i}.", (kind,), "Cat, Dog")
        for i, kind in enumerate(kinds)
    )
    return BenchmarkData(tuple(questions), TEMPLATE)


def answers_of(benchmark):
    return [Answer(q.id, q.image_id, q.prompt, f"I see {q.id}.") for q in benchmark.questions]


def score_of(benchmark, *texts, **others):
    verdicts = (Verdict(q.id, 0, "", text, None, "v") for q, text in zip(benchmark.questions, texts))
    return mmhal.score(benchmark, answers_of(benchmark), JudgeRun("gpt", 0.0, "d", tuple(verdicts)), **others)


@official
def test_the_official_file():
    """96 questions, 12 of each type in turn; the picture is called by its id."""
    benchmark = mmhal.load(BENCH)
    assert len(benchmark.questions) == 96
    assert [q.kinds[0] for q in benchmark.questions] == list(mmhal.KINDS) * 12
    first = benchmark.questions[0]
    assert (first.id, first.image, first.context) == ("df62a56fdc1bb12b", "df62a56fdc1bb12b.jpg", "Fire hydrant")
    assert benchmark.requests()[0].prompt == "What color is the fire hydrant cap in the picture?"
    assert benchmark.prompt_digest == "2db099baee2b452e"


@official
def test_the_official_prompt_with_its_slots_filled(tmp_path):
    """Braces in an answer are no slots. From the script the prompt is the same as from the file."""
    benchmark = mmhal.load(BENCH)
    question = benchmark.questions[2]
    answers = [Answer(question.id, "", question.prompt, "The {left} one {}.")]
    (request,) = mmhal.judge_requests(benchmark, answers)
    assert [turn["role"] for turn in request.messages] == ["user"]
    text = request.messages[0]["content"]
    assert text == Path(BENCH, "prompts/mmhal_judge.txt").read_text().replace("{}", "<>") \
        .replace("<>", "Vase, Houseplant, Stool, Coffee table, Flower", 1).replace("<>", question.prompt, 1) \
        .replace("<>", question.truth, 1).replace("<>", "The {left} one {}.", 1)  # fmt: skip
    home = tmp_path / "mmhal"
    home.mkdir()
    template = Path(BENCH, "mmhal/mmhal-bench_answer_template.json")
    (home / template.name).write_bytes(template.read_bytes())
    (home / "eval_gpt_mmhal.py").write_text(f"raise SystemExit\ntemplate = {benchmark.judge_prompt + chr(10)!r}\n")
    assert mmhal.load(tmp_path).judge_prompt == benchmark.judge_prompt


def record(**changes):
    good = {"question_type": "other", "image_id": "a", "image_src": "https://x/y/z_o.png", "image_content": ["Cat"]}
    return good | {"question": "What?", "gt_answer": "A cat.", "model_answer": ""} | changes


def write_template(folder, *records):
    (folder / "mmhal").mkdir()
    (folder / "mmhal/mmhal-bench_answer_template.json").write_text(json.dumps(records))


def test_faults_name_file_and_field(tmp_path):
    write_template(tmp_path, record(), record(question_type="colour"), record(image_id="a"))
    with pytest.raises(ValueError) as caught:
        mmhal.load(tmp_path)
    lines = str(caught.value).splitlines()
    assert "mmhal-bench_answer_template.json: 3 errors" in lines[0]
    assert "record 1: field 'question_type': expected one of attribute, " in lines[1]
    assert [line.strip() for line in lines[2:4]] == [
        "record 1: field 'image_id': 'a' is used before",
        "record 2: field 'image_id': 'a' is used before",
    ]


def test_a_missing_field_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="mmhal-bench_answer_template.json: missing"):
        mmhal.load(tmp_path)
    write_template(tmp_path, record(gt_answer=None))
    with pytest.raises(ValueError, match="record 0: field 'gt_answer': expected str, got NoneType"):
        mmhal.load(tmp_path)
    (tmp_path / "mmhal/mmhal-bench_answer_template.json").write_text(json.dumps([record()]))
    with pytest.raises(ValueError, match="official prompt: expected .*mmhal_judge.txt or .*eval_gpt_mmhal.py"):
        mmhal.load(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/mmhal_judge.txt").write_text(TEMPLATE)
    with pytest.raises(ValueError, match="mmhal_judge.txt: expected a text of SHA-256 2db099ba"):
        mmhal.load(tmp_path)


def test_a_prompt_without_its_slots_is_refused():
    benchmark = BenchmarkData((), "Rate {}")
    with pytest.raises(ValueError, match="expected 4 slots, got 1"):
        mmhal.judge_requests(benchmark, [])


@pytest.mark.parametrize(
    "text, rating, as_original",
    [
        ("It is true.\nRating: 5, very informative, no hallucination", 5, 5),
        ("- RATING: 0, not informative, with hallucination", 0, 0),
        ("Rating: 3. As I said, rating: 3", 3, 3),
        ("**Rating**: 5", 5, None),
        ("**Rating: 4**", 4, 4),
        ("Rating:\n6", 6, None),
        ("Rating: 5. On reflection, rating: 2", None, None),
        ("Rating: 10", None, 1),
        ("Rating: 5.5", None, 5),
        ("Rating: -1", None, None),
        ("Rating (0-6): 4", None, None),
        ("Rating: 4 or 5", None, 4),
        ("Rating: 1, 2", None, 1),
        ("Rating: 1 and 2", None, 1),
        ("Rating: 1/2", None, 1),
        ("Rating: 4/5", None, 4),
        ("Rating: 3; 4", None, 3),
        ("Rating: 5 or maybe 4", None, 5),
        ("Rating: 1 (Rating: 10)", None, 1),
        ("Rating: 4 then 5", None, 4),
        ("Rating: 4 vs 5", None, 4),
        ("Rating: 4 but maybe 5", None, 4),
        ("Rating: 4, possibly as high as 5", None, 4),
        ("Rating: 5 (or 4)", None, 5),
        ("Rating: 4. No, wait: my rating is 5", None, 4),
        ("Rating: 5 (it is right)", 5, 5),
        ("Rating: 4th", None, 4),
        ("Rating: 4 out of 5", None, 4),
        ("Rating: 5/6", 5, 5),
        ("Rating: 5 out of 6", 5, 5),
        ("Rating: 5\n1. It is right.", 5, 5),
        ("Rating (0-6): 4. Rating: 4, no hallucination", 4, 4),
        ("The answer is fine.", None, None),
        ("<think>Rating: 2?</think> Rating: 6", 6, None),
        ("", None, None),
    ],
)
def test_ratings(text, rating, as_original):
    assert mmhal.parse(text) == rating
    assert mmhal.parse_official(text) == as_original


def test_metrics_on_paper():
    """Ratings 6, 2, 3, 1: mean 12 / 4 = 3; below 3 are two of four, 50 %.

    Informativeness: (6 - 3) / 3, 2 / 3, (3 - 3) / 3, 1 / 3, together 2 of 4. The two attribute questions: (6 + 3) / 2.
    """
    benchmark = benchmark_of("attribute", "counting", "attribute", "other")
    score = score_of(benchmark, "Rating: 6", "Rating: 2", "Rating: 3", "Rating: 1")
    assert {name: value for name, value in score.metrics.items() if value is not None} == {
        "score": 3.0,
        "hallucination_rate": 50.0,
        "informativeness": pytest.approx(0.5),
        "mean_words": 3.0,
        "score_attribute": 4.5,
        "score_counting": 2.0,
        "score_other": 1.0,
    }
    assert [item["wrong"] for item in score.items] == [False, True, False, True]
    assert set(score.items[0]["parts"]) == {metric.name for metric in mmhal.METRICS} - {"score_std"}
    assert "3.00 [" in mmhal.format_table({"m": score})


def test_words_count_whatever_the_verdict():
    """Answers of 3 words each: "I see im0." and "I see im1.", also where a rating is unreadable."""
    score = score_of(benchmark_of("other", "other"), "Rating: 6", "I cannot say.")
    assert score.metrics["mean_words"] == 3.0
    header, line = mmhal.format_table({"m": score}).splitlines()[:2]
    assert header.split()[3:5] == ["informativeness", "words"]
    assert "3.0" in line.split()


def test_an_unreadable_rating_is_no_hallucination():
    """Official bug: it is scored 0. Of 6 and unreadable the mean is 6 and nothing hallucinates; there 3, and 50 %."""
    benchmark = benchmark_of("other", "other")
    ours = score_of(benchmark, "Rating: 6", "I cannot say.")
    assert (ours.metrics["score"], ours.metrics["hallucination_rate"], ours.counts["unparsed"]) == (6.0, 0.0, 1)
    theirs = score_of(benchmark, "Rating: 6", "I cannot say.", official_quirks=True)
    assert (theirs.metrics["score"], theirs.metrics["hallucination_rate"], theirs.counts["unparsed"]) == (3.0, 50.0, 1)
    assert (ours.protocol, theirs.protocol) == ("mmhal", "mmhal-official-quirks")


def test_a_bold_rating_is_a_rating():
    benchmark = benchmark_of("other")
    assert score_of(benchmark, "**Rating**: 5").metrics["score"] == 5.0
    assert score_of(benchmark, "**Rating**: 5", official_quirks=True).metrics["score"] == 0.0


def test_an_alias_does_not_loop(tmp_path):
    """Official bug: asked for ever where the server names another model than the one asked for."""
    benchmark = benchmark_of("other", "counting")
    server = ScriptedServer(lambda call: "Rating: 4")
    with server as base_url:
        run = mmhal.JUDGE.ask(benchmark, answers_of(benchmark), mmhal.JUDGE.settings(base_url, "gpt-4"), tmp_path)
    assert len(server.calls) == 2
    assert (run.name, run.version) == ("gpt-4", VERSION)
    assert {"temperature": 0.0, "max_tokens": 512}.items() <= server.calls[0].body.items()
    again = replay(tmp_path, mmhal.judge_requests(benchmark, answers_of(benchmark)))
    assert mmhal.score(benchmark, answers_of(benchmark), again).metrics["score"] == 4.0


def test_answers_are_joined_by_id(tmp_path):
    """Official bug: answers go into the template by their order. Here the judge rates by the answer it is shown."""
    benchmark = benchmark_of("other", "counting", "relation")
    ratings = {"im0": 6, "im1": 2, "im2": 4}
    server = ScriptedServer(lambda call: f"Rating: {ratings[call.text.split('I see ')[1][:3]]}")
    shuffled = [answers_of(benchmark)[i] for i in (2, 0, 1)]
    with server as base_url:
        run = mmhal.JUDGE.ask(benchmark, shuffled, mmhal.JUDGE.settings(base_url), tmp_path)
    for call in server.calls:
        shown = call.text.split("I see ")[1][:3]
        assert f"How many on {shown[2]}?" in call.text
    score = mmhal.score(benchmark, shuffled, run)
    assert {item["id"]: item["values"] for item in score.items} == {id_: [r] for id_, r in ratings.items()}


def test_the_picture_may_bear_its_flickr_name(tmp_path):
    row = {"image_id": "ab12", "image_src": "https://c4.flickr.example/8/72_c5_o.png", "image_content": ["Cat"]}
    row |= {"question": "What?", "gt_answer": "A cat.", "question_type": "other"}
    assert mmhal._question(row, tmp_path).image == "ab12.png"
    (tmp_path / "72_c5_o.png").touch()
    assert mmhal._question(row, tmp_path).image == "72_c5_o.png"


def test_decoding_is_the_published_one():
    assert mmhal.DECODING == {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}
