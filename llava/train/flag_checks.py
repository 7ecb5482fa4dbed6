"""Checks of the flags that need no model and no data, reported together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.pairs import missing_folders
from dama.train.arguments import objective_errors
from dama.train.reference import BASE_AS_REFERENCE
from llava.conversation import get_template

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

# --train_sampling_strategy, by whether the task is DPO
SAMPLING = {False: ("random", "sequential", "group_by_length"), True: ("random", "sequential")}


def find_errors(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> list[str]:
    """Return everything that can be known to be wrong before any long work, one message per error."""
    errors = [
        *path_errors(model_args, data_args),
        *choice_errors(model_args, data_args, args),
        *value_errors(data_args, args),
        *unsupported_flags(model_args, args),
        *resume_errors(args),
    ]
    for check in (lambda: get_template(model_args.version or "v1"), args.weighting):
        try:
            check()
        except (ValueError, KeyError) as error:
            errors.append(str(error))
    return [*errors, *preference_errors(data_args, args)] if args.task == "DPO" else errors


def path_errors(model_args: ModelArguments, data_args: DataArguments) -> list[str]:
    """Check that model, data and images are named, and that data and images exist."""
    data, folders = data_args.data_path, data_args.image_folder or []
    got = repr(data) if data else "none"
    checks = [
        (bool(model_args.model_name_or_path), "--model_name_or_path: expected a folder or hub name, got none"),
        (bool(data) and Path(str(data)).exists(), f"--data_path: expected an existing path, got {got}"),
        (bool(folders), "--image_folder: expected an existing path, got none"),
    ]
    missing = [f"--image_folder: expected an existing path, got {str(path)!r}" for path in missing_folders(folders)]
    return [*failed(checks), *missing]


def choice_errors(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> list[str]:
    """Check the flags that have a fixed set of values; None among them is the default."""
    choices: list[tuple[str, Any, tuple]] = [
        ("task", args.task, ("LM", "DPO")),
        ("bits", args.bits, (4, 8, 16)),
        ("debug_sync", args.debug_sync, ("off", "warn", "error")),
        ("on_bad_image", data_args.on_bad_image, ("fail", "skip")),
        ("on_long_pair", data_args.on_long_pair, ("fail", "skip")),
        ("image_aspect_ratio", data_args.image_aspect_ratio, (None, "pad", "square", "anyres")),
        ("mm_vision_select_feature", model_args.mm_vision_select_feature, (None, "patch", "cls_patch")),
        ("mm_patch_merge_type", model_args.mm_patch_merge_type, (None, "flat", "spatial", "spatial_unpad")),
    ]
    errors = []
    for name, value, allowed in choices:
        if value not in allowed:
            named = ["the default" if choice is None else str(choice) for choice in allowed]
            errors.append(f"--{name}: expected one of {', '.join(named)}, got {value!r}")
    return errors


def value_errors(data_args: DataArguments, args: TrainingArguments) -> list[str]:
    """Check numbers and combinations that hold for both tasks."""
    return failed([
        (args.bits == 16 or args.lora_enable,
         f"--bits {args.bits}: a quantized base is trained with --lora_enable True"),
        (args.bits == 16 or not uses_zero3(args),
         f"--bits {args.bits}: expected ZeRO-2 or no DeepSpeed, got --deepspeed {args.deepspeed}, whose ZeRO-3 cannot "
         "divide quantized weights among the ranks; use scripts/zero2.json, or --bits 16"),
        (data_args.eval_pairs >= 0, f"--eval_pairs: expected a share or a number, got {data_args.eval_pairs}"),
        (args.per_device_train_batch_size >= 1,
         f"--per_device_train_batch_size: expected 1 or more, got {args.per_device_train_batch_size}"),
        (args.lora_r >= 1 or not args.lora_enable, f"--lora_r: expected 1 or more, got {args.lora_r}"),
        (not args.lora_weight_path, "--lora_weight_path: starting from an adapter is not supported; merge it first "
         "with scripts/merge_lora_weights.py"),
    ])  # fmt: skip


def uses_zero3(args: TrainingArguments) -> bool:
    """Whether these arguments' own --deepspeed says stage 3."""
    return bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()


def preference_errors(data_args: DataArguments, args: TrainingArguments) -> list[str]:
    """Check what preference training needs besides."""
    stages = [("hardness", data_args.hardness), ("reference", data_args.reference)]
    checks = [
        (stage in (None, BASE_AS_REFERENCE) or (Path(stage) / "manifest.json").is_file(),
         f"--{name}: expected a folder written by `python -m dama {name}`, got {stage!r}")
        for name, stage in stages
    ]  # fmt: skip
    checks += [
        (data_args.image_aspect_ratio != "anyres",
         "--image_aspect_ratio anyres: not supported for --task DPO; use pad or square"),
        (args.eval_strategy == "no" or data_args.eval_pairs > 0,
         f"--eval_strategy {args.eval_strategy}: needs held-out pairs, give --eval_pairs (a share or a number)"),
        (args.bits == 16 or data_args.reference == BASE_AS_REFERENCE,
         f"--bits {args.bits}: the reference must be the same quantized base, give --reference base"),
        (data_args.reference != BASE_AS_REFERENCE or (args.lora_enable and args.freeze_mm_mlp_adapter),
         "--reference base: needs --lora_enable True and --freeze_mm_mlp_adapter True, or what is left with the "
         "adapters off is not the model that training started from"),
    ]  # fmt: skip
    return [*objective_errors(args), *failed(checks)]


def failed(checks: list[tuple[bool, str]]) -> list[str]:
    """Return the messages of the checks that do not hold."""
    return [message for holds, message in checks if not holds]


def unsupported_flags(model_args: ModelArguments, args: TrainingArguments) -> list[str]:
    """Flags that would be accepted and then ignored, or end in an error in the middle of a run."""
    adapter_file = model_args.pretrain_mm_mlp_adapter
    checks = [
        (args.label_smoothing_factor == 0, f"--label_smoothing_factor {args.label_smoothing_factor}: not supported, "
         "its loss does not know the image tokens; leave it at 0"),
        (not args.neftune_noise_alpha, f"--neftune_noise_alpha {args.neftune_noise_alpha}: not supported, images "
         "and text share one sequence of embeddings; leave it out"),
        (args.model_max_length >= 1, f"--model_max_length: expected 1 or more tokens, got {args.model_max_length}"),
        (not args.auto_find_batch_size, "--auto_find_batch_size: not supported, it would change the pairs or rows of "
         "a step; use --auto_micro_batch True"),
        (not args.ignore_data_skip, "--ignore_data_skip: not supported, a resumed run would train on rows twice"),
        (args.train_sampling_strategy in SAMPLING[args.task == "DPO"], f"--train_sampling_strategy "
         f"{args.train_sampling_strategy}: expected one of {', '.join(SAMPLING[args.task == 'DPO'])}"),
        (not args.load_best_model_at_end or args.eval_strategy != "no", "--load_best_model_at_end: needs evaluations "
         "during training, give --eval_strategy (and --eval_pairs)"),
        (args.task == "DPO" or args.eval_strategy == "no", f"--eval_strategy {args.eval_strategy.value}: not "
         "supported for --task LM, which has no held-out rows; leave it at no"),
        (not (model_args.tune_mm_mlp_adapter and model_args.mm_use_im_start_end), "--tune_mm_mlp_adapter True with "
         "--mm_use_im_start_end True: not supported, choose one of the two"),
        (not (model_args.tune_mm_mlp_adapter and args.lora_enable), "--tune_mm_mlp_adapter True with --lora_enable "
         "True: adapters would not train; choose one of the two"),
        (adapter_file is None or Path(adapter_file).is_file(),
         f"--pretrain_mm_mlp_adapter: expected an existing file, got {adapter_file!r}"),
    ]  # fmt: skip
    return failed(checks)


def report_errors(args: TrainingArguments) -> list[str]:
    """Names in --report_to that are not known, or whose package is not installed here."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    installed = get_available_reporting_integrations()
    checks = []
    for name in args.report_to:
        known = name in INTEGRATION_TO_CALLBACK
        checks += [
            (known, f"--report_to {name}: expected none, all or some of {', '.join(INTEGRATION_TO_CALLBACK)}"),
            (not known or name in (*installed, "flyte"),  # the list leaves that one out
             f"--report_to {name}: expected an installed package, found none; install it, or give none or "
             f"{' '.join(installed)}"),
        ]  # fmt: skip
    return failed(checks)


def resume_errors(args: TrainingArguments) -> list[str]:
    """Why --resume_from_checkpoint cannot be honored, known from the flags and the folders' names."""
    value, folder = args.resume_from_checkpoint, Path(str(args.output_dir))
    if value is None:
        return []
    if value.lower() in ("true", "false"):
        found, wanted = any(folder.glob("checkpoint-*")), value.lower() == "true"
        if found == wanted:
            return []
        remedy = (
            "leave the flag out to train from scratch" if wanted else "give another --output_dir to train from scratch"
        )
        return [
            f"--resume_from_checkpoint {value}: expected {'a' if wanted else 'no'} checkpoint in '{folder}', found "
            f"{'none' if wanted else 'some'}; {remedy}"
        ]
    if (Path(value) / "trainer_state.json").is_file():
        return []
    return [f"--resume_from_checkpoint: expected a checkpoint folder with trainer_state.json, got '{value}'"]
