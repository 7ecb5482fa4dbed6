"""POPE's reading and counting of answers, and LLaVA's command."""

import gzip
import json
import os
from pathlib import Path

import pytest

from llava.eval.eval_pope import Counts, count, eval_pope, main, official_reading, read_answer
from tests.conftest import GOLDEN

pytestmark = pytest.mark.fast

LABELS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a car in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a bus in the image?", "label": "no"},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labels(tmp_path):
    return write_lines(tmp_path / "coco_pope_random.json", LABELS)


def answers(*texts, offset=10_000_000):
    rows = zip(LABELS, texts)
    return [{"question_id": offset + row["question_id"], "prompt": row["text"] + "\nOne word.", "text": text}
            for row, text in rows]  # fmt: skip


@pytest.mark.parametrize(
    "text, ours, original",
    [
        ("Yes", "yes", "yes"), ("No", "no", "no"), ("no, there is not", "no", "no"), ("Yes, a big one.", "yes", "yes"),
        ("There is no dog in the image.", "no", "no"), ("There is a dog in the image.", "yes", "yes"),
        ("Yes. No doubt.", "yes", "yes"), ("yes, and it is not small", "yes", "no"),
        # read as yes by the original, because it knows no other spelling of no
        ("NO", "no", "yes"), ("None", "no", "yes"), ("There isn't one", "no", "yes"), ("no\n", "no", "yes"),
        # neither, but yes by the original, because it is not no
        ("", None, "yes"), ("A snowboard", None, "yes"), ("I cannot tell", None, "yes"), ("Noah", None, "yes"),
        # neither, though there is a negation: of knowing
        ("I can't tell.", None, "yes"), ("I can\u2019t tell", None, "yes"), ("I'm not sure", None, "no"),
        ("I don't know", None, "yes"), ("I do not know.", None, "no"), ("I can not tell", None, "no"),
        ("I couldn't say whether there is a dog", None, "yes"), ("It's not clear.", None, "no"),
        ("It isn't clear", None, "yes"), ("Not sure", None, "yes"), ("No idea.", None, "no"), ("No clue", None, "no"),
        ("It is not possible to tell", None, "no"), ("There is not enough information", None, "no"),
        ("There's no way to tell", None, "no"), ("I can't see the image", None, "yes"),
        ("I'm not able to determine that", None, "no"), ("I can't help with that", None, "yes"),
        ("It can't be determined", None, "yes"), ("I don't really know", None, "yes"), ("Yes or no", None, "no"),
        ("yes/no", None, "yes"), ("I don't have enough information.", None, "yes"),
        ("There is insufficient information", None, "yes"), ("I haven't got a clue", None, "yes"),
        ("I don't have an answer", None, "yes"), ("The image doesn't make it clear", None, "yes"),
        ("It does not say", None, "no"), ("The image doesn't show enough to tell", None, "yes"),
        ("Neither yes nor no", None, "no"), ("It could be yes or it could be no", None, "no"),
        ("There is a possibility of a dog", None, "yes"), ("Not applicable", None, "yes"),
        # a negation of the thing
        ("I can't identify a dog in the image", "no", "yes"), ("I can't make out any dog", "no", "yes"),
        ("The image doesn't show a dog", "no", "yes"),
        ("I can't see a dog in the image", "no", "yes"), ("I don't think so", "no", "yes"),
        ("Not that I can see", "no", "yes"),
        ("No, I'm not sure why", "no", "no"), ("Yes, I'm not sure of its color", "yes", "no"),
        ("yes, no doubt", "yes", "no"),
    ],
)  # fmt: skip
def test_reading_answers(text, ours, original):
    assert (read_answer(text), official_reading(text)) == (ours, original)


def test_figures_on_paper():
    """Ten questions, 5 of them yes.

    Answered: yes to 3 and 1 of them wrongly (TP 2, FP 1); no to 5 of which 2 wrongly (TN 3, FN 2); nothing readable to
    2, one of each kind.

    accuracy 5 / 10, precision 2 / 3, recall 2 / 5, F1 = 2 * 2 / (3 + 5) = 0.5, yes-ratio 3 / 10.
    """
    pairs = [("yes", "yes")] * 2 + [("yes", "no")] + [("no", "no")] * 3 + [("no", "yes")] * 2
    counts = count([*pairs, (None, "yes"), (None, "no")])
    assert counts == Counts(tp=2, fp=1, tn=3, fn=2, unread_positive=1, unread_negative=1)
    assert counts.ratios() == {"accuracy": 0.5, "precision": 2 / 3, "recall": 0.4, "f1": 0.5, "yes_ratio": 0.3}
    assert (counts.answers, counts.unread) == (10, 2)


def test_no_can_be_the_positive_class():
    counts = count([("no", "no"), ("yes", "no"), ("no", "yes")], positive="no")
    assert counts == Counts(tp=1, fn=1, fp=1)


class TestFaultsOfTheOriginal:
    """One test per fault known of it: none may come back."""

    def test_nothing_to_divide_by_is_undefined(self, labels, capsys):
        assert eval_pope(answers("No", "No"), labels).ratios()["precision"] is None
        assert "Precision: n/a" in capsys.readouterr().out
        assert set(count([]).ratios().values()) == {None}

    def test_what_is_not_no_is_not_yes(self, labels, capsys):
        assert eval_pope(answers("A cat", "", "Yes", "None"), labels) == Counts(
            tp=1, tn=1, unread_positive=1, unread_negative=1
        )
        assert "Neither yes nor no: 2, questions without answer: 0" in capsys.readouterr().out
        assert eval_pope(answers("A cat", "", "Yes", "None"), labels, official_quirks=True) == Counts(tp=2, fp=2)

    def test_answers_go_by_number_not_by_order(self, labels, capsys):
        given = answers("Yes", "No", "Yes", "No")
        assert eval_pope(given[::-1], labels) == eval_pope(given, labels) == Counts(tp=2, tn=2)
        assert eval_pope(given[2:], labels) == Counts(tp=1, tn=1)
        assert "questions without answer: 2" in capsys.readouterr().out

    def test_answers_to_other_questions_are_refused(self, labels):
        given = answers("Yes", "No")
        given[1]["prompt"] = "Is there a bird in the image?\nOne word."
        given += [{"question_id": 9, "text": "No"}, {"question_id": 9, "text": "Yes"}]
        with pytest.raises(ValueError, match=r"(?s)3 errors.*to 'Is there a bird.*9: no label.*1 answers more than"):
            eval_pope(given, labels)


@pytest.fixture
def files(tmp_path, labels):
    questions = [
        {"question_id": offset + row["question_id"], "image": row["image"], "text": row["text"], "category": split}
        for split, offset in (("adversarial", 0), ("random", 10_000_000))
        for row in LABELS
    ]
    write_lines(tmp_path / "coco_pope_adversarial.json", LABELS)
    write_lines(tmp_path / "questions.jsonl", questions)
    rows = answers("Yes", "No", "No", "No") + answers("Yes", "Yes", "Yes", "Yes", offset=0)
    write_lines(tmp_path / "answers.jsonl", rows)
    return {
        "--annotation-dir": tmp_path,
        "--question-file": tmp_path / "questions.jsonl",
        "--result-file": tmp_path / "answers.jsonl",
    }


def command(files):
    return [str(word) for pair in files.items() for word in pair]


def test_the_command_prints_llavas_lines(files, capsys):
    """random: TP 1, TN 2, FN 1: accuracy 3/4, precision 1, recall 1/2, F1 2/3, yes-ratio 1/4."""
    assert main(command(files)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Category: adversarial, # samples: 4"
    assert lines[len(lines) // 2 :] == [
        "Category: random, # samples: 4",
        "TP\tFP\tTN\tFN\t",
        "1\t0\t2\t1",
        "Accuracy: 0.75",
        "Precision: 1.0",
        "Recall: 0.5",
        f"F1 score: {2 / 3}",
        "Yes ratio: 0.25",
        "0.667, 0.750, 1.000, 0.500, 0.250",
        "====================================",
    ]


def test_its_flags_are_llavas(capsys):
    inventory = json.loads((GOLDEN / "api_inventory.json").read_text())["upstream_llava"]["argparse_flags"]
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for flag in inventory["llava/eval/eval_pope.py"] for name in flag["flags"])


def test_all_missing_flags_at_once(capsys):
    with pytest.raises(SystemExit):
        main(["--question-file", "q.jsonl"])
    assert "error: expected --annotation-dir, --result-file" in capsys.readouterr().err


def test_its_errors_name_the_file_and_the_line(files, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text('{"question_id": 99, "text": "No"}\n')
    assert main(command(files)) == 2
    assert "1 answers to no question of" in capsys.readouterr().err
    (tmp_path / "answers.jsonl").write_text('\n{"text": "No"}\n')
    assert main(command(files)) == 2
    assert "answers.jsonl:2: expected an object with question_id" in capsys.readouterr().err
    assert main(command(files | {"--annotation-dir": tmp_path / "none"})) == 2


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
def test_the_figures_of_llava_13b(tmp_path, capsys):
    """LLaVA's own answers, questions and labels, through its own command line."""
    home = Path(os.environ["DAMA_BENCH_DATA"]) / "pope"
    for name, source in (("q", "llava_pope_test.jsonl.gz"), ("a", "llava-v1.5-13b_answers.jsonl.gz")):
        (tmp_path / name).write_bytes(gzip.decompress((home / "golden" / source).read_bytes()))
    flags = {
        "--annotation-dir": home / "llava_variant",
        "--question-file": tmp_path / "q",
        "--result-file": tmp_path / "a",
    }
    assert main(command(flags)) == 0
    figures = [line for line in capsys.readouterr().out.splitlines() if line.count(", ") == 4]
    assert figures == [
        "0.845, 0.855, 0.910, 0.788, 0.433",  # adversarial: F1, accuracy, precision, recall, yes-ratio
        "0.862, 0.874, 0.952, 0.788, 0.414",  # popular
        "0.871, 0.880, 0.974, 0.788, 0.417",  # random
    ]
