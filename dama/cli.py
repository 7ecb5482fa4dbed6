"""`python -m dama COMMAND`: the table of commands. A command's module is imported only when it is called.

Such a module has DESCRIPTION (and EXAMPLES), `add_flags(parser)`, and `run(args)`, which returns nothing or an exit
status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dama.console import USER_ERROR, end_on_interrupt, report_error
from dama.flags import FlagParser, Help
from dama.version import __version__

DESCRIPTION = """\
Data- and model-aware preference alignment of multimodal LLMs, stage by stage. Each stage writes a folder: records as
JSONL and a manifest.json. A stage is skipped if it is complete for the same inputs, continued if it was interrupted,
and refused, with the difference named, if its inputs changed.
"""
EPILOG = """\
Benchmarks: python -m eval.evaluate. Chat: python -m llava.serve.cli, python -m llava.serve.gradio_web_server. A wheel
has all of these; the shell scripts and TinyCOCO (scripts/, playground/) come with the repository only.
"""


@dataclass(frozen=True)
class Command:
    """A row of the table: the module, a line of help, and whether unknown flags are passed on as `args.rest`."""

    module: str
    help: str
    passes_on: bool = False


COMMANDS = {
    "prepare": Command("dama.prepare.command", "check, filter and split a preference data set, and extract its images"),
    "hardness": Command("dama.hardness.command", "score how much better each preferred answer fits its image"),
    "hardness_show": Command("dama.hardness.show_command", "page and plot of hardness; also `hardness show`"),
    "reference": Command("llava.commands.reference", "log-probs of both answers under the model training starts from"),
    "train": Command("llava.commands.train", "align a model with DAMA or another objective", passes_on=True),
    "merge": Command("dama.merge", "join the shards of a stage"),
    "synth": Command("dama.synth.command", "preference pairs from generative and reward models, without annotators"),
    "doctor": Command(
        "llava.commands.doctor",
        "check a training on this machine: memory, disk, one batch",
        passes_on=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, USER_ERROR after an error that was reported."""
    if argv is None:
        end_on_interrupt()  # the installed command `dama` is not run by python -m
    words = _joined(list(sys.argv[1:] if argv is None else argv))
    name = next((word for word in words if word in COMMANDS), "")  # DeepSpeed's launcher puts --local_rank before it
    parser = build_parser(name)
    args, rest = parser.parse_known_args(words)
    command = COMMANDS[args.command]
    if rest and not command.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return importlib.import_module(command.module).run(args) or 0
    except Exception as error:
        report_error(error, f"dama {args.command}")
        return USER_ERROR


def build_parser(called: str = "") -> argparse.ArgumentParser:
    """Build the parser of all commands, with flags for the one that is called."""
    parser = FlagParser("dama", description=DESCRIPTION, epilog=EPILOG, formatter_class=Help)
    parser.add_argument("--version", action="version", version=f"dama {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher also sets LOCAL_RANK
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name != called:
            commands.add_parser(name, help=command.help)
            continue
        module = importlib.import_module(command.module)
        texts: dict[str, Any] = {"description": module.DESCRIPTION, "epilog": getattr(module, "EXAMPLES", None)}
        if command.passes_on:  # an abbreviation could be another program's flag, whose help may be added
            texts |= {"allow_abbrev": False, "conflict_handler": "resolve"}
        module.add_flags(commands.add_parser(name, help=command.help, formatter_class=Help, **texts))
    return parser


def _joined(words: list[str]) -> list[str]:
    """Join a command of two words, `hardness show`."""
    start = next((index for index, word in enumerate(words) if word in COMMANDS), len(words))
    two = "_".join(words[start : start + 2])
    return [*words[:start], two, *words[start + 2 :]] if two in COMMANDS else words
