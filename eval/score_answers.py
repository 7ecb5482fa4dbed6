"""Score answers that somebody has already, without a model: the same scorers, table, page and results.json.

    python -m eval.score_answers BENCHMARK ANSWERS [ANSWERS ...] --name MODEL
    python -m eval.score_answers mmstar predictions.xlsx --name llava-next-34b
    python -m eval.score_answers objhal answers.jsonl --compare other.jsonl

ANSWERS are LLaVA's jsonl, lmms-eval's samples, VLMEvalKit's xlsx or tsv, or the JSON that the benchmark's own scorer
reads. They are joined to the questions by id, and to no question of another wording; questions without answer are
counted. How the answers were decoded is not known, and results.json says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dama.console import digest_of, digest_of_file, log, report_error
from dama.errors import error_list
from eval import benchmarks
from eval.answer_files import Row, answers_of, read_rows
from eval.core.record import DownloadError, data_folder
from eval.core.store import Provenance, write_results
from eval.download import fetch, unpublished
from eval.evaluate import Outcome, image_folders, report, scored_with
from eval.evaluate_flags import EvaluateError, add_judge_flags, add_question_flags, mode_errors, tasks_of
from eval.task import Task

NOT_STATED = "not stated"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.score_answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=benchmarks.names(), help="that was answered")
    parser.add_argument("answers", nargs="+", type=Path, help="files of one model's answers")
    parser.add_argument("--name", help="name of the model (default: that in the answers, else the first file's name)")
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="ANSWERS", help="the baseline's answers; differences are to these"
    )
    parser.add_argument("--compare_name", "--compare-name", metavar="NAME", help="name of the baseline")
    parser.add_argument("--published", action="store_true", help="with --compare: show published results below these")
    parser.add_argument("--out", default="runs/eval", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument("--mode", help="mode of the benchmark, as in python -m eval.evaluate --help")
    add_question_flags(parser)
    add_judge_flags(parser)
    return parser


def score_files(
    task: Task, data: Any, rows: Sequence[Row], files: Sequence[Path], name: str, label: str, args: argparse.Namespace
) -> Outcome:
    """Score one model's answers and write results.json. label: ends the protocol."""
    answers = answers_of(rows, task.benchmark, data, files[0])
    log(f"{task.name}: {len(answers)} answers of {name} to {len(data.questions)} questions")
    out = task.results_folder(Path(args.out) / name)
    result = scored_with(task, data, answers, out, args)
    result = replace(result, protocol=result.protocol + label)
    provenance = Provenance(
        benchmark=task.name,
        protocol=result.protocol,
        checkpoint=name,
        fingerprint=digest_of([digest_of_file(path) for path in files]),
        decoding={"decoding": NOT_STATED},
        counts=result.counts,
        judge=result.judge,
    )
    write_results(out / "results.json", result.metrics, provenance, [*result.items, *data.missing_records(answers)])
    return Outcome(result, out / "results.json")


def load(task: Task, rows: Sequence[Row], path: Path) -> tuple[Any, str]:
    """Load the questions, from the answers' own file where the official files are not there and it has them.

    Also return what to label the protocol with. Raises DownloadError where neither has them.
    """
    makes_questions, read_only = task.benchmark.from_rows, bool(os.environ.get("DAMA_BENCH_DATA"))
    try:
        folder = fetch([task.name], chosen=(), offline=read_only or makes_questions is not None, judge=task.judged)
        return task.load(folder), data_label(task)
    except ValueError:  # missing, incomplete, or damaged
        if makes_questions is None:
            raise
    try:
        data = makes_questions(rows, path, task.mode.name)
    except ValueError as error:  # the rows have no truths, or not all of them
        return load_official(task, error, read_only)
    log(f"{task.name}: the official files are not in {data_folder()}; questions and truths are those in {path}")
    return data, f", truths of the answers' file, {len(data.questions)} questions"


def load_official(task: Task, error: ValueError, read_only: bool) -> tuple[Any, str]:
    """Fetch and load the official files. error: why the answers' file cannot replace them, named where they fail."""
    try:
        folder = fetch([task.name], chosen=(), offline=read_only, judge=task.judged)
    except DownloadError as missing:
        raise DownloadError(f"{missing}\n\nThe answers' own file cannot replace them: {error}") from error
    return task.load(folder), data_label(task)


def data_label(task: Task) -> str:
    """Return what to label the protocol with where the data are not the published ones."""
    other = unpublished([task.name], data_folder())
    return f", data {digest_of(other)[:8]}" if other else ""


def name_of(rows: Sequence[Row], files: Sequence[Path], chosen: str | None) -> str:
    """Return the model's name: the chosen one, the last part of that in the answers, or of the file's name."""
    stated = [str(row["model_id"]) for row in rows if row.get("model_id")]
    name = chosen or (Path(stated[0]).name if stated else files[0].stem)
    if name.strip(". ") == "" or "/" in name or "\\" in name or not name.isprintable():
        raise EvaluateError(f"--name: expected a name that can be that of a folder below --out, got {name!r}")
    return name


def with_images_of(task: Task, rows: Sequence[Row]) -> Task:
    """Return the task about the images of the answers, where images may be chosen and none are."""
    if not task.benchmark.takes_image_ids or task.image_ids is not None:
        return task
    ids = [task.benchmark.id_of(row, None) if task.benchmark.id_of else None for row in rows]
    known = tuple(int(id_) for id_ in ids if id_ is not None)
    return replace(task, image_ids=known) if len(known) == len(rows) else task


def run(args: argparse.Namespace) -> None:
    """Score the answers, and the baseline's if there are any; report both."""
    args.limit = None
    if errors := mode_errors(args):
        raise EvaluateError(error_list("score_answers", errors, "see python -m eval.score_answers --help"))
    (task,) = tasks_of(args)
    models = [(args.answers, args.name), *([(args.compare, args.compare_name)] if args.compare else [])]
    outcomes: dict[str, Outcome] = {}
    read = [(files, [row for path in files for row in read_rows(path)], name) for files, name in models]
    task = with_images_of(task, read[0][1])
    for files, rows, chosen in read:
        data, label = load(task, rows, files[0])
        name = name_of(rows, files, chosen)
        if name in outcomes:
            raise EvaluateError(f"names: both models are called {name!r}\nRemedy: give --name and --compare_name")
        outcomes[name] = score_files(task, data, rows, files, name, label, args)
    report(task, data, outcomes, args.published, page=has_images(data))


def has_images(data: Any) -> bool:
    """Whether any of the benchmark's images is there, or none is needed, so that a page can be written."""
    names = [question.image for question in data.questions if question.image]
    folders = image_folders(data)
    return not names or any((folder / name).is_file() for folder in folders for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except Exception as error:
        report_error(error, "score_answers")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
