"""The generation driver: batches answer as one at a time does, interrupted runs continue, shards make the whole."""

import base64
import json
import re
import runpy
from pathlib import Path

import pytest

from dama import stage
from dama.console import digest_of_file
from dama.stage import Shard, StageError, merge_shards
from llava.eval.generate import main
from llava.generation.answers import generate_answers, run_answers, summarize
from llava.generation.local import Answerer, default_device
from llava.generation.questions import read_questions
from llava.generation.request import Decoding, Request
from llava.generation.served import ServedAnswerer
from tests.conftest import GOLDEN
from tests.openai_server import ScriptedServer, failure

ROOT = Path(__file__).resolve().parents[2]

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


def test_only_the_last_position_of_a_prompt_gets_logits(answerer):
    """The others' would take the vocabulary's size times the picture's positions, and nobody reads them."""
    positions = []
    answerer.model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(logits.shape[1]))
    answerer.answer(REQUESTS[:4], GOLDEN / "images", Decoding(max_new_tokens=3))
    assert positions == [1] * 3


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


# --------------------------------------------------------------------------------------------------------------- order


def in_file(folder):
    """(question, sample) of every line of answers.jsonl."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return [(row["question_id"], row["sample"]) for row in rows]


def in_order(samples=1):
    return [(request.id, k) for request in REQUESTS for k in range(samples)]


@pytest.mark.parametrize("samples", [1, 2])
def test_answers_end_in_the_order_of_the_questions(answerer, tmp_path, samples):
    decoding = Decoding(max_new_tokens=4, temperature=float(samples > 1), samples=samples)
    inputs = answerer, REQUESTS, GOLDEN / "images"
    run_answers(*inputs, tmp_path / "whole", decoding, batch_size=3)
    assert in_file(tmp_path / "whole") == in_order(samples)
    for index in (1, 0):
        run_answers(*inputs, tmp_path / "parts", decoding, batch_size=3, shard=Shard(index, 2))
    whole, merged = ((tmp_path / name / "answers.jsonl").read_bytes() for name in ("whole", "parts"))
    assert whole == merged
    (tmp_path / "parts" / "answers.jsonl").unlink()
    merge_shards(tmp_path / "parts", "answers", summarize)  # as `dama merge`, which has no questions at hand
    assert (tmp_path / "parts" / "answers.jsonl").read_bytes() == whole


def test_answers_of_a_server_end_in_the_order_of_the_questions(tmp_path):
    with ScriptedServer(lambda call: call.text) as base_url:
        served = ServedAnswerer("m", base_url)
        run_answers(served, REQUESTS, GOLDEN / "images", tmp_path, Decoding(4), batch_size=3)
    assert in_file(tmp_path) == in_order()
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(row["text"] == row["prompt"] == request.prompt for row, request in zip(rows, REQUESTS, strict=True))


@pytest.mark.parametrize("moment", ["atomic_file", "write_json"])
def test_a_kill_while_answers_are_put_in_order_is_continued(answerer, tmp_path, monkeypatch, moment):
    """Before the ordered file is written, and between it and the manifest."""
    inputs = answerer, REQUESTS, GOLDEN / "images"
    run_answers(*inputs, tmp_path / "whole", Decoding(4), batch_size=3)
    real = getattr(stage, moment)

    def killed(path, content):
        if moment == "atomic_file" or content["complete"]:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(stage, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        run_answers(*inputs, tmp_path / "parts", Decoding(4), batch_size=3)
    monkeypatch.undo()
    monkeypatch.chdir(GOLDEN)
    assert (in_file(tmp_path / "parts") == in_order()) is (moment == "write_json")
    answerer.answer = None  # nothing is asked again
    run_answers(*inputs, tmp_path / "parts", Decoding(4), batch_size=3)
    assert (tmp_path / "parts" / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_a_folder_of_an_earlier_revision_is_read_in_order(answerer, tmp_path, capsys):
    """It was complete in the order of its batches, and stays as it is."""
    inputs = answerer, REQUESTS, GOLDEN / "images", tmp_path, Decoding(4)
    whole = generate_answers(*inputs, batch_size=3)
    path, manifest = tmp_path / "answers.jsonl", json.loads((tmp_path / "manifest.json").read_text())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[3:] + lines[:3]))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"digest": digest_of_file(path)}))
    assert generate_answers(*inputs, batch_size=3) == whole
    assert "skipped" in capsys.readouterr().out and in_file(tmp_path)[0] == ("q3", 0)


def test_shards_of_an_earlier_revision_are_merged_in_order(answerer, tmp_path):
    inputs = answerer, REQUESTS, GOLDEN / "images", tmp_path, Decoding(4)
    run_answers(*inputs, batch_size=3, shard=Shard(0, 2))
    path = tmp_path / "shards" / "00000-of-00002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["places"]
    path.write_text(json.dumps(manifest))
    run_answers(*inputs, batch_size=3, shard=Shard(1, 2))
    assert in_file(tmp_path) == in_order()
    (tmp_path / "manifest.json").unlink()
    merge_shards(tmp_path, "answers", summarize)  # nothing says where the first shard's belong
    assert sorted(in_file(tmp_path)) == sorted(in_order())


def test_other_decoding_is_refused(answerer, tmp_path):
    generate_answers(answerer, REQUESTS[:2], GOLDEN / "images", tmp_path, Decoding(max_new_tokens=4))
    with pytest.raises(ValueError, match="--max-new-tokens: 4 -> 5"):
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


def test_changed_pictures_are_refused(answerer, tmp_path):
    """The questions name the same file, but it shows something else."""
    (tmp_path / "images").mkdir()
    picture = tmp_path / "images" / "it.png"
    for name in ("wide.png", "tall.png"):
        picture.write_bytes((GOLDEN / "images" / name).read_bytes())
        if name == "wide.png":
            generate_answers(answerer, [Request("q", "?", "it.png")], picture.parent, tmp_path / "out", Decoding(2))
    with pytest.raises(ValueError, match=r"--image-folder \(content\): "):
        generate_answers(answerer, [Request("q", "?", "it.png")], picture.parent, tmp_path / "out", Decoding(2))


# -------------------------------------------------------------------------------------------------------------- shards


def test_three_shards_write_the_bytes_of_one_run(answerer, tmp_path):
    decoding = Decoding(max_new_tokens=8)
    inputs = answerer, REQUESTS, GOLDEN / "images"
    whole = run_answers(*inputs, tmp_path / "a", decoding, batch_size=2)
    merged = [
        run_answers(*inputs, tmp_path / "b", decoding, batch_size=2, shard=Shard(index, 3)) for index in (2, 0, 1)
    ]
    assert merged[:2] == [None, None] and merged[2]["summary"] == whole["summary"]
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == (tmp_path / "b" / "answers.jsonl").read_bytes()
    assert generate_answers(*inputs, tmp_path / "b", decoding, batch_size=2)[-1]["question_id"] == "q9"


def test_a_missing_shard_is_a_gap(answerer, tmp_path):
    inputs = answerer, REQUESTS, GOLDEN / "images", tmp_path, Decoding(max_new_tokens=2)
    for index in (0, 2):
        run_answers(*inputs, batch_size=2, shard=Shard(index, 3))
    with pytest.raises(StageError, match="gap: chunks 1 to 2 are in no finished shard"):
        merge_shards(tmp_path, "answers", summarize)


def test_the_launcher_says_which_shard(in_golden, tmp_path, monkeypatch, capsys):
    rows = [{"question_id": i, "image": "wide.png", "text": f"What is it{'?' * i}"} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model-path", "llava-v1.5-tiny", "--question-file", str(tmp_path / "q.jsonl"), "--image-folder",
             "images", "--max-new-tokens", "2", "--device", "cpu", "--batch-size", "1"]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in sorted((tmp_path / "out" / "shards").iterdir())] == [
        "00000-of-00002",
        "00001-of-00002",
    ]
    monkeypatch.delenv("RANK")
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert "complete in" in capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (tmp_path / "one" / "answers.jsonl").read_bytes()


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert default_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == "cuda:3"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # the launcher shows each process its own
    assert default_device() == "cuda:0"


# -------------------------------------------------------------------------------------------------------------- served


def test_a_served_model_sees_picture_and_question(tmp_path):
    server = ScriptedServer(lambda call: f" about: {call.text} ")
    with server as base_url:
        served = ServedAnswerer("llava-export", base_url)
        records = generate_answers(
            served, REQUESTS, GOLDEN / "images", tmp_path, Decoding(max_new_tokens=9), batch_size=4
        )
        generate_answers(served, REQUESTS, GOLDEN / "images", tmp_path, Decoding(max_new_tokens=9), batch_size=4)
    assert [record["text"] for record in records] == [f"about: {request.prompt}" for request in REQUESTS]
    assert {record["model_id"] for record in records} == {"llava-export"} and len(server.calls) == len(REQUESTS)
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in (call.body for call in server.calls)} == {
        ("llava-export", 0.0, 9)
    }
    turns = [call.body["messages"][0]["content"] for call in server.calls]
    shown = [turn[0]["image_url"]["url"].partition(",") for turn in turns if len(turn) == 2]
    assert {kind for kind, _, _ in shown} == {"data:image/png;base64"} and len(turns) - len(shown) == 2
    assert {base64.b64decode(data) for _, _, data in shown} == {
        (GOLDEN / "images" / name).read_bytes() for name in PICTURES if name
    }


def test_thoughts_are_left_out_and_missing_answers_named(tmp_path, capsys):
    """Every answer in the file is what followed the thoughts; the file says why others are missing."""
    texts = {"thinks": "<think>no, wait</think>\nYes", "never": "<think>no", "empty": " "}
    kinds = iter([*texts, *["thinks"] * 7])
    with ScriptedServer(lambda call: texts[next(kinds)]) as base_url:
        served = ServedAnswerer("m", base_url, concurrency=1)
        manifest = run_answers(served, REQUESTS, GOLDEN / "images", tmp_path, Decoding(9), batch_size=4)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [request.id for request in REQUESTS]
    assert sorted(row["text"] for row in rows) == ["", "", *["Yes"] * 8]
    assert sorted(row["missing"] for row in rows if not row["text"]) == [
        "empty reply, finish reason stop", "thoughts without an answer, finish reason stop",
    ]  # fmt: skip
    assert {row["finish_reason"] for row in rows} == {"stop"} and sum(manifest["summary"]["missing"].values()) == 2


def test_a_server_that_fails_in_the_middle_is_continued(tmp_path):
    broken = ScriptedServer(lambda call: failure(400, "no memory") if "reallyreally" in call.text else "fine")
    with broken as base_url, pytest.raises(ValueError, match=r"q2#0: BadRequestError: .*no memory[\s\S]*it continues"):
        run_answers(ServedAnswerer("m", base_url), REQUESTS, GOLDEN / "images", tmp_path, Decoding(4), batch_size=4)
    whole = ScriptedServer(lambda call: "fine")
    with whole as base_url:
        run_answers(ServedAnswerer("m", base_url), REQUESTS, GOLDEN / "images", tmp_path, Decoding(4), batch_size=4)
    assert len(whole.calls) == 6  # the first batch of four was kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "openai"], "--base-url: expected the server's URL"),
        (["--base-url", "http://127.0.0.1:1/v1"], "add --backend openai"),
        (["--backend", "openai", "--base-url", "http://127.0.0.1:1/v1", "--num-beams", "3"], "num_beams: .* got 3"),
    ],
)
def test_flags_that_do_not_fit(in_golden, tmp_path, capsys, flags, message):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 7, "text": "What is it?"}) + "\n")
    base = ["--model-path", "m", "--question-file", str(tmp_path / "q.jsonl"), "--image-folder", "images"]
    assert main([*base, "--out", str(tmp_path / "out"), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_benchmark_finds_the_same_answers_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    file = tmp_path / "figures.json"
    flags = ["--shape", "tinycoco", "--answers", "5", "--batch", "3", "--tokens", "6", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["generate.py", *flags, "--json", str(file)])
    runpy.run_path(str(ROOT / "scripts/bench/generate.py"), run_name="__main__")
    (found,) = json.loads(file.read_text())
    assert (found["answers"], found["tokens"], found["other"]) == (5, 30, 0)
    assert "of 5 answers 5 are the same" in capsys.readouterr().out
