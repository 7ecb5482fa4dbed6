"""Called again when they are finished, the stages and training end before torch is imported."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import GOLDEN, ROOT

RUN = """
import json, sys
from dama.cli import main as dama
from llava.train.train_mem import main as train
codes = [(train if words[0] == "train" else dama)(words[words[0] == "train":]) for words in json.loads(sys.argv[1])]
print("torch" in sys.modules, codes)
"""


def call(world, *lines):
    """Calls one after the other in a process of their own: (whether torch was imported and exit codes, output)."""
    words = [sys.executable, "-c", RUN, json.dumps(lines)]
    done = subprocess.run(words, cwd=world, capture_output=True, text=True, check=True, timeout=600)
    output, _, last = done.stdout.rstrip().rpartition("\n")
    return last, output, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A copy of the tiny checkpoint and its pairs, and finished calls on them."""
    folder = tmp_path_factory.mktemp("second")
    for name in ("llava-v1.5-tiny", "clip-vit-tiny-patch14-56", "images", "dama", "sft"):
        shutil.copytree(GOLDEN / name, folder / name)
    return folder


PAIRS = ["--data", "dama/rlaifv_records.json", "--image_folder", "images"]
MODEL = ["--model_name_or_path", "llava-v1.5-tiny"]
TRAIN = [
    "train", *MODEL, "--image_folder", "images", "--use_cpu", "True", "--max_steps", "1", "--image_aspect_ratio",
    "square", "--save_strategy", "no", "--disable_tqdm", "True", "--report_to", "none",
]  # fmt: skip
LINES = [
    ["hardness", *PAIRS, "--out", "hardness", "--from_scores"],
    ["reference", *PAIRS, *MODEL, "--out", "reference", "--image_aspect_ratio", "square", "--workers", "0"],
    [*TRAIN, "--task", "DPO", "--data_path", "dama/rlaifv_records.json", "--output_dir", "dpo",
     "--hardness", "hardness", "--reference", "reference"],
    [*TRAIN, "--data_path", "sft/records.json", "--output_dir", "sft_out"],
]  # fmt: skip


def test_the_second_call_imports_nothing_slow_and_a_change_is_still_refused(world):
    first, output, errors = call(world, *LINES)
    assert first == "True [0, 0, 0, 0]", output + errors
    manifest = json.loads((world / "reference/manifest.json").read_text())
    last, output, errors = call(world, *LINES)
    assert last == "False [0, 0, 0, 0]", output + errors
    for line in ("hardness: complete in hardness", "reference: complete in reference",
                 f"reference: {manifest['summary']['pairs']} pairs in float32", "delta_bar = ",
                 "training: complete in dpo, skipped", "training: complete in sft_out, skipped"):  # fmt: skip
        assert line in output
    records = json.loads((world / "dama/rlaifv_records.json").read_text())
    records[0]["chosen"] += " And a boat."
    (world / "dama/rlaifv_records.json").write_text(json.dumps(records))
    last, output, errors = call(world, *LINES[:3])
    assert last == "True [2, 2, 2]"
    assert "hardness was made from other inputs" in errors and "reference was made from other inputs" in errors
    assert "--hardness hardness: made from other inputs than this training's" in errors


def test_overwrite_starts_anew(world):
    line = ["hardness", *PAIRS, "--out", "anew", "--from_scores"]
    assert call(world, line)[0].endswith("[0]")
    last, output, _ = call(world, [*line, "--overwrite"])
    assert last.endswith("[0]") and "complete in" not in output


def test_an_added_view_that_was_removed_is_added_again(world):
    """Neither the views in OUT/added nor the tokens beside the records can go without the stage noticing."""
    line = ["reference", "--data", "dama/rlaifv_records.json", "--image_folder", "images", *MODEL, "--out", "views",
            "--image_aspect_ratio", "square", "--workers", "0"]  # fmt: skip
    mdpo = [*line, "--loss", "mdpo", "--corruption", "blank", "--per_token"]
    assert call(world, line, mdpo)[0] == "True [0, 0]"
    assert call(world, mdpo)[0] == "False [0]"
    [part] = (world / "views/added").iterdir()
    shutil.rmtree(part)
    last, output, errors = call(world, mdpo)
    assert last == "True [0]" and (part / "tokens.f32").is_file(), output + errors


def test_flags_are_checked_first(world):
    """A wrong flag is an error, whatever is finished."""
    _, _, errors = call(world, [*LINES[3], "--learning_rate", "fast"])
    assert "learning_rate" in errors
    assert str(ROOT) not in errors
