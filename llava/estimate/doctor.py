"""What a training will meet on this machine, on a page.

`python -m dama doctor --config-of scripts/dama_7b.sh` looks at the flags that the script would train with: libraries,
data, memory, disk, one batch; every training begins with the short form, llava/estimate/preflight.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dama.console import report_error, say
from llava.estimate import machine
from llava.estimate.checks import check_data, check_host, check_libraries, check_machine, check_model
from llava.estimate.disk import check_disk
from llava.estimate.fit import check_memory
from llava.estimate.flags import plan_of_flags, plan_of_script
from llava.estimate.lengths import lengths_of
from llava.estimate.machine import GIB
from llava.estimate.one_batch import try_one_batch
from llava.estimate.plan import Plan, error_text

EPILOG = """\
Further flags go to the script, or without one to the training: python -m dama doctor --task DPO --data_path ...
"""


def examine(plan: Plan) -> None:
    """Everything, one batch only if all else is there."""
    check_libraries(plan)
    check_machine(plan)
    items = check_data(plan)
    shape = check_model(plan)
    if shape is not None:
        try:
            check_memory(plan, shape, *lengths_of(plan.arguments, items, shape.patches))
        except ValueError as error:  # of flags that are among the errors already
            plan.note("memory", f"not estimated: {error}")
        check_host(plan, shape)
    check_disk(plan, shape, len(items))
    if shape is not None and items and not plan.errors and Path(str(plan.arguments[0].model_name_or_path)).is_dir():
        try_one_batch(plan, shape, items)


def rehearse(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Starts the rehearsal in a process of its own; its exit status, 1 where memory runs out."""
    from llava.rehearsal.launch import GIB as CARD
    from llava.rehearsal.launch import environment

    plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
    smallest = min((memory for _, memory in machine.gpus()), default=0) / GIB
    words = ["--config-of", args.config_of, *flags] if args.config_of else flags
    command = [sys.executable, "-m", "llava.rehearsal.training", str(plan.ranks), *words]
    return subprocess.run(command, env=environment(args.gpu_memory or smallest or CARD), check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where something is missing for the training run."""
    parser = argparse.ArgumentParser("dama doctor", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--config-of", "--config_of", metavar="SCRIPT", help="script whose training is looked at")
    parser.add_argument("--ranks", type=int, default=1, help="processes, without a script. Default: %(default)s")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="run two steps of the training on a CUDA device without a GPU, and print the memory of each phase",
    )  # fmt: skip
    parser.add_argument(
        "--gpu_memory", "--gpu-memory", type=float, metavar="GIB",
        help="with --rehearse: memory of a GPU in GiB (default: this machine's GPUs, else 79.25, a card of 80 GB)",
    )  # fmt: skip
    args, flags = parser.parse_known_args(argv)
    try:
        if args.rehearse:
            return rehearse(args, flags)
        plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
        examine(plan)
    except (ValueError, OSError) as error:
        report_error(error, "dama doctor")
        return 1
    for title, text in plan.notes:
        say(f"{title:<12}{text}")
    say(error_text(plan.errors) if plan.errors else "all there")
    return 1 if plan.errors else 0


if __name__ == "__main__":
    sys.exit(main())
