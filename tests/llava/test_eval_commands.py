"""LLaVA's evaluation commands: answer files in its format, in parts, resumed; one question about several pictures."""

import json
import re
from types import SimpleNamespace

import pytest

from llava.eval import model_vqa, model_vqa_loader, run_llava
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from tests.conftest import GOLDEN

QUESTIONS = [
    {"question_id": 3, "image": "wide.png", "text": "What is it?"},
    {"question_id": "b", "image": "tall.png", "text": "What is there, and why?", "category": "conv"},
    {"question_id": 3, "image": "wide.png", "text": "Is it wide?"},  # ids repeat in MME
    {"question_id": 9, "text": "Say something."},
    {"question_id": 10, "image": "square.png", "text": "What is it?"},
]


@pytest.fixture()
def command(in_golden, tmp_path):
    """Runs model_vqa or model_vqa_loader, greedily, on five questions: exit status and what is in the answer file."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def run(*flags, module=model_vqa, answers="a.jsonl"):
        base = ["--model-path", "llava-v1.5-tiny", "--image-folder", "images", "--device", "cpu", "--temperature", "0"]
        files = ["--question-file", str(tmp_path / "q.jsonl"), "--answers-file", str(tmp_path / answers)]
        status = module.main([*base, *files, "--max_new_tokens", "6", "--batch-size", "2", *flags])
        written = tmp_path / answers
        return status, written.read_text() if written.exists() else None

    return run


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_llavas_answer_format(command):
    status, text = command()
    answerer = Answerer("llava-v1.5-tiny", conv_mode="llava_v1", device="cpu")
    assert status == 0
    for question, answer in zip(QUESTIONS, rows(text), strict=True):
        assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert (answer["question_id"], answer["prompt"]) == (question["question_id"], question["text"])
        assert (answer["model_id"], answer["metadata"]) == ("llava-v1.5-tiny", {})
        request = Request("", question["text"], question.get("image"))
        assert answer["text"] == answerer.answer([request], GOLDEN / "images", Decoding(6))[0][0]
    assert len({answer["answer_id"] for answer in rows(text)}) == 5
    assert {len(answer["answer_id"]) for answer in rows(text)} == {22}


def test_the_parts_are_the_whole(command):
    """5 questions in 4 parts are 2, 2, 1 and none (LLaVA fails at the last)."""
    parts = [command("--num-chunks", "4", "--chunk-idx", str(k), answers=f"{k}.jsonl")[1] for k in range(4)]
    assert [len(rows(part)) for part in parts] == [2, 2, 1, 0]
    assert "".join(parts) == command()[1]


def test_parts():
    assert model_vqa.split_list(list("abcde"), 2) == [["a", "b", "c"], ["d", "e"]]
    assert model_vqa.get_chunk(list("abcde"), 4, 3) == model_vqa.get_chunk([], 2, 1) == []
    with pytest.raises(ValueError, match="--chunk-idx: expected 0 to 1 with --num-chunks 2, got 2"):
        model_vqa.get_chunk([1, 2], 2, 2)


def test_the_loader_is_the_same_command(command):
    assert command(module=model_vqa_loader) == command(answers="b.jsonl")


def test_an_interrupted_run_continues(command, monkeypatch, capsys):
    whole = command(answers="whole.jsonl")[1]
    asked, real = [], Answerer.answer

    def dies_at_the_second(self, requests, *args):
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, requests, *args)

    monkeypatch.setattr(Answerer, "answer", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        command()
    assert command() == (0, whole)
    assert asked == [2, 2, 2, 1] and "continues at record 2 of 5" in capsys.readouterr().out


def test_other_inputs_are_refused_until_overwritten(command, capsys):
    command()
    assert command("--max_new_tokens", "7")[0] == 2
    assert "--max-new-tokens: 6 -> 7" in capsys.readouterr().err
    assert command("--max_new_tokens", "7", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question_id": 1}, r"q.jsonl:1: expected question_id and text, got \{"),
        ([1], r"q.jsonl, row 1: expected question_id and text, got 1"),
        ({"question_id": 1, "text": "?", "image": "../README.md"}, "leaves the image folder"),
        ({"question_id": 1, "text": "?", "image": "none.png"}, "none.png"),
    ],
)
def test_bad_questions(command, tmp_path, capsys, line, reason):
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    assert command() == (2, None)
    assert re.search(f"model_vqa: error: .*{reason}", capsys.readouterr().err, re.DOTALL)


# ---------------------------------------------------------------------------------------------------------- run_llava


def arguments(**changes):
    """As LLaVA's README builds them."""
    args = {
        "model_path": "llava-v1.5-tiny", "model_base": None, "model_name": "llava", "query": "What is it?",
        "conv_mode": None, "image_file": "images/wide.png", "sep": ",", "temperature": 0, "top_p": None,
        "num_beams": 1, "max_new_tokens": 6,
    }  # fmt: skip
    return SimpleNamespace(**args | changes)


def test_one_question(in_golden, capsys):
    expected = Answerer("llava-v1.5-tiny", conv_mode="llava_v1", device="cpu").answer(
        [Request("q", "What is it?", "wide.png")], "images", Decoding(6)
    )
    assert run_llava.eval_model(arguments()) == expected[0][0]
    assert capsys.readouterr().out == expected[0][0] + "\n"


def test_beams_are_those_of_the_driver(in_golden):
    expected = Answerer("llava-v1.5-tiny", conv_mode="llava_v1", device="cpu").answer(
        [Request("q", "What is it?", "wide.png")], "images", Decoding(6, num_beams=2)
    )
    assert run_llava.eval_model(arguments(num_beams=2)) == expected[0][0]


def test_where_the_pictures_go():
    """LLaVA puts one <image> before the question however many pictures there are, and drops the others."""
    assert run_llava.with_images("What?", "<image>", 2) == "<image>\n<image>\nWhat?"
    query = "From <image-placeholder> to <image-placeholder>?"
    assert run_llava.with_images(query, "<image>", 2) == "From <image> to <image>?"
    with pytest.raises(ValueError, match="--query: expected 1 <image-placeholder>, got 2"):
        run_llava.with_images(query, "<image>", 1)


def test_two_pictures(in_golden):
    both = arguments(image_file="images/wide.png;images/tall.png", sep=";")
    assert [image.size for image in run_llava.load_images(run_llava.image_parser(both))] == [
        run_llava.load_image(f"images/{name}.png").size for name in ("wide", "tall")
    ]
    answers = {run_llava.eval_model(both), run_llava.eval_model(arguments()), run_llava.eval_model(arguments(
        image_file="images/tall.png,images/wide.png"))}  # fmt: skip
    assert len(answers) == 3


def test_the_command(in_golden, capsys):
    flags = ["--model-path", "llava-v1.5-tiny", "--query", "What is it?", "--temperature", "0"]
    assert run_llava.main([*flags, "--image-file", "images/wide.png", "--max_new_tokens", "6"]) == 0
    assert run_llava.main([*flags, "--image-file", "README.md"]) == 2
    assert "run_llava: error: README.md: not an image that can be read" in capsys.readouterr().err
