"""Worker processes: what is killed, what fails, and what is left when the command ends."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from playground.tinycoco.study.workers import SPAWN, each_outcome

ROOT = Path(__file__).resolve().parents[2]
SLEEPERS = """\
import gc, time
from playground.tinycoco.study.workers import SPAWN, each_outcome

if __name__ == "__main__":
    for _, outcome in each_outcome(time.sleep, [0, 0, 600, 600, 0], 2, gc.collect):
        print(*(worker.pid for worker in SPAWN.active_children()), flush=True)
"""


def die_at_two(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


@pytest.mark.parametrize("count", [1, 3])
def test_a_killed_worker_costs_its_own_task(count: int) -> None:
    """As where memory runs out; every other task is done once."""
    found = dict(each_outcome(die_at_two, range(7), count, gc.collect))
    killed = found.pop(2)
    assert killed.result is None and killed.error == "its process ended with exit code -9 (out of memory?)"
    assert {task: outcome.result for task, outcome in found.items()} == {n: n * 10 for n in (0, 1, 3, 4, 5, 6)}
    assert not any(outcome.error for outcome in found.values()) and not SPAWN.active_children()


def test_an_error_is_its_tasks_outcome() -> None:
    found = dict(each_outcome(math.sqrt, [4.0, -1.0, 9.0], 1, gc.collect))
    assert (found[4.0].result, found[9.0].result) == (2.0, 3.0)
    assert found[-1.0].result is None and found[-1.0].error.startswith("ValueError: ")


def test_processes_end_with_the_iteration() -> None:
    outcomes = each_outcome(time.sleep, [0, 600, 600], 2, gc.collect)
    began = time.monotonic()
    next(outcomes)
    assert SPAWN.active_children()
    outcomes.close()
    assert not SPAWN.active_children() and time.monotonic() - began < 60


def running(pid: str) -> bool:
    """Whether a process is there, and not only its entry that nobody has collected."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_command(tmp_path: Path, ending: signal.Signals) -> None:
    """However it ends, those that are in the middle of a task, too."""
    (script := tmp_path / "sleepers.py").write_text(SLEEPERS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    sleepers = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert sleepers.stdout
        first, both = (sleepers.stdout.readline().split() for _ in range(2))
        assert len(both) == 2 and set(first) <= set(both) and all(map(running, both))
        sleepers.send_signal(ending)
        sleepers.wait(60)
    finally:
        sleepers.kill()
    until = time.monotonic() + 60
    while any(map(running, both)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(running, both))
