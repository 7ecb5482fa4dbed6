"""The wheel in an environment of its own, far from the checkout: every stage, an evaluation, and nothing missing."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

from dama import __version__
from playground.tinycoco.run import prepare
from tests.conftest import ROOT
from tests.eval import tiny_bench

PACKAGES = ("dama", "llava", "eval")
DEVICE = ("--conv-mode", "v1", "--max-new-tokens", "12", "--device", "cpu")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, the libraries of this one, and a folder to work in."""

    prefix: Path
    folder: Path

    def __call__(self, *words, status=0, **environment):
        """The standard output of a command of the environment; its standard error too where it is to fail."""
        usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        usual |= {"PATH": f"{self.prefix}/bin:{usual['PATH']}", "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [str(self.prefix / "bin" / words[0]), *words[1:]], cwd=self.folder, env=usual, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr[-4000:]
        return done.stdout + done.stderr * bool(status)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network from a copy, since setuptools leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def pip(python, command, *words):
    quiet = ["--quiet", "--disable-pip-version-check"]
    common = ["--no-deps", "--no-index", *map(str, words)]
    subprocess.run([sys.executable, "-m", "pip", *quiet, "--python", str(python), command, *common], check=True)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel comes before the libraries on the path, where a link to this checkout has no effect."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    pip(python, "install", wheel)
    packages = next((folder / "env/lib").glob("python*/site-packages"))
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "work"
    shutil.copytree(ROOT / "playground/tinycoco/weights", work / "weights")
    prepare(work / "data", pairs=6, scenes=0, split="test")
    tiny_bench.objhal(work / "bench", count=2)
    tiny_bench.record(work / "bench")
    return Installed(folder / "env", work)


@pytest.fixture(scope="module")
def trained(installed):
    """One step of DAMA, after the stages that it needs."""
    data = ("--data", "data/pairs.json", "--image_folder", "data/images")
    stages = (
        ("hardness", *data, "--clip", "weights/clip", "--workers", "0", "--out", "hardness"),
        ("reference", *data, "--model", "weights/llava", "--model_max_length", "512", "--out", "reference"),
    )
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda stage: installed("dama", *stage), stages))
    installed(
        "dama", "train", *data, "--model", "weights/llava", "--hardness", "hardness", "--reference", "reference",
        "--version", "v1", "--image_aspect_ratio", "pad", "--model_max_length", "512", "--use_cpu", "True",
        "--per_device_train_batch_size", "4", "--max_steps", "1", "--learning_rate", "1e-5", "--report_to", "none",
        "--out", "trained",
    )  # fmt: skip
    return installed.folder / "trained"


def test_every_file_of_the_packages_is_in_it_and_no_other(wheel):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(metadata))
    expected = {path.relative_to(ROOT).as_posix() for top in PACKAGES for path in (ROOT / top).rglob("*.*")
                if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert names == expected and {f"{name}/py.typed" for name in PACKAGES} < names
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("dama-mllm", __version__, "Apache-2.0")


def test_it_is_the_wheel_that_runs(installed):
    program = "import sys, dama, llava, eval; print(*(m.__file__ for m in (dama, llava, eval)), 'torch' in sys.modules)"
    *files, torch = installed("python", "-c", program).split()
    assert len(files) == 3 and all(Path(file).is_relative_to(installed.prefix) for file in files) and torch == "False"
    assert installed("dama", "--version") == f"dama {__version__}\n"
    assert "hardness" in installed("dama", "--help")


def test_an_error_of_the_user_is_one_line(installed):
    """In a wheel too, whose files lie among the libraries'."""
    said = installed("dama", "hardness", "--data", "no.json", "--image_folder", "data", "--out", "x", status=2)
    assert "dama hardness: error: " in said and "no.json" in said and "Traceback" not in said


def test_a_model_is_trained_and_evaluated(installed, trained):
    provenance = json.loads((trained / "dama_provenance.json").read_text())
    assert provenance["revision"] == f"version {__version__}"
    bench = {"DAMA_BENCH_DATA": str(installed.folder / "bench")}
    evaluate = ("python", "-m", "eval.evaluate", "objhal", "trained", "--compare", "weights/llava", *DEVICE)
    table = installed(*evaluate, "--out", "eval", **bench)
    assert "response-level" in table
    first, second = (f"eval/{name}/objhal/results.json" for name in ("llava", "trained"))
    assert "response-level" in installed("python", "-m", "eval.compare", first, second, **bench)
    page = (installed.folder / "eval/trained/objhal/page.html").read_text()
    assert "<style>" in page and "<script" in page


def test_the_files_of_benchmarks_are_listed(installed):
    assert "objhal/obj_halbench_300_questions.jsonl" in installed("python", "-m", "eval.download", "--list")
