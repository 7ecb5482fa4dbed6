"""dama.stage: resume after real kills gives the bytes of an undisturbed run, and other inputs are refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dama.stage import StageError, differences, open_stage, read_stage

ROOT = Path(__file__).parents[2]
SIZES = [3, 2, 4, 1]
INPUTS = {"pairs": "abc", "clip": {"model": "tiny", "weights": "123"}, "scale": "cosine"}
WRITER = """
import os, sys, time
from dama.stage import open_stage
folder, mode = sys.argv[1:]
sizes = {sizes}
with open_stage(folder, "toy", {inputs}, sizes) as stage:
    for chunk in range(stage.chunks_done, len(sizes)):
        first = sum(sizes[:chunk])
        if mode == "torn" and chunk == 2:
            stage._file.write(b'{{"id": "5", "v": 0.5}}\\n{{"id": "6", "v"')
            stage._file.flush()
        if mode == "hold" or (mode == "torn" and chunk == 2):
            print("ready", flush=True)
            time.sleep(60)
        if mode == "slow":
            time.sleep(0.05)
        stage.append([{{"id": str(first + n), "v": (first + n) / 10}} for n in range(sizes[chunk])])
    if not stage.complete:
        stage.finish({{"mean": 0.45}})
"""


def writer(folder: Path, mode: str) -> subprocess.Popen[str]:
    script = WRITER.format(sizes=SIZES, inputs=INPUTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), mode], stdout=subprocess.PIPE, text=True, env=environment
    )


def finished(folder: Path, mode: str = "plain") -> str:
    process = writer(folder, mode)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return output


def contents(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The records' bytes and the manifest without its times."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["time"]
    return (folder / "toy.jsonl").read_bytes(), manifest


def records(chunk: int) -> list[dict[str, Any]]:
    first = sum(SIZES[:chunk])
    return [{"id": str(first + n), "v": (first + n) / 10} for n in range(SIZES[chunk])]


def test_killed_inside_a_line_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    """Chunks 0 and 1 (5 records) are written; of chunk 2 one whole line and a torn one lie in the file at the kill."""
    finished(tmp_path / "calm")
    process = writer(tmp_path / "killed", "torn")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert (tmp_path / "killed/toy.jsonl").read_bytes().endswith(b'{"id": "6", "v"')
    with pytest.raises(StageError, match="interrupted\nRemedy: run .*again, it continues"):
        read_stage(tmp_path / "killed", "toy")
    assert "continues at record 5 of 10 in" in (output := finished(tmp_path / "killed"))
    assert "37 bytes of an interrupted chunk cut off" in output
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert json.loads((tmp_path / "killed/manifest.json").read_text())["time"]["records"] == 5


def test_killed_again_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """Each life is killed as soon as the file has grown, wherever it is then."""
    finished(tmp_path / "calm")
    path, lives = tmp_path / "killed/toy.jsonl", 0
    while True:
        size = path.stat().st_size if path.exists() else 0
        process = writer(tmp_path / "killed", "slow")
        while process.poll() is None and (not path.exists() or path.stat().st_size <= size):
            time.sleep(0.005)
        process.kill()
        process.communicate(timeout=30)
        lives += 1
        if process.returncode == 0 or lives > 10:
            break
    finished(tmp_path / "killed")
    assert lives > 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


def test_a_complete_stage_is_skipped_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert stage.complete and stage.chunks_done == len(SIZES) and stage.records_done == 10
        with pytest.raises(StageError, match="complete or closed"):
            stage.append(records(0))
    assert "toy: complete in" in capsys.readouterr().out
    assert (tmp_path / "manifest.json").read_bytes() == before
    manifest, rows = read_stage(tmp_path, "toy")
    assert manifest["summary"] == {"mean": 0.45}
    assert rows == [row for chunk in range(len(SIZES)) for row in records(chunk)]


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    process = writer(tmp_path, "hold")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(StageError, match="another process writes"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)
    process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert stage.chunks_done == 0


@pytest.mark.parametrize("complete", [True, False])
def test_other_inputs_are_refused_field_by_field(tmp_path: Path, complete: bool) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [1]) as stage:
        stage.append([{"id": "0"}]) if complete else None
        stage.finish({}) if complete else None
    other = INPUTS | {"clip": {"model": "tiny", "weights": "456"}, "scale": "logit"}
    with pytest.raises(StageError) as caught:
        open_stage(tmp_path, "toy", other, [1])
    message = str(caught.value)
    assert 'clip.weights: "123" -> "456"' in message and 'scale: "cosine" -> "logit"' in message
    assert "pairs" not in message and "model" not in message
    assert "another --out, or --overwrite" in message
    with open_stage(tmp_path, "toy", other, [1], overwrite=True) as stage:
        assert (stage.chunks_done, stage.complete, stage.records_path.read_bytes()) == (0, False, b"")


def test_another_stage_in_the_folder_is_refused(tmp_path: Path) -> None:
    open_stage(tmp_path, "toy", INPUTS, [1]).close()
    with pytest.raises(StageError, match="holds the stage toy, this is other"):
        open_stage(tmp_path, "other", INPUTS, [1])
    with pytest.raises(StageError, match="holds the stage toy, expected other"):
        read_stage(tmp_path, "other")


def test_another_plan_is_refused_while_unfinished_only(tmp_path: Path) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [1, 1]) as stage:
        stage.append([{"id": "0"}])
    with pytest.raises(StageError, match=r"begun with other chunks \(2 records; now 2 records in 1 chunks\)"):
        open_stage(tmp_path, "toy", INPUTS, [2])
    with open_stage(tmp_path, "toy", INPUTS, [1, 1]) as stage:
        stage.append([{"id": "1"}])
        stage.finish({})
    assert open_stage(tmp_path, "toy", INPUTS, [2]).complete


def test_damage_is_named(tmp_path: Path) -> None:
    finished(tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    for use in (lambda: read_stage(tmp_path, "toy"), lambda: open_stage(tmp_path, "toy", INPUTS, SIZES)):
        with pytest.raises(StageError, match="changed since the stage was finished(?s:.*)--overwrite"):
            use()
    path.unlink()
    with pytest.raises(StageError, match="missing, although"):
        read_stage(tmp_path, "toy")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StageError, match=r"manifest\.json: not JSON"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StageError, match=r"no manifest\.json in .*\nRemedy: run `python -m dama toy"):
        read_stage(tmp_path, "toy")
    path.write_text('{"id": "0"}\n')
    with pytest.raises(StageError, match="records without a manifest"):
        open_stage(tmp_path, "toy", INPUTS, SIZES)


def test_records_after_a_damaged_line_are_made_again(tmp_path: Path) -> None:
    """Of chunks 0 (3), 1 (2) the fourth record is spoilt: chunk 1 starts again."""
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        stage.append(records(0))
        stage.append(records(1))
    lines = stage.records_path.read_bytes().splitlines(keepends=True)
    stage.records_path.write_bytes(b"".join(lines[:3]) + b"\0" * len(lines[3]) + b"\n" + lines[4])
    with open_stage(tmp_path, "toy", INPUTS, SIZES) as stage:
        assert (stage.chunks_done, stage.records()) == (1, records(0))


def test_misuse_is_refused(tmp_path: Path) -> None:
    with open_stage(tmp_path, "toy", INPUTS, [2]) as stage:
        with pytest.raises(StageError, match="chunk 0 has 1 records, planned were 2"):
            stage.append([{"id": "0"}])
        with pytest.raises(ValueError, match="not JSON compliant"):
            stage.append([{"v": float("nan")}, {}])
        with pytest.raises(StageError, match="finished after 0 of 1 chunks"):
            stage.finish({})
        stage.append([{}, {}])
        with pytest.raises(StageError, match="all 1 planned chunks"):
            stage.append([{}])


def test_differences_names_nested_fields() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": [5]}
    assert differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> null", "e: null -> [5]"]
    assert differences(old, old) == []
