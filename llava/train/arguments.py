"""The flags of training: three dataclasses, the checks that report all faults at once, and LLaVA's old flag names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from dama.console import say
from dama.pairs import missing_folders
from dama.weighting import Selection, Strategy, Variant, WeightingConfig
from llava.conversation import get_template
from llava.notices import without_build_notices
from llava.train.flag_names import raise_flag_error, reject_unknown_flags, translate_flags


def described(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
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


@dataclass
class DataArguments:
    data_path: str | None = described(
        None, "Training data. Task DPO: preference pairs as RLAIF-V's JSON or JSONL. Task LM: LLaVA's conversations."
    )
    image_folder: list[str] | None = described(
        None, "Folder that the image paths in the data are relative to. Given more than once, the last "
        "folder that holds a path counts, and symbolic links may lead from one into another.", action="extend",
    )  # fmt: skip
    image_aspect_ratio: str | None = described(
        None, "pad: to a square with the mean colour (LLaVA-v1.5); square: resize and cut the centre. "
        "Default: the checkpoint's, else pad."
    )  # fmt: skip
    lazy_preprocess: bool = described(True, "Kept for LLaVA's scripts; data are always tokenised when needed.")
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
        0.0, "Pairs held out for evaluation during training: a share below 1, or a number. Whole images are held out, "
        "drawn by --seed."
    )  # fmt: skip


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = described(None, "Folder for downloads.")
    optim: str | None = described(None, "Optimizer. Default: adamw_torch_fused on GPUs, adamw_torch on CPUs.")
    logging_nan_inf_filter: bool = described(
        False, "Log a loss of NaN or infinity as the loss of the step before (it hides a training that failed, and the "
        "host waits for the GPU twice in every micro-batch)."
    )  # fmt: skip
    remove_unused_columns: bool = described(False, "Kept for LLaVA's scripts.")
    freeze_mm_mlp_adapter: bool = described(False, "Do not train the projector.")
    model_max_length: int = described(2048, "Longest sequence in tokens, image features included.")
    bits: int = described(16, "16, or 8 or 4 for a quantised base under LoRA.")
    double_quant: bool = described(True, "4 bits: quantise the scales too.")
    quant_type: str = described("nf4", "4 bits: nf4 or fp4.")
    lora_enable: bool = described(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = described(64, "LoRA: rank.")
    lora_alpha: int = described(16, "LoRA: scale numerator; the update is multiplied by alpha / r.")
    lora_dropout: float = described(0.05, "LoRA: dropout.")
    lora_weight_path: str = described("", "LoRA: adapter to start from.")
    lora_bias: str = described("none", "LoRA: which biases train: none, all or lora_only.")
    mm_projector_lr: float | None = described(None, "Learning rate of the projector. Default: --learning_rate.")
    trust_checkpoint: bool = described(
        False, "Resume from a checkpoint whose files this user's runs did not sign. Loading it can run code that its "
        "pickles contain."
    )  # fmt: skip
    group_by_modality_length: bool = described(False, "Batches of one modality and of similar lengths (task LM).")
    task: str = described("LM", "LM: supervised fine-tuning; DPO: preference alignment with DAMA.")

    dpo_beta: float = described(0.1, "beta of the paper: strength of the pull towards the reference.")
    dpo_use_average: bool = described(False, "Mean instead of sum of the answer's token log-probs.")
    strategy: Strategy = described(
        Strategy.BOTH, "What sets beta per pair: none (plain DPO), data (alpha_D), model (alpha_M), both (DAMA), "
        "beta_dpo (Wu et al. 2024)."
    )  # fmt: skip
    variant: Variant = described(
        Variant.PAPER, "paper: Algorithm 1, defined per optimiser step, whatever the hardware; released: what the "
        "authors' released code computes, per gathered micro-batch."
    )  # fmt: skip
    selection: Selection = described(
        Selection.AUTO, "Which pairs of a step are trained on: off (all), sample (Eq. 10-11), nearest (the K smallest "
        "|R - R_bar|), random; auto: off for none and data, sample otherwise."
    )  # fmt: skip
    select_ratio: float = described(0.75, "K / N: share of a step's pairs that is selected (12 of 16).")
    gamma: float = described(0.9, "Decay of the running mean R_bar (Eq. 14).")
    beta_min: float = described(1e-3, "Lower bound of beta per pair.")
    delta_bar: float | None = described(
        None, "Mean hardness. Default: computed from the data in use. 0.0482190464911681 is the released code's."
    )
    check_reference: bool = described(
        True, "Stop after the first forward pass when policy and reference log-probs are not the same model's."
    )
    shared_prefix: bool = described(
        True, "Run image and question once for both answers of a pair, packed without padding; False: two padded rows."
    )
    logp_chunk: int = described(1024, "Answer positions whose logits exist at one time (memory: chunk x vocabulary).")

    pair_log: bool = described(
        False, "Write pair_log.jsonl to the output folder: for every pair of every step its R, alpha_D, beta, selected."
    )
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
    debug_sync: str = described(
        "off", "Host-device synchronizations in the forward pass: off, warn (name each), or error."
    )

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        self.optim = self.optim or ("adamw_torch_fused" if on_gpu else "adamw_torch")
        self.dataloader_pin_memory: bool = self.dataloader_pin_memory and on_gpu  # memory to copy to GPUs from
        super().__post_init__()

    @cached_property
    def _setup_devices(self) -> torch.device:
        """This process's own GPU: transformers would spread its batches over all that it sees (DataParallel)."""
        with without_build_notices():  # the ranks of a distributed run join here
            device = super()._setup_devices
        if self.n_gpu > 1:
            say(
                f"warning: {self.n_gpu} GPUs are visible and one process uses one; start one process for each, with "
                "`deepspeed --include localhost:0,1,...` or `torchrun --nproc_per_node N`, to use them all"
            )
            self._n_gpu: int = 1
        return device

    def weighting(self) -> WeightingConfig:
        """The method's constants as the flags give them."""
        return WeightingConfig(
            strategy=Strategy(self.strategy),
            variant=Variant(self.variant),
            selection=Selection(self.selection),
            beta=self.dpo_beta,
            gamma=self.gamma,
            keep=self.select_ratio,
            beta_min=self.beta_min,
            seed=self.data_seed if self.data_seed is not None else self.seed,
        )


# --train_sampling_strategy, by whether the task is DPO
SAMPLING = {False: ("random", "sequential", "group_by_length"), True: ("random", "sequential")}
BASE_AS_REFERENCE = "base"  # of --reference: the model with its adapters off

Arguments = tuple[ModelArguments, DataArguments, TrainingArguments]

USAGE = """\
usage: train_mem.py --task LM|DPO --model_name_or_path M --data_path FILE --image_folder DIR --output_dir DIR [flags]

Trains a LLaVA-v1.5 model: --task LM fine-tunes on conversations, --task DPO aligns on preference pairs with DAMA (or,
with --strategy none, plain DPO). One optimiser step takes per_device_train_batch_size x GPUs x
gradient_accumulation_steps rows or pairs. A run that was interrupted continues from its last checkpoint in
--output_dir. Start it with `deepspeed --include localhost:0,1,2,3` (the GPUs to use) and --deepspeed
scripts/zero2.json, or plainly with python, which uses one GPU.

example (what scripts/dama_7b.sh runs after the stages `python -m dama hardness` and `python -m dama reference`):
  deepspeed --include localhost:0,1,2,3 llava/train/train_mem.py --deepspeed scripts/zero2.json --task DPO \\
      --bf16 True --model_name_or_path liuhaotian/llava-v1.5-7b --data_path pairs.jsonl --image_folder images \\
      --hardness runs/hardness --reference runs/reference --num_train_epochs 4 --learning_rate 5e-7 \\
      --lr_scheduler_type cosine --warmup_steps 0.1 --per_device_train_batch_size 4 --output_dir runs/dama
"""
# transformers' own flags that most runs set; the others are listed by --help_all.
OFTEN_USED = {
    "output_dir": "Folder for checkpoints and the final model.",
    "deepspeed": "DeepSpeed's JSON file: scripts/zero2.json.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimiser steps; overrides epochs.",
    "per_device_train_batch_size": "Rows or pairs in one forward pass on each GPU.",
    "gradient_accumulation_steps": "Forward passes in one optimiser step.",
    "learning_rate": "Peak learning rate (5e-7 for DAMA on 7B, 1e-5 with LoRA).",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "warmup_steps": "Steps of warm-up; a number below 1 is a share of all steps.",
    "weight_decay": "AdamW's weight decay.",
    "max_grad_norm": "Clips the gradient's norm; 0 is off.",
    "bf16": "Weights and arithmetic in bfloat16.",
    "full_determinism": "Same bits in every run on the same GPUs too, by slower kernels; on CPUs runs always repeat.",
    "gradient_checkpointing": "Recompute activations in backward: less memory, about a third more time; see "
    "--auto_checkpointing.",
    "eval_strategy": "When held-out pairs are evaluated: no, steps or epoch.",
    "save_strategy": "When checkpoints are written: no, steps, epoch or best.",
    "save_total_limit": "Checkpoints kept; the best by --metric_for_best_model is kept beside the last.",
    "metric_for_best_model": "eval_loss, eval_rewards/accuracies, ...",
    "logging_steps": "Steps between log lines.",
    "report_to": "none, tensorboard or wandb.",
    "seed": "Of initialisation, dropout and held-out pairs.",
    "data_seed": "Of the order of the data and of DAMA's selection. Default: --seed.",
    "dataloader_num_workers": "Processes that prepare images ahead.",
    "resume_from_checkpoint": "Checkpoint folder to continue from. Default: the last one in --output_dir.",
    "use_cpu": "Train without a GPU.",
}


def help_text() -> str:
    """The flags by what they are about, each with its meaning and default."""
    own = TrainingArguments.__annotations__
    lora = ("lora_", "bits", "double_quant", "quant_type")
    dama_flags = (
        "dpo_beta", "dpo_use_average", "strategy", "variant", "selection", "select_ratio", "gamma", "beta_min",
        "delta_bar", "check_reference", "shared_prefix", "logp_chunk", "pair_log",
    )  # fmt: skip
    groups = {
        "DAMA (--task DPO)": [TrainingArguments.__dataclass_fields__[name] for name in dama_flags],
        "data": list(DataArguments.__dataclass_fields__.values()),
        "model": list(ModelArguments.__dataclass_fields__.values()),
        "LoRA and quantisation": [TrainingArguments.__dataclass_fields__[n] for n in own if n.startswith(lora)],
    }
    rest = [name for name in own if name not in dama_flags and not name.startswith(lora)]
    groups["training"] = [TrainingArguments.__dataclass_fields__[name] for name in [*rest, *OFTEN_USED]]
    lines = [USAGE]
    for title, entries in groups.items():
        lines.append(f"{title}:")
        for entry in entries:
            text = OFTEN_USED.get(entry.name) or entry.metadata["help"]
            default = "" if entry.default in (None, MISSING) or "Default" in text else f" Default: {entry.default}."
            lines += wrap(text + default, 118, initial_indent=f"  --{entry.name:<30}", subsequent_indent=" " * 34)
        lines.append("")
    lines.append("--help_all lists every flag of transformers' TrainingArguments too.")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None, task: str | None = None) -> Arguments:
    """Flags to the three dataclasses, checked. `task` overrides the default of --task.

    Raises:
        ValueError: listing every fault.
    """
    words, warnings = translate_flags(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        say(help_text())
        sys.exit(0)
    model_args, data_args, training_args = dataclasses_of(words, task)
    if not data_args.is_multimodal:  # as in LLaVA, where a vision tower switches it on again
        warnings.append("--is_multimodal False is ignored: whether a row has an image is seen from the row")
        data_args.is_multimodal = True
    for warning in warnings:
        say(f"warning: {warning}")
    faults = find_faults(model_args, data_args, training_args)
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} fault(s) in the flags:", *faults]))
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


def find_faults(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> list[str]:
    """Everything that can be known to be wrong before any long work."""
    faults = []

    def expect(holds: bool, fault: str) -> None:
        if not holds:
            faults.append(fault)

    def one_of(name: str, value: Any, allowed: tuple) -> None:
        named = ["the default" if choice is None else str(choice) for choice in allowed]
        expect(value in allowed, f"--{name}: expected one of {', '.join(named)}, got {value!r}")

    expect(bool(model_args.model_name_or_path), "--model_name_or_path: expected a folder or hub name, got none")
    data, folders = data_args.data_path, data_args.image_folder or []
    got = repr(data) if data else "none"
    expect(bool(data) and Path(str(data)).exists(), f"--data_path: expected an existing path, got {got}")
    expect(bool(folders), "--image_folder: expected an existing path, got none")
    faults += [f"--image_folder: expected an existing path, got {str(path)!r}" for path in missing_folders(folders)]
    one_of("task", args.task, ("LM", "DPO"))
    one_of("bits", args.bits, (4, 8, 16))
    one_of("debug_sync", args.debug_sync, ("off", "warn", "error"))
    one_of("on_bad_image", data_args.on_bad_image, ("fail", "skip"))
    one_of("on_long_pair", data_args.on_long_pair, ("fail", "skip"))
    one_of("image_aspect_ratio", data_args.image_aspect_ratio, (None, "pad", "square", "anyres"))
    one_of("mm_vision_select_feature", model_args.mm_vision_select_feature, (None, "patch", "cls_patch"))
    one_of("mm_patch_merge_type", model_args.mm_patch_merge_type, (None, "flat", "spatial", "spatial_unpad"))
    expect(
        args.bits == 16 or args.lora_enable, f"--bits {args.bits}: a quantised base is trained with --lora_enable True"
    )
    expect(data_args.eval_pairs >= 0, f"--eval_pairs: expected a share or a number, got {data_args.eval_pairs}")
    expect(
        args.per_device_train_batch_size >= 1,
        f"--per_device_train_batch_size: expected 1 or more, got {args.per_device_train_batch_size}",
    )
    expect(not args.lora_weight_path, "--lora_weight_path: starting from an adapter is not supported; merge it first "
           "with scripts/merge_lora_weights.py")  # fmt: skip
    faults += unsupported_flags(model_args, args)
    faults += resume_errors(args)
    for check in (lambda: get_template(model_args.version or "v1"), args.weighting):
        try:
            check()
        except (ValueError, KeyError) as error:
            faults.append(str(error))
    if args.task == "DPO":
        for name, stage in (("hardness", data_args.hardness), ("reference", data_args.reference)):
            expect(
                stage in (None, BASE_AS_REFERENCE) or (Path(stage) / "manifest.json").is_file(),
                f"--{name}: expected a folder written by `python -m dama {name}`, got {stage!r}",
            )
        expect(
            data_args.image_aspect_ratio != "anyres",
            "--image_aspect_ratio anyres: not supported for --task DPO; use pad or square",
        )
        expect(
            args.eval_strategy == "no" or data_args.eval_pairs > 0,
            f"--eval_strategy {args.eval_strategy}: needs held-out pairs, give --eval_pairs (a share or a number)",
        )
        expect(
            args.bits == 16 or data_args.reference == BASE_AS_REFERENCE,
            f"--bits {args.bits}: the reference must be the same quantised base, give --reference base",
        )
        expect(
            data_args.reference != BASE_AS_REFERENCE or (args.lora_enable and args.freeze_mm_mlp_adapter),
            "--reference base: needs --lora_enable True and --freeze_mm_mlp_adapter True, or what is left with the "
            "adapters off is not the model that training started from",
        )
    return faults


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
    return [error for holds, error in checks if not holds]


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
