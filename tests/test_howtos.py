"""Each page of docs/howto that adds something: its code in a copy of the packages, its commands, and what they make."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.howto import Example, blocks, examples

HOWTO = ROOT / "docs/howto"
PACKAGES = ("dama", "llava", "eval", "playground")
# The commands of a page in one process, which imports torch once: `export`, `rm`, `python FILE` and `python -m MODULE`.
RUN = r"""
import os, runpy, shlex, sys
for line in sys.stdin.read().replace("\\\n", " ").splitlines():
    program, *words = shlex.split(line)
    print("+", line, flush=True)
    if program == "export":
        name, _, os.environ[name] = words[0].partition("=")
    elif program == "rm":
        os.remove(words[0])
    else:
        assert program == "python", line
        is_module = words[0] == "-m"
        sys.argv = words[is_module:]
        try:
            (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise
"""


@pytest.fixture
def follow(tmp_path):
    """A function that follows a page in a copy of the packages, and returns the copy and what was printed."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(page):
        for example in examples(HOWTO / page):
            example.apply(tmp_path)
        changed = sorted({example.file for example in examples(HOWTO / page)})
        for check in (["check", "--quiet"], ["format", "--check", "--quiet"]):
            line = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), *changed]
            done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        done = subprocess.run(
            [sys.executable, "-c", RUN], input="".join(blocks(HOWTO / page, "bash")), cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return tmp_path / "runs/howto", done.stdout

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_objective_and_its_corruption(follow):
    runs, printed = follow("add_objective.md")
    log = json.loads((runs / "image_only/trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 8 and losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-3:]) / 3 < losses[0] - 0.01
    assert all("rewards/chosen_corrupted" in row for row in log if "loss" in row)
    flags = json.loads((runs / "image_only/dama_provenance.json").read_text())["flags"]
    assert "loss image_only" in printed and (flags["loss"], flags["corruption"]) == ("image_only", "inverted")
    manifest = json.loads((runs / "reference/manifest.json").read_text())
    assert manifest["fingerprint"]["corruption"] == "inverted, seed 0"


def test_the_benchmark(follow):
    runs, printed = follow("add_benchmark.md")
    results = json.loads((runs / "eval/llava/toy/results.json").read_text())
    counts = results["provenance"]["counts"]
    assert (counts["answers"], counts["missing"], counts["incomplete images"]) == (6, 0, 0)
    assert results["metrics"]["silent"] == pytest.approx(100 * counts["unparsed"] / 6)
    assert "toy score" in printed and (runs / "eval/llava/toy/page.html").is_file()


def test_the_model_family(follow):
    runs, _ = follow("add_model_family.md")
    assert len(rows_of(runs / "reference/reference.jsonl")) == 16
    answers = rows_of(runs / "answers/answers.jsonl")
    assert len(answers) == 8 and all(len(row["text"].split()) > 5 for row in answers)


def test_a_line_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 2\n")
    for line, count in (("y", 0), ("x", 2)):
        with pytest.raises(ValueError, match=f"a.py: expected one line that begins with '{line}', got {count}"):
            Example("a.py", "below", line, "z = 3\n").apply(tmp_path)
