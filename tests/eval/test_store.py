"""answers.jsonl in the field names of LLaVA and RLHF-V, its faults, and results.json with provenance."""

from __future__ import annotations

import json

import pytest

from eval.core.statistics import Interval
from eval.core.store import Provenance, read_answers, write_results
from eval.core.types import Answer

pytestmark = pytest.mark.fast

PROVENANCE = Provenance(
    benchmark="Object HalBench",
    protocol="objhal-rules",
    checkpoint="runs/dama",
    fingerprint="0123456789abcdef",
    decoding={"temperature": 0, "num_beams": 1, "max_new_tokens": 1024},
    counts={"answers": 1, "unparsed": 0},
)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_llava_and_rlhfv_names(tmp_path):
    path = write_lines(
        tmp_path / "answers.jsonl",
        {"question_id": 7, "image_id": 339761, "prompt": "What?", "text": "A dog.", "model_id": "m", "answer_id": "x"},
        {"question_id": "b", "question": "Where?", "answer": "", "image_id": None},
        {"question_id": 0, "prompt": "p", "text": "t", "image_id": 0},
    )
    assert read_answers(path) == [
        Answer("7", "339761", "What?", "A dog.", "m"),
        Answer("b", "", "Where?", "", ""),
        Answer("0", "0", "p", "t", ""),
    ]


def test_blank_lines_are_no_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('\n{"question_id": 1, "prompt": "p", "text": "t"}\n\n', encoding="utf-8")
    assert len(read_answers(path)) == 1


def test_torn_last_line_is_named(tmp_path):
    path = write_lines(tmp_path / "answers.jsonl", {"question_id": 1, "prompt": "p", "text": "t"})
    path.write_text(path.read_text() + '{"question_id": 2, "pro', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected one JSON object.*resume it"):
        read_answers(path)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "text": "t"}, "line 1: expected the field question_id"),
        ({"question_id": 1, "text": "t"}, "line 1: expected the field prompt or question"),
        ({"question_id": 1, "prompt": "p", "output": "t"}, "line 1: expected the field text or answer"),
        ([1, 2], "line 1: expected one JSON object, got list"),
    ],
)
def test_faulty_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_answers(write_lines(tmp_path / "answers.jsonl", row))


@pytest.mark.parametrize("row", ["[" * 100_000, '{"question_id": ' + "9" * 5000 + "}", '{"question_id": 1'])
def test_rows_that_json_does_not_read_are_named(tmp_path, row):
    """Nested without end, a number of too many digits, a torn one."""
    (tmp_path / "answers.jsonl").write_text(row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: expected one JSON object, got .*delete the line"):
        read_answers(tmp_path / "answers.jsonl")


def test_a_question_answered_twice_is_refused(tmp_path):
    row = {"question_id": 1, "prompt": "p", "text": "t"}
    with pytest.raises(ValueError, match="line 2: question_id '1' occurs a second time"):
        read_answers(write_lines(tmp_path / "answers.jsonl", row, row))


def test_results_carry_provenance_and_null_for_undefined(tmp_path):
    path = tmp_path / "new" / "results.json"
    metrics = {"response_level": Interval(None, None, None)._asdict(), "mean_words": Interval(9.0, 8.0, 10.0)._asdict()}
    write_results(path, metrics, PROVENANCE, [{"question_id": "1", "text": "Käse"}])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["provenance"]["checkpoint"] == "runs/dama"
    assert content["provenance"]["fingerprint"] == "0123456789abcdef"
    assert content["provenance"]["judge"] is None
    assert content["metrics"]["response_level"] == {"value": None, "low": None, "high": None}
    assert content["items"] == [{"question_id": "1", "text": "Käse"}]


def test_not_a_number_is_refused_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant.*\n  metrics, mention_level: nan"):
        write_results(path, {"mention_level": float("nan")}, PROVENANCE)
    items = [{"id": "q1", "values": [1.0, float("-inf")], "parts": {"chair": [float("nan"), 1]}}]
    with pytest.raises(ValueError, match="items, q1, values, 1: -inf\n  items, q1, parts, chair, 0: nan"):
        write_results(path, {"mean": float("inf")}, PROVENANCE, items)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
