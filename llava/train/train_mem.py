"""The command that LLaVA's scripts start: `train_mem.py --task LM` fine-tunes, `--task DPO` aligns with DAMA."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from dama.console import end_on_interrupt, report_error
from dama.finished import NOT_PATHS, Call
from dama.notices import without_loading_bars
from dama.train.checkpoints import log_finished
from llava.supported import is_hub_model, validate_supported_model, validate_trained_model
from llava.train.flag_names import check_flags_early

HALF_PRECISIONS = ("bf16", "fp16")


def main(argv: Sequence[str] | None = None, program: str = "train_mem.py") -> int:
    """Run the command and return its exit status; `program` is what its errors begin with."""
    if argv is None:
        end_on_interrupt()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        report_error(error, program)
        return 2
    return 0


def run(argv: Sequence[str]) -> None:
    """Parses the flags and trains. What is imported here takes seconds."""
    validate_gpu_count(argv)
    check_flags_early(argv)
    validate_half_precision(argv)
    model, is_preference = value_of(argv, "model_name_or_path"), value_of(argv, "task") == "DPO"
    (validate_trained_model if is_preference else validate_supported_model)(model, "--model_name_or_path")
    call = training_call(argv)
    if call is not None and call.is_finished():
        log_finished(str(value_of(argv, "output_dir")))
        return
    from dama.train.builds import watched_builds
    from llava.train import train as sft
    from llava.train import train_dpo, train_hub
    from llava.train.arguments import parse_arguments

    arguments = parse_arguments(argv)
    # Saving has its own line; the bars that are left are the training's and those of downloads.
    with without_loading_bars(), watched_builds() if arguments[2].deepspeed else nullcontext():
        if arguments[2].task != "DPO":
            sft.run(arguments, call=call)
        elif is_hub_model(arguments[0].model_name_or_path):
            train_hub.run(arguments, call=call)
        else:
            train_dpo.run(arguments, call=call)


def validate_gpu_count(argv: Sequence[str]) -> None:
    """Raises ValueError where a launcher started more ranks on this machine than it has GPUs, unless they are on CPUs.

    Ranks that shared a GPU, or met on none, would end in an error of NCCL's or wait for each other.
    """
    ranks = max(int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))  # torchrun, DeepSpeed
    if ranks == 1 or wants_cpu(argv):
        return
    import torch

    found = torch.cuda.device_count()
    if ranks > found:
        fewer = f"start {found} (--num_gpus {found}, --nproc_per_node {found}), or " if found else ""
        raise ValueError(
            f"GPUs: {ranks} ranks need {ranks}, found {found} that torch can use; {fewer}train on CPUs with "
            "DS_ACCELERATOR=cpu in front of the command and --use_cpu True behind it"
        )


def validate_half_precision(argv: Sequence[str]) -> None:
    """Raises ValueError for --bf16 or --fp16 on a machine without a GPU, unless --use_cpu says that this is meant."""
    precision = next((name for name in HALF_PRECISIONS if is_true(argv, name)), None)
    if precision is None or wants_cpu(argv):
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"--{precision} True: expected a GPU, found none that torch can use; leave --{precision} out and add "
            "--use_cpu True to train a small model on the CPU in float32 (`nvidia-smi` lists this machine's GPUs)"
        )


def training_call(argv: Sequence[str]) -> Call | None:
    """This call, by which its finished model is found again; None without an output folder."""
    out, words = value_of(argv, "output_dir"), [word for word in argv if not word.startswith("--local_rank")]
    if not out:
        return None
    return Call.begin("training", words, values_without(words, ("image_folder", "output_dir", *NOT_PATHS)), out)


def values_without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The values of all flags but these."""
    found, taking = [], True
    for word in argv:
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            taking = flag.replace("-", "_").removeprefix("__") not in names
            found += [value] * bool(taking and has_value)
        elif taking:
            found.append(word)
    return found


def value_of(argv: Sequence[str], name: str) -> str | None:
    """The last value given for a flag; None where it is not given."""
    found = None
    for word, value in zip(argv, [*argv[1:], ""]):
        flag, has_value, given = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            found = given if has_value else value
    return found


def wants_cpu(argv: Sequence[str]) -> bool:
    """Whether the flags choose CPUs: --use_cpu, or --no_cuda as it was called."""
    return is_true(argv, "use_cpu") or is_true(argv, "no_cuda")


def is_true(argv: Sequence[str], name: str) -> bool:
    """Whether a flag is given alone or with a true value, at its first place."""
    for word, value in zip(argv, [*argv[1:], ""]):
        flag, has_value, given = word.replace("-", "_").partition("=")
        if flag == f"__{name}":
            text = (given if has_value else value).lower()
            return text.startswith("--") or text in ("", "true", "t", "yes", "y", "1")
    return False


if __name__ == "__main__":
    sys.exit(main())
