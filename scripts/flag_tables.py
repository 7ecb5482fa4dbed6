"""Write the tables of flags that answer `--help` at once (dama/flag_table.py): llava/flags.json, eval/flags.json.

python scripts/flag_tables.py           # after a command's flags changed
python scripts/flag_tables.py --check   # exit code 1 where a table is out of date
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dama.console import end_on_interrupt, log, write_atomic
from dama.flag_table import Entry, describe, make_entry

ROOT = Path(__file__).resolve().parents[1]
GENERATION = "llava/generation/flags.py"
# Commands that import torch or transformers, and the further files that their flags come from.
MODULES: dict[str, list[str]] = {
    "llava.eval.model_vqa": [GENERATION],
    "llava.eval.model_vqa_loader": [GENERATION, "llava/eval/model_vqa.py"],
    "llava.eval.run_llava": ["llava/serve/chat.py", "llava/constants.py"],
    "llava.eval.generate": [GENERATION],
    "llava.serve.cli": [GENERATION, "llava/serve/chat.py"],
    "llava.serve.gradio_web_server": [GENERATION, "llava/serve/chat.py"],
    "llava.model.consolidate": [],
    "llava.model.apply_delta": [],
    "llava.model.make_delta": [],
    "llava.model.export": [],
    "eval.evaluate": [GENERATION, "eval/evaluate_flags.py", "eval/benchmarks.py"],
    "eval.score_answers": ["eval/evaluate_flags.py", "eval/benchmarks.py"],
}
TRAINING = "llava.train"  # train_mem.py, train.py and train_dpo.py, which have the same flags
TRAINING_SOURCES = [
    "llava/train/arguments.py",
    "llava/train/flag_names.py",
    "llava/train/flag_help.py",
    "dama/train/arguments.py",
    "dama/losses.py",
    "dama/corruptions.py",
    "dama/weighting.py",
]


class Captured(Exception):
    """Carries a command's parser out of it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def main() -> int:
    """Write the tables that changed; with --check, write none and return 1 where one is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table is out of date")
    check, status = parser.parse_args().check, 0
    for package, entries in tables().items():
        path = ROOT / package / "flags.json"
        if not path.exists() or json.loads(path.read_bytes()) != entries:
            status = int(check)
            log(f"{path.relative_to(ROOT)}: {'out of date' if check else f'{len(entries)} commands written'}")
            if not check:
                lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
                write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return status


def tables() -> dict[str, dict[str, Entry]]:
    """Entries by package and command."""
    found: dict[str, dict[str, Entry]] = {"llava": {}, "eval": {}}
    for module, more in MODULES.items():
        sources = [f"{module.replace('.', '/')}.py", *more]
        found[module.split(".")[0]][module] = make_entry(ROOT, sources, [], parser=describe(parser_of(module)))
    found["llava"][TRAINING] = training_entry()
    return found


def training_entry() -> Entry:
    """Entry of train_mem.py, whose flags come from dataclasses."""
    from llava.train.arguments import FlagParser, help_text

    return make_entry(
        ROOT, TRAINING_SOURCES, ["transformers"], help=help_text(), parser=described_training(FlagParser())
    )


def described_training(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The parser without the flags' help, which `help_text` gives."""
    spec = describe(parser)
    for group in spec["groups"]:
        for flag in group["flags"]:
            flag["help"] = None
    return spec | {"formatter": "HelpFormatter"}


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that `python -m module` reads its flags with."""
    with captured_parsers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of modules that are imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except Captured as captured:
            return captured.parser
    raise ValueError(f"{module}: expected a command that parses flags")


@contextmanager
def captured_parsers() -> Iterator[None]:
    """A block in which parsing flags raises Captured."""

    def capture(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise Captured(self)

    original, argv, hook = argparse.ArgumentParser.parse_known_args, sys.argv, sys.excepthook
    argparse.ArgumentParser.parse_known_args = capture  # type: ignore[method-assign]
    sys.argv = ["command"]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
        sys.argv, sys.excepthook = argv, hook


if __name__ == "__main__":
    end_on_interrupt()
    sys.exit(main())
