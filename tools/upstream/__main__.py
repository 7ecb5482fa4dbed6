"""`python -m tools.upstream PATH_TO_A_LLAVA_CHECKOUT`: compares this repository with LLaVA, name by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dama.console import USER_ERROR, log, report_error
from dama.flags import FlagParser, Help
from tools.upstream.comparison import compare
from tools.upstream.inventory import UpstreamError, inventory_of
from tools.upstream.report import left_out_page, report_lines, write_page

PROGRAM = "tools.upstream"
DESCRIPTION = """\
Compares this repository with a LLaVA checkout, by syntax tree: files of llava/ and scripts/, public names, signatures,
flags and defaults of the command lines, fields of config.json. Nothing of the checkout is imported or run.

A name is present if it can be imported from the same module. Differences are printed with how they differ, omissions
with the reason. Exits with status 1 if a name is missing and no reason is known.
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command."""
    parser = FlagParser(PROGRAM, description=DESCRIPTION, formatter_class=Help)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "checkout", nargs="?", metavar="PATH_TO_A_LLAVA_CHECKOUT", help="folder with llava/ and scripts/"
    )
    subject.add_argument("--left_out", action="store_true", help="print docs/left_out.md instead of comparing")
    parser.add_argument("--html", metavar="FILE", help="also write the comparison as a page")
    parser.add_argument("--all", action="store_true", help="also list the names that are the same or added")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if names are missing without a reason, USER_ERROR for no checkout."""
    args = build_parser().parse_args(argv)
    if args.left_out:
        sys.stdout.write(left_out_page())
        return 0
    try:
        findings = compare(inventory_of(args.checkout), inventory_of(Path(__file__).resolve().parents[2]))
    except UpstreamError as error:
        report_error(error, PROGRAM)
        return USER_ERROR
    for line in report_lines(findings, everything=args.all):
        log(line)
    if args.html:
        write_page(findings, args.html, str(args.checkout))
        log(f"written to {args.html}")
    missing = [f"{finding.file}  {finding.name}".rstrip() for finding in findings if finding.state == "missing"]
    if missing:
        lines = [f"missing without a reason ({len(missing)}):", *missing]
        remedy = "Remedy: implement them, or give the reason in LEFT_OUT of tools/upstream/reasons.py"
        sys.stderr.write("\n  ".join(lines) + f"\n{remedy}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
