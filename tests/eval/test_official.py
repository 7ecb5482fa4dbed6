"""Official files: faults named with file and field, prompts found by digest and scripts never run."""

from __future__ import annotations

import hashlib
import json

import pytest

from eval.core.official import digest_of_text, official_prompt, read_json, read_records

TEXT = "Rate the answer.\n\n{}"


def test_a_digest_is_that_of_the_file(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Größe\n".encode())
    assert digest_of_text("Größe\n") == hashlib.sha256((tmp_path / "prompt.txt").read_bytes()).hexdigest()


def test_a_prompt_is_read_out_of_a_script_that_never_runs(tmp_path):
    script = tmp_path / "eval_it.py"
    prompt = TEXT + "\n"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\nother = 'x'\nprompt = {prompt!r}\n")
    assert official_prompt([tmp_path / "absent.txt", script], digest_of_text(TEXT)) == TEXT
    assert not (tmp_path / "ran").exists()


def test_the_first_file_that_is_there_decides(tmp_path):
    (tmp_path / "prompt.txt").write_text(TEXT)
    (tmp_path / "script.py").write_text("prompt = 'another'\n")
    assert official_prompt([tmp_path / "prompt.txt", tmp_path / "script.py"], digest_of_text(TEXT)) == TEXT


def test_a_prompt_that_differs_is_refused(tmp_path):
    (tmp_path / "prompt.txt").write_text(TEXT + "!")
    (tmp_path / "script.py").write_text("prompt = 'another' + ' one'\n")
    expected = digest_of_text(TEXT)
    got = digest_of_text(TEXT + "!")
    with pytest.raises(ValueError, match=f"prompt.txt: expected a text of SHA-256 {expected}, got {got}"):
        official_prompt([tmp_path / "prompt.txt"], expected)
    with pytest.raises(ValueError, match="script.py: expected .*, got none among its 2 strings"):
        official_prompt([tmp_path / "script.py"], expected)


def test_an_absent_prompt_names_every_place(tmp_path):
    with pytest.raises(ValueError, match="(?s)a.txt or .*b.py, got neither.*eval.download.*DAMA_BENCH_DATA"):
        official_prompt([tmp_path / "a.txt", tmp_path / "b.py"], "00")


def test_json_and_json_lines(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1}')
    (tmp_path / "a.jsonl").write_text('{"b": "x\u2028y"}\n\n{"b": 2}\n', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"b": 1}
    assert read_json(tmp_path / "a.jsonl") == [{"b": "x\u2028y"}, {"b": 2}]


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"b": 1}\n{"b": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: not JSON"):
        read_json(tmp_path / "a.jsonl")


def test_every_fault_of_a_file_at_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1, "text": "x"}, {"id": "2"}, ["no object"], {"id": [], "text": 3}]))
    fields = {"id": (int, str), "text": (str,)}
    with pytest.raises(ValueError) as caught:
        read_records(path, fields)
    assert str(caught.value).splitlines()[:5] == [
        f"{path}: 4 errors",
        "  record 1: field 'text': expected str, got no such field",
        "  record 2: expected an object, got list",
        "  record 3: field 'id': expected int or str, got list",
        "  record 3: field 'text': expected str, got int",
    ]


@pytest.mark.parametrize("content", ["{}", "[]", "3"])
def test_no_list_of_records(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json: expected a list of records"):
        read_records(tmp_path / "a.json", {})
