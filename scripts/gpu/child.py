"""A block's process. The parent imports this file, and torch is imported in the child only."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path


def run_in_child(name: str, results: Path, log: Path) -> None:
    """Output goes to the log; the exit status is 0 only where all cases of the block succeeded."""
    os.setsid()  # whatever it starts is killed with it
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        sys.exit(importlib.import_module("scripts.gpu.block").run(name, results))
    except Exception:
        traceback.print_exc()  # the log's last line is the reason
        sys.exit(1)
