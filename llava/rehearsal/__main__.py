"""python -m llava.rehearsal SCRIPT [ARGS] or -m MODULE [ARGS]: runs Python on a CUDA device without a GPU."""

from __future__ import annotations

import argparse
import os
import resource
import sys

from dama.console import report_error
from llava.rehearsal.build import RehearsalError
from llava.rehearsal.launch import CAPABILITY, DEVICES, GIB, NAME, environment

PROGRAM = "python -m llava.rehearsal"


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = argparse.ArgumentParser(
        prog=PROGRAM, description="Run a Python script or module on a CUDA device without a GPU. Kernels do nothing; "
        "memory, argument checks and synchronizations are those of torch's CUDA build.",
        usage="%(prog)s [--gib N] [--devices N] [--name NAME] [--capability M.N] (SCRIPT | -m MODULE) [ARGS ...]",
    )  # fmt: skip
    p.add_argument("--gib", type=float, default=GIB, help="memory of each device in GiB (default: %(default)s)")
    p.add_argument("--devices", type=int, default=DEVICES, help="number of devices, 1 to 8 (default: %(default)s)")
    p.add_argument("--name", default=NAME, help="name of the devices (default: %(default)s)")
    p.add_argument("--capability", type=capability, default=CAPABILITY, metavar="M.N",
                   help="compute capability (default: {}.{})".format(*CAPABILITY))  # fmt: skip
    p.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="module to run, its arguments")
    p.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT", help="script to run, its arguments")
    return p


def capability(text: str) -> tuple[int, int]:
    """Parse a compute capability such as 9.0."""
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise argparse.ArgumentTypeError(f"expected two numbers such as 9.0, got {text!r}")
    return int(major), int(minor)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = parser()
    options = p.parse_args(argv)
    program = ["-m", *options.module] if options.module else options.script
    if not program:
        p.error("expected a script, or -m and a module")
    try:
        variables = environment(options.gib, options.devices, options.name, options.capability)
    except (RehearsalError, ValueError) as error:
        report_error(error, PROGRAM)
        return 2
    # A crash would write the devices' whole address space to a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *program], variables)


if __name__ == "__main__":
    sys.exit(main())
