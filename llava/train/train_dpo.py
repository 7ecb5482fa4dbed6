"""Preference alignment with DAMA (`--task DPO`): pairs, hardness and reference log-probs to an aligned model.

The released code's names can still be imported from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dama.console import end_on_interrupt, log
from dama.finished import Call
from dama.hardness.sources import HardnessSource
from dama.train.checkpoints import resume_point
from dama.train.data import (
    ImageChoice,
    PreferenceData,
    checked_pairs_of,
    hardness_of_pairs,
    join_pairs,
)
from dama.train.provenance import provenance_of
from dama.train.reference import BASE_AS_REFERENCE, reference_of_pairs
from dama.weighting import Variant
from llava.estimate.preflight import preflight
from llava.train.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava.train.base_model import validate_base
from llava.train.checkpoints import is_finished
from llava.train.dpo_data import DataCollatorForDPODataset, DPODataset
from llava.train.dpo_trainer import LLaVA15DPOTrainer
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model
from llava.train.train import remember_training, train_and_save

__all__ = [
    "DPODataset", "DataArguments", "DataCollatorForDPODataset", "LLaVA15DPOTrainer", "ModelArguments",
    "TrainingArguments", "run", "train",
]  # fmt: skip


def train(attn_implementation: str | None = None, *, argv: Sequence[str] | None = None) -> LLaVA15DPOTrainer | None:
    """Parses flags, trains, saves; returns the trainer."""
    return run(parse_arguments(argv, task="DPO"), attn_implementation)


def run(
    arguments: Arguments, attn_implementation: str | None = None, *, call: Call | None = None
) -> LLaVA15DPOTrainer | None:
    """Train LLaVA-1.5 and save it; None when --output_dir holds the finished model of the same inputs already.

    Args:
        call: gets its receipt when the model is finished.
    """

    def load() -> LlavaFamily:
        model, tokenizer, _ = setup_model(arguments, attn_implementation)
        return LlavaFamily.of(arguments, model, tokenizer)

    def trainer_of(family: LlavaFamily, **options: Any) -> LLaVA15DPOTrainer:
        return LLaVA15DPOTrainer(family.module, family.tokenizer, arguments[2], family=family, **options)

    validate_base(arguments)
    return run_family(arguments, load, trainer_of, call)


def run_family(
    arguments: Arguments, load: Callable[[], Any], trainer_of: Callable[..., Any], call: Call | None = None
) -> Any:
    """Train a model family and save it; return the trainer, or None where the finished model is there already.

    Args:
        load: the family. trainer_of: its trainer, of the family and the options of PreferenceTrainer.
    """
    _, data_args, args = arguments
    checkpoint = resume_point(args)
    # What can be wrong with the data is found before the model is loaded.
    checked = checked_pairs_of(data_args)
    pairs, skipped, fingerprint = checked.pairs, checked.skipped, checked.fingerprint
    ImageChoice.of(pairs, args.views(), args)
    preflight(arguments, pairs)
    hardness = hardness_of_pairs(pairs, data_args.hardness, fingerprint, needs_clip(args))
    family = load()
    reference = reference_of_pairs(pairs, data_args, args, fingerprint, family)
    data = join_pairs(pairs, hardness, reference, family, data_args, args)
    skipped = skipped + data.skipped
    made_from = data.provenance | {"delta_bar": data.delta_bar, "pairs": len(data.train), "skipped": len(skipped)}
    provenance = provenance_of(arguments, data=made_from)
    if is_finished(args.output_dir, provenance, checkpoint):
        remember_training(call, arguments, checked.table, family.files)
        return None
    announce(arguments, data, len(skipped))
    trainer = trainer_of(
        family,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        delta_bar=data.delta_bar,
        reference_is_base=data_args.reference == BASE_AS_REFERENCE,
        provenance=provenance,
    )
    train_and_save(trainer, checkpoint)
    remember_training(call, arguments, checked.table, family.files)
    for skip in skipped:
        log(f"skipped {skip.id}: {skip.reason}")
    return trainer


def needs_clip(args: Any) -> bool:
    """Whether CLIP's delta takes part in training."""
    return args.weighting().uses_delta and args.hardness_from != HardnessSource.GENERATIVE


def announce(arguments: Arguments, data: PreferenceData, skipped: int) -> None:
    """One line each on the data, the step and the method, before training."""
    args: Any = arguments[2]
    config = args.weighting()
    n = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    held_out = len(data.held_out) if data.held_out else 0
    kept = n if config.selects == "off" else config.count_kept(n)
    hardness = f"; delta_bar {data.delta_bar:.6f}" if config.uses_delta else ""
    log(f"pairs: {len(data.train)} to train on, {held_out} held out, {skipped} skipped{hardness}")
    log(
        f"step: {n} pairs = {args.per_device_train_batch_size} x {args.world_size} rank(s) x "
        f"{args.gradient_accumulation_steps} micro-batch(es), {kept} selected"
    )
    log(
        f"method: loss {args.preference_loss().name}, {token_weights_of(args)}strategy {config.strategy}, "
        f"variant {config.variant}, selection {config.selects}, beta {config.beta}, gamma {config.gamma}, "
        f"learning rate {args.learning_rate}"
    )
    if warning := single_pair_warning(args, len(data.train)):
        log(warning)


def token_weights_of(args: Any) -> str:
    """The method's line on token weights, where there are any."""
    weights = args.token_weighting()
    return f"token weights {weights}, " if weights else ""


def single_pair_warning(args: Any, pairs: int) -> str | None:
    """A warning where pairs are decided upon one at a time, although selection and R_bar need several; else None.

    pairs: of the training data, of which an epoch's last step may have one left.
    """
    config = args.weighting()
    micro_batches = 1 if config.variant is Variant.RELEASED else args.gradient_accumulation_steps
    n = args.per_device_train_batch_size * args.world_size * micro_batches
    if config.is_static or (n > 1 and pairs % n != 1):
        return None
    which = "every step has 1 pair" if n == 1 else f"the last step of an epoch has 1 pair ({pairs} in steps of {n})"
    what = f"{which}: that pair is always selected, and R_bar follows it alone"
    return (
        f"warning: {what}; expected several (16 in the paper), raise --per_device_train_batch_size or "
        "--gradient_accumulation_steps, or choose --strategy none or data"
        if n == 1
        else f"warning: {what}; a step size that leaves more avoids it"
    )


if __name__ == "__main__":
    end_on_interrupt()
    train()
