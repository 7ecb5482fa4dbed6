"""The shell scripts: strict mode, dry runs with the paper's settings, one message for all that is missing."""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from llava.train.arguments import parse_arguments
from llava.train.doctor import find_missing, gpu_memory_needed
from tests.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_failure(script):
    text = script.read_text()
    assert "set -euo pipefail" in text and text.startswith("#!/usr/bin/env bash\n#")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def dry_run(script, **environment):
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), "--dry-run", "--logging_steps", "1"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("gpus", ["1", "2", "4", "8", "16"])
@pytest.mark.parametrize("script", ["dama_7b.sh", "dama_13b.sh", "dama_7b_lora.sh"])
def test_dry_runs_have_the_papers_settings(script, gpus, tmp_path, monkeypatch):
    commands = dry_run(script, GPUS=gpus, OUTPUT="runs/x", DATA="pairs.json", IMAGES="pictures")
    assert [command[:4] for command in commands[:3]] == [
        ["python", "-m", "llava.train.doctor", "--model"],
        ["python", "-m", "dama", "hardness"],
        ["python", "-m", "dama", "reference"],
    ]
    training = commands[3]
    assert training[:4] == ["deepspeed", "--num_gpus", gpus, "llava/train/train_mem.py"]
    # The flags must parse; paths and hardware are put in their place first.
    replaced = {"--data_path": str(GOLDEN / "dama" / "rlaifv_records.json"), "--image_folder": str(GOLDEN / "images"),
                "--deepspeed": None, "--bf16": None, "--hardness": None, "--reference": None}  # fmt: skip
    words = training[4:]
    flags = []
    for flag, value in zip(words[::2], words[1::2]):
        if replaced.get(flag, value) is not None:
            flags += [flag, replaced.get(flag, value)]
    monkeypatch.chdir(tmp_path)
    _, data, args = parse_arguments([*flags, "--use_cpu", "True"])
    config = args.weighting()
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * int(gpus)
    assert (pairs, config.count_kept(16), config.beta, config.gamma) == (16, 12, 0.1, 0.9)
    assert (args.num_train_epochs, args.lr_scheduler_type, args.warmup_steps) == (4, "cosine", 0.1)
    assert args.learning_rate == (1e-5 if "lora" in script else 5e-7) and args.lora_enable == ("lora" in script)
    assert (data.on_bad_image, args.logging_steps) == ("skip", 1)  # further flags go to train_mem.py
    assert "--bf16" in words and words[words.index("--deepspeed") + 1] == "scripts/zero2.json"


def preflight(**changes):
    given = {"model": "no/such-model", "data": "no.json", "images": "nowhere", "output": "runs/x", "gpus": 3,
             "billions": 1e6, "method": "full", "zero": 2, "clip": "ViT-L-14-336-quickgelu:openai",
             "pairs_per_step": 16}  # fmt: skip
    return find_missing(argparse.Namespace(**(given | changes)))


def test_everything_missing_is_said_at_once():
    said = "\n".join(preflight())
    for part in (
        "DATA: no file 'no.json'",
        "IMAGES: no folder 'nowhere'",
        "MODEL: 'no/such-model'",
        "CLIP: the weights ViT-L-14-336",
        "GPU",
        "memory: ",
        "disk: ",
    ):
        assert part in said


def test_gpu_counts_that_do_not_divide_the_step(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: argparse.Namespace(total_memory=80 << 30))
    said = preflight(gpus=3, billions=1.0)
    assert any(
        "16 pairs a step cannot be spread evenly over 3; set GPUS to one of 1, 2, 4, 8, 16" in line for line in said
    )
    assert not any("GPU" in line for line in preflight(gpus=4, billions=6.7))
    assert any("GPU memory: 80 GiB on each, about 106 GiB needed" in line for line in preflight(gpus=1, billions=6.7))


def test_memory_on_paper():
    """1e9 parameters on 2 GPUs: 2 GB weights + 14 GB / 2 of gradients and optimiser = 9e9 B; ZeRO-3 halves all: 8e9."""
    assert gpu_memory_needed(1.0, 2, "full") == pytest.approx(9e9 / 2**30 + 6)
    assert gpu_memory_needed(1.0, 2, "full", zero=3) == pytest.approx(8e9 / 2**30 + 6)


def test_micro_batches_that_do_not_divide_the_step():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "dama_7b.sh"), "--dry-run"],
        env=os.environ | {"GPUS": "4", "MICRO_BATCH": "3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "no multiple of 4 GPU(s) x 3; set it to a divisor of 4" in done.stderr
