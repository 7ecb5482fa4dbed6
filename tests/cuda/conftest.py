"""Children on the null device: one for a test module, which then judges what the child wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llava.rehearsal.build import unavailable

ROOT = Path(__file__).resolve().parents[2]


def skip_unless_possible() -> None:
    """Skips the test where no rehearsal is possible, with the reason."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)


def run_child(*words: str, gib: float = 8, devices: int = 1, settings: dict[str, str] | None = None) -> str:
    """Output of `python -m llava.rehearsal ...`; the test fails with its end where the child fails.

    Args:
        settings: variables of the environment that the child has besides this process's.
    """
    skip_unless_possible()
    start = [sys.executable, "-m", "llava.rehearsal", "--gib", str(gib), "--devices", str(devices)]
    done = subprocess.run(
        [*start, *words], cwd=ROOT, env=os.environ | (settings or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)} exits with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def results_of(
    module: str, folder: Path, *words: str, gib: float = 8, devices: int = 1, settings: dict[str, str] | None = None
) -> Any:
    """What a module of this folder wrote as JSON: its command line is an output file, and `words`."""
    out = folder / "results.json"
    run_child("-m", f"tests.cuda.{module}", str(out), *words, gib=gib, devices=devices, settings=settings)
    return json.loads(out.read_text())


def outcomes_of(folder: Path, *words: str, gib: float = 8, devices: int = 1) -> dict[str, str]:
    """Outcome of every test that pytest ran in a child: "passed", or how it failed and why, by name."""
    skip_unless_possible()
    file = folder / "outcomes.xml"
    start = [sys.executable, "-m", "llava.rehearsal", "--gib", str(gib), "--devices", str(devices)]
    # Short tracebacks: long ones print tensors after a test, when no mode computes what printing needs.
    pytest_words = ["-m", "pytest", "-q", "--tb=short", f"--junitxml={file}", *words]
    done = subprocess.run([*start, *pytest_words], cwd=ROOT, capture_output=True, text=True)
    assert file.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    cases = ElementTree.parse(file).getroot().iter("testcase")
    return {case.attrib["name"]: outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    told = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    return "passed" if told is None else f"{told.tag}: {told.attrib.get('message', '')}"
