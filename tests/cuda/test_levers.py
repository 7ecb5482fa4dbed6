"""What trainings do on CUDA only, by tests/cuda/levers.py in a child; DeepSpeed's launcher on the GPUs it is given."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from llava.estimate.machine import gpu_problem
from llava.rehearsal.launch import environment
from tests.cuda.conftest import outcomes_of, skip_unless_possible

ROOT = Path(__file__).resolve().parents[2]
TESTS = 10


@pytest.fixture(scope="module")
def levers(tmp_path_factory):
    words = ("-p", "tests.cuda.everything", "tests/cuda/levers.py")
    return outcomes_of(tmp_path_factory.mktemp("levers"), *words, devices=2)


@pytest.mark.gpu
def test_levers(levers):
    assert levers == dict.fromkeys(levers, "passed")
    assert len(levers) == TESTS


@pytest.fixture()
def machine(tmp_path):
    """A machine of four GPUs, as nvidia-smi lists them."""
    rows = "".join(f"{i}, GPU-{letter * 4}-{i}\\n" for i, letter in enumerate("abcd"))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("visible", "found", "launched"),
    [(None, ["0", "1", "2", "3"], "--include localhost:0,1"), ("2,3", ["2", "3"], "--include localhost:2,3"),
     ("GPU-dddd,GPU-aaaa-0", ["3", "0"], "--include localhost:3,0"), (" 1 , 2 ", ["1", "2"], "--include localhost:1,2"),
     ("3,-1,2", ["3"], "--num_gpus 2"), ("", [], "--num_gpus 2")],
)  # fmt: skip
def test_visible_gpus(machine, visible, found, launched):
    machine.pop("CUDA_VISIBLE_DEVICES", None)
    machine |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    asked = 'source scripts/gpus.sh; visible_gpus; echo "$(launch_on 2)"'
    done = subprocess.run(["bash", "-c", asked], env=machine, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*found, launched]


def test_parts_of_gpus_are_refused(machine):
    machine["CUDA_VISIBLE_DEVICES"] = "MIG-1234"
    done = subprocess.run(["bash", "-c", "source scripts/gpus.sh; visible_gpus"], env=machine, cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode and "expected indices or UUIDs of whole GPUs, got 'MIG-1234'" in done.stderr


@pytest.mark.gpu
def test_deepspeed_starts_ranks_on_the_visible_gpus(machine, tmp_path):
    """The launcher itself, on eight null devices: its ranks see GPUs 2 and 3, not 0 and 1."""
    skip_unless_possible()
    script = tmp_path / "rank.py"
    # In one write each, or the ranks' lines mix.
    line = "'RANK ' + os.environ['LOCAL_RANK'] + ' ' + os.environ['CUDA_VISIBLE_DEVICES'] + '\\n'"
    script.write_text(f"import os; os.write(1, ({line}).encode())")
    machine |= environment(devices=8) | {"CUDA_VISIBLE_DEVICES": "2,3", "PATH": machine["PATH"]}
    asked = subprocess.run(["bash", "-c", 'source scripts/gpus.sh; launch_on "$(visible_gpus | wc -l)"'], env=machine,
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout  # fmt: skip
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--master_port", "29871"]
    done = subprocess.run([*deepspeed, *shlex.split(asked), str(script)], env=machine, capture_output=True, text=True,
                          cwd=tmp_path, check=True)  # fmt: skip
    ranks = sorted(line for line in done.stdout.splitlines() if line.startswith("RANK"))
    assert ranks == ["RANK 0 2,3", "RANK 1 2,3"]


def test_setup_takes_torch_of_an_older_cuda(tmp_path):
    """setup.sh installs torch first, from the index; then with a constraint that its local version meets.

    A later call without the variable leaves it as it is.
    """
    for name in ("setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
    python.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    for more in ({"TORCH_INDEX_URL": "https://index.test/cu126"}, {}):
        subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, env=variables | more, check=True)
    first, *others = (tmp_path / "commands").read_text().splitlines()
    assert first.endswith("--constraint .venv/constraints.txt --index-url https://index.test/cu126 torch torchvision")
    assert len(others) == 2 and not any("index-url" in command for command in others)
    wanted = {line.partition("=")[0]: line for line in (tmp_path / ".venv/constraints.txt").read_text().splitlines()}
    release = wanted["torch"].rpartition("=")[2]
    assert Requirement(wanted["torch"]).specifier.contains(f"{release}+cu126")
    assert not Requirement(wanted["torch"].replace("==", "===")).specifier.contains(f"{release}+cu126")


@pytest.mark.parametrize(
    ("driver", "visible", "said"),
    [("535.183.01", None, "the NVIDIA driver is 535.183.01, torch 2.13.0 for CUDA 13.0 needs 580 or newer; update the "
      "driver, or set TORCH_INDEX_URL"),
     ("580.65.06", "7", "none visible with CUDA_VISIBLE_DEVICES='7'; nvidia-smi finds driver 580.65.06"),
     ("580.65.06", None, "finds none, nvidia-smi finds driver 580.65.06"),
     ("No devices were found", None, "none found; for a run without one see scripts/dama_tiny.sh")],
)  # fmt: skip
def test_why_there_is_no_gpu(tmp_path, monkeypatch, driver, visible, said):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{driver}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert said in gpu_problem()
