"""Reference stage, hardness stage and generation on each of two devices, every number computed.

In a child: python -m tests.cuda.stages OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dama.cli import main as dama
from dama.stage import read_stage
from llava.eval.generate import main as generate
from llava.rehearsal.engine import single_rank_world
from tests.conftest import GOLDEN
from tests.dama.tiny_clip import write_tiny_clip

IMAGES = ("wide.png", "tall.png", "square.png")


def write_inputs(folder: Path) -> None:
    """pairs.json without log-probs and scores, questions.jsonl and a tiny CLIP."""
    rows = json.loads((GOLDEN / "dama" / "rlaifv_records.json").read_text())
    names = ("idx", "question", "chosen", "rejected", "image_path", "origin_dataset", "origin_split")
    (folder / "pairs.json").write_text(json.dumps([{name: row[name] for name in names} for row in rows]))
    questions = [{"question_id": i, "image": IMAGES[i % 3], "text": f"What is in image {i}?"} for i in range(4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    write_tiny_clip(folder / "clip")


def reference(folder: Path, out: Path, device: str) -> Any:
    """(log-prob of the chosen answer, of the rejected one) by pair."""
    kind, _, index = device.partition(":")
    words = ["reference", *inputs(folder, out, kind), "--model_name_or_path", "llava-v1.5-tiny",
             "--image_aspect_ratio", "square"]  # fmt: skip
    # The stage takes the device of its rank: on the second device it is a shard, and the first completes it.
    for rank in range(int(index or 0), -1, -1) if index else ():
        with single_rank_world(int(index) + 1, rank=rank, numbers=True):
            assert dama(words) == 0
    if not index:
        assert dama(words) == 0
    return {row["id"]: (row["chosen_logp"], row["rejected_logp"]) for row in read_stage(out, "reference")[1]}


def hardness(folder: Path, out: Path, device: str) -> Any:
    """Records of the hardness stage."""
    assert dama(["hardness", *inputs(folder, out, device), "--clip", str(folder / "clip")]) == 0
    return {row["id"]: row["delta"] for row in read_stage(out, "hardness")[1]}


def generation(folder: Path, out: Path, device: str) -> Any:
    """Text of each answer; in the data type of the device."""
    words = ["--model-path", "llava-v1.5-tiny", "--question-file", str(folder / "questions.jsonl"), "--image-folder",
             "images", "--max-new-tokens", "6", "--batch-size", "2", "--out", str(out), "--device", device]  # fmt: skip
    generate(words)
    return [json.loads(line)["text"] for line in (out / "answers.jsonl").read_text().splitlines()]


def inputs(folder: Path, out: Path, device: str) -> list[str]:
    return ["--data", str(folder / "pairs.json"), "--image_folder", "images", "--out", str(out), "--workers", "0",
            "--device", device]  # fmt: skip


STAGES: dict[str, Callable[[Path, Path, str], Any]] = {
    "reference": reference,
    "hardness": hardness,
    "generation": generation,
}


def results_on(device: str) -> dict[str, Any]:
    """Every stage's results on a device, in the golden folder."""
    before = os.getcwd()
    os.chdir(GOLDEN)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_inputs(folder)
            return {stage: run(folder, folder / stage, device) for stage, run in STAGES.items()}
    finally:
        os.chdir(before)


def main(out: str) -> None:
    from llava.rehearsal.mode import NullMode

    with NullMode(everything=True):
        results = {device: results_on(device) for device in ("cuda:0", "cuda:1")}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
