"""The shell scripts: strict mode, dry runs with the paper's settings, one message for all that is missing."""

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from llava.estimate import doctor, machine
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = ("checks.sh", "gpus.sh")  # which other scripts source, and which do nothing by themselves
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
    assert commands[0] == ["python", "-m", "dama", "doctor", "--config-of", f"scripts/{script}", "--logging_steps", "1"]
    assert [command[:4] for command in commands[1:3]] == [
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


GIB = 1 << 30


def page(capsys, monkeypatch, script, *flags, gpus=0, memory=80 * GIB, **environment):
    """The doctor's page on a machine of so many GPUs."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(machine, "gpus", lambda: [("GPU", memory)] * gpus)
    status = doctor.main(["--config-of", str(ROOT / "scripts" / script), *flags])
    return status, capsys.readouterr().out


def test_everything_missing_is_said_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "host_memory", lambda: GIB)
    usage = shutil.disk_usage(tmp_path)._replace(free=GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    places = {"DATA": "no.json", "IMAGES": "nowhere", "OUTPUT": tmp_path / "x"}
    status, said = page(capsys, monkeypatch, "dama_7b.sh", "--gamma", "2", GPUS="3", MODEL="no/llava-7b", **places)
    assert status == 1 and "9 thing(s) missing for this training" in said
    for part in (
        "GPUS: 16 pairs a step cannot be spread evenly over 3; set GPUS to 1, 2, 4, 8 or 16",
        "GPU: none found",
        "data: no file 'no.json'",
        "images: no folder 'nowhere'",
        "model: 'no/llava-7b'",
        "CLIP: the weights ViT-L-14-336-quickgelu:openai",
        "gamma",
        "memory: 1.0 GiB on this host",
        "disk: 1.0 GiB free",
    ):
        assert part in said, part
    assert "memory      not estimated: gamma: expected" in said
    assert "--hardness" not in said and "--reference" not in said  # which the script's own stages will write


def memory_line(said):
    return next(line for line in said.splitlines() if line.startswith("memory"))


def test_memory_of_the_7b_recipe(capsys, monkeypatch, tmp_path):
    """On paper, in 10^9 bytes: 7.06 parameters x 2, 6.76 trained x 12 / GPUs.

    While fused AdamW steps, also x (2 + 4 + 2) / GPUs: gradients, an fp32 copy of them, and the flat copy that it is
    made of. On 4 GPUs 14.1 + 20.3 + 13.5 = 47.9, 44.6 GiB; on 2 GPUs 14.1 + 40.6 + 27.0 = 81.7, 76.1 GiB, and with
    fragments more than 80 GB.
    """
    where = {"OUTPUT": tmp_path / "x"}
    said = page(capsys, monkeypatch, "dama_7b.sh", gpus=4, **where, GPUS="4")[1]
    assert "about 44.6 GiB on each GPU, 51.9 GiB reserved, most in the phase of the optimizer" in memory_line(said)
    assert "GPU memory" not in said and "of 80.0 GiB: micro-batches of up to 4 fit" in memory_line(said)
    said = page(capsys, monkeypatch, "dama_7b.sh", gpus=2, **where, GPUS="2")[1]
    assert (
        "GPU memory: 80.0 GiB on each, about 87.5 GiB needed on 2 GPU(s) (76.1 GiB of tensors); use "
        "ZERO=scripts/zero3.json; or 4 GPUs; or LoRA (scripts/dama_7b_lora.sh, or --lora_enable True)"
    ) in said
    said = page(capsys, monkeypatch, "dama_7b.sh", "--check_memory", "False", gpus=2, **where, GPUS="2")[1]
    assert "GPU memory" not in said
    said = page(capsys, monkeypatch, "dama_7b_lora.sh", gpus=1, **where, GPUS="1")[1]
    assert "GPU memory" not in said and "rank 128" not in said
    said = page(capsys, monkeypatch, "dama_7b.sh", gpus=2, **where, GPUS="4")[1]
    assert "GPU: 4 asked for, 2 found" in said


def test_what_would_fit_is_named(capsys, monkeypatch, tmp_path):
    """LoRA with 16 long pairs at a time on a card of 40 GB: fewer pairs, or shorter ones."""
    words = ["--auto_micro_batch", "False", "--auto_checkpointing", "False"]
    said = page(capsys, monkeypatch, "dama_7b_lora.sh", *words, gpus=1, memory=40 * GIB, OUTPUT=tmp_path / "x")[1]
    refusal = next(line for line in said.splitlines() if "GPU memory: 40.0 GiB on each" in line)
    assert "--per_device_train_batch_size 8" in refusal and "LoRA" not in refusal


@pytest.mark.parametrize("script", ["pretrain.sh", "finetune.sh", "finetune_lora.sh"])
def test_fine_tuning_has_a_page_too(capsys, monkeypatch, script, tmp_path):
    status, said = page(capsys, monkeypatch, f"v1_5/{script}", gpus=8, GPUS="8", OUTPUT=tmp_path / "x")
    assert status == 1 and "13,350.8 million parameters" in said and "rows = " in said


def test_micro_batches_that_do_not_divide_the_step():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "dama_7b.sh"), "--dry-run"],
        env=os.environ | {"GPUS": "4", "MICRO_BATCH": "3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (
        done.returncode == 1
        and "4 pairs a step on each of 4 GPU(s) are no multiple of 3; set it to 1, 2, 4" in done.stderr
    )


@pytest.mark.parametrize("words", [["--help"], ["x", "--help"]], ids=" ".join)
@pytest.mark.parametrize("script", [path for path in SCRIPTS[:-1] if path.name not in FUNCTIONS], ids=lambda p: p.name)
def test_help_is_the_head_of_the_script_and_starts_nothing(script, words, tmp_path):
    """In a copy without .venv, and without a PATH that could make one."""
    scripts = tmp_path / "copy/scripts"
    shutil.copytree(ROOT / "scripts", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    head = script.read_text().split("\nset -euo")[0].splitlines()[1:]
    tools = tmp_path.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "sed", "dirname"):
        (tools / name).exists() or (tools / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        ["bash", str(scripts / script.relative_to(ROOT / "scripts")), *words], capture_output=True, text=True,
        cwd=tmp_path, env={"PATH": str(tools)}, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
    assert not done.stderr and sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------------- set-up


def set_up(folder, **environment):
    """scripts/setup.sh in a copy of what it reads, where pip can install nothing."""
    for name in ("scripts/setup.sh", "scripts/help.sh", "setup.py", "pyproject.toml", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    usual = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        ["bash", str(folder / "scripts/setup.sh")], capture_output=True, text=True, check=False,
        env=usual | {"PIP_NO_INDEX": "1"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_with_these_versions_is_used(tmp_path, name):
    done = set_up(tmp_path, **{name: sys.prefix})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"setup: using the active environment {sys.prefix}" in done.stdout
    assert os.readlink(tmp_path / ".venv") == sys.prefix
    assert set_up(tmp_path).stdout == ""  # and remains the one that is used
    with open(tmp_path / "constraints.txt", "a") as file:
        file.write("no-such-package==1.0\n")
    again = subprocess.run(["bash", str(tmp_path / "scripts/setup.sh")], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "differs from constraints.txt (1, the first is no-such-package none instead of 1.0)" in again.stderr


def test_another_active_environment_is_left_alone(tmp_path):
    venv.create(tmp_path / "other", with_pip=False)
    done = set_up(tmp_path / "copy", VIRTUAL_ENV=str(tmp_path / "other"), CXX="no-such-compiler")
    assert "other differs from constraints.txt (" in done.stdout and "making .venv" in done.stdout
    assert done.returncode == 1 and "a C++ compiler" in done.stderr
    assert not (tmp_path / "copy/.venv").exists()
