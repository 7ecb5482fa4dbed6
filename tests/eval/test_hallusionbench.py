"""HallusionBench: metrics on paper, groups, both modes, the original's errors, and figures from official questions."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from dama.chat import ChatUsage
from eval.core.judge import JudgeRun, Verdict
from eval.core.official import digest_of_text
from eval.core.types import Answer
from eval.hallusionbench import (
    BENCHMARK,
    JUDGE,
    judge_requests,
    load,
    parse,
    parse_official,
    prompt_in,
    score,
)
from eval.yes_no import read_leading

pytestmark = pytest.mark.fast

PROMPT = "Q {question} R {gt_answer_details} A {prediction}"


def row(category, visual_input, figure, question, truth):
    image = None if visual_input == "0" else f"./{category}/map/7_{figure}.png"
    return {"category": category, "subcategory": "map", "visual_input": visual_input, "set_id": "7",
            "figure_id": figure, "sample_note": "", "question_id": question, "question": f"Is it {question}?",
            "gt_answer_details": f"It is {truth}.", "gt_answer": truth, "filename": image}  # fmt: skip


# One set of each category. VS: the question without figure, on the figure, and on the edited figure; two questions.
ROWS = [
    row("VS", "0", "0", "0", "1"), row("VS", "0", "0", "1", "0"),
    row("VS", "1", "1", "0", "1"), row("VS", "1", "1", "1", "0"),
    row("VS", "2", "2", "0", "0"), row("VS", "2", "2", "1", "1"),
    row("VD", "1", "0", "0", "1"), row("VD", "2", "1", "0", "0"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hallusionbench").mkdir()
    (tmp_path / "hallusionbench/HallusionBench.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.fixture
def data(folder):
    return load(folder)


def answers(data, *texts):
    return [Answer(q.id, "", q.prompt, text) for q, text in zip(data.questions, texts, strict=True)]


def judged(replies):
    verdicts = [
        Verdict(id_, 0, "", text, None if text is not None else "timeout", "v") for id_, text in replies.items()
    ]
    return JudgeRun("gpt-4", 0.0, "d", tuple(verdicts), ChatUsage())


# Right where the truth is yes no | yes no | no yes | yes no.
SAID = ("I cannot tell.", "No.", "Yes, it is.", "Yes", "no", "Perhaps", "YES!", "No - it is not")


def test_metrics_on_paper(data):
    """Right: 0 (unclear without figure counts), 1, 2, 4, 6, 7; wrong: 3 (false positive); unparsed: 5. 6 of 8.

    Pairs: VS question 0 has answers 0, 2, 4, all right; VS question 1 has 1, 3, 5: no; VD 6, 7: right. 2 of 3.
    Figures: VS 1 (2, 3) no, VS 2 (4, 5) no, VD 0 and VD 1 right, VS 0 is none: 2 of 4.
    Easy: VS 0 (0, 2) right, VS 1 (1, 3) no, VD (6) right: 2 of 3. Hard: (4) right, (5) no, (7) right: 2 of 3.
    Read: 1 3 2 4 6 7 = no yes yes no yes no: half yes; truths no no yes no yes no: a third. Wrong: one, said yes.
    """
    found = score(data, answers(data, *SAID))
    expected = {"question_accuracy": 75, "pair_accuracy": 200 / 3, "figure_accuracy": 50, "easy_accuracy": 200 / 3,
                "hard_accuracy": 200 / 3, "vd_accuracy": 100, "vs_accuracy": 400 / 6, "yes_difference": 100 / 6,
                "false_positive_share": 100}  # fmt: skip
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.protocol == "hallusionbench-rules" and found.counts["unparsed"] == 2
    assert [item["wrong"] for item in found.items] == [False, False, False, True, False, None, False, False]
    assert found.interval("pair_accuracy").value == pytest.approx(200 / 3)


def test_a_missing_answer_takes_its_groups_out(data):
    found = score(data, answers(data, *SAID)[:-1])
    groups = {name: count for name, count in found.counts.items() if name.startswith("incomplete")}
    assert groups == {"incomplete pairs": 1, "incomplete figures": 1, "incomplete easy pairs": 0,
                      "incomplete hard pairs": 1}  # fmt: skip
    assert (found.counts["missing"], found.metrics["pair_accuracy"]) == (1, 50.0)


def test_questions_without_figure_are_asked_without_image(data):
    requests = data.requests()
    assert [request.image for request in requests[:3]] == [None, None, "VS/map/7_1.png"]
    assert len({request.image_id for request in requests}) == 5  # figures of both categories keep apart
    assert requests[6].image_id == "VD/map/7_0"


# ----------------------------------------------------------------------------------------------------------- the judge


@pytest.fixture
def with_prompt(folder, monkeypatch):
    (folder / "prompts").mkdir()
    (folder / "prompts/hallusionbench_judge.txt").write_text(PROMPT + "\n")
    monkeypatch.setattr("eval.hallusionbench._PROMPT_SHA256", digest_of_text(PROMPT))
    return load(folder)


def test_the_judge_decides(with_prompt):
    """Verdicts: unclear without figure is right; incorrect: 1; unclear with figure: 5. 6 of 8 right."""
    given = answers(with_prompt, *"abcdefgh")
    replies = ["unclear", "Incorrect.", "correct", "correct", "correct", "unclear", "correct", "correct"]
    run = judged(dict(zip((answer.id for answer in given), replies)))
    found = score(with_prompt, given, run)
    assert found.protocol == "hallusionbench-llm" and found.metrics["question_accuracy"] == 75.0
    assert found.metrics["false_positive_share"] == 100.0  # the wrong one's truth is no
    (request, *_) = judge_requests(with_prompt, given)
    assert request.messages == ({"role": "user", "content": "Q Is it 0? R It is 1. A a"},)


class TestErrorsOfTheOriginal:
    def test_an_empty_answer_is_never_correct(self, with_prompt):
        """The judge, which calls it correct, is not asked; the original asks it and believes it."""
        given = answers(with_prompt, *" " * 8)
        assert judge_requests(with_prompt, given) == []
        ours = score(with_prompt, given, judged({}))
        assert ours.metrics["question_accuracy"] == 25.0  # not knowing, where there is no figure
        asked = judge_requests(with_prompt, given, official_quirks=True)
        believed = judged({request.id: "correct" for request in asked})
        theirs = score(with_prompt, given, believed, official_quirks=True)
        assert (len(asked), theirs.metrics["question_accuracy"]) == (8, 100.0)
        assert theirs.protocol == "hallusionbench-llm-official-quirks"

    def test_a_failed_request_is_not_unclear(self, with_prompt):
        """Right for a question without figure by the original; in no metric here, and neither are its groups."""
        given = answers(with_prompt, *"abcdefgh")
        replies = {answer.id: "correct" for answer in given} | {given[0].id: None}
        ours = score(with_prompt, given, judged(replies))
        assert (ours.counts["failed"], ours.items[0]["wrong"]) == (1, None)
        assert sum(item["parts"].get("question_accuracy", [0, 0])[1] for item in ours.items) == 7
        assert sum(item["parts"].get("pair_accuracy", [0, 0])[1] for item in ours.items) == 2
        assert score(with_prompt, given, judged(replies), official_quirks=True).items[0]["wrong"] is False

    @pytest.mark.parametrize(
        "reply, ours, theirs",
        [
            ("correct", "correct", "correct"),
            ("“Correct”.", "correct", "correct"),
            ("incorrect", "incorrect", "incorrect"),
            ("not correct", "incorrect", "correct"),
            ("Unclear", "unclear", "unclear"),
            ("", None, "unclear"),
            ("correct or incorrect", None, "incorrect"),
            ("I am a language model", None, "unclear"),
        ],
    )
    def test_a_verdict_is_read_by_words(self, reply, ours, theirs):
        assert (parse(reply), parse_official(reply)) == (ours, theirs)


def test_a_judge_that_was_asked_about_other_answers(with_prompt):
    given = answers(with_prompt, *"abcdefgh")
    with pytest.raises(ValueError, match="answer 'VD_map_7_0_0': no verdict"):
        score(with_prompt, given, judged({answer.id: "correct" for answer in given[:6]}))


def test_the_prompt_is_put_together_from_the_script_that_never_runs(folder):
    script = """
raise SystemExit("never runs")
def evaluate_by_chatgpt(data, output_entry):
    for sample in data:
        prompt = 'Compare. '
        prompt += 'Question:'
        prompt += sample['question']
        prompt += ' Reference:'
        prompt += sample['gt_answer_details']
        prompt += ' Prediction:'
        prompt += sample[output_entry]
def check_same_by_chatgpt(data):
    prompt = 'Another'
"""
    assert prompt_in(script) == "Compare. Question:{question} Reference:{gt_answer_details} Prediction:{prediction}"
    (folder / "hallusionbench/utils.py").write_text(script)
    with pytest.raises(ValueError, match=r"utils.py: expected a judge's prompt of SHA-256 bb0c7f"):
        load(folder)


def test_rules_need_no_prompt_and_the_judge_does(data):
    with pytest.raises(ValueError, match=r"HallusionBench: expected the judge's prompt with \{question\}"):
        JUDGE.requests(data, answers(data, *"abcdefgh"))
    with pytest.raises(ValueError, match="expected no official_quirks"):
        score(data, answers(data, *"abcdefgh"), official_quirks=True)


def test_all_errors_of_a_file_at_once(folder):
    rows = [ROWS[0] | {"filename": "./VS/map/7_0.png"}, ROWS[1] | {"gt_answer": "2"}, ROWS[2], ROWS[2]]
    (folder / "hallusionbench/HallusionBench.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"(?s)3 errors.*'VS_map_7_1_0': 2 questions.*'0' with filename.*got '2'"):
        load(folder)


def test_images_of_one_name_come_out_of_the_archive_by_their_folders(tmp_path):
    """Figures are numbered anew in every folder."""
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        for name in ("hallusion_bench/VD/map/7_0.png", "hallusion_bench/VS/map/7_0.png"):
            archive.writestr(name, name)
    wanted = ["VD/map/7_0.png", "VS/map/7_0.png"]
    assert dict(BENCHMARK.images.take(tmp_path / "i.zip", wanted)) == {
        n: f"hallusion_bench/{n}".encode() for n in wanted
    }


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    @pytest.fixture(scope="class")
    def official(self):
        return load(os.environ["DAMA_BENCH_DATA"])

    @pytest.mark.parametrize(
        "text, figures",
        [
            ("Yes", [42.87, 3.96, 7.23, 46.37, 34.19]),
            ("Hard to say.", [15.77, 0.0, 0.0, 1.76, 0.0]),
            ("", [15.77, 0.0, 0.0, 1.76, 0.0]),
        ],
    )
    def test_the_same_answer_everywhere(self, official, text, figures):
        found = score(official, [Answer(q.id, "", q.prompt, text) for q in official.questions])
        names = ("question", "pair", "figure", "easy", "hard")
        assert [round(found.metrics[f"{name}_accuracy"], 2) for name in names] == figures

    def test_questions_and_groups(self, official):
        found = score(official, [Answer(q.id, "", q.prompt, "Yes") for q in official.questions])
        groups = {
            metric: sum(item["parts"].get(f"{metric}_accuracy", [0, 0])[1] for item in found.items)
            for metric in ("question", "pair", "figure", "easy", "hard", "vd", "vs")
        }
        assert groups == {"question": 1129, "pair": 455, "figure": 346, "easy": 455, "hard": 430, "vd": 591, "vs": 538}
        assert sum(request.image is None for request in official.requests()) == 178

    def test_real_answers_are_read_by_their_first_word(self):
        """254 answers: 112 begin with yes, 87 with no, and 55 with neither."""
        path = Path(os.environ["DAMA_BENCH_DATA"]) / "hallusionbench/HallusionBench_result_sample.json"
        read = Counter(read_leading(row["model_prediction"]) for row in json.loads(path.read_text()))
        assert read == {"yes": 112, "no": 87, None: 55}
