"""The miniature world.

python -m playground.tinycoco scenes | vlm | report | benchmarks | judge | study | build | figures | examples
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dama.console import report_error


def at_least(low: int) -> Callable[[str], int]:
    """The type of a flag that counts something."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, got {text}")
        return int(text)

    return number


def build_parser() -> argparse.ArgumentParser:
    """Parser of all subcommands; importing their modules is left to `main`, so that --help is fast."""
    parser = argparse.ArgumentParser(prog="python -m playground.tinycoco", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    count, positive = at_least(0), at_least(1)
    scenes = commands.add_parser("scenes", help="draw the pairs' pictures and held-out scenes, write their questions")
    scenes.add_argument("--out", type=Path, required=True, help="folder for images/, pairs.json, questions.jsonl")
    scenes.add_argument("--pairs", type=count, help="use only the first so many pairs (default: all)")
    scenes.add_argument("--scenes", type=count, default=300, help="held-out scenes (default: %(default)s)")
    scenes.add_argument("--split", choices=("test", "validation"), default="test", help="which (default: %(default)s)")
    scenes.add_argument(
        "--second_images", action="store_true",
        help="also draw each pair's scene without one object that its chosen answer names, and add an answer that is "
        "right for it: what `dama train --corruption field` compares with",
    )  # fmt: skip
    vlm = commands.add_parser("vlm", help="make a tiny LLaVA-OneVision from the tiny LLaVA by a short fine-tuning")
    vlm.add_argument("--out", type=Path, required=True, help="folder; the model will be in its model/")
    vlm.add_argument("--scenes", type=positive, default=1600, help="to fine-tune on, 16 a step (default: %(default)s)")
    vlm.add_argument("--seed", type=int, default=0, help="of the fine-tuning (default: %(default)s)")
    report = commands.add_parser("report", help="score the captions of a run, print the table, write the report")
    report.add_argument("--run", type=Path, required=True, help="folder with data/, hardness/, captions/")
    report.add_argument(
        "--models", nargs="+", required=True, metavar="NAME=FOLDER", help="the one before alignment first"
    )
    report.add_argument("--smoke", action="store_true", help="say in the report that so small a run shows nothing")
    benchmarks = commands.add_parser(
        "benchmarks",
        help="write the benchmarks' questions about held-out scenes, in the official files' formats",
    )
    benchmarks.add_argument("--out", type=Path, required=True, help="folder; DAMA_BENCH_DATA for scripts/eval_*.sh")
    benchmarks.add_argument("--scenes", type=positive, default=100, help="held-out scenes (default: %(default)s)")
    benchmarks.add_argument("--split", choices=("test", "validation"), default="test", help="default: %(default)s")
    judge = commands.add_parser(
        "judge", help="serve a judge for their MMHal-Bench on 127.0.0.1: it rates by rules and is no language model"
    )
    judge.add_argument("--port", type=int, default=8765, help="default: %(default)s; 0 takes a free one")
    study = commands.add_parser("study", help="compare preference objectives on a grid, write a page: 8 core hours")
    study.add_argument("--quick", action="store_true", help="DPO and DAMA, two rates, one seed: about 15 core minutes")
    study.add_argument("--out", type=Path, help="cells, kept (default: runs/study, or runs/study_quick)")
    study.add_argument(
        "--docs",
        type=Path,
        help="for study.html and study.json (default: docs; OUT with --quick or --page, or where a cell failed)",
    )
    study.add_argument(
        "--cores", type=positive, default=os.cpu_count() or 1, help="cells at a time (default: %(default)s)"
    )
    study.add_argument("--again", type=positive, metavar="N", help="only repeat N finished cells at random and compare")
    study.add_argument("--page", action="store_true", help="only write the page, of what is finished, to OUT")
    study.add_argument(
        "--unpack", type=Path, metavar="FOLDER",
        help="first put the cells of FOLDER's archives into OUT, as those of docs/study_cells, to go on from there",
    )  # fmt: skip
    build = commands.add_parser("build", help="rebuild every shipped file from nothing (up to 40 minutes on 2 cores)")
    build.add_argument("--seed", type=int, default=0, help="of all training and sampling (default: %(default)s)")
    examples = commands.add_parser("examples", help="write the example images of the chat page")
    examples.add_argument("--out", type=Path, help="folder (default: llava/serve/example_images)")
    figures = commands.add_parser("figures", help="measure the shipped files against their marks (1 minute)")
    here, work = Path(__file__).parent, Path("runs/tinycoco_build")
    for command in (build, figures):
        command.add_argument("--out", type=Path, default=here, help="has weights/, pairs.json (default: this package)")
        command.add_argument("--work", type=Path, default=work, help="for what lies between (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code, 1 after an error."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "build":
            # Before torch is imported: threads that wait by spinning would slow each other down on two cores.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            os.environ.setdefault("GOMP_SPINCOUNT", "0")
            from playground.tinycoco.build import build

            build(args.out, args.work, args.seed)
        elif args.command == "study":
            from playground.tinycoco.study import runner

            return runner.main(args.out, args.docs, args.cores, args.quick, args.again, args.page, args.unpack)
        elif args.command == "vlm":
            from playground.tinycoco import vlm

            vlm.build(args.out, args.scenes, args.seed)
        elif args.command == "benchmarks":
            from playground.tinycoco.benchmarks import write_benchmarks

            write_benchmarks(args.out, args.scenes, args.split)
        elif args.command == "judge":
            from playground.tinycoco.judge import serve

            serve(args.port)
        elif args.command == "examples":
            from playground.tinycoco.examples import FOLDER, write_examples

            write_examples(args.out or FOLDER)
        elif args.command == "figures":
            from playground.tinycoco.build import judge, measure

            judge(measure(args.out, args.work))
        else:
            from playground.tinycoco import run

            if args.command == "scenes":
                run.prepare(args.out, args.pairs, args.scenes, args.split, second_images=args.second_images)
            else:
                run.report(args.run, run.parse_models(args.models), args.smoke)
    except Exception as error:
        report_error(error, "tinycoco")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
