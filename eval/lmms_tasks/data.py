"""Write the questions of the lmms-eval tasks: `python -m eval.lmms_tasks.data`.

Each task's questions become a data set on disk, runs/lmms_data/TASK, where the task files look for them when lmms-eval
runs in the root of the repository. Images stay in the data folder (DAMA_BENCH_DATA, else playground/data/eval).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dama.console import log, report_error
from eval import benchmarks
from eval.download import fetch
from eval.task import Task
from llava.generation.request import Request

OUT = Path("runs/lmms_data")
# Task -> benchmark, and the folder of the part of its answers.
TASKS = {
    "dama_objhal": ("objhal", "answers"),
    "dama_amber_g": ("amber", "generative"),
    "dama_amber_d": ("amber", "discriminative"),
    "dama_mmhal": ("mmhal", "answers"),
}


def requests_of(task: str) -> list[Request]:
    """Return a task's questions, files and images fetched; raises DownloadError where these are not to be had."""
    name, part = TASKS[task]
    benchmark = benchmarks.named(name)
    folder = fetch([name], offline=bool(os.environ.get("DAMA_BENCH_DATA")), judge=benchmark.modes[0].judged)
    whole = Task(benchmark, benchmark.modes[0], None)
    return whole.parts(whole.load(folder))[part][0]


def write(task: str, out: Path) -> Path:
    """Write a task's data set with the split "test"; an older one is replaced."""
    import datasets

    rows = [{"id": r.id, "image": r.image, "question": r.prompt} for r in requests_of(task)]
    target = out / task
    shutil.rmtree(target, ignore_errors=True)
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(target))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.lmms_tasks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="output folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := [task for task in args.tasks if task not in TASKS]:
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(TASKS)}")
    try:
        for task in args.tasks or TASKS:
            log(f"{task}: {write(task, args.out)}")
    except Exception as error:
        report_error(error, "lmms_tasks.data")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
