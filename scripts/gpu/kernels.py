"""The packed attention on the GPU against padded rows: the tests of its kernels, run by pytest in this process."""

from __future__ import annotations

from typing import Any

import pytest

from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report

FILES = ("tests/cuda/kernel_checks.py", "tests/dama/test_shared_prefix.py")
# The first is about real kernels' rounding, and takes long where numbers are computed on the CPU.
CHOSEN = "test_widths" if is_rehearsed() else "bf16_on_a_gpu or test_widths"


class Outcomes:
    """Outcome and message of every test, as a plugin of pytest."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Store each test's outcome; a failed set-up counts as the test's."""
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            self.found[name] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.found[name]["error"] = str(crash.message if crash else report.longrepr)[:500]


def measure(report: Report) -> None:
    """Run the kernel tests in this process; each test is a case."""
    outcomes = Outcomes()
    words = ["-q", "-s", "--tb=short", "-p", "no:cacheprovider", *FILES, "-k", CHOSEN]
    status = pytest.main(words, plugins=[outcomes])
    report.cases |= outcomes.found
    passed = sum(found["outcome"] == "passed" for found in outcomes.found.values())
    report.failed = len(outcomes.found) - passed + (not outcomes.found)
    report.line = f"{passed} of {len(outcomes.found)} kernel tests pass" + f" (pytest: {status})" * bool(status)
