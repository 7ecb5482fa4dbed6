"""One command for every benchmark: fetch what is missing, generate, score, print a table, write results.json.

    python -m eval.evaluate objhal CHECKPOINT
    python -m eval.evaluate mmhal CHECKPOINT --compare BASE --judge-base-url http://127.0.0.1:8000/v1 --judge-model M
    python -m eval.evaluate all CHECKPOINT

Everything goes to OUT/<checkpoint's name>/<benchmark>/: answers/ (a resumable stage), a judge's verdicts.jsonl,
results.json, table.txt and page.html. What is complete for the same inputs is skipped, what was interrupted continued,
and what was made from other inputs refused, with the difference named.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dama.console import digest_of, report_error, say, write_atomic
from dama.errors import error_list
from dama.stage import Shard, read_stage
from eval.compare import compare
from eval.core.answering import ensure_answers
from eval.core.judge import VERDICTS, replay
from eval.core.official import read_json
from eval.core.store import Provenance, read_answers, write_results
from eval.core.types import Answer, Question
from eval.download import DownloadError, data_folder, fetch, unpublished
from eval.page import PAGE, write_page
from eval.summary import summarise
from llava.conversation import get_template
from llava.generation.answers import STAGE
from llava.generation.flags import add_backend_flags, responder_of
from llava.generation.request import Decoding, Request, Responder
from llava.mm_utils import get_model_name_from_path

MODES = {"objhal": ("rules", "llm"), "pope": ("llava", "official")}  # the first is what is done unless another is named
JUDGED = ("mmhal", "llavabench", "mmvet")
BENCHMARKS = ("objhal", "amber", *JUDGED, "pope")
PARTED = ("amber", "pope")  # --limit takes the first questions of each part
TEMPLATE = "vicuna_v1"
TRIES = 3  # for a verdict that can be read
_LONGEST_NAME = 255  # bytes of a file's name on most systems


class EvaluateError(ValueError):
    """Faults of the flags, all in one message."""


@dataclass(frozen=True)
class Task:
    """A benchmark and the way it is scored."""

    name: str
    mode: str
    limit: int | None

    @property
    def module(self) -> Any:
        return importlib.import_module(f"eval.{self.name}")

    @property
    def judged(self) -> bool:
        return self.name in JUDGED or self.mode == "llm"

    def load(self, folder: Path) -> Any:
        """The benchmark, or its first questions."""
        bench = self.module.load(folder, self.mode) if self.name == "pope" else self.module.load(folder)
        return bench if self.limit is None else replace(bench, questions=self._first(bench.questions))

    def _first(self, questions: Iterable[Question]) -> tuple[Question, ...]:
        parts: dict[str, list[Question]] = {}
        for question in questions:
            parts.setdefault(question.kinds[0] if self.name in PARTED else "", []).append(question)
        return tuple(question for part in parts.values() for question in part[: self.limit])

    def parts(self, bench: Any) -> dict[str, tuple[list[Request], Decoding]]:
        """Folder of the answers -> what is asked, and the published decoding."""
        decoding = self.module.DECODING
        if self.name == "amber":
            return {part: (self.module.requests(bench, part), Decoding(**decoding[part])) for part in decoding}
        folder = f"answers_{self.mode}" if self.name == "pope" and self.mode != MODES["pope"][0] else "answers"
        return {folder: (self.module.requests(bench), Decoding(**decoding))}

    def home(self, run: Path) -> Path:
        """Of the answers. A trial has a home of its own."""
        return run / (self.name if self.limit is None else f"{self.name}_first{self.limit}")

    def results(self, run: Path) -> Path:
        """Folder of the verdicts and results; below the home where it is not the usual mode."""
        return self.home(run) if self.mode == MODES.get(self.name, ("",))[0] else self.home(run) / self.mode


@dataclass(frozen=True)
class Outcome:
    """A scored benchmark: the score for its own table, and where its results.json is."""

    score: Any
    path: Path


# ------------------------------------------------------------------------------------------------------- one benchmark


def evaluate(task: Task, bench: Any, responder: Responder, run: Path, args: argparse.Namespace) -> Outcome | None:
    """Answers and scores in the model's folder `run`; None where only answers are wanted, or no judge is there."""
    answers, manifests = answer(task, bench, responder, run, args)
    if args.answers_only or (task.judged and not args.judge_base_url and not has_verdicts(task, run)):
        reason = "as --answers-only says" if args.answers_only else "no --judge-base-url"
        say(f"{task.name}: {len(answers)} answers in {task.home(run)}; not scored, {reason}")
        return None
    return score(task, bench, answers, manifests, run, args)


def prepare(task: Task) -> Any:
    """The benchmark, its files and pictures fetched. A folder given by DAMA_BENCH_DATA is only read."""
    offline = bool(os.environ.get("DAMA_BENCH_DATA"))
    folder = fetch([task.name], chosen=None if task.limit is None else (), offline=offline, judge=task.judged)
    bench = task.load(folder)
    if task.limit is not None:
        chosen = {question.image for question in bench.questions}
        fetch([task.name], chosen=chosen, offline=offline, judge=task.judged)
    return bench


def has_verdicts(task: Task, run: Path) -> bool:
    return (task.results(run) / VERDICTS).is_file()


def answer(
    task: Task, bench: Any, responder: Responder, run: Path, args: argparse.Namespace
) -> tuple[list[Answer], dict[str, Any]]:
    """All answers, and the manifest of each part."""
    answers, manifests = [], {}
    for part, (requests, published) in task.parts(bench).items():
        folder, decoding = task.home(run) / part, overridden(published, args)
        say(f"{task.name}: {len(requests)} questions to {responder.name} -> {folder}")
        ensure_answers(responder, requests, image_folders(bench), folder, decoding, args)
        manifests[part] = read_stage(folder, STAGE)[0]
        answers += read_answers(folder / f"{STAGE}.jsonl")
    say_missing(task, answers)
    return answers, manifests


def say_missing(task: Task, answers: Sequence[Answer]) -> None:
    """Logs how many answers a server did not give, by reason. Raises EvaluateError where it gave none."""
    reasons = Counter(answer.missing for answer in answers if answer.missing)
    if not reasons:
        return
    listed = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(5))
    message = f"{task.name}: no answer to {reasons.total()} of {len(answers)} questions ({listed})"
    if reasons.total() == len(answers):
        raise EvaluateError(f"{message}\nRemedy: correct what the server names, e.g. by a larger --max-new-tokens")
    say(f"{message}; counted as missing, in no metric")


def image_folders(bench: Any) -> list[Path]:
    """The benchmark's images; links may lead from there to anywhere in the data folder that the user names."""
    return [data_folder(), bench.image_folder]


def overridden(published: Decoding, args: argparse.Namespace) -> Decoding:
    """The published decoding with what the flags change."""
    changes = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    return replace(published, **{name: value for name, value in changes.items() if value is not None})


def score(
    task: Task, bench: Any, answers: list[Answer], manifests: Mapping[str, Any], run: Path, args: argparse.Namespace
) -> Outcome:
    """Judges where the benchmark has a judge, scores, and writes results.json."""
    out, quirks = task.results(run), {"official_quirks": args.official_quirks}
    if task.judged:
        result = task.module.score(bench, answers, verdicts(task, bench, answers, out, args), **quirks)
    elif task.name == "objhal":  # rules have no quirks
        result = task.module.score(bench, answers)
    else:
        result = task.module.score(bench, answers, **quirks)
    result = replace(result, protocol=labelled(task, result.protocol, bench, args))
    if task.name == "objhal":
        metrics, counts, items = result.metrics_record(), result.counts(), [item.record() for item in result.items]
    else:
        metrics, counts, items = result.metrics, result.counts, result.items
    items = [*items, *bench.missing_records(answers)]
    settings = {part: _decoding_of(manifest) for part, manifest in manifests.items()}
    fingerprint = next(iter(manifests.values()))["fingerprint"]
    provenance = Provenance(
        benchmark=task.name,
        protocol=result.protocol,
        checkpoint=fingerprint["model"],
        fingerprint=fingerprint["weights"],
        decoding=settings if len(settings) > 1 else next(iter(settings.values())),
        counts=counts,
        judge=result.judge,
    )
    write_results(out / "results.json", metrics, provenance, items)
    return Outcome(result, out / "results.json")


def _decoding_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    fingerprint = manifest["fingerprint"]
    return fingerprint["decoding"] | {name: fingerprint[name] for name in ("template", "precision", "batch_size")}


def verdicts(task: Task, bench: Any, answers: list[Answer], out: Path, args: argparse.Namespace) -> Any:
    """The judge's, asked for now; or those of an earlier run, where no judge is named."""
    module, quirks = task.module, {"official_quirks": args.official_quirks}
    if not args.judge_base_url:
        return replay(out, module.judge_requests(bench, answers, **quirks))
    settings = module.JUDGE.settings(
        args.judge_base_url, args.judge_model, concurrency=args.judge_concurrency, give_up=True
    ).without(args.judge_omit)
    repeats = {"runs": args.judge_runs} if task.name in JUDGED else {}
    tries = getattr(module, "TRIES", TRIES)
    run = module.judge(bench, answers, settings, out, tries=tries, **repeats, **quirks)
    say(run.summary(args.judge_prices))
    return run


def labelled(task: Task, protocol: str, bench: Any, args: argparse.Namespace) -> str:
    """The protocol, with everything in which this run left it: such figures compare among themselves only."""
    other = unpublished([task.name], data_folder())
    changes = [f"data {digest_of(other)[:8]}"] if other else []
    if get_template(args.conv_mode) != get_template(TEMPLATE):
        changes.append(f"template {args.conv_mode}")
    for _, published in task.parts(bench).values():
        chosen = overridden(published, args)
        changes += [
            f"{name} {getattr(chosen, name)}"
            for name in ("num_beams", "max_new_tokens")
            if getattr(chosen, name) != getattr(published, name)
        ]
    if task.limit is not None:
        changes.append(f"first {task.limit}")
    return ", ".join([protocol, *dict.fromkeys(changes)])


def say_results(task: Task, bench: Any, outcomes: Mapping[str, Outcome], published: bool = False) -> None:
    """The benchmark's own table, what two models differ in, and a page of all answers; beside the first's results."""
    names, paths = list(outcomes), [outcome.path for outcome in outcomes.values()]
    home = paths[0].parent
    lines = [task.module.format_table({name: outcome.score for name, outcome in outcomes.items()})]
    if len(outcomes) > 1:  # the base comes second here, and first in a comparison
        lines.append(compare(paths[::-1], names[::-1]).report(published))
    say("\n\n".join(lines))
    write_atomic(home / "table.txt", "\n\n".join(lines) + "\n")
    write_page(paths[-1], home / PAGE, image_folders(bench), paths[0] if len(paths) > 1 else None, names=names[::-1])
    say(f"results: {', '.join(map(str, paths))}")


# ------------------------------------------------------------------------------------------------------------- command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, "all"))
    parser.add_argument("checkpoint", help="folder or hub name; with --backend openai the name that the server lists")
    parser.add_argument(
        "--compare", metavar="BASE",
        help="the baseline, answered and scored as well; differences are CHECKPOINT minus BASE",
    )  # fmt: skip
    parser.add_argument("--published", action="store_true", help="with --compare: show published results below these")
    parser.add_argument("--out", default="runs/eval", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--mode",
        help="objhal: rules (the answer's own words, no judge) or llm (a judge extracts the objects; not comparable "
        "with rules); pope: llava (8,910 questions) or official (9,000). Default: the first",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="a trial on the first N questions (of each split or part); its own folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="answer anew where the folder has other inputs")
    parser.add_argument("--answers-only", action="store_true", help="stop before scoring")
    add_generation_flags(parser)
    add_backend_flags(parser)
    add_judge_flags(parser)
    return parser


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation (decoding is the published one unless changed here, then labelled)")
    group.add_argument("--model-base", metavar="NAME|DIR", help="base of a LoRA folder")
    group.add_argument("--conv-mode", default=TEMPLATE, metavar="NAME", help="template (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default: 16)")
    group.add_argument(
        "--processes", type=int, metavar="N", help="that answer side by side (default: one for each GPU, 1 on a CPU)"
    )
    group.add_argument("--device", help="cuda or cpu (default: what is there)")
    group.add_argument("--num-beams", type=int, metavar="N", help="beams instead of the published number")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer, instead of the published")


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge (any OpenAI-compatible server; OPENAI_API_KEY holds its key, if any)")
    group.add_argument(
        "--judge-base-url", metavar="URL", help="ends in /v1 for most; without it, verdicts of an earlier run count"
    )
    group.add_argument("--judge-model", metavar="NAME", help="default: the one that the benchmark's authors used")
    group.add_argument("--judge-concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    group.add_argument(
        "--judge-runs", type=int, default=1, metavar="N",
        help="verdicts on each answer, for mmhal, llavabench and mmvet, whose paper takes 5 (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--judge-omit", nargs="+", default=(), choices=("max_tokens", "temperature"), metavar="SETTING",
        help="settings that the judge refuses, to be left to it: max_tokens, temperature",
    )  # fmt: skip
    group.add_argument(
        "--judge-prices", type=float, nargs=2, metavar=("PROMPT", "COMPLETION"),
        help="of a million tokens each, to have the cost said",
    )  # fmt: skip
    group.add_argument(
        "--official-quirks",
        action="store_true",
        help="read verdicts and answers as the original scorers, bugs included",
    )


def tasks_of(args: argparse.Namespace) -> list[Task]:
    names = BENCHMARKS if args.benchmark == "all" else (args.benchmark,)
    return [Task(name, _mode_of(name, args), args.limit) for name in names]


def _mode_of(name: str, args: argparse.Namespace) -> str:
    modes = MODES.get(name, ("",))
    return args.mode if args.mode in modes else modes[0]


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on the machine, and raises EvaluateError naming every fault of the flags."""
    faults = [f"--{n.replace('_', '-')} {v}: expected 1 or more" for n, v in _counts(args).items() if v < 1]
    if Shard.from_launcher().count > 1:
        faults.append("started by a launcher: expected one process, which starts the others itself (--processes)")
    known = [mode for task in tasks_of(args) for mode in MODES.get(task.name, ())]
    if args.mode is not None and args.mode not in known:
        faults.append(f"--mode {args.mode}: expected {' or '.join(known) or 'none'} for {args.benchmark}")
    for task in tasks_of(args):
        faults += _task_faults(task, args)
    faults += [f"checkpoint {path!r}: {fault}" for path in checkpoints(args) if (fault := _name_fault(path))]
    if faults:
        raise EvaluateError(error_list("evaluate", faults, "see python -m eval.evaluate --help"))
    if args.processes is None:
        args.processes = _processes(args)
    return args


def _counts(args: argparse.Namespace) -> dict[str, int]:
    names = ("limit", "batch_size", "processes", "num_beams", "max_new_tokens", "judge_concurrency", "judge_runs")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _processes(args: argparse.Namespace) -> int:
    import torch

    on_gpu = args.backend == "local" and args.device in (None, "cuda")
    return max(1, torch.cuda.device_count()) if on_gpu else 1


def _task_faults(task: Task, args: argparse.Namespace) -> list[str]:
    faults = []
    if task.judged and args.benchmark != "all" and not args.judge_base_url and not args.answers_only:
        runs = [Path(args.out) / name for name in (args.checkpoint, args.compare) if name]
        if not all(has_verdicts(task, Path(args.out) / get_model_name_from_path(run.name)) for run in runs):
            faults.append(
                f"{task.name}: expected --judge-base-url, got none, and there are no verdicts of an earlier run"
            )
    if args.official_quirks and task.name == "objhal" and not task.judged and args.benchmark != "all":
        faults.append("--official-quirks: rules have none; they are those of --mode llm")
    beams = args.num_beams or task.module.DECODING.get("num_beams", 1)
    if args.backend == "openai" and beams > 1:
        faults.append(f"{task.name}: a server decodes without beams, published are {beams}; add --num-beams 1")
    return faults


def checkpoints(args: argparse.Namespace) -> list[str]:
    return [path for path in (args.checkpoint, args.compare) if path is not None]


def responder_at(path: str, args: argparse.Namespace) -> Responder:
    return responder_of(argparse.Namespace(**(vars(args) | {"model_path": path})))


def _name_fault(path: str) -> str:
    """Why the checkpoint's name cannot name the folder of its results, or ""."""
    name = get_model_name_from_path(path)
    if name.strip(". ") == "" or any(part in name for part in ("/", "\\")) or not name.isprintable():
        return f"expected a name that can be that of a folder below --out, got {name!r}"
    return "" if len(name.encode()) <= _LONGEST_NAME else f"expected a name of {_LONGEST_NAME} bytes or fewer"


def check_checkpoints(args: argparse.Namespace) -> None:
    """Raises where one of them is not there, or both would write to one folder."""
    names = [get_model_name_from_path(path) for path in checkpoints(args)]
    if len(set(names)) < len(names):
        raise EvaluateError(f"--compare {args.compare}: its folder's name is the checkpoint's, and so is its --out")
    for path in checkpoints(args):
        responder_at(path, args).identity()


def benches_of(args: argparse.Namespace) -> tuple[dict[Task, Any], list[str]]:
    """All benchmarks that are asked for, and the names of those whose data cannot be had, which are said at once.

    Raises DownloadError where no benchmark is left.
    """
    benches, lacking = {}, {}
    for task in tasks_of(args):
        try:
            benches[task] = prepare(task)
        except ValueError as error:  # incomplete, or damaged
            lacking[task.name] = str(error)
    if not benches:
        raise DownloadError("\n\n".join(lacking.values()))
    for message in lacking.values():
        say(f"LEFT OUT: {message}\n")
    return benches, list(lacking)


def run(args: argparse.Namespace) -> None:
    """One checkpoint after the other, so that one at a time is in memory; a table as soon as both are scored."""
    check_checkpoints(args)
    benches, lacking = benches_of(args)
    outcomes: dict[Task, dict[str, Outcome]] = {task: {} for task in benches}
    for path in checkpoints(args):
        name, responder = get_model_name_from_path(path), responder_at(path, args)
        for task, bench in benches.items():
            outcome = evaluate(task, bench, responder, Path(args.out) / name, args)
            if outcome is not None:
                outcomes[task][name] = outcome
            if path == checkpoints(args)[-1] and outcomes[task]:
                say_results(task, bench, outcomes[task], args.published)
    if args.benchmark == "all" and any(outcomes.values()):
        paths = {task.name: {name: outcome.path for name, outcome in of.items()} for task, of in outcomes.items()}
        names = [get_model_name_from_path(path) for path in checkpoints(args)]
        summarise({n: {b: read_json(of[n]) for b, of in paths.items() if n in of} for n in names}, Path(args.out))
    if lacking:
        raise DownloadError(f"left out, because their data could not be had (see above): {', '.join(lacking)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(complete(args))
    except Exception as error:
        report_error(error, "evaluate")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
