"""`python -m dama hardness`: help, faults in one message before long work, the summary, a second call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from dama.cli import main
from dama.console import USER_ERROR
from dama.flags import pick_device
from dama.hardness import score
from dama.hardness.command import histogram
from dama.hardness.score import load_hardness
from dama.hardness.split_llm import PROMPT
from dama.stage import Shard, open_stage
from tests.dama.tiny_clip import write_tiny_clip
from tests.openai_server import Call, ScriptedServer

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
    assert main(flags(world, *more)) == USER_ERROR
    message = capsys.readouterr().err
    for part in (
        "--batch_size 0: expected 1 image or more",
        "--device tpu: expected auto, cpu, cuda or cuda:N",
        "--workers -1: expected 0 or more processes",
        "QuickGELU mismatch",
        "--clip ViT-L-14-336-quickgelu",
        "pairs.jsonl: 3 errors",
        "line 3: not JSON, perhaps torn",
        "row 0 (image none.png): image is missing",
        "row 1 (image 1.png): chosen and rejected answer are equal",
    ):
        assert part in message
    assert not (world / "out").exists()


def test_absent_paths_are_named_together(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "file").write_text("")
    paths = ["--data", str(world / "no.json"), "--image_folder", str(world / "no"), "--out", str(world / "file/out")]
    assert main(["hardness", *paths, "--clip", str(world / "clip")]) == USER_ERROR
    message = capsys.readouterr().err
    assert "no.json: no such file" in message and "no: no such folder" in message
    assert "is not a folder that can be written to" in message


def test_skipped_rows_are_told_and_listed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "images/1.png").unlink()
    assert main(flags(world)) == USER_ERROR
    assert "--on_bad_image skip" in capsys.readouterr().err
    assert main(flags(world, "--on_bad_image", "skip")) == 0
    output = capsys.readouterr().out
    assert "skipped row 1: image is missing: 1.png" in output and "pairs 2, left out 1" in output
    manifest = json.loads((world / "out/manifest.json").read_text())
    assert manifest["summary"]["skipped"] == [{"id": "1", "reason": "image is missing: 1.png"}]


def test_other_inputs_are_refused_until_overwritten(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(world)) == 0
    assert main(flags(world, "--scale", "logit")) == USER_ERROR
    assert 'scale: "cosine" -> "logit"' in capsys.readouterr().err
    assert main(flags(world, "--scale", "logit", "--overwrite")) == 0


def test_given_scores_need_no_clip(tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--data", str(golden / "dama/rlaifv_records.json"), "--image_folder", str(golden / "images")]
    common = ["hardness", *paths, "--out", str(tmp_path / "out"), "--from_scores"]
    assert main([*common, "--scale", "logit"]) == USER_ERROR
    assert "--scale: the scores in the file are taken as they are" in capsys.readouterr().err
    assert main(common) == 0
    assert "8 pairs in" in capsys.readouterr().out


def test_given_scores_must_be_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(world, "--from_scores")) == USER_ERROR
    assert "row 0: no scores in chosen_logits or rejected_logits" in capsys.readouterr().err


def test_histogram_on_paper() -> None:
    """0, 1, 1, 2 in two bins of width 1: [0, 1) holds one value, [1, 2] three; the fullest bar has the full width."""
    assert histogram([0, 1, 1, 2], bins=2, width=6) == ["    0.0000 ## 1", "    1.0000 ###### 3"]
    assert histogram([0.5, 0.5], width=4) == ["    0.5000 #### 2"]


def test_help_reads_like_documentation() -> None:
    run = [sys.executable, "-m", "dama", "hardness", "--help"]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for part in ("Eq. 3-5", "manifest.json", "(default: fail)", "--from_scores", "examples:"):
        assert part in text


# ---------------------------------------------------------------------------------------------------------- shards


def contents(out: Path) -> tuple[bytes, dict[str, Any]]:
    """The records' bytes and the manifest without its times."""
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["time"]
    return (out / "hardness.jsonl").read_bytes(), manifest


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "IMAGES_PER_CHUNK", 1)


def test_shards_by_flag_and_the_merge_command(
    world: Path, small_chunks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(world)) == 0
    whole = contents(world / "out")
    parts = ["--out", str(world / "parts")]
    assert main(flags(world, *parts, "--shard", "1/2")) == 0
    assert "cpu, shard 1/2" in (output := capsys.readouterr().out) and "`python -m dama merge" in output
    assert main(["merge", str(world / "parts")]) == USER_ERROR
    assert "gap: chunks 0 to 0 are in no finished shard" in capsys.readouterr().err
    assert main(flags(world, *parts, "--shard", "0/2")) == 0
    assert "2 shards with 3 records merged" in (output := capsys.readouterr().out) and "delta_bar = " in output
    assert contents(world / "parts") == whole
    (world / "parts/manifest.json").unlink()
    (world / "parts/hardness.jsonl").unlink()
    assert main(["merge", str(world / "parts")]) == 0
    assert contents(world / "parts") == whole
    assert main(flags(world, "--shard", "2/2")) == USER_ERROR
    assert "--shard '2/2': expected i/n with 0 <= i < n" in capsys.readouterr().err


def test_other_stages_are_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_stage(tmp_path, "toy", {}, [], shard=Shard(0, 2)) as stage:
        stage.finish({})
    assert main(["merge", str(tmp_path)]) == USER_ERROR
    assert "holds the stage toy, expected one of hardness, reference" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_ranks_of_a_launcher_are_shards(
    world: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: tuple[str, str],
) -> None:
    """The last rank prints the result, also where it is not rank 0.

    DeepSpeed's launcher also hands every process a --local_rank before the command's own words.
    """
    assert main(flags(world)) == 0
    monkeypatch.setenv(names[1], "2")
    for rank in ("0", "1"):
        monkeypatch.setenv(names[0], rank)
        capsys.readouterr()
        assert main([f"--local_rank={rank}", *flags(world, "--out", str(world / "ranks"))]) == 0
    assert "delta_bar = " in capsys.readouterr().out
    assert contents(world / "ranks") == contents(world / "out")


def test_each_rank_takes_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tasks on a machine of four GPUs, or one GPU shown to each: the rank within what is visible."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert pick_device("auto") == "cuda:0"
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert pick_device("auto") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (pick_device("auto"), pick_device("cuda:2"), pick_device("cpu")) == ("cuda:3", "cuda:2", "cpu")


# --------------------------------------------------------------------------------------------------------- splitter


def test_a_server_splits_the_answers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server splits "A cat." well, adds a word to "1.", has no statement for "2." and "0.": rules split those."""

    def reply(call: Call) -> str:
        answer = call.text.removeprefix(PROMPT)
        return {"A cat.": "There is a cat.", "1.": "1 dog"}.get(answer, "-")

    with ScriptedServer(reply) as url:
        llm = ["--splitter", "llm", "--base-url", url, "--judge-model", "splitter"]
        assert main(flags(world, *llm)) == 0
        said = capsys.readouterr().out
        assert "answers split by rules instead of the LLM, of 6: added words: 1, no statements: 2" in said
        before = contents(world / "out")
        assert main(flags(world, *llm, "--overwrite")) == 0
        assert contents(world / "out") == before
    rows = [json.loads(line) for line in (world / "out/hardness.jsonl").read_text().splitlines()]
    assert rows[0]["chosen_statements"] == ["There is a cat."] and rows[1]["rejected_statements"] == ["1."]
    assert rows[1]["fallbacks"] == {"rejected": "added words"}
    assert (world / "out/splits.jsonl").exists()
    assert main(flags(world)) == USER_ERROR
    assert "\n  --splitter: {" in capsys.readouterr().err


def test_wrong_choices_of_a_splitter_are_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--base_url", "http://x/v1"], "--base_url: only used by --splitter llm"),
        (["--splitter", "llm"], "or --base_url URL with --judge_model NAME; got neither"),
        (["--splitter", "llm", "--base_url", "http://x/v1"], "NAME; got --base_url"),
        (["--splitter", "llm", "--splitter_model", "no"], "--splitter_model no: no such folder"),
        (["--splitter", "llm", "--base_url", "x", "--judge_model", "m"], "base_url: expected http://HOST/v1"),
        (["--splitter", "llm", "--splitter_model", str(world), "--from_scores"], "scores are given are not split"),
    ):
        assert main(flags(world, *words)) == USER_ERROR
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("scale", ["cosine", "logit"])
def test_scores_that_are_not_finite_name_the_pair_and_the_image(
    value: str, scale: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token has a broken embedding, and only the last pair has that token."""
    write_rows(world, [row | {"rejected": "A zebra."} if row["idx"] == 2 else row for row in read_rows_of(world)])
    spoil(world / "clip", "token_embedding.weight", SimpleTokenizer().encode("zebra")[0], float(value))
    assert main(flags(world, "--scale", scale)) == USER_ERROR
    error = capsys.readouterr().err
    assert "dama hardness: error: pair 2 (image 2.png): expected finite scores, got 1 of 2 that are not" in error
    assert "the first nan for 'A zebra.'\nRemedy: --precision fp32" in error and "Traceback" not in error
    assert "JSON compliant" not in error


def test_a_broken_vision_tower_is_told_at_the_first_pair(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(world / "clip", "visual.proj", slice(None), float("nan"))
    assert main(flags(world)) == USER_ERROR
    assert "pair 0 (image 0.png): expected finite scores, got 2 of 2 that are not" in capsys.readouterr().err


def read_rows_of(world: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]


def spoil(clip: Path, name: str, index: Any, value: float) -> None:
    """Sets some weights of a CLIP in a folder to a value that is no number."""
    weights = load_file(clip / "open_clip_model.safetensors")
    weights[name][index] = value
    save_file(weights, clip / "open_clip_model.safetensors")
