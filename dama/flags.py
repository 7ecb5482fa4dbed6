"""Flags that commands share: one dialect for all, pairs and output folder, device, shard."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dama.checked_pairs import CheckedPairs, check_pair_file, read_pair_file
from dama.console import USER_ERROR, log, printable
from dama.images import missing_folders
from dama.pairs import PairsError
from dama.stage import Shard


class CommandError(ValueError):
    """Errors of a command's flags or files, all in one message."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, and room for long flags."""

    def __init__(self, prog: str) -> None:
        """Fix the width: help does not depend on the terminal."""
        super().__init__(prog, max_help_position=32, width=110)


class FlagParser(argparse.ArgumentParser):
    """Argument parser that accepts --image_folder and --image-folder alike, whichever a command declares."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words after spelling their flags as declared; values and unknown flags stay as they are."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._declared, words[:end]), *words[end:]], namespace)

    def _declared(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or self._knows(flag):
            return word
        spellings = ("--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-"))
        return next((s + equals + value for s in spellings if self._knows(s)), word)

    def _knows(self, flag: str) -> bool:
        """Whether a flag is declared, or may abbreviate one that is."""
        declared = self._option_string_actions
        return flag in declared or (self.allow_abbrev and any(option.startswith(flag) for option in declared))

    def error(self, message: str) -> NoReturn:
        """Exit with the status of every user error."""
        self.print_usage(sys.stderr)
        self.exit(USER_ERROR, printable(f"{self.prog}: error: {message}\n"))


def fail(errors: Sequence[str]) -> NoReturn:
    """Raise CommandError with all errors of a command in one message."""
    raise CommandError("\n\n".join(errors))


# ---------------------------------------------------------------------------------------------------- pairs and output


def add_pair_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command that reads pairs and writes a stage."""
    group = parser.add_argument_group("pairs and output")
    group.add_argument(
        "--data", required=True, metavar="FILE", help="preference pairs: JSON list or JSONL, with the fields above"
    )
    group.add_argument(
        "--image_folder", action="append", required=True, metavar="DIR",
        help="folder that image paths are relative to. If given more than once, the last folder that contains a path "
        "is used, and symbolic links may lead from one folder into another",
    )  # fmt: skip
    group.add_argument("--out", required=True, metavar="DIR", help="output folder of the stage; created if missing")
    group.add_argument("--overwrite", action="store_true", help="start again if --out contains a stage of other inputs")
    group.add_argument(
        "--on_bad_image", choices=("fail", "skip"), default="fail",
        help="missing or unreadable images: report all of them and stop, or leave out their pairs and list them in the "
        "manifest (default: fail)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="number of processes that read and decode images ahead; 0 for none (default: CPU cores, at most 8: "
        "%(default)s)",
    )  # fmt: skip


def add_batch_flags(group: argparse._ArgumentGroup, items: str, default: int) -> None:
    """Add the flags of how a stage runs its model; `items` are what a batch consists of."""
    group.add_argument(
        "--batch_size", type=int, default=default, metavar="N",
        help=f"number of {items} per batch (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of weights and compute (default: fp32)"
    )


def pair_flag_errors(args: argparse.Namespace) -> list[str]:
    """Collect errors of the pair flags that need no look at the pairs."""
    errors = []
    if not Path(args.data).is_file():
        errors.append(f"--data {args.data}: no such file")
    errors += [f"--image_folder {folder}: no such folder" for folder in missing_folders(args.image_folder)]
    if args.workers < 0:
        errors.append(f"--workers {args.workers}: expected 0 or more processes")
    return errors + output_errors(Path(args.out))


def paths_missing(args: argparse.Namespace) -> bool:
    """Whether --data or an --image_folder does not exist."""
    return not Path(args.data).is_file() or bool(missing_folders(args.image_folder))


def output_errors(out: Path) -> list[str]:
    """Say whether an output folder, or the closest existing parent, is not writable."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return []
    return [f"--out {out}: {existing} is not a folder that can be written to"]


def load_pairs(args: argparse.Namespace, errors: Sequence[str]) -> CheckedPairs:
    """Read the pairs of --data and check every image.

    Args:
        args: values of the pair flags.
        errors: errors of the command's other flags.

    Raises:
        CommandError: with `errors` and all errors of the pairs in one message.
    """
    flags = [*pair_flag_errors(args), *errors]
    if paths_missing(args):
        fail(flags)
    try:
        checked = check_pair_file(
            read_pair_file(args.data),
            args.image_folder,
            args.on_bad_image,
            subject=args.data,
            workers=max(1, args.workers),
            progress=int(os.environ.get("RANK", "0")) == 0,
        )
    except PairsError as error:
        fail([*flags, str(error)])
    if flags:
        fail(flags)
    for pair in checked.skipped[:5]:
        log(f"skipped row {pair.id}: {pair.reason}")
    if len(checked.skipped) > 5:
        log(f"... and {len(checked.skipped) - 5} more, all listed in the manifest")
    return checked


# -------------------------------------------------------------------------------------------------------------- device


def device_errors(device: str) -> list[str]:
    """Collect errors of --device: an unknown name, or a CUDA device that torch does not find."""
    if device in ("auto", "cpu"):
        return []
    if not re.fullmatch(r"cuda(:\d+)?", device):
        return [f"--device {device}: expected auto, cpu, cuda or cuda:N"]
    import torch

    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        return [f"--device {device}: this machine has {found} CUDA devices that torch can use"]
    return []


def pick_device(device: str) -> str:
    """Resolve auto to the CUDA device of this process's local rank, or to the CPU."""
    import torch

    if device != "auto" or not torch.cuda.is_available():
        return "cpu" if device == "auto" else device
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


# --------------------------------------------------------------------------------------------------------------- shard


def add_shard_flag(group: Any) -> None:
    """Add --shard."""
    group.add_argument(
        "--shard", metavar="I/N",
        help="process only part I (from 0) of N; the last to finish merges them into the bytes of an undivided run "
        "(default: the rank under torchrun, DeepSpeed's launcher or srun; everything without a launcher)",
    )  # fmt: skip


def pick_shard(shard: str | None, errors: list[str]) -> Shard:
    """Take the shard from the flag or from the launcher; an error of the flag is appended to `errors`."""
    if shard is None:
        return Shard.from_launcher()
    try:
        return Shard.parse(shard)
    except ValueError as error:
        errors.append(f"--{error}")
        return Shard.from_launcher()


@contextmanager
def logging_on_every_rank() -> Iterator[None]:
    """Let this rank log whichever it is: the rank that merged the shards prints the result."""
    rank = os.environ.pop("RANK", None)
    try:
        yield
    finally:
        os.environ.update({} if rank is None else {"RANK": rank})
