"""Names of flags: those of older scripts, those that are gone, and what people type instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

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
    """Return a flag's value as a number; ValueError where it is none."""
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
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    parts = sorted((other for other in names if name in other or other in name), key=len) if len(name) > 2 else []
    best = [*close, *parts][:1]
    return f"; did you mean --{best[0]}?" if best else ""
