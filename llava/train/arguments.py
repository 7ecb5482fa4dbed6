"""The flags of training: three dataclasses and their parser, which reports all errors at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from transformers import HfArgumentParser

from dama.console import log
from dama.train.arguments import PreferenceArguments, described
from llava.train.flag_checks import BASE_AS_REFERENCE, find_errors, report_errors
from llava.train.flag_help import describe_flags
from llava.train.flag_names import raise_flag_error, reject_unknown_flags, translate_flags

__all__ = [
    "BASE_AS_REFERENCE",
    "Arguments",
    "DataArguments",
    "ModelArguments",
    "TrainingArguments",
    "dataclasses_of",
    "find_errors",
    "help_text",
    "parse_arguments",
    "translate_flags",
]


@dataclass
class ModelArguments:
    """Flags of the model."""

    model_name_or_path: str | None = described(
        None, "Checkpoint to start from: a LLaVA or LLaMA folder, or a hub name. For DPO it is also the reference."
    )
    version: str | None = described(
        "v1", "Prompt template: v1 (LLaVA-v1.5), plain (projector pre-training), llava_llama_2, mpt, ..."
    )
    freeze_backbone: bool = described(False, "Do not train the language model.")
    tune_mm_mlp_adapter: bool = described(False, "Train the projector only, and save it as mm_projector.bin.")
    vision_tower: str | None = described(None, "Folder or hub name of the CLIP tower. Default: the checkpoint's own.")
    mm_vision_select_layer: int | None = described(
        None, "Hidden layer that gives the features, counted as in Python (-2 in LLaVA-v1.5). Default: the "
        "checkpoint's, else -1."
    )  # fmt: skip
    pretrain_mm_mlp_adapter: str | None = described(None, "mm_projector.bin to start the projector from.")
    mm_projector_type: str | None = described(
        None, "linear, mlp2x_gelu (LLaVA-v1.5), mlp<depth>x_gelu or identity. Default: the checkpoint's, else linear."
    )
    mm_use_im_start_end: bool | None = described(
        None, "Put <im_start> and <im_end> around each image. Default: the checkpoint's, else False."
    )
    mm_use_im_patch_token: bool | None = described(
        None, "Add <im_patch> to the vocabulary. Default: the checkpoint's, else False."
    )
    mm_patch_merge_type: str | None = described(
        None, "How crops of one image are joined: flat, spatial or spatial_unpad. Default: the checkpoint's, else flat."
    )
    mm_vision_select_feature: str | None = described(
        None, "patch, or cls_patch with the class token. Default: the checkpoint's, else patch."
    )
    system_prompt: str = described("", "Models other than LLaVA-1.5: text of a system turn before each question.")
    freeze_vision: bool = described(True, "Models other than LLaVA-1.5: do not train the vision encoder.")
    min_pixels: int | None = described(
        None, "Models other than LLaVA-1.5 whose resolution follows the image: fewest pixels that an image is scaled "
        "to. Default: the checkpoint's."
    )  # fmt: skip
    max_pixels: int | None = described(
        None, "Models other than LLaVA-1.5 whose resolution follows the image: most pixels that an image is scaled to, "
        "which bounds its tokens. Default: the checkpoint's."
    )  # fmt: skip
    processor_option: list[str] = field(
        default_factory=list,
        metadata={"help": "Models other than LLaVA-1.5: NAME=VALUE for the image processor, the value as JSON."},
    )


@dataclass
class DataArguments:
    """Flags of the data."""

    data_path: str | None = described(
        None, "Training data. Task DPO: preference pairs as RLAIF-V's JSON or JSONL. Task LM: LLaVA's conversations."
    )
    image_folder: list[str] | None = described(
        None, "Folder that the image paths in the data are relative to. Given more than once, the last "
        "folder that holds a path counts, and symbolic links may lead from one into another.", action="extend",
    )  # fmt: skip
    image_aspect_ratio: str | None = described(
        None, "pad: to a square with the mean color (LLaVA-v1.5); square: resize and cut the center. "
        "Default: the checkpoint's, else pad."
    )  # fmt: skip
    lazy_preprocess: bool = described(True, "Kept for LLaVA's scripts; data are always tokenized when needed.")
    is_multimodal: bool = described(True, "Kept for LLaVA's scripts; whether a row has an image is seen from the row.")
    on_bad_image: str = described("fail", "A missing or unreadable image: 'fail', or 'skip' and list the row.")
    on_long_pair: str = described("fail", "A pair longer than --model_max_length: 'fail', or 'skip' and list it.")
    hardness: str | None = described(
        None, "Folder written by `python -m dama hardness`; gives delta of each pair and delta_bar. Without it the "
        "scores inside the data file (chosen_logits, rejected_logits) are used."
    )  # fmt: skip
    reference: str | None = described(
        None,
        "Folder written by `python -m dama reference`; or 'base', with LoRA and --freeze_mm_mlp_adapter True: the "
        "model with its adapters off, computed on the fly. Default: the log-probs inside the data file.",
    )
    eval_pairs: float = described(
        0.0, "Pairs held out for evaluation during training: a share below 1 (at least one pair), or a number. Whole "
        "images are held out, drawn by --seed."
    )  # fmt: skip


@dataclass
class TrainingArguments(PreferenceArguments):
    """LLaVA's training arguments."""

    cache_dir: str | None = described(None, "Folder for downloads.")
    freeze_mm_mlp_adapter: bool = described(False, "Do not train the projector.")
    mm_projector_lr: float | None = described(None, "Learning rate of the projector. Default: --learning_rate.")
    group_by_modality_length: bool = described(False, "Batches of one modality and of similar lengths (task LM).")
    task: str = described("LM", "LM: supervised fine-tuning; DPO: preference alignment with DAMA.")

    auto_micro_batch: bool = described(
        False, "Let the memory estimate choose --per_device_train_batch_size and --gradient_accumulation_steps; the "
        "pairs of a step stay as many."
    )  # fmt: skip

    auto_checkpointing: bool = described(
        False, "Switch --gradient_checkpointing off where the memory estimate says that a step fits without it; a step "
        "then takes about a quarter less time."
    )  # fmt: skip
    check_memory: bool = described(
        True, "Stop before the model is loaded where the estimate of a step's memory is above what a GPU has."
    )
    float32_logits: bool = described(
        True, "On GPUs in half precision: log-probs from float32 logits; off, each R has 0.3 to 0.7 nats of noise more."
    )
    compile_layers: bool = described(
        False, "Compile each decoder layer's norms, rotary embedding and MLP into fused kernels (torch.compile; has no "
        "effect with gradient checkpointing)."
    )  # fmt: skip


Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]


def help_text() -> str:
    """Return the help of training, with each flag's meaning and default."""
    return describe_flags(ModelArguments, DataArguments, TrainingArguments)


def parse_arguments(argv: Sequence[str] | None = None, task: str | None = None) -> Arguments:
    """Flags to the three dataclasses, checked. `task` overrides the default of --task.

    Raises:
        ValueError: listing every error.
    """
    words, warnings = translate_flags(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        log(help_text())
        sys.exit(0)
    model_args, data_args, training_args = dataclasses_of(words, task)
    if not data_args.is_multimodal:  # as in LLaVA, where a vision tower switches it on again
        warnings.append("--is_multimodal False is ignored: whether a row has an image is seen from the row")
        data_args.is_multimodal = True
    for warning in warnings:
        log(f"warning: {warning}")
    errors = [*find_errors(model_args, data_args, training_args), *report_errors(training_args)]
    if errors:
        raise ValueError("\n  ".join([f"{len(errors)} error(s) in the flags:", *errors]))
    return model_args, data_args, training_args


class FlagParser(HfArgumentParser):
    """transformers' parser; an error of the flags is a ValueError of one line."""

    def __init__(self) -> None:
        groups = (ModelArguments, DataArguments, TrainingArguments)
        super().__init__(groups, description=__doc__, prog="train_mem.py", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise_flag_error(message)


def dataclasses_of(words: Sequence[str], task: str | None = None) -> Arguments:
    """The three dataclasses of flags under today's names; `task` overrides the default of --task.

    Raises:
        ValueError: one line on an unknown flag, a value of the wrong type, or flags that transformers refuses.
    """
    parser = FlagParser()
    if task is not None:
        parser.set_defaults(task=task)
    words = ["--help" if word == "--help_all" else word for word in words]
    reject_unknown_flags(words, parser)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # of transformers' own checks
        raise ValueError(str(error)) from error
    if rest:
        raise ValueError(f"{' '.join(rest)}: expected a flag before each value (--help lists the flags)")
    model_args, data_args, training_args = parsed
    return model_args, data_args, training_args
