"""`python -m dama hardness`: help, faults in one message before long work, the summary, a second call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dama.cli import histogram, main
from dama.hardness.score import load_hardness
from tests.dama.tiny_clip import write_tiny_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """pairs.jsonl, images/ and clip/ for three pairs."""
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{index}.png")
        answers = {"chosen": "A cat.", "rejected": f"{index}."}
        kind = "edit" if index else "sample"
        rows.append({"idx": index, "image": f"{index}.png", "question": "What?", "kind": kind, **answers})
    write_rows(tmp_path, rows)
    write_tiny_clip(tmp_path / "clip")
    return tmp_path


def write_rows(world: Path, rows: list[dict[str, Any]]) -> None:
    (world / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(world: Path, *more: str) -> list[str]:
    paths = ["--data", str(world / "pairs.jsonl"), "--image_folder", str(world / "images"), "--out", str(world / "out")]
    return ["hardness", *paths, "--clip", str(world / "clip"), "--workers", "0", *more]


def test_runs_summarises_and_skips_the_second_time(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(world)) == 0
    output = capsys.readouterr().out
    result = load_hardness(world / "out")
    assert set(result.delta) == {"0", "1", "2"}
    for part in (
        "hardness: 3 pairs on 3 images, CLIP clip (local weights, fp32), cpu",
        "statements 3 of chosen answers, 3 of rejected ones",
        f"delta_bar = {result.delta_bar:.6f}",
        f"written to {world / 'out'}",
    ):
        assert part in output
    kinds = [line.split()[:2] for line in output.splitlines() if line.startswith(("all ", "edit ", "sample "))]
    assert kinds == [["all", "3"], ["edit", "2"], ["sample", "1"]]
    assert main(flags(world)) == 0
    assert "hardness: complete in" in capsys.readouterr().out


def test_dashes_are_taken_for_underscores(world: Path) -> None:
    words = [word.replace("_", "-") if word.startswith("--") else word for word in flags(world, "--batch_size=2")]
    assert "--image-folder" in words
    assert main([*words, "--on-bad-image", "skip"]) == 0


def test_all_faults_come_in_one_message(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"idx": 0, "image": "none.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."},
        {"idx": 1, "image": "1.png", "question": "What?", "chosen": "A cat.", "rejected": "A cat."},
    ]
    write_rows(world, rows)
    with open(world / "pairs.jsonl", "a") as file:
        file.write('{"idx": 2, "ima')
    more = ("--clip", "ViT-L-14-336", "--batch_size", "0", "--device", "tpu", "--workers", "-1")
    assert main(flags(world, *more)) == 1
    message = capsys.readouterr().err
    for part in (
        "--batch_size 0: expected 1 image or more",
        "--device tpu: expected auto, cpu, cuda or cuda:N",
        "--workers -1: expected 0 or more processes",
        "QuickGELU mismatch",
        "--clip ViT-L-14-336-quickgelu",
        "pairs.jsonl: 3 faults",
        "line 3: not JSON, perhaps torn",
        "row 0 (image none.png): image is missing",
        "row 1 (image 1.png): chosen and rejected answer are equal",
    ):
        assert part in message
    assert not (world / "out").exists()


def test_absent_paths_are_named_together(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "file").write_text("")
    paths = ["--data", str(world / "no.json"), "--image_folder", str(world / "no"), "--out", str(world / "file/out")]
    assert main(["hardness", *paths, "--clip", str(world / "clip")]) == 1
    message = capsys.readouterr().err
    assert "no.json: no such file" in message and "no: no such folder" in message
    assert "is not a folder that can be written to" in message


def test_skipped_rows_are_told_and_listed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "images/1.png").unlink()
    assert main(flags(world)) == 1
    assert "--on_bad_image skip" in capsys.readouterr().err
    assert main(flags(world, "--on_bad_image", "skip")) == 0
    output = capsys.readouterr().out
    assert "skipped row 1: image is missing: 1.png" in output and "pairs 2, left out 1" in output
    manifest = json.loads((world / "out/manifest.json").read_text())
    assert manifest["summary"]["skipped"] == [{"id": "1", "reason": "image is missing: 1.png"}]


def test_other_inputs_are_refused_until_overwritten(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(world)) == 0
    assert main(flags(world, "--scale", "logit")) == 1
    assert 'scale: "cosine" -> "logit"' in capsys.readouterr().err
    assert main(flags(world, "--scale", "logit", "--overwrite")) == 0


def test_given_scores_need_no_clip(tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--data", str(golden / "dama/rlaifv_records.json"), "--image_folder", str(golden / "images")]
    common = ["hardness", *paths, "--out", str(tmp_path / "out"), "--from_scores"]
    assert main([*common, "--scale", "logit"]) == 1
    assert "--scale: the scores in the file are taken as they are" in capsys.readouterr().err
    assert main(common) == 0
    assert "8 pairs in" in capsys.readouterr().out


def test_given_scores_must_be_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(world, "--from_scores")) == 1
    assert "row 0: no scores in chosen_logits or rejected_logits" in capsys.readouterr().err


def test_histogram_on_paper() -> None:
    """0, 1, 1, 2 in two bins of width 1: [0, 1) holds one value, [1, 2] three; the fullest bar has the full width."""
    assert histogram([0, 1, 1, 2], bins=2, width=6) == ["    0.0000 ## 1", "    1.0000 ###### 3"]
    assert histogram([0.5, 0.5], width=4) == ["    0.5000 #### 2"]


def test_help_reads_like_documentation() -> None:
    run = [sys.executable, "-m", "dama", "hardness", "--help"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for part in ("Eq. 3-5", "manifest.json", "Default: fail", "--from_scores", "examples:"):
        assert part in text
