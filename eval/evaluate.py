"""One command for every benchmark: fetch what is missing, generate, score, print a table, write results.json.

    python -m eval.evaluate BENCHMARK CHECKPOINT
    python -m eval.evaluate BENCHMARK CHECKPOINT --compare BASE --judge-base-url http://127.0.0.1:8000/v1
    python -m eval.evaluate all CHECKPOINT

Everything goes to OUT/<checkpoint's name>/<benchmark>/: answers/ (a resumable stage), a judge's verdicts.jsonl,
results.json, table.txt and page.html. What is complete for the same inputs is skipped, what was interrupted continued,
and what was made from other inputs refused, with the difference named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dama.console import digest_of, log, report_error, write_atomic
from dama.stage import read_stage
from eval.compare import compare
from eval.core.answering import ensure_answers
from eval.core.judge import JudgeRun, replay
from eval.core.official import read_json
from eval.core.record import DownloadError, data_folder
from eval.core.scores import Score
from eval.core.store import Provenance, read_answers, write_results
from eval.core.types import Answer
from eval.download import fetch, unpublished
from eval.evaluate_flags import (
    TEMPLATE,
    EvaluateError,
    build_parser,
    checkpoints,
    complete,
    responder_at,
    tasks_of,
    validate_checkpoints,
)
from eval.page import PAGE, write_page
from eval.results import read_all
from eval.summary import summarize
from eval.task import Task
from llava.conversation import get_template
from llava.generation.answers import STAGE
from llava.generation.flags import processor_options
from llava.generation.request import Decoding, Responder
from llava.mm_utils import get_model_name_from_path


@dataclass(frozen=True)
class Outcome:
    """A scored benchmark: the score for its own table, and the path of its results.json."""

    score: Score
    path: Path


# ------------------------------------------------------------------------------------------------------- one benchmark


def evaluate(task: Task, data: Any, responder: Responder, run: Path, args: argparse.Namespace) -> Outcome | None:
    """Answer and score in the model's folder `run`; None where only answers are wanted, or there is no judge."""
    answers, manifests = answer(task, data, responder, run, args)
    if args.answers_only or (task.judged and not args.judge_base_url and not task.has_verdicts(run)):
        reason = "as --answers-only says" if args.answers_only else "no --judge-base-url"
        log(f"{task.name}: {len(answers)} answers in {task.answers_folder(run)}; not scored, {reason}")
        return None
    return score(task, data, answers, manifests, run, args)


def prepare(task: Task) -> Any:
    """Fetch the benchmark's files and images, and load it. A folder given by DAMA_BENCH_DATA is only read."""
    offline = bool(os.environ.get("DAMA_BENCH_DATA"))
    partly = task.limit is not None or task.image_ids is not None
    folder = fetch([task.name], chosen=() if partly else None, offline=offline, judge=task.judged)
    data = task.load(folder)
    if partly:
        chosen = {question.image for question in data.questions if question.image}
        fetch([task.name], chosen=chosen, offline=offline, judge=task.judged)
    return data


def answer(
    task: Task, data: Any, responder: Responder, run: Path, args: argparse.Namespace
) -> tuple[list[Answer], dict[str, Any]]:
    """Return all answers, and the manifest of each part."""
    answers, manifests = [], {}
    for part, (requests, published) in task.parts(data).items():
        folder, decoding = task.answers_folder(run) / part, overridden(published, args)
        log(f"{task.name}: {len(requests)} questions to {responder.name} -> {folder}")
        ensure_answers(responder, requests, image_folders(data), folder, decoding, args)
        manifests[part] = read_stage(folder, STAGE)[0]
        answers += read_answers(folder / f"{STAGE}.jsonl")
    log_missing(task, answers)
    return answers, manifests


def log_missing(task: Task, answers: Sequence[Answer]) -> None:
    """Log how many answers a server did not give, by reason. Raises EvaluateError where it gave none."""
    reasons = Counter(answer.missing for answer in answers if answer.missing)
    if not reasons:
        return
    listed = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(5))
    message = f"{task.name}: no answer to {reasons.total()} of {len(answers)} questions ({listed})"
    if reasons.total() == len(answers):
        raise EvaluateError(f"{message}\nRemedy: correct what the server names, e.g. by a larger --max-new-tokens")
    log(f"{message}; counted as missing, in no metric")


def image_folders(data: Any) -> list[Path]:
    """Return the benchmark's image folder, and the data folder that its links may lead to."""
    return [data_folder(), data.image_folder]


def overridden(published: Decoding, args: argparse.Namespace) -> Decoding:
    """Return the published decoding with what the flags change."""
    changes = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    return replace(published, **{name: value for name, value in changes.items() if value is not None})


def score(
    task: Task, data: Any, answers: list[Answer], manifests: Mapping[str, Any], run: Path, args: argparse.Namespace
) -> Outcome:
    """Judge where a judge decides, score, and write results.json."""
    out = task.results_folder(run)
    result = scored_with(task, data, answers, out, args)
    result = replace(result, protocol=labeled(task, result.protocol, data, args))
    settings = {part: _decoding_of(manifest) for part, manifest in manifests.items()}
    fingerprint = next(iter(manifests.values()))["fingerprint"]
    provenance = Provenance(
        benchmark=task.name,
        protocol=result.protocol,
        checkpoint=fingerprint["model"],
        fingerprint=fingerprint["weights"],
        decoding=settings if len(settings) > 1 else next(iter(settings.values())),
        counts=result.counts,
        judge=result.judge,
    )
    write_results(out / "results.json", result.metrics, provenance, [*result.items, *data.missing_records(answers)])
    return Outcome(result, out / "results.json")


def scored_with(task: Task, data: Any, answers: list[Answer], out: Path, args: argparse.Namespace) -> Score:
    """Judge where a judge decides, with its files in `out`, and score."""
    judged = [verdicts(task, data, answers, out, args)] if task.judged else []
    return task.benchmark.score(data, answers, *judged, **scoring(task, args))


def scoring(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of the benchmark's `score` that the flags ask for."""
    chosen: dict[str, Any] = {"official_quirks": args.official_quirks} if task.mode.quirks else {}
    if task.benchmark.takes_text_only and args.text_only is not None:
        (alone,) = read_all([args.text_only])
        if alone.benchmark.name != task.name:
            raise EvaluateError(f"--text_only {args.text_only}: expected results of {task.name}, got {alone.title}")
        chosen["text_only"] = alone.items
    return chosen


def _decoding_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    fingerprint = manifest["fingerprint"]
    return fingerprint["decoding"] | {name: fingerprint[name] for name in ("template", "precision", "batch_size")}


def verdicts(task: Task, data: Any, answers: list[Answer], out: Path, args: argparse.Namespace) -> JudgeRun:
    """Ask the judge, or return the verdicts of an earlier run where no judge is named."""
    judge, quirks = task.benchmark.judge, {"official_quirks": args.official_quirks}
    assert judge is not None  # the description is checked when it is made
    if not args.judge_base_url:
        return replay(out, judge.requests(data, answers, **quirks))
    settings = judge.settings(
        args.judge_base_url, args.judge_model, concurrency=args.judge_concurrency, give_up=True
    ).without(args.judge_omit)
    found = judge.ask(data, answers, settings, out, runs=args.judge_runs if judge.repeats else 1, **quirks)
    log(found.summary(args.judge_prices))
    return found


def labeled(task: Task, protocol: str, data: Any, args: argparse.Namespace) -> str:
    """Return the protocol, and everything in which this run differs from it and is not comparable with it."""
    other = unpublished([task.name], data_folder())
    changes = [f"data {digest_of(other)[:8]}"] if other else []
    if get_template(args.conv_mode) != get_template(TEMPLATE):
        changes.append(f"template {args.conv_mode}")
    changes += processor_options(args).changes() + [f"{args.bits} bits"] * (args.bits != 16)
    for _, published in task.parts(data).values():
        chosen = overridden(published, args)
        changes += [
            f"{name} {getattr(chosen, name)}"
            for name in ("num_beams", "max_new_tokens")
            if getattr(chosen, name) != getattr(published, name)
        ]
    if task.limit is not None:
        changes.append(f"first {task.limit}")
    return ", ".join([protocol, *dict.fromkeys(changes)])


def report(
    task: Task, data: Any, outcomes: Mapping[str, Outcome], published: bool = False, *, page: bool = True
) -> None:
    """Print the benchmark's own table and the differences, and write them and a page beside the first's results."""
    names, paths = list(outcomes), [outcome.path for outcome in outcomes.values()]
    folder = paths[0].parent
    lines = [task.benchmark.format_table({name: outcome.score for name, outcome in outcomes.items()})]
    if len(outcomes) > 1:  # the base comes second here, and first in a comparison
        lines.append(compare(paths[::-1], names[::-1]).report(published))
    log("\n\n".join(lines))
    write_atomic(folder / "table.txt", "\n\n".join(lines) + "\n")
    if page:
        other = paths[0] if len(paths) > 1 else None
        write_page(paths[-1], folder / PAGE, image_folders(data), other, names=names[::-1])
    else:
        log(f"no page: none of the images is in {image_folders(data)[-1]}")
    log(f"results: {', '.join(map(str, paths))}")


# ------------------------------------------------------------------------------------------------------------- command


def load_all(args: argparse.Namespace) -> tuple[dict[Task, Any], list[str]]:
    """Load all benchmarks that are asked for; also return the names of those without data, which are logged at once.

    Raises DownloadError where no benchmark is left.
    """
    loaded, unavailable = {}, {}
    for task in tasks_of(args):
        try:
            loaded[task] = prepare(task)
        except ValueError as error:  # incomplete, or damaged
            unavailable[task.name] = str(error)
    if not loaded:
        raise DownloadError("\n\n".join(unavailable.values()))
    for message in unavailable.values():
        log(f"LEFT OUT: {message}\n")
    return loaded, list(unavailable)


def run(args: argparse.Namespace) -> None:
    """Run one checkpoint after the other, so that one at a time is in memory; report when both are scored."""
    validate_checkpoints(args)
    loaded, unavailable = load_all(args)
    outcomes: dict[Task, dict[str, Outcome]] = {task: {} for task in loaded}
    for path in checkpoints(args):
        name, responder = get_model_name_from_path(path), responder_at(path, args)
        for task, data in loaded.items():
            outcome = evaluate(task, data, responder, Path(args.out) / name, args)
            if outcome is not None:
                outcomes[task][name] = outcome
            if path == checkpoints(args)[-1] and outcomes[task]:
                report(task, data, outcomes[task], args.published)
    if args.benchmark == "all" and any(outcomes.values()):
        paths = {task.name: {name: outcome.path for name, outcome in of.items()} for task, of in outcomes.items()}
        names = [get_model_name_from_path(path) for path in checkpoints(args)]
        summarize({n: {b: read_json(of[n]) for b, of in paths.items() if n in of} for n in names}, Path(args.out))
    if unavailable:
        raise DownloadError(f"left out, because their data could not be had (see above): {', '.join(unavailable)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    args = build_parser(__doc__).parse_args(argv)
    try:
        run(complete(args))
    except Exception as error:
        report_error(error, "evaluate")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
