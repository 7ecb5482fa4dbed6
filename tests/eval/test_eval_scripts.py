"""The eval_*.sh scripts run the command that their name says, with whatever flags they are given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval import benchmarks
from tests.eval import tiny_bench
from tests.models.saved import save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def checkout(tmp_path):
    """This repository as a checkout that is set up already: the environment in use for its .venv."""
    (tmp_path / "scripts").mkdir()
    for script in (*(ROOT / "scripts").glob("eval_*.sh"), ROOT / "scripts/help.sh"):
        (tmp_path / "scripts" / script.name).write_text(script.read_text())
    (tmp_path / "scripts/setup.sh").write_text("exit 0\n")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for folder in ("eval", "llava", "dama"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def run(checkout, script, *flags, **environment):
    line = ["bash", str(checkout / "scripts" / script), *flags]
    return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=False, cwd="/")


def test_there_is_one_for_each_benchmark():
    names = {path.name for path in (ROOT / "scripts").glob("eval_*.sh")}
    assert names == {f"eval_{name}.sh" for name in (*benchmarks.names(), "all")}


@pytest.mark.parametrize("name", [*benchmarks.names(), "all"])
def test_each_names_its_benchmark_and_what_to_expect(name):
    text = (ROOT / f"scripts/eval_{name}.sh").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert f'-m eval.evaluate {name} "$@"' in text and any("Hardware" in line for line in header)
    assert any("Expected" in line for line in header) and max(map(len, header)) <= 120


def test_pope_on_the_miniature_world(checkout):
    tiny_bench.pope(checkout / "data")
    tiny_bench.record(checkout / "data")
    flags = ["--conv-mode", "v1", "--device", "cpu", "--max-new-tokens", "4"]
    model = str(ROOT / "playground/tinycoco/weights/llava")
    done = run(checkout, "eval_pope.sh", model, *flags, DAMA_BENCH_DATA=str(checkout / "data"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (checkout / "runs/eval/llava/pope/results.json").exists() and "pope-llava" in done.stdout


def test_pope_of_another_model_on_the_miniature_world(checkout):
    save("internvl", checkout / "internvl")
    tiny_bench.pope(checkout / "data")
    tiny_bench.record(checkout / "data")
    flags = ["--device", "cpu", "--max-new-tokens", "4"]
    data = str(checkout / "data")
    done = run(checkout, "eval_pope.sh", str(checkout / "internvl"), *flags, DAMA_BENCH_DATA=data, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (checkout / "runs/eval/internvl/pope/results.json").exists() and "pope-llava" in done.stdout
