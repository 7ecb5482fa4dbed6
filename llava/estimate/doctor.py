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

from dama import cli
from dama.console import log
from llava.estimate import machine
from llava.estimate.checks import check_data, check_host, check_libraries, check_machine, check_model
from llava.estimate.disk import check_disk
from llava.estimate.fit import check_memory
from llava.estimate.flags import plan_of_flags, plan_of_script
from llava.estimate.lengths import lengths_of
from llava.estimate.machine import GIB
from llava.estimate.one_batch import try_one_batch
from llava.estimate.plan import Plan, error_text


def examine(plan: Plan) -> None:
    """Everything, one batch only if all else is there."""
    check_libraries(plan)
    check_machine(plan)
    items = check_data(plan)
    shape = check_model(plan, items)
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


def run_doctor(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print the page; 1 if something is missing. `flags` go to the script, or to training."""
    if args.rehearse:
        return rehearse(args, flags)
    plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
    examine(plan)
    for title, text in plan.notes:
        log(f"{title:<12}{text}")
    log(error_text(plan.errors) if plan.errors else "all there")
    return 1 if plan.errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `python -m dama doctor` with these words."""
    return cli.main(["doctor", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
