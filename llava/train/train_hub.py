"""Preference alignment (`--task DPO`) of models other than LLaVA-1.5, through dama.models."""

from __future__ import annotations

from typing import Any

from dama.finished import Call
from dama.models.family import HubFamily
from dama.models.setup import setup_family
from dama.models.trainer import HubTrainer
from llava.train.arguments import Arguments, DataArguments, ModelArguments
from llava.train.train_dpo import run_family

# Flags of LLaVA-1.5's own parts, which other models do not have.
LLAVA_ONLY = (
    "version", "tune_mm_mlp_adapter", "vision_tower", "mm_vision_select_layer", "pretrain_mm_mlp_adapter",
    "mm_projector_type", "mm_use_im_start_end", "mm_use_im_patch_token", "mm_patch_merge_type",
    "mm_vision_select_feature", "image_aspect_ratio", "mm_projector_lr",
)  # fmt: skip


def validate_flags(arguments: Arguments) -> None:
    """Raise ValueError naming flags that are given and mean nothing to this model."""
    defaults: dict[str, Any] = {}
    for group in (ModelArguments(), DataArguments()):
        defaults |= vars(group)
    given = {name: value for group in arguments for name, value in vars(group).items() if name in LLAVA_ONLY}
    wrong = [name for name, value in given.items() if value is not None and value != defaults.get(name)]
    if wrong:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in wrong)}: expected with LLaVA-1.5 only, got "
            f"{arguments[0].model_name_or_path}, whose own processor and chat template are used; leave out"
        )


def run(arguments: Arguments, *, call: Call | None = None) -> HubTrainer | None:
    """Train such a model and save it; None when --output_dir holds the finished model of the same inputs already.

    Args:
        call: gets its receipt when the model is finished.
    """

    def trainer_of(family: HubFamily, **options: Any) -> HubTrainer:
        return HubTrainer(family, family.processor, arguments[2], **options)

    validate_flags(arguments)
    return run_family(arguments, lambda: setup_family(arguments), trainer_of, call)
