"""A file that cannot be written for lack of room: its path and the sizes in one line, and the rest goes on later.

A limit on the size of files stands for the disk's end; it needs no rights and gives the system's own errors.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dama.console import DiskFullError, write_atomic, writing
from tests.conftest import GOLDEN
from tests.llava.tiny import flags_of

ROOT = Path(__file__).resolve().parents[1]


def run(words, limit=None):
    """A Python command from tests/golden whose files may have `limit` bytes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=GOLDEN, env=environment, capture_output=True, text=True, check=False,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )  # fmt: skip


def pairs_file(path, count):
    rows = [
        {"idx": f"pair-{i}", "question": "What?", "chosen": "A cat.", "rejected": "A dog.", "image_path": "wide.png",
         "chosen_logits": [0.3 + i / 1000], "rejected_logits": [0.1]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


def test_a_stage_names_its_file_and_goes_on(tmp_path):
    data = pairs_file(tmp_path / "pairs.json", 3000)
    command = ["-m", "dama", "hardness", "--data", data, "--image_folder", "images", "--from_scores", "--out"]
    ended = run([*command, tmp_path / "full"], limit=300_000)
    assert ended.returncode == 2
    assert f"{tmp_path}/full/hardness.jsonl: cannot be written, " in ended.stderr
    assert " MiB are needed and " in ended.stderr and "Traceback" not in ended.stderr
    assert run([*command, tmp_path / "full"]).returncode == 0
    assert run([*command, tmp_path / "whole"]).returncode == 0
    whole, full = ((tmp_path / name / "hardness.jsonl").read_bytes() for name in ("whole", "full"))
    assert whole == full and len(whole) > 300_000


def test_training_is_refused_before_it_begins(tmp_path):
    """Its trial save writes with the libraries that checkpoints are written with."""
    ended = run([ROOT / "llava/train/train_mem.py", *flags_of(tmp_path / "out")], limit=500_000)
    assert ended.returncode == 2
    assert f"{tmp_path}/out: cannot be written, 2.0 MiB are needed and " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_file_is_whole_or_absent(tmp_path):
    code = f"from dama.console import write_atomic; write_atomic({str(tmp_path / 'a.json')!r}, 'x' * 3_000_000)"
    ended = run(["-c", code], limit=1_000_000)
    assert f"DiskFullError: {tmp_path}/a.json: cannot be written, 2.9 MiB are needed and " in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_device_without_room_is_named():
    expected = r"/dev/full: cannot be written, 0.1 MiB are needed and .*No space left"
    with (
        pytest.raises(DiskFullError, match=expected), writing("/dev/full", 100_000), open("/dev/full", "wb") as file,
    ):  # fmt: skip
        file.write(b"x" * 100_000)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "no"), OSError(errno.EIO, "no"), RuntimeError("file write failed"), ValueError("no")],
    ids=repr,
)
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as raised, writing(tmp_path / "x", 1):
        raise error
    assert raised.value is error


def test_errors_of_libraries_are_read(tmp_path):
    """The texts of safetensors' and torch's errors when their disk is full."""
    for text in ("Error while serializing: I/O error: No space left on device (os error 28)", "x: file write failed"):
        with pytest.raises(DiskFullError, match="x: cannot be written"), writing(tmp_path / "x", 1, RuntimeError):
            raise RuntimeError(text)


def test_nothing_is_said_where_there_is_room(tmp_path):
    write_atomic(tmp_path / "a/b.json", "{}")
    assert (tmp_path / "a/b.json").read_text() == "{}"
