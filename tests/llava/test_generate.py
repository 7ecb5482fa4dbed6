"""The generation driver: batches answer as one at a time does, interrupted runs continue, bad questions are named."""

import json

import pytest

from llava.eval.generate import Answerer, Decoding, Request, generate_answers, main, read_questions
from tests.conftest import GOLDEN

PICTURES = ["wide.png", "tall.png", "square.png", "exact.png", None]
REQUESTS = [
    Request(f"q{i}", f"What is in the picture{' ' + 'really' * (i % 3)}?", PICTURES[i % 5], f"image{i}")
    for i in range(10)
]


@pytest.fixture()
def answerer(in_golden):
    return Answerer("llava-v1.5-tiny", device="cpu")


def texts(records):
    return {record["question_id"]: record["text"] for record in records}


def test_batched_answers_are_those_of_one_at_a_time(answerer, tmp_path):
    decoding = Decoding(max_new_tokens=12)
    alone = generate_answers(answerer, REQUESTS, GOLDEN / "images", tmp_path / "one", decoding, batch_size=1)
    together = generate_answers(answerer, REQUESTS, GOLDEN / "images", tmp_path / "four", decoding, batch_size=4)
    assert texts(alone) == texts(together)
    assert [record["question_id"] for record in together] == [request.id for request in REQUESTS]
    assert len(set(texts(together).values())) > 3


def test_an_interrupted_run_continues(answerer, tmp_path):
    decoding = Decoding(max_new_tokens=8)
    whole = generate_answers(answerer, REQUESTS, GOLDEN / "images", tmp_path / "a", decoding, batch_size=3)
    asked = []
    real = answerer.answer

    def dies_at_the_third(requests, *args):
        asked.append(len(requests))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(requests, *args)

    answerer.answer = dies_at_the_third
    with pytest.raises(KeyboardInterrupt):
        generate_answers(answerer, REQUESTS, GOLDEN / "images", tmp_path / "b", decoding, batch_size=3)
    answerer.answer = real
    assert generate_answers(answerer, REQUESTS, GOLDEN / "images", tmp_path / "b", decoding, batch_size=3) == whole
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == (tmp_path / "b" / "answers.jsonl").read_bytes()


def test_samples_differ_and_repeat_by_seed(answerer, tmp_path):
    decoding = Decoding(max_new_tokens=8, temperature=1.0, samples=3)
    one = generate_answers(answerer, REQUESTS[:2], GOLDEN / "images", tmp_path / "a", decoding)
    same = generate_answers(answerer, REQUESTS[:2], GOLDEN / "images", tmp_path / "b", decoding)
    assert [r["sample"] for r in one] == [0, 1, 2] * 2 and one == same
    assert len({r["text"] for r in one}) > 2


def test_other_decoding_is_refused(answerer, tmp_path):
    generate_answers(answerer, REQUESTS[:2], GOLDEN / "images", tmp_path, Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match="decoding.max_new_tokens"):
        generate_answers(answerer, REQUESTS[:2], GOLDEN / "images", tmp_path, Decoding(max_new_tokens=5))


def test_the_command(in_golden, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 7, "image": "wide.png", "text": "What is it?"}) + "\n")
    flags = ["--model-path", "llava-v1.5-tiny", "--question-file", str(questions), "--image-folder", "images",
             "--max-new-tokens", "4", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(flags) == 0
    answer = json.loads((tmp_path / "out" / "answers.jsonl").read_text())
    assert (answer["question_id"], answer["image_id"], answer["model_id"]) == ("7", "wide.png", "llava-v1.5-tiny")
    questions.write_text('{"question_id": 7}\n')
    assert main(flags) == 2
    assert "q.jsonl:1: expected question_id and text" in capsys.readouterr().err


def test_pictures_stay_inside_their_folder(answerer, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "../secret.png", "text": "?"}) + "\n")
    with pytest.raises(ValueError, match="secret.png"):
        generate_answers(
            answerer, read_questions(tmp_path / "q.jsonl"), GOLDEN / "images", tmp_path / "out", Decoding(4)
        )
