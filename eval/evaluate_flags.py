"""Flags of eval.evaluate: the parser, and a check of all of them before anything long starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dama.errors import error_list
from dama.stage import Shard
from eval import benchmarks
from eval.core.benchmark import Benchmark
from eval.task import Task
from llava.generation.flags import (
    Given,
    add_backend_flags,
    add_precision_flags,
    add_processor_flags,
    responder_of,
)
from llava.generation.request import Responder
from llava.mm_utils import get_model_name_from_path

TEMPLATE = "vicuna_v1"
BLIND = "blind"  # the mode that also asks without images
_LONGEST_NAME = 255  # bytes of a file's name on most systems


class EvaluateError(ValueError):
    """Errors of the flags, all in one message."""


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.evaluate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=(*benchmarks.names(), "all"), help="one, or all for which data is at hand")
    parser.add_argument("checkpoint", help="folder or hub name; with --backend openai the name that the server lists")
    parser.add_argument(
        "--compare", metavar="BASE",
        help="the baseline, answered and scored as well; differences are CHECKPOINT minus BASE",
    )  # fmt: skip
    parser.add_argument("--published", action="store_true", help="with --compare: show published results below these")
    parser.add_argument("--out", default="runs/eval", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument("--mode", help=f"{_modes()}. Default: the first")
    add_question_flags(parser)
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="run a trial on the first N questions (of each split or part), in its own output folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="answer anew where the folder has other inputs")
    parser.add_argument("--answers-only", action="store_true", help="stop before scoring")
    add_generation_flags(parser)
    add_processor_flags(parser)
    add_backend_flags(parser)
    add_judge_flags(parser)
    return parser


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that some benchmarks have for what is asked and compared."""
    blind = _names_with(lambda benchmark: any(mode.name == BLIND for mode in benchmark.modes))
    parser.add_argument("--blind", action="store_true", help=f"the same as --mode {BLIND}, for {blind}")
    parser.add_argument(
        "--text_only", "--text-only", type=Path, metavar="RESULTS",
        help="results.json of the language model alone (--mode text_only), with which leakage is computed, for "
        + _names_with(lambda benchmark: benchmark.takes_text_only),
    )  # fmt: skip
    parser.add_argument(
        "--image_ids", "--image-ids", type=Path, metavar="FILE",
        help="COCO ids of the images that are asked about, one per line, for "
        + _names_with(lambda benchmark: benchmark.takes_image_ids),
    )  # fmt: skip


def _names_with(having: Callable[[Benchmark], bool]) -> str:
    return ", ".join(benchmark.name for benchmark in benchmarks.BENCHMARKS if having(benchmark))


def _modes() -> str:
    """Describe the modes of the benchmarks that have several."""
    described = [
        f"{benchmark.name}: " + " or ".join(f"{mode.name} ({mode.help})" for mode in benchmark.modes)
        for benchmark in benchmarks.BENCHMARKS
        if len(benchmark.modes) > 1
    ]
    return "; ".join(described)


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of generation."""
    group = parser.add_argument_group("generation (decoding is the published one unless changed here, then labelled)")
    group.add_argument("--model-base", metavar="NAME|DIR", help="base model of a LoRA folder")
    group.add_argument(
        "--conv-mode", action=Given, default=TEMPLATE, metavar="NAME",
        help="conversation template of LLaVA-1.5; other models have their own (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions per batch (default: 16)")
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes that generate in parallel (default: one for each GPU, 1 on a CPU)",
    )
    group.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    add_precision_flags(group)
    group.add_argument("--num-beams", type=int, metavar="N", help="number of beams (default: the published number)")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the published number)"
    )


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the judge."""
    repeated = ", ".join(b.name for b in benchmarks.BENCHMARKS if b.judge is not None and b.judge.repeats)
    group = parser.add_argument_group("judge (any OpenAI-compatible server; OPENAI_API_KEY holds its key, if any)")
    group.add_argument(
        "--judge-base-url",
        metavar="URL",
        help="server's URL, for most ending in /v1; without it, verdicts of an earlier run are used",
    )
    group.add_argument(
        "--judge-model", metavar="NAME", help="model that judges (default: the one that the benchmark's authors used)"
    )
    group.add_argument(
        "--judge-concurrency", type=int, default=8, metavar="N", help="requests in parallel (default: 8)"
    )
    group.add_argument(
        "--judge-runs", type=int, default=1, metavar="N",
        help=f"verdicts on each answer, for {repeated}; papers use up to 5 (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--judge-omit", nargs="+", default=(), choices=("max_tokens", "temperature"), metavar="SETTING",
        help="settings that the server refuses and that are therefore not sent: max_tokens, temperature",
    )  # fmt: skip
    group.add_argument(
        "--judge-prices", type=float, nargs=2, metavar=("PROMPT", "COMPLETION"),
        help="prices of a million tokens each, to print the cost",
    )  # fmt: skip
    group.add_argument(
        "--official-quirks",
        action="store_true",
        help="read verdicts and answers as the original scorers do, bugs included",
    )


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Return the tasks that the flags ask for."""
    names = benchmarks.names() if args.benchmark == "all" else [args.benchmark]
    chosen = [benchmarks.named(name) for name in names]
    return [_task(benchmark, args) for benchmark in chosen]


def _task(benchmark: Benchmark, args: argparse.Namespace) -> Task:
    image_ids = args.image_ids if benchmark.takes_image_ids else None
    return Task(benchmark, benchmark.mode_named(args.mode), args.limit, image_ids)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the machine. Raises EvaluateError that names every error of the flags."""
    errors = [f"--{n.replace('_', '-')} {v}: expected 1 or more" for n, v in _counts(args).items() if v < 1]
    if Shard.from_launcher().count > 1:
        errors.append("started by a launcher: expected one process, which starts the others itself (--processes)")
    errors += mode_errors(args)
    tasks = tasks_of(args)
    for task in tasks:
        errors += _task_errors(task, args)
    errors += [f"checkpoint {path!r}: {error}" for path in checkpoints(args) if (error := _name_error(path))]
    if errors:
        raise EvaluateError(error_list("evaluate", errors, "see python -m eval.evaluate --help"))
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


def mode_errors(args: argparse.Namespace) -> list[str]:
    """Set the mode that --blind names, and return the errors of the mode and of the flags on questions."""
    errors = []
    if args.blind and args.mode not in (None, BLIND):
        errors.append(f"--blind: expected no other mode, got --mode {args.mode}")
    args.mode = BLIND if args.blind else args.mode
    tasks = tasks_of(args)
    known = [mode.name for task in tasks for mode in task.benchmark.modes if mode.name]
    if args.mode is not None and args.mode not in known:
        errors.append(f"--mode {args.mode}: expected {' or '.join(known) or 'none'} for {args.benchmark}")
    return errors + _question_errors(tasks, args)


def _question_errors(tasks: Sequence[Task], args: argparse.Namespace) -> list[str]:
    """Name flags that no benchmark of these takes, and files that are missing."""
    taking = {
        "--text_only": (args.text_only, any(task.benchmark.takes_text_only for task in tasks)),
        "--image_ids": (args.image_ids, any(task.benchmark.takes_image_ids for task in tasks)),
    }
    given = {flag: (path, taken) for flag, (path, taken) in taking.items() if path is not None}
    errors = [f"{flag}: {args.benchmark} does not take it" for flag, (_, taken) in given.items() if not taken]
    errors += [f"{flag} {path}: expected a file, got none" for flag, (path, _) in given.items() if not path.is_file()]
    if args.text_only is not None and args.mode != BLIND:
        errors.append("--text_only: leakage compares with the answers without images; add --blind")
    return errors


def _task_errors(task: Task, args: argparse.Namespace) -> list[str]:
    errors = []
    if task.judged and args.benchmark != "all" and not args.judge_base_url and not args.answers_only:
        runs = [Path(args.out) / get_model_name_from_path(path) for path in checkpoints(args)]
        if not all(map(task.has_verdicts, runs)):
            errors.append(
                f"{task.name}: expected --judge-base-url, got none, and there are no verdicts of an earlier run"
            )
    if args.official_quirks and not task.mode.quirks and args.benchmark != "all":
        having = " or ".join(mode.name for mode in task.benchmark.modes if mode.quirks)
        errors.append(f"--official-quirks: {task.mode.name} have none; they are those of --mode {having}")
    beams = args.num_beams or max(task.decoding(part).num_beams for part in task.benchmark.parts)
    if args.backend == "openai" and beams > 1:
        errors.append(f"{task.name}: a server decodes without beams, published are {beams}; add --num-beams 1")
    return errors


def checkpoints(args: argparse.Namespace) -> list[str]:
    """Return the checkpoint, and the baseline if there is one."""
    return [path for path in (args.checkpoint, args.compare) if path is not None]


def responder_at(path: str, args: argparse.Namespace) -> Responder:
    """Return the model at `path` that answers as the flags say."""
    return responder_of(argparse.Namespace(**(vars(args) | {"model_path": path})))


def _name_error(path: str) -> str:
    """Return why the checkpoint's name cannot name the folder of its results, or ""."""
    name = get_model_name_from_path(path)
    if name.strip(". ") == "" or any(part in name for part in ("/", "\\")) or not name.isprintable():
        return f"expected a name that can be that of a folder below --out, got {name!r}"
    return "" if len(name.encode()) <= _LONGEST_NAME else f"expected a name of {_LONGEST_NAME} bytes or fewer"


def validate_checkpoints(args: argparse.Namespace) -> None:
    """Raise where a checkpoint is missing, or where both would write to one folder."""
    names = [get_model_name_from_path(path) for path in checkpoints(args)]
    if len(set(names)) < len(names):
        raise EvaluateError(f"--compare {args.compare}: its folder's name is the checkpoint's, and so is its --out")
    for path in checkpoints(args):
        responder_at(path, args).identity()
