"""POPE: both variants, figures on paper, and those of LLaVA-v1.5-13B from its own answers."""

import gzip
import json
import os
from pathlib import Path

import pytest

from eval.core.store import read_answers
from eval.core.types import Answer
from eval.pope import DECODING, RATIOS, SPLITS, SUFFIX, format_table, load, score

pytestmark = pytest.mark.fast

LABELS = ("yes", "no", "yes", "no")
THINGS = ("dog", "cat", "car", "bus")


@pytest.fixture
def folder(tmp_path):
    for home in (tmp_path / "pope", tmp_path / "pope" / "llava_variant"):
        home.mkdir()
        for split in SPLITS:
            rows = [
                {
                    "question_id": i,
                    "image": f"{i // 3}.jpg",
                    "text": f"Is there a {thing} in the image?",
                    "label": label,
                }
                for i, (thing, label) in enumerate(zip(THINGS, LABELS), 1)
            ]
            count = 2 if (split, home.name) == ("random", "llava_variant") else 4
            (home / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return tmp_path


@pytest.fixture
def pope(folder):
    return load(folder, "official")


def answers(pope, **texts):
    """texts: split -> what is said to its questions, in order."""
    said = {
        question.id: text
        for split, replies in texts.items()
        for question, text in zip((q for q in pope.questions if q.kinds == (split,)), replies)
    }
    return [Answer(q.id, "", q.prompt, said[q.id]) for q in pope.questions if q.id in said]


def test_both_variants_are_numbered_as_llava_does(folder, pope):
    assert [q.id for q in pope.questions if q.kinds == ("popular",)][0] == "20000001"
    assert [q.id for q in load(folder).questions] == (
        ["10000001", "10000002"] + [f"2000000{i}" for i in range(1, 5)] + [str(i) for i in range(1, 5)]
    )
    (first, *_) = pope.requests()
    assert (first.image, first.image_id) == ("0.jpg", "0")
    assert first.prompt == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert DECODING == {"max_new_tokens": 128, "num_beams": 1, "temperature": 0.0}


def test_figures_on_paper(pope):
    """Right are yes no yes no.

    random yes no no no: acc 3/4, P 1, R 1/2, F1 2/3, yes 1/4; popular all yes: acc 1/2, P 1/2, R 1, F1 2/3, yes 1;
    adversarial yes, nothing readable, no, no: acc 2/4, P 1, R 1/2, F1 2 / (1 + 2), yes 1/4. Mean F1 66.67.
    """
    said = {"random": ("Yes", "No", "No", "No"), "popular": ("yes",) * 4, "adversarial": ("Yes", "Perhaps", "No", "No")}
    found = score(pope, answers(pope, **said))
    expected = {"random": (75, 100, 50, 200 / 3, 25), "popular": (50, 50, 100, 200 / 3, 100),
                "adversarial": (50, 100, 50, 200 / 3, 25)}  # fmt: skip
    for split, values in expected.items():
        assert [found.metrics[f"{split}_{name}"] for name in RATIOS] == pytest.approx(values)
    assert (found.metrics["mean_f1"], found.metrics["mean_accuracy"]) == pytest.approx((200 / 3, 175 / 3))
    assert found.counts == {"answers": 12, "missing": 0, "unparsed": 1}
    assert found.protocol == "pope-official"
    assert "m: unparsed, right in no metric, which lowers accuracy and recall: 1 of 12" in format_table({"m": found})
    assert found.interval("random_f1").value == pytest.approx(200 / 3)
    with pytest.raises(KeyError):
        found.interval("mean_f1")


def test_records(pope):
    record, *_, unread, last = score(pope, answers(pope, random=("No", "Yes", "", "No"))).items
    assert record["parts"]["random_f1"] == [0.0, 1.0]
    assert {name: record[name] for name in ("id", "image_id", "image", "truth", "wrong", "spans", "split", "said")} == {
        "id": "10000001", "image_id": "0", "image": "0.jpg", "truth": "yes", "wrong": True, "spans": [],
        "split": "random", "said": "no",
    }  # fmt: skip
    assert (unread["wrong"], last["wrong"]) == (None, False)


def test_a_split_without_answers_is_undefined_and_said(pope):
    found = score(pope, answers(pope, random=("Yes", "No", "Yes", "No")))
    assert (found.metrics["random_f1"], found.metrics["popular_f1"], found.metrics["mean_f1"]) == (100.0, None, None)
    assert found.counts["missing"] == len(found.missing) == 8
    table = format_table({"model": found})
    assert "model: no answer: 8 of 12: " in table and "n/a" in table and "pope-official" in table


class TestFaultsOfTheOriginal:
    def test_an_answer_is_not_yes_by_default(self, pope):
        given = answers(pope, random=("", "None", "NO", "A bus"))
        ours, theirs = score(pope, given), score(pope, given, official_quirks=True)
        assert [item["said"] for item in ours.items] == [None, "no", "no", None]
        assert [item["said"] for item in theirs.items] == ["yes"] * 4
        assert (ours.metrics["random_yes_ratio"], theirs.metrics["random_yes_ratio"]) == (0.0, 100.0)
        assert theirs.protocol == "pope-official-official-quirks"
        assert "2 of 4" in format_table({"model": ours})

    def test_the_yes_ratio_is_the_models(self, pope):
        """And not that of the labels, which is 50 % whatever is said."""
        given = answers(pope, random=("Yes", "Yes", "Yes", "No"))
        assert score(pope, given).metrics["random_yes_ratio"] == 75.0

    def test_answers_go_by_id_not_by_order(self, pope):
        given = answers(pope, random=("Yes", "No", "Yes", "No"))
        assert score(pope, given[::-1]).metrics["random_accuracy"] == 100.0


def test_all_faults_of_a_file_at_once(folder):
    path = folder / "pope" / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["label"] = "maybe"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    with pytest.raises(ValueError, match=r"(?s)2 errors.*1 numbers are used twice.*expected yes or no, got 'maybe'"):
        load(folder, "official")
    path.unlink()
    (folder / "pope" / "coco_pope_popular.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 errors.*coco_pope_random.json: missing.*popular.json: missing"):
        load(folder, "official")


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    @pytest.fixture(scope="class")
    def home(self):
        return Path(os.environ["DAMA_BENCH_DATA"])

    @pytest.mark.parametrize("variant, counts", [("llava", (2910, 3000, 3000)), ("official", (3000, 3000, 3000))])
    def test_the_number_of_questions(self, home, variant, counts):
        kinds = [question.kinds[0] for question in load(home, variant).questions]
        assert tuple(kinds.count(split) for split in SPLITS) == counts

    @pytest.mark.parametrize("quirks", [False, True])
    def test_the_figures_of_llava_13b(self, home, tmp_path, quirks):
        """Its own answers; every one is Yes or No, so the original's reading makes no difference."""
        packed = home / "pope" / "golden" / "llava-v1.5-13b_answers.jsonl.gz"
        (tmp_path / "answers.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
        found = score(load(home), read_answers(tmp_path / "answers.jsonl"), official_quirks=quirks)
        figures = {split: [round(found.metrics[f"{split}_{name}"], 2) for name in RATIOS] for split in SPLITS}
        assert figures == {
            "random": [88.01, 97.44, 78.80, 87.14, 41.68],
            "popular": [87.43, 95.25, 78.80, 86.25, 41.37],
            "adversarial": [85.50, 90.99, 78.80, 84.46, 43.30],
        }
        assert round(found.metrics["mean_f1"], 2) == 85.95
        assert found.counts == {"answers": 8910, "missing": 0, "unparsed": 0}

    def test_llavas_questions_are_ours(self, home):
        theirs = gzip.decompress((home / "pope/golden/llava_pope_test.jsonl.gz").read_bytes()).decode().splitlines()
        asked = {str(row["question_id"]): (row["image"], row["text"]) for row in map(json.loads, theirs)}
        assert {q.id: (q.image, q.prompt) for q in load(home).questions} == asked
        assert all(prompt.endswith(SUFFIX) for _, prompt in asked.values())
