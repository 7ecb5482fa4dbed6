"""The reference stage by its command: the original's log-probs, resuming, refusal of what does not belong."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dama.cli import main
from dama.console import USER_ERROR
from dama.fingerprint import digest_of_checkpoint
from dama.stage import read_stage
from dama.train.data import read_checked_pairs
from dama.train.reference import TOLERANCE, compare, run_reference, sample_of
from dama.train.reference_parts import Wanted, read_parts
from dama.train.trainer import PairLoader
from dama.views import PAIR_VIEWS
from llava.train import train_dpo
from llava.train.arguments import parse_arguments
from llava.train.reference import reference_family
from tests.conftest import GOLDEN
from tests.llava.tiny import flags


@pytest.fixture()
def world(in_golden, tmp_path):
    """Pairs without log-probs or scores of their own, in a folder that a test may change."""
    rows = json.loads((GOLDEN / "dama" / "rlaifv_records.json").read_text())
    keep = ("idx", "question", "chosen", "rejected", "image_path", "origin_dataset", "origin_split")
    (tmp_path / "pairs.json").write_text(json.dumps([{k: row[k] for k in keep} for row in rows]))
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    return tmp_path


def words(world, *more, out="reference"):
    return [
        "reference", "--data", str(world / "pairs.json"), "--image_folder", str(world / "images"), "--device", "cpu",
        "--model_name_or_path", "llava-v1.5-tiny", "--image_aspect_ratio", "square", "--out", str(world / out),
        "--workers", "0", *more,
    ]  # fmt: skip


def reference(world, *more, out="reference"):
    return main(words(world, *more, out=out))


def train(world, *more):
    return train_dpo.run(
        parse_arguments(
            flags(world, "--data_path", str(world / "pairs.json"), "--image_folder", str(world / "images"),
                  "--reference", str(world / "reference"), "--strategy", "model", "--variant", "paper",
                  "--max_steps", "1", "--save_strategy", "no", *more)
        )
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", ["1", "3", "8"])
def test_the_originals_log_probs_whatever_the_batch(world, batch_size):
    assert reference(world, "--batch_size", batch_size) == 0
    _, records = read_stage(world / "reference", "reference")
    got = {record["id"]: record for record in records}
    dataset = json.loads((GOLDEN / "g_dataset.json").read_text())
    for row in dataset["reference_logps"]["llava-v1.5-tiny"]:
        assert got[str(row["idx"])]["chosen_logp"] == pytest.approx(row["win"]["sum"], abs=2e-4)
        assert got[str(row["idx"])]["rejected_logp"] == pytest.approx(row["rej"]["sum"], abs=2e-4)
        assert got[str(row["idx"])]["chosen_tokens"] == row["win"]["n_label_tokens"]


def test_training_takes_them_and_starts_at_log_2(world):
    assert reference(world) == 0
    trainer = train(world)
    assert trainer.state.log_history[0].get("loss", trainer.state.log_history[0].get("train_loss")) == pytest.approx(
        0.693147, abs=1e-4
    )


def test_a_second_call_is_skipped_and_says_so(world, capsys):
    assert reference(world) == 0
    before = (world / "reference" / "reference.jsonl").read_bytes()
    capsys.readouterr()
    assert reference(world) == 0
    assert "complete" in capsys.readouterr().out
    assert (world / "reference" / "reference.jsonl").read_bytes() == before


def test_an_interrupted_stage_continues_to_the_same_bytes(world):
    assert reference(world, "--batch_size", "2") == 0
    whole = (world / "reference" / "reference.jsonl").read_bytes()
    path = world / "reference" / "reference.jsonl"
    manifest = json.loads((world / "reference" / "manifest.json").read_text())
    unfinished = {k: v for k, v in manifest.items() if k not in ("digest", "summary", "time")} | {"complete": False}
    (world / "reference" / "manifest.json").write_text(json.dumps(unfinished))
    path.write_bytes(whole[: len(whole) * 2 // 3])  # a torn line at the end
    assert reference(world, "--batch_size", "2") == 0
    assert path.read_bytes() == whole


def test_other_pairs_are_refused_by_name(world):
    assert reference(world) == 0
    rows = json.loads((world / "pairs.json").read_text())
    rows[0]["chosen"] += " Indeed."
    (world / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"--reference .*: made from other inputs .*--data_path \(content\): "):
        train(world)


def test_other_images_are_refused_by_name(world):
    assert reference(world) == 0
    shutil.copy(world / "images" / "tall.png", world / "images" / "wide.png")
    with pytest.raises(ValueError, match=r"made from other inputs than this training's \(--image_folder \(content\): "):
        train(world)


def test_another_model_template_or_image_preparation_is_refused_by_name(world):
    assert reference(world) == 0
    with pytest.raises(ValueError, match=r'image_aspect_ratio: "square" -> "pad"'):
        train(world, "--image_aspect_ratio", "pad")
    with pytest.raises(ValueError, match=r'--version: "v1" -> "llava_v1"'):
        train(world, "--version", "llava_v1")
    other = world / "other"
    shutil.copytree(GOLDEN / "llava-v1.5-tiny", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ValueError, match=r"\(--model_name_or_path \(content\): "):
        train(world, "--model_name_or_path", str(other))


def test_all_faults_before_the_model_is_loaded(world, capsys):
    (world / "images" / "wide.png").unlink()
    assert reference(world, "--batch_size", "0") == USER_ERROR
    said = capsys.readouterr().err
    assert "--batch_size 0: expected 1 pair or more" in said and "wide.png" in said


def test_bad_images_can_be_left_out_and_are_listed(world):
    (world / "images" / "wide.png").write_bytes(b"not a picture")
    assert reference(world, "--on_bad_image", "skip") == 0
    manifest, records = read_stage(world / "reference", "reference")
    skipped = manifest["summary"]["skipped"]
    assert len(records) + len(skipped) == 8 and all("wide.png" in skip["reason"] for skip in skipped)


def test_weights_have_a_digest_of_their_content(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / "llava-v1.5-tiny", tmp_path / name)
    assert digest_of_checkpoint(str(tmp_path / "a")) == digest_of_checkpoint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected weights"):
        digest_of_checkpoint(str(tmp_path / "b"))


def test_pairs_without_log_probs_are_named(world):
    """Left out as too long by the stage, but not by the training."""
    assert reference(world, "--model_max_length", "80", "--on_long_pair", "skip") == 0
    assert read_stage(world / "reference", "reference")[0]["summary"]["skipped"]
    with pytest.raises(ValueError, match=r"reference: expected log-probs for every pair, got none for \d of 8"):
        train(world)


# ---------------------------------------------------------------------------------------------------------- shards


def contents(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["time"], manifest["summary"]["verified"]  # which pairs are computed again depends on the shards
    return (folder / "reference.jsonl").read_bytes(), manifest


def test_shards_give_the_bytes_of_an_undivided_run(world, capsys):
    assert reference(world, "--batch_size", "2", out="whole") == 0
    assert reference(world, "--batch_size", "2", "--shard", "1/2", out="parts") == 0
    assert "shard 1/2 is done, 1 others are not yet" in capsys.readouterr().out
    assert not (world / "parts" / "reference.jsonl").exists()
    assert reference(world, "--batch_size", "2", "--shard", "0/2", out="parts") == 0
    assert contents(world / "parts") == contents(world / "whole")
    assert read_stage(world / "parts", "reference")[0]["summary"]["verified"]["pairs"] == 2  # one in each shard
    for name in ("manifest.json", "reference.jsonl"):
        (world / "parts" / name).unlink()
    assert main(["merge", str(world / "parts")]) == 0
    assert contents(world / "parts") == contents(world / "whole")
    shutil.rmtree(world / "parts" / "shards" / "00000-of-00002")
    assert main(["merge", str(world / "parts")]) == USER_ERROR
    assert "gap: chunks 0 to 1 are in no finished shard" in capsys.readouterr().err


@pytest.mark.distributed
def test_ranks_of_torchrun_are_shards(world):
    """Two real ranks, which meet once and then work alone."""
    assert reference(world, "--batch_size", "2", out="whole") == 0
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dama"]
    done = subprocess.run(
        [*run, *words(world, "--batch_size", "2", out="ranks")], timeout=120, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(GOLDEN.parents[1])}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(world / "ranks") == contents(world / "whole")


# --------------------------------------------------------------------------------------------------- single tokens


def token_files(folder):
    return [(folder / name).read_bytes() for name in ("reference.jsonl", "tokens.f32")]


def test_an_interrupted_stage_of_tokens_continues_to_the_same_bytes(world):
    """Killed after the bytes of a batch, before its records; and in shards."""
    assert reference(world, "--batch_size", "2", "--per_token") == 0
    folder = world / "reference"
    whole, manifest = token_files(folder), json.loads((folder / "manifest.json").read_text())
    unfinished = {k: v for k, v in manifest.items() if k not in ("digest", "attached", "summary", "time")}
    (folder / "manifest.json").write_text(json.dumps(unfinished | {"complete": False}))
    lines = whole[0].splitlines(keepends=True)
    (folder / "reference.jsonl").write_bytes(b"".join(lines[:4]))
    assert reference(world, "--batch_size", "2", "--per_token") == 0
    assert token_files(folder) == whole
    for shard in ("1/2", "0/2"):
        assert reference(world, "--batch_size", "2", "--per_token", "--shard", shard, out="parts") == 0
    assert token_files(world / "parts") == whole


def test_tokens_are_those_of_the_rows_alone(world):
    """Log-probs of each token, packed with the other answer and apart: 1e-5."""
    for packed in (True, False):
        given = ["--data_path", str(world / "pairs.json"), "--image_folder", str(world / "images")]
        arguments = parse_arguments(flags(world, *given, "--shared_prefix", str(packed)))
        pairs, skipped = read_checked_pairs(arguments[1])
        family, out = reference_family(arguments), world / str(packed)
        run_reference(family, *arguments[1:], pairs, skipped, out, 3, progress=False, per_token=True)
    found, apart = (read_parts(world / out, Wanted(PAIR_VIEWS, "none", per_token=True)) for out in ("True", "False"))
    for id_, answers in found.tokens.items():
        for one, other in zip(answers, apart.tokens[id_], strict=True):
            assert len(one) > 2 and abs(one - other).max() < 1e-5
        assert [values.sum() for values in answers] == pytest.approx(found.sums[id_], abs=1e-4)


def test_a_finished_folder_is_extended_by_the_command(world, capsys):
    assert reference(world) == 0
    before = (world / "reference" / "reference.jsonl").read_bytes()
    assert reference(world, "--loss", "mdpo", "--shard", "1/2") == 0
    assert reference(world, "--loss", "mdpo", "--shard", "0/2") == 0
    assert "reference: adds chosen_corrupted in" in capsys.readouterr().out
    _, (record, *_) = read_stage(world / "reference" / "added" / "chosen_corrupted-crop-0", "reference")
    assert [name for name in record if name.endswith("_logp")] == ["chosen_corrupted_logp"]
    assert reference(world, "--loss", "mdpo") == 0
    said = capsys.readouterr().out
    assert "complete in" in said and "chosen, rejected; chosen_corrupted (crop, seed 0)), skipped" in said
    assert (world / "reference" / "reference.jsonl").read_bytes() == before
    assert reference(world, "--loss", "mdpo", "--batch_size", "3") == USER_ERROR
    assert "--batch_size: 8 -> 3" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- verification


def test_a_share_of_the_pairs_is_drawn_by_the_seed():
    """0.5 % of 401 pairs are 2.005: three. One of a single pair, none of none; another seed draws others."""
    records = [{"id": str(i)} for i in range(401)]
    assert [len(sample_of(records[:n], "42 0/1")) for n in (401, 400, 1, 0)] == [3, 2, 1, 0]
    assert sample_of(records, "42 0/1") == sample_of(records, "42 0/1") != sample_of(records, "42 0/2")


def answer_records(*differences, tokens=25):
    """Pairs whose chosen answers differ so, in nats, from the same pairs alone; rejected answers agree."""
    alone = {"chosen_logp": -20.0, "rejected_logp": -30.0, "chosen_tokens": tokens, "rejected_tokens": tokens}
    batched = [alone | {"id": str(i), "chosen_logp": -20.0 + by} for i, by in enumerate(differences)]
    return batched, [alone | {"id": str(i)} for i in range(len(differences))]


def test_differences_on_paper():
    """Answers of 25 tokens 0.004 nats apart: 0.004 / 5 = 0.0008 on one side, 0 on the other.

    The root mean square is 0.0008 / sqrt(2) = 0.00057, below 0.001. Each 0.008: 0.0011, above. One of ten 0.03 apart is
    an outlier: 0.006 is above 4 x 0.001.
    """
    found = compare(*answer_records(0.004, 0.004), 1e-3)
    assert found == {"pairs": 2, "max_difference": pytest.approx(0.004), "drift": pytest.approx(0.0008 / 2**0.5)}
    with pytest.raises(ValueError, match=r"4 answers: 0.0011 nats per square root of tokens apart .* at most 0.001"):
        compare(*answer_records(0.008, -0.008), 1e-3)
    with pytest.raises(ValueError, match=r"pair 3, chosen answer of 25 tokens: -19.9700 .*-20.0000 alone.*0.0200"):
        compare(*answer_records(0, 0, 0, 0.03, 0, 0, 0, 0, 0, 0), 1e-3)
    with pytest.raises(ValueError, match="pair 0, chosen"):
        compare(*answer_records(float("nan")), 1e-3)


def test_noise_of_half_precision_passes():
    """22,000 pairs are sampled as 110, with 0.04 nats of noise on each of 100 tokens.

    A rule for every single answer, 0.1 nats x sqrt(tokens), refused most such stages; the root mean square of their
    noise is 0.04.
    """
    generator = random.Random(0)
    sums = [0.04 * 100**0.5 * generator.gauss(0, 1) for _ in range(110)]
    assert compare(*answer_records(*sums, tokens=100), TOLERANCE[torch.bfloat16])["drift"] < 0.05
    with pytest.raises(ValueError, match="computed again"):
        compare(*answer_records(*(5 * value for value in sums), tokens=100), TOLERANCE[torch.bfloat16])


def test_log_probs_that_depend_on_the_batch_stop_the_stage(world, capsys, monkeypatch):
    """A collator that gives every pair of a batch the first one's image, as a bug in batching would."""
    original = PairLoader.__call__

    def first_image_for_all(self, instances):
        batch = original(self, instances)
        return batch | {"images": dict.fromkeys(batch["images"], next(iter(batch["images"].values())))}

    monkeypatch.setattr(PairLoader, "__call__", first_image_for_all)
    assert reference(world, "--batch_size", "8") == USER_ERROR
    said = capsys.readouterr().err
    assert "reference: pairs computed again" in said and "alone; expected a difference of at most" in said
    assert json.loads((world / "reference" / "manifest.json").read_text())["complete"] is False


def test_log_probs_that_are_no_numbers_point_to_the_weights(world, capsys):
    """Of a checkpoint that diverged: it is not the device that is in doubt."""
    broken = world / "llava-v1.5-diverged"
    shutil.copytree("llava-v1.5-tiny", broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert reference(world, "--model_name_or_path", str(broken)) == USER_ERROR
    said = capsys.readouterr().err
    assert "reference: expected finite log-probs, got nan for view chosen of pair" in said
    assert "another checkpoint where its weights" in said and "device" not in said


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_pairs_alone_agree_with_their_batch(world, capsys, monkeypatch, precision):
    monkeypatch.setattr("dama.train.reference.VERIFIED_SHARE", 1.0)
    assert reference(world, "--precision", precision) == 0
    said = capsys.readouterr().out
    assert f"8 pairs in {'float32' if precision == 'fp32' else 'bfloat16'}" in said
    assert "8 pairs computed again, each alone: log-probs differ by at most" in said
