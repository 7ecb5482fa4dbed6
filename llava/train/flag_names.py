"""Names of the training flags without what they mean: old names, names of other trainers, errors of unknown flags.

Importing this module is quick; llava/train/arguments.py brings torch and transformers along.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dama.console import log, report_error
from dama.flag_table import find_entry, rebuild

COMMANDS = ("llava.train.train", "llava.train.train_dpo")  # train_mem.py calls check_flags_early itself
TABLE = Path(__file__).resolve().parents[1] / "flags.json"

# Flags of LLaVA's and of the released code's scripts that transformers 5 or this repository calls otherwise.
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--group_by_length": "--group_by_modality_length",
}
# ... or no longer has, and why.
DROPPED = {
    "--logging_dir": "TensorBoard's folder is set by the environment variable TENSORBOARD_LOGGING_DIR",
    "--save_safetensors": "weights are always saved as safetensors",
    "--overwrite_output_dir": "a run continues from its last checkpoint; give another --output_dir to start anew",
    "--past_index": "transformers removed it",
    "--mpt_attn_impl": "MPT is not supported",
    "--data_source_names": "one file of pairs is read",
    "--data_source_weights": "one file of pairs is read",
    "--eval_data_source_names": "--eval_pairs holds pairs out",
    "--image_token_len": "the vision tower says how many tokens an image has",
    "--dpo_token_weight": "token-weighted log-probs are not part of DAMA",
    "--dpo_token_weighted": "token-weighted log-probs are not part of DAMA",
    "--shuffle_data": "training data are shuffled by --data_seed",
}


# What other trainers, or people, call flags.
SHORT_NAMES = {
    "accumulation_steps": "gradient_accumulation_steps",
    "batch_size": "per_device_train_batch_size",
    "beta": "dpo_beta",
    "data": "data_path",
    "dataset": "data_path",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "images": "image_folder",
    "length": "model_max_length",
    "lora": "lora_enable",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_length": "model_max_length",
    "max_seq_length": "model_max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "out": "output_dir",
    "output": "output_dir",
    "per_device_batch_size": "per_device_train_batch_size",
    "scheduler": "lr_scheduler_type",
    "steps": "max_steps",
    "template": "version",
    "use_lora": "lora_enable",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}


def translate_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Old flag names to today's: (arguments, one warning for each change)."""
    translated: list[str] = []
    warnings: list[str] = []
    skipping = False
    for word in argv:
        flag, has_value, value = word.partition("=")
        if not word.startswith("--"):
            if not skipping:
                translated.append(word)
            continue
        flag = "--" + flag[2:].replace("-", "_")
        skipping = flag in DROPPED
        if skipping:
            warnings.append(f"{flag} is ignored: {DROPPED[flag]}")
            continue
        if flag in RENAMED:
            warnings.append(f"{flag} is now {RENAMED[flag]}")
            flag = RENAMED[flag]
        translated.append(f"{flag}={value}" if has_value else flag)
    return merge_warmup(translated, warnings), warnings


def merge_warmup(words: Sequence[str], warnings: list[str]) -> list[str]:
    """Replace --warmup_ratio, which transformers 5 no longer has, by --warmup_steps under transformers' old rule.

    Steps above 0 win over the ratio. A ratio of 1 warms up over all steps, which --warmup_steps 1 would not.

    Raises:
        ValueError: a value that is not a number, or a ratio outside 0 to 1.
    """
    rest, ratio = take_flag(words, "--warmup_ratio")
    if ratio is None:
        return rest
    others, steps = take_flag(rest, "--warmup_steps")
    if steps is not None and as_number("--warmup_steps", steps) > 0:
        warnings.append(f"--warmup_ratio {ratio} is ignored: --warmup_steps {steps} wins over it")
        return [*others, "--warmup_steps", steps]
    share = as_number("--warmup_ratio", ratio)
    if not 0 <= share <= 1:
        raise ValueError(f"--warmup_ratio: expected a share of all steps from 0 to 1, got {ratio}")
    warnings.append("--warmup_ratio is now --warmup_steps")
    return [*others, "--warmup_steps", ratio if share < 1 else repr(math.nextafter(1, 0))]


def take_flag(words: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """(words without `flag` and its value, the last value given or None)."""
    rest: list[str] = []
    found: str | None = None
    remaining = iter(words)
    for word in remaining:
        name, has_value, value = word.partition("=")
        if name != flag:
            rest.append(word)
        else:
            found = value if has_value else next(remaining, "")
    return rest, found


def as_number(flag: str, text: str) -> float:
    """Value of a numeric flag. Raises ValueError naming the flag."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{flag}: expected a number, got {text!r}") from error


def nearest_flag(flag: str, known: Sequence[str]) -> str:
    """`; did you mean --X?`, or nothing where no flag is near."""
    name = flag.lstrip("-").lower().replace("-", "_")
    if name in SHORT_NAMES:
        return f"; did you mean --{SHORT_NAMES[name]}?"
    names = [other.removeprefix("--") for other in known if "-" not in other.removeprefix("--")]
    close = difflib.get_close_matches(name, [*names, *SHORT_NAMES], n=1, cutoff=0.7)
    parts = sorted((other for other in names if name in other or other in name), key=len) if len(name) > 2 else []
    best = [SHORT_NAMES.get(other, other) for other in [*close, *parts]][:1]
    return f"; did you mean --{best[0]}?" if best else ""


def raise_flag_error(message: str) -> NoReturn:
    """Raise the ValueError of one line for an error message of argparse."""
    flag, colon, reason = message.removeprefix("argument ").partition(": ")
    raise ValueError(f"{flag.split('/')[0]}{colon}{reason} (--help lists the flags)")


def reject_unknown_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise ValueError naming the flag nearest to each that is unknown."""
    known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    unknown = [flag for flag in dict.fromkeys(flags) if flag not in known]
    if unknown:
        hints = [f"{flag}: no such flag{nearest_flag(flag, known)}" for flag in unknown]
        raise ValueError(f"{'; '.join(hints)} (--help lists the flags)")


class _EarlyParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise_flag_error(message)


def check_flags_early(argv: Sequence[str], table: Path = TABLE) -> None:
    """Print --help, or find wrong names and values of flags, before the long imports.

    Nothing happens where the table is not of these sources: parse_arguments finds the same.

    Raises:
        ValueError: an unknown flag, one without its value, or a value that is no number or no choice.
        SystemExit: after --help.
    """
    entry = find_entry(table, "llava.train")
    if entry is None or "--help_all" in argv:
        return
    words, _ = translate_flags(argv)
    if "--help" in words or "-h" in words:
        log(entry["help"])
        sys.exit(0)
    parser = rebuild(entry["parser"], _EarlyParser)
    reject_unknown_flags(words, parser)
    parser.parse_known_args(words)


def training_help() -> str:
    """What --help of training prints, from the table where that is of these sources."""
    if entry := find_entry(TABLE, "llava.train"):
        return str(entry["help"])
    from llava.train.arguments import help_text

    return help_text()


def check_command_flags() -> None:
    """In a process that runs train.py or train_dpo.py, whose long imports follow: end with help or a flag's error."""
    script = Path(sys.argv[0]) if sys.argv else Path()
    module = next((word for before, word in itertools.pairwise(sys.orig_argv) if before == "-m"), "")
    named = module if str(script) == "-m" else f"llava.train.{script.stem}"
    here = str(script) == "-m" or script.resolve().parent == Path(__file__).resolve().parent
    if not here or named not in COMMANDS:
        return
    try:
        check_flags_early(sys.argv[1:])
    except ValueError as error:
        report_error(error, f"{named.rpartition('.')[2]}.py")
        sys.exit(2)
