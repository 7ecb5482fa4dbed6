"""The help of training: flags by what they are about, each with its meaning and default."""

from __future__ import annotations

from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from textwrap import wrap
from typing import Any

USAGE = """\
usage: train_mem.py --task LM|DPO --model_name_or_path M --data_path FILE --image_folder DIR --output_dir DIR [flags]

Trains a LLaVA-v1.5 model: --task LM fine-tunes on conversations, --task DPO aligns on preference pairs with DAMA (or,
with --strategy none, plain DPO). One optimizer step takes per_device_train_batch_size x GPUs x
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
    "deepspeed": "DeepSpeed's JSON file, such as scripts/zero2.json; or the name of an installed one: zero2, zero3 or "
    "zero3_offload.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps; overrides epochs.",
    "per_device_train_batch_size": "Rows or pairs in one forward pass on each GPU.",
    "gradient_accumulation_steps": "Forward passes in one optimizer step.",
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
    "report_to": "none, tensorboard or wandb.",
    "seed": "Of initialization, dropout and held-out pairs.",
    "data_seed": "Of the order of the data and of DAMA's selection. Default: --seed.",
    "dataloader_num_workers": "Processes that prepare images ahead.",
    "resume_from_checkpoint": "Checkpoint folder to continue from. Default: the last one in --output_dir.",
    "use_cpu": "Train without a GPU.",
}
DAMA_FLAGS = (
    "loss", "dpo_beta", "dpo_use_average", "label_smoothing", "simpo_margin", "orpo_lambda", "mdpo_anchor",
    "symmpo_lambda", "token_weights", "corruption", "corruption_seed", "hardness_from", "strategy", "variant",
    "selection", "select_ratio", "gamma", "beta_min", "delta_bar", "check_reference", "shared_prefix", "logp_chunk",
    "pair_log",
)  # fmt: skip
LORA_PREFIXES = ("lora_", "bits", "double_quant", "quant_type")


def describe_flags(model: type, data: type, training: type) -> str:
    """Return the help: the flags of the three dataclasses, grouped, each with its meaning and default."""
    own = [name for group in training.__mro__[1::-1] for name in group.__annotations__]
    fields: dict[str, Any] = {
        entry.name: entry for group in (model, data, training) for entry in dataclass_fields(group)
    }
    lora = [name for name in own if name.startswith(LORA_PREFIXES)]
    rest = [name for name in own if name not in (*DAMA_FLAGS, *lora)]
    groups = {
        "DAMA (--task DPO)": DAMA_FLAGS,
        "data": data.__annotations__,
        "model": model.__annotations__,
        "LoRA and quantization": lora,
        "training": [*rest, *OFTEN_USED],
    }
    lines = [USAGE]
    for title, names in groups.items():
        lines += [f"{title}:", *(line for name in names for line in describe_flag(fields[name])), ""]
    lines.append("--help_all lists every flag of transformers' TrainingArguments too.")
    return "\n".join(lines)


def describe_flag(entry: Any) -> list[str]:
    """Return the lines of one flag."""
    text = OFTEN_USED.get(entry.name) or entry.metadata["help"]
    default = "" if entry.default in (None, MISSING) or "Default" in text else f" Default: {entry.default}."
    return wrap(text + default, 118, initial_indent=f"  --{entry.name:<30}", subsequent_indent=" " * 34)
