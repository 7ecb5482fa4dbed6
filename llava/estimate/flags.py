"""Turn a script or flags into the plan of the training run that they would start."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from dama.train.arguments import zero_file
from llava.estimate.plan import Plan
from llava.train.arguments import dataclasses_of
from llava.train.flag_checks import find_errors
from llava.train.flag_names import translate_flags

COMMAND = "train_mem.py"


def plan_of_script(script: str, more: Sequence[str]) -> Plan:
    """Flags, ranks and stages of the training that a script would start, from what its --dry-run prints."""
    if "--dry-run" not in text_of(Path(script)):  # it would start
        raise ValueError(f"--config-of: expected a script with --dry-run, such as scripts/dama_7b.sh, got {script!r}")
    done = subprocess.run(["bash", script, "--dry-run", *more], capture_output=True, text=True, check=False)
    commands = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    errors = done.stderr.strip().splitlines() if done.returncode else []
    training = next((words for words in commands if any(word.endswith(COMMAND) for word in words)), None)
    if training is None:
        raise ValueError("\n".join([f"--config-of {script}: expected it to call {COMMAND}, found no call", *errors]))
    start = next(i for i, word in enumerate(training) if word.endswith(COMMAND))
    stages = {words[3]: _values(words[4:]) for words in commands if words[:3] == ["python", "-m", "dama"]}
    written = [values["--out"] for values in stages.values() if "--out" in values]
    plan = plan_of_flags(training[start + 1 :], ranks_of(training[:start]), written)
    hardness = stages.get("hardness", {})
    if "--clip" in hardness and not Path(hardness["--clip"]).is_dir():
        plan.clip = hardness["--clip"], hardness.get("--pretrained", "openai")
    plan.errors += errors
    return plan


def ranks_of(launcher: Sequence[str]) -> int:
    """Processes that a deepspeed command starts on this machine."""
    options = _values(launcher)
    if "--include" in options:
        return len(options["--include"].partition(":")[2].split(","))
    return int(options.get("--num_gpus", 1))


def text_of(script: Path) -> str:
    """A script's text, behind that of what it sources from its folder; empty where there is none."""
    if not script.is_file():
        return ""
    text = script.read_text()
    sourced = re.findall(r'^source .*/([\w.]+)"?$', text, re.MULTILINE)
    return "".join(text_of(script.parent / name) for name in sourced) + text


def _values(words: Sequence[str]) -> dict[str, str]:
    return {flag: value for flag, value in zip(words, words[1:]) if flag.startswith("--")}


def plan_of_flags(words: Sequence[str], ranks: int, written: Sequence[str] = ()) -> Plan:
    """From the flags of train_mem.py. Nothing is started: DeepSpeed's file is only noted.

    Args:
        written: folders that stages before the training will write.
    """
    words = translate_flags(words)[0]
    values = _values(words)
    config = values.get("--deepspeed")
    cuda = values.get("--use_cpu", "false").lower() not in ("true", "1")
    if config is not None:
        at = words.index("--deepspeed")
        words = words[:at] + words[at + 2 :]
    if not torch.cuda.is_available():  # transformers would refuse bf16 before all else is said
        optimizer = ["--optim", "adamw_torch_fused"] * (cuda and "--optim" not in words)  # as on a GPU
        words = [*words, *optimizer, "--use_cpu", "True"]
    arguments = dataclasses_of(words)
    later = tuple(f"--{name}:" for name, folder in vars(arguments[1]).items() if folder in written)
    said_below = ("--data_path:", "--image_folder:", *later)
    errors = [error for error in find_errors(*arguments) if not error.startswith(said_below)]
    arguments[2].deepspeed = zero_file(config)
    return Plan(arguments, ranks, cuda, errors=errors)
