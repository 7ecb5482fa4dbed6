"""One block in a process of its own, its results written to a file as they come."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dama.console import log, write_json
from llava.rehearsal.launch import allow_forks, is_rehearsed
from llava.rehearsal.mode import NullMode


class Report:
    """Results of a block: a line, cases by name, and what was left out; in the file after every case.

    Attributes:
        line: what is printed about the block.
        failed: number of cases that ended with an error.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.line = ""
        self.failed = 0
        self.cases: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """One measurement, which fills the dictionary that it is given. An error is recorded, and the block goes on."""
        found: dict[str, Any] = {}
        try:
            yield found
        except torch.OutOfMemoryError as error:
            found["out_of_memory"] = first_line(error)
        except Exception as error:  # whatever it is, the other cases are worth their GPU time
            traceback.print_exc()
            self.failed += 1
            found["error"] = f"{type(error).__name__}: {first_line(error)}"
        self.cases[name] = found
        log(f"{name}: {found}")
        torch.cuda.empty_cache()
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        """Record that a case was not run, and why."""
        self.left_out[name] = why
        self.write()

    def write(self) -> None:
        """Write all results so far, so that a killed block loses none."""
        write_json(self.out, {"line": self.line, "failed": self.failed, "cases": self.cases, "left_out": self.left_out})


def first_line(error: BaseException) -> str:
    """First line of an error's message, at most 300 characters."""
    return (str(error).splitlines() or [""])[0][:300]


def run(name: str, results: Path) -> int:
    """Exit status of a block: 1 where a case failed."""
    report = Report(results)
    if is_rehearsed():
        allow_forks()
    block = importlib.import_module(f"scripts.gpu.{name}")
    with NullMode(everything=True) if is_rehearsed() else nullcontext():
        block.measure(report)
    report.write()
    return 1 if report.failed else 0
