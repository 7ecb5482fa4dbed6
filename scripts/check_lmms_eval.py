"""Recorded answers for lmms-eval, and the comparison of its scores with this repository's (check_lmms_eval.sh).

python scripts/check_lmms_eval.py record FOLDER
python scripts/check_lmms_eval.py compare RESULTS ... --judge FOLDER
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dama.console import log, write_json
from eval import benchmarks
from eval.answer_files import answers_of, read_rows
from eval.core.record import data_folder
from eval.import_lmms import metrics_of, read_results, results_file
from eval.lmms_tasks.data import TASKS, requests_of
from eval.task import Task

ABSENT = "a horse, a cow, a pizza, a kite and a surfboard"  # of which no scene of TinyCOCO has all


def record(folder: Path) -> None:
    """Write a log that lmms-eval's model `from_log` replays: for each task right, wrong and unparsable answers."""
    for task, (name, _) in TASKS.items():
        benchmark = benchmarks.named(name)
        data = Task(benchmark, benchmark.modes[0], None).load(data_folder())
        truths = {question.id: question.truth for question in data.questions}
        said = [reply(number, truths[request.id], task) for number, request in enumerate(requests_of(task))]
        logs = [{"doc_id": number, "resps": [[text]]} for number, text in enumerate(said)]
        arguments = {"model": "recorded", "model_args": "", "limit": None}
        write_json(folder / f"{task}.json", {"args": arguments, "logs": logs, "model_configs": {"task": task}})


def reply(number: int, truth: str, task: str) -> str:
    """Return the truth, something false, something that answers nothing, or nothing, in turn."""
    if task == "dama_amber_d":
        other = {"yes": "No", "no": "Yes"}[truth]
        return (truth.capitalize(), other, "It is hard to tell.", "")[number % 4]
    return (
        f"There is {truth or 'a dog'} in the image.\n\nNothing else.",
        f"There is {truth or 'a dog'}, and {ABSENT}.",
        f"{ABSENT.capitalize()}. It is hard to tell.",
        "",
    )[number % 4]


def differences(folder: Path, judge: Path) -> list[str]:
    """Return a line for each metric that lmms-eval has and our scorer does not give for the same answers."""
    path = results_file(folder)
    content = read_results(path)
    found = []
    for task, (name, _) in TASKS.items():
        own = own_metrics(task, name, path, judge)
        theirs = {metric: value for metric, (_, value) in metrics_of(content, task).items()}
        log(f"{folder.name}: {task}: " + ", ".join(f"{m} {v:.4f}" for m, v in theirs.items()))
        found += [f"{task} has no metric"] * (not theirs)
        found += [
            f"{task} {metric}: lmms-eval {value}, here {own[metric]}"
            for metric, value in theirs.items()
            if not same(value, own[metric])
        ]
    return found


def own_metrics(task: str, name: str, path: Path, judge: Path) -> Mapping[str, float | None]:
    """Score the samples of a task as python -m eval.score_answers does; a judge's verdicts are its stored ones."""
    benchmark = benchmarks.named(name)
    data = Task(benchmark, benchmark.modes[0], None).load(data_folder())
    samples = path.with_name(path.name.replace("_results.json", f"_samples_{task}.jsonl"))
    answers = answers_of(read_rows(samples), benchmark, data, samples)
    arguments: list[Any] = [data, answers]
    if benchmark.judge is not None and benchmark.modes[0].judged:
        settings = benchmark.judge.settings(os.environ["DAMA_JUDGE_BASE_URL"], os.environ["DAMA_JUDGE_MODEL"])
        arguments.append(benchmark.judge.ask(data, answers, settings, judge / f"{name}_here"))
    return benchmark.score(*arguments).metrics


def same(theirs: float, ours: float | None) -> bool:
    """Whether both are equal to 1e-9, or both undefined."""
    return math.isnan(theirs) if ours is None else math.isclose(theirs, ours, rel_tol=1e-9, abs_tol=1e-9)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a score differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write answers that lmms-eval replays")
    recording.add_argument("folder", type=Path, help="for a file of each task")
    comparing = commands.add_parser("compare", help="score the answers here and compare the metrics")
    comparing.add_argument("results", nargs="+", type=Path, help="output folders of lmms-eval")
    comparing.add_argument("--judge", type=Path, required=True, help="folder for the judge's verdicts, kept")
    args = parser.parse_args(argv)
    if args.command == "record":
        record(args.folder)
        return 0
    found = [line for path in args.results for line in differences(path, args.judge)]
    for line in found:
        log(f"DIFFERS: {line}")
    log("differs" if found else "equal")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
