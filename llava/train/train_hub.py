"""Preference alignment (`--task DPO`) of models other than LLaVA-1.5, through dama.models."""

from __future__ import annotations

from typing import Any

from dama.console import log
from dama.finished import Call
from dama.models.setup import setup_family
from dama.models.trainer import HubTrainer
from dama.train.checkpoints import resume_point
from dama.train.data import ImageChoice, checked_pairs_of, hardness_of_pairs, join_pairs
from dama.train.provenance import is_finished, provenance_of
from dama.train.reference import BASE_AS_REFERENCE, reference_of_pairs
from llava.estimate.preflight import preflight
from llava.train.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments
from llava.train.train import remember_training
from llava.train.train_dpo import announce, needs_clip

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
    """Trains and saves; None when --output_dir holds the finished model of the same inputs already.

    Args:
        call: gets its receipt when the model is finished.
    """
    _, data_args, args = arguments
    validate_flags(arguments)
    checkpoint = resume_point(args)
    checked = checked_pairs_of(data_args)
    pairs, skipped, fingerprint = checked.pairs, checked.skipped, checked.fingerprint
    ImageChoice.of(pairs, args.views(), args)
    preflight(arguments, pairs)
    hardness = hardness_of_pairs(pairs, data_args.hardness, fingerprint, needs_clip(args))
    family = setup_family(arguments)
    reference = reference_of_pairs(pairs, data_args, args, fingerprint, family)
    data = join_pairs(pairs, hardness, reference, family, data_args, args)
    skipped = skipped + data.skipped
    made_from: dict[str, Any] = data.provenance | {"delta_bar": data.delta_bar}
    made_from |= {"pairs": len(data.train), "skipped": len(skipped)}
    provenance = provenance_of(arguments, data=made_from)
    groups = (ModelArguments, DataArguments, TrainingArguments)
    if is_finished(args.output_dir, provenance, checkpoint, groups=groups):
        remember_training(call, arguments, checked.table, family.files)
        return None
    announce(arguments, data, len(skipped))
    trainer = HubTrainer(
        family,
        family.processor,
        args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        delta_bar=data.delta_bar,
        reference_is_base=data_args.reference == BASE_AS_REFERENCE,
        provenance=provenance,
    )
    if checkpoint is not None:
        log(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    family.model.config.use_cache = True
    trainer.save_model(args.output_dir)
    remember_training(call, arguments, checked.table, family.files)
    for skip in skipped:
        log(f"skipped {skip.id}: {skip.reason}")
    return trainer
