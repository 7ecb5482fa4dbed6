"""MMStar: letters, totals on paper, the blind run, leakage, the original's errors, and real predictions."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from eval.core.types import Answer
from eval.mmstar import BENCHMARK, SUFFIX, from_rows, is_right_officially, load, options_of, read_letter, score

pytestmark = pytest.mark.fast

QUESTION = "Where?\nOptions: A: On the book., B: The cat., C: Beneath the bed, or in it., D: Dogs"


def rows(*truths):
    capabilities = ("math", "math", "coarse perception", "logical reasoning")
    return [
        {"index": i, "question": QUESTION, "answer": truth, "category": capability, "l2_category": "axis"}
        for i, (truth, capability) in enumerate(zip(truths, capabilities))
    ]


def answers(data, shown, hidden=()):
    texts = dict(zip([q.id for q in data.questions if q.image], shown))
    texts |= dict(zip([q.id for q in data.questions if not q.image], hidden))
    return [Answer(q.id, "", q.prompt, texts[q.id]) for q in data.questions if q.id in texts]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("A", "A"), ("a", "A"), ("b.", "B"), ("(C)", "C"), ("(C) Beneath the bed", "C"), ("C) it", "C"), ("C: x", "C"),
        ("D. Dogs", "D"), ("Option B", "B"), ("The answer is C", "C"), ("the correct answer is (D).", "D"),
        ("Answer: B", "B"), ("**Answer:** C", "C"), ("**B**", "B"), ("B is correct", "B"), ("C, since", "C"),
        ("Because of the cat, the answer is B.", "B"), ("B\n\nExplanation: C is wrong", "B"), ("B The cat.", "B"),
        ("A because B is wrong", "A"), ("The answer is option D: Dogs", "D"), ("  \nB", "B"),
        ("<answer>B</answer>", "B"), ("<think>A or C?</think> C", "C"), (r"\boxed{D}", "D"),
        (r"So $\boxed{\text{A}}$.", "A"),
        ("answer: (b)", "B"), ("Answer: (B) The cat.", "B"),
        # No letter, or not one letter.
        ("<think>It is A", None), (r"\boxed{A} or \boxed{B}", None), (r"\boxed{12}", None), ("nan", None),
        ("", None), ("E", None), ("Dogs run", None), ("a dog", None), ("A dog", None), ("Can", None),
        ("B The dog", None), ("not A", None), ("The answer is not A", None), ("The answer is a dog", None),
        ("A or B", None), ("A, B", None), ("A and C", None), ("A/B", None), ("Both A and B", None), ("(A)(B)", None),
        ("A B C D", None), ("ABCD", None), ("A.M.", None), ("B.B. King", None), ("A-frame house", None),
        ("A: x. The answer is B.", None), ("The answer is A or B", None), ("None of A, B, C, D", None),
        ("I think it is B", None),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert read_letter(text, QUESTION + SUFFIX) == letter


def test_options():
    assert options_of(QUESTION + SUFFIX) == {
        "A": "On the book.", "B": "The cat.", "C": "Beneath the bed, or in it.", "D": "Dogs"
    }  # fmt: skip
    assert options_of("Hint.\nChoices:\n(A) 40.7\n(B) 74\n(C) 70.4\n(D) 70.0")["C"] == "70.4"


def test_metrics_on_paper():
    """Right are A B C D; said A, nothing, C, A: 2 of 4; of math 1 of 2; one of the four is unparsed."""
    data = from_rows(rows(*"ABCD"), Path("f"))
    found = score(data, answers(data, ("A", "Both", "(C)", "A.")))
    assert (found.metrics["total"], found.metrics["math"], found.metrics["coarse_perception"]) == (50.0, 50.0, 100.0)
    assert (found.metrics["instance_reasoning"], found.metrics["multimodal_gain"]) == (None, None)
    assert found.counts == {"answers": 4, "missing": 0, "unparsed": 1} and found.protocol == "mmstar"
    assert [item["wrong"] for item in found.items] == [False, None, False, True]
    table = BENCHMARK.format_table({"m": found})
    assert "m: unparsed, not right: 1 of 4: 1" in table and "1 of 4" in table.splitlines()[1]


def test_gain_and_leakage_on_paper():
    """With images 3 of 4, without 2 of 4, the language model alone 1 of 4: gain 25, leakage 25 points."""
    blind = from_rows(rows(*"ABCD"), Path("f"), "blind")
    alone = from_rows(rows(*"ABCD"), Path("f"), "text_only")
    of_lm = score(alone, answers(alone, (), ("A", "A", "A", "A")))
    assert (of_lm.metrics["total"], of_lm.protocol, of_lm.items[3]["id"]) == (25.0, "mmstar-text-only", "3")
    records = {item["id"]: item for item in of_lm.items}
    given = answers(blind, ("A", "B", "C", "A"), ("A", "B", "A", "A"))
    found = score(blind, given, text_only=records)
    names = ("total", "blind_total", "text_only_total", "multimodal_gain", "leakage")
    assert [found.metrics[name] for name in names] == [75.0, 50.0, 25.0, 25.0, 25.0]
    assert len(found.items) == 4 and found.items[2]["said_without_image"] == "A"
    better = {id_: item | {"parts": {"total": [100.0, 1.0]}} for id_, item in records.items()}
    assert score(blind, given, text_only=better).metrics["leakage"] == 0.0


def test_the_language_models_results_must_be_of_these_questions_without_images():
    blind = from_rows(rows(*"AB"), Path("f"), "blind")
    given = answers(blind, "AB", "AB")
    shown = {item["id"]: item for item in score(blind, given).items}
    with pytest.raises(
        ValueError, match=r"(?s)--text_only: 3 errors.*question 0: with an image.*question 1: no answer"
    ):
        score(blind, given, text_only={"0": shown["0"] | {"prompt": "Another?"}})


def test_a_question_without_blind_answer_is_counted():
    blind = from_rows(rows(*"AB"), Path("f"), "blind")
    found = score(blind, answers(blind, "AB", "A"))
    assert (found.counts["missing without images"], found.counts["missing"]) == (1, 0)
    assert (found.metrics["blind_total"], found.metrics["total"]) == (100.0, 100.0)


class TestErrorsOfTheOriginal:
    def test_a_word_that_begins_with_the_letter_is_no_answer(self):
        data = from_rows(rows(*"DAAB"), Path("f"))
        given = answers(data, ("Dogs run", "a cat", "As I see it", "(b) The cat"))
        ours, theirs = score(data, given), score(data, given, official_quirks=True)
        assert (ours.metrics["total"], theirs.metrics["total"]) == (25.0, 100.0)
        assert (ours.counts["unparsed"], theirs.protocol) == (3, "mmstar-official-quirks")

    def test_an_empty_answer_is_wrong_and_no_crash(self):
        assert not is_right_officially("", "A") and not is_right_officially("(", "A")

    def test_an_answer_that_comes_last_counts(self):
        data = from_rows(rows("B"), Path("f"))
        given = answers(data, ["Cats are in the image, so the correct answer is B."])
        assert score(data, given).metrics["total"] == 100.0
        assert score(data, given, official_quirks=True).metrics["total"] == 0.0


@pytest.mark.parametrize("as_struct", [True, False])
def test_the_official_file(tmp_path, as_struct):
    image = {"bytes": b"x", "path": "0.jpg"} if as_struct else b"x"
    (tmp_path / "mmstar").mkdir()
    table = pyarrow.Table.from_pylist([row | {"image": image} for row in rows(*"AB")])
    path = tmp_path / "mmstar/mmstar.parquet"
    pyarrow.parquet.write_table(table, path)
    first, *_ = load(tmp_path, "blind").requests()
    assert (first.id, first.image, first.prompt) == ("0", "0.jpg", QUESTION + SUFFIX)
    assert [request.image for request in load(tmp_path, "text_only").requests()] == [None, None]
    assert BENCHMARK.images.urls(tmp_path) == {"0.jpg": "", "1.jpg": ""}
    assert dict(BENCHMARK.images.take(path, ["1.jpg"])) == {"1.jpg": b"x"}
    path.write_text("<html>")
    with pytest.raises(ValueError, match="mmstar.parquet: expected Parquet with index, question"):
        load(tmp_path)


def test_all_errors_of_rows_at_once():
    bad = [*rows("A", "E"), {"index": 0}]
    with pytest.raises(
        ValueError, match=r"(?s)5 errors.*record 1: field 'answer': expected one of A, B, C, D, got 'E'"
    ):
        from_rows(bad, Path("f"))
    assert [q.id for q in from_rows([rows("A")[0] | {"index": i} for i in ("07", 8.0, 9)], Path("f")).questions] == [
        "7",
        "8",
        "9",
    ]
    with pytest.raises(ValueError, match="record 0: field 'index': expected int, got str"):
        from_rows([rows("A")[0] | {"index": "x"}], Path("f"))
    with pytest.raises(ValueError, match="field 'index': 0 is used 2 times"):
        from_rows([*rows("A"), *rows("A")], Path("f"))
