"""kill -9 while HallusionBench, MMStar and CHAIR are answered and judged: resumed, the results are the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.core.judge import VERDICTS
from eval.evaluate import main
from playground.tinycoco.benchmarks import write_benchmarks
from playground.tinycoco.hallusionbench import judge_prompt
from tests import warm
from tests.openai_server import Scripted, ScriptedServer, completion

pytestmark = pytest.mark.kill
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "playground/tinycoco/weights/llava")
SETTINGS = ["--conv-mode", "v1", "--max-new-tokens", "4", "--device", "cpu", "--batch-size", "1"]
SCENES = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_benchmarks(folder, SCENES, "test")
    return folder


@pytest.fixture()
def command(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command's arguments; its output folder is `out`."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(world))
    return lambda benchmark, *flags: [benchmark, CHECKPOINT, "--out", str(tmp_path / "out"), *SETTINGS, *flags]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "eval.evaluate", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def kill_when(done: Callable[[], bool], arguments: list[str]) -> None:
    """Start the command as a process of its own, and kill it at the moment that `done` names."""
    process = start(arguments)
    while process.poll() is None and not done():
        time.sleep(0.002)
    warm.kill(process)


def answered(run: Path) -> int:
    """Count the answers of all parts."""
    return sum(path.read_bytes().count(b"\n") for path in run.glob("answers*/answers.jsonl"))


def written(run: Path, *names: str) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for name in names for path in sorted(run.glob(name))}


@pytest.mark.parametrize(
    "benchmark, flags, moments, total",
    [("chair", [], (1, 3), 4), ("mmstar", ["--blind"], (2, 6), 8), ("hallusionbench", [], (1, 20), 40)],
)
def test_killed_while_answering(
    command: Callable[..., list[str]],
    tmp_path: Path,
    benchmark: str,
    flags: list[str],
    moments: tuple[int, ...],
    total: int,
) -> None:
    """Killed twice, MMStar in each of its parts: answers and results are the undisturbed run's to the byte."""
    run, arguments = tmp_path / f"out/llava/{benchmark}", command(benchmark, *flags)
    files = "answers*/answers.jsonl", "results.json", "*/results.json"
    assert main(arguments) == 0
    whole = written(run, *files)
    assert answered(run) >= total and any(name.endswith("results.json") for name in whole)
    shutil.rmtree(run)
    for moment in moments:
        kill_when(lambda: answered(run) >= moment, arguments)  # noqa: B023
        assert moment <= answered(run) < total and not written(run, "results.json", "*/results.json")
    assert main(arguments) == 0
    assert written(run, *files) == whole


def test_killed_while_judged(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """Killed twice among the verdicts: results are equal to the byte, and no verdict that was stored is asked again."""

    def slow(call: object) -> Scripted:
        return completion(judge_prompt(call.text) or "", delay=0.05)  # type: ignore[attr-defined]

    run, judged = tmp_path / "out/llava/hallusionbench", "llm/results.json"
    flags = "--mode", "llm", "--judge-model", "rules", "--judge-concurrency", "2", "--judge-base-url"
    server = ScriptedServer(slow)
    with server as url:
        assert main(command("hallusionbench", *flags, url)) == 0
    whole, asked = written(run, judged, f"llm/{VERDICTS}"), len(server.calls)
    shutil.rmtree(run / "llm")
    server = ScriptedServer(slow)
    with server as url:
        for calls in (6, 20):
            kill_when(lambda: len(server.calls) >= calls, command("hallusionbench", *flags, url))  # noqa: B023
            assert not written(run, judged, f"llm/{VERDICTS}") and len(server.calls) < asked
        assert main(command("hallusionbench", *flags, url)) == 0
    assert written(run, judged, f"llm/{VERDICTS}") == whole
    assert asked <= len(server.calls) <= asked + 2 * 2  # a kill costs the two that are under way
