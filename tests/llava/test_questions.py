"""Question files as people have them, for both commands that read them."""

import io
import json

import pytest
from PIL import Image

from dama.pairs import PairsError
from llava.eval import eval_pope, model_vqa, model_vqa_loader
from llava.eval.generate import main
from llava.generation.questions import read_question_rows, read_questions
from llava.generation.request import Request
from tests.conftest import GOLDEN

pytestmark = pytest.mark.fast

ASKED = {"question_id": 1, "image": "wide.png", "text": "What is it?"}
PLAIN = {"question_id": "b", "text": "Say something."}
READ = [Request("1", "What is it?", "wide.png", "wide.png"), Request("b", "Say something.", None, "")]


@pytest.mark.parametrize(
    "content",
    [
        f"{json.dumps(ASKED)}\n{json.dumps(PLAIN)}\n",
        f"\ufeff{json.dumps(ASKED)}\r\n\r\n{json.dumps(PLAIN)}",
        json.dumps([ASKED, PLAIN], indent=1),
        "\ufeff" + json.dumps([ASKED, PLAIN]),
        json.dumps({"question_id": 1, "images": ["wide.png"], "prompt": "What is it?"}) + "\n" + json.dumps(PLAIN),
        json.dumps({"id": 1, "image": "wide.png", "question": "What is it?", "text": None}) + "\n" + json.dumps(PLAIN),
        json.dumps(ASKED | {"text": "<image>\nWhat is it?"}) + "\n" + json.dumps(PLAIN | {"image": None}),
        json.dumps(ASKED | {"text": "What is it?\r\n<image> "}) + "\n" + json.dumps(PLAIN | {"images": []}),
    ],
    ids=["lines", "BOM and CRLF", "list", "list with BOM", "images", "other names", "tag before", "tag behind"],
)  # fmt: skip
def test_files_that_are_read(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content.encode())
    assert read_questions(path) == READ


def test_the_text_is_answered_under_its_own_name(tmp_path):
    """model_vqa writes the question as the file has it, tag included."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ASKED | {"text": "<image>\nWhat is it?", "category": "conv"}))
    assert read_question_rows(path) == [ASKED | {"text": "<image>\nWhat is it?", "category": "conv"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no questions in it"),
        (b"\n \n", "no questions in it"),
        (b"[]", "no questions in it"),
        (json.dumps(ASKED).encode()[:-9], "q.jsonl:1: not JSON, perhaps torn"),
        (json.dumps([ASKED]).encode()[:-9], "q.jsonl, line 1: .*\nRemedy: the file is torn or not JSON"),
        (json.dumps(ASKED).encode().replace(b"What", "Où".encode("latin-1")), r"q.jsonl:1: byte \d+ is not UTF-8"),
        (json.dumps([ASKED]).encode().replace(b"What", "Où".encode("latin-1")), r"q.jsonl: byte \d+ is not UTF-8"),
        (json.dumps(ASKED | {"question_id": None}).encode(), "q.jsonl:1: expected question_id and text"),
        (json.dumps(ASKED | {"text": None}).encode(), "q.jsonl:1: expected question_id and text"),
        (json.dumps(ASKED | {"text": " "}).encode(), "q.jsonl:1: expected question_id and text"),
        (json.dumps([PLAIN, "text"]).encode(), "q.jsonl, row 2: expected question_id and text"),
        (json.dumps(ASKED | {"image": ["a.png", "b.png"]}).encode(), "q.jsonl:1: field image: expected one"),
        (json.dumps(PLAIN | {"image_path": "a.png"}).encode(), "q.jsonl:1: field image_path: expected what"),
        (json.dumps(PLAIN | {"img": "a.png"}).encode(), "q.jsonl:1: field img: expected what the row shows"),
        (json.dumps(ASKED | {"image": 4}).encode(), "q.jsonl:1: field image: expected a path"),
        (json.dumps(PLAIN | {"text": "<image>\nWhat?"}).encode(), "q.jsonl:1: question b: expected an image, got 0"),
        (json.dumps(ASKED | {"text": "a <image> b"}).encode(), "q.jsonl:1: question 1: expected one <image> at an end"),
        (json.dumps(ASKED | {"text": "<image><image>?"}).encode(), "q.jsonl:1: question 1: expected one <image> at"),
        (json.dumps(ASKED | {"text": "half \ud83d"}).encode(), "q.jsonl:1: question 1: contains an unpaired surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_refused_by_name(tmp_path, content, reason, capsys):
    """Before a model is loaded: there is none at --model-path."""
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(PairsError, match=reason):
        read_questions(path)
    files = ["--model-path", "nowhere", "--question-file", str(path), "--image-folder", str(GOLDEN / "images")]
    assert main([*files, "--out", str(tmp_path / "out")]) == 2
    for command in (model_vqa, model_vqa_loader):
        assert command.main([*files, "--answers-file", str(tmp_path / "a.jsonl")]) == 2
    assert capsys.readouterr().err.count(f"{path}") >= 3


def test_every_bad_question_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("{}\n" + json.dumps(ASKED) + "\n[]\n")
    with pytest.raises(PairsError, match=r"2 errors\n.*q.jsonl:1: .*\n.*q.jsonl:3: "):
        read_questions(path)


@pytest.mark.parametrize("name", ["cut.jpg", "page.jpg", "empty.png", "gone.png", "dir.png"])
def test_images_that_cannot_be_used_are_named_before_a_model_is_loaded(tmp_path, name, capsys):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "dir.png").mkdir()
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ASKED | {"question_id": 77, "image": name}))
    files = ["--model-path", "nowhere", "--question-file", str(path), "--image-folder", str(tmp_path)]
    assert main([*files, "--out", str(tmp_path / "out")]) == 2
    assert f"question 77: image {name}: image is " in capsys.readouterr().err
    assert model_vqa_loader.main([*files, "--answers-file", str(tmp_path / "a.jsonl")]) == 2
    assert f"question 0: image {name}: image is " in capsys.readouterr().err


def test_pope_reads_its_files_alike(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"question_id": 1, "text": "Yes"}).encode())
    assert eval_pope.read_lines(path) == [{"question_id": 1, "text": "Yes"}]
    for content, reason in ((b"", "got an empty file"), (b"\xff\xfe", "answers.jsonl:1: expected"), (b"{", ":1: ")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            eval_pope.read_lines(path)
