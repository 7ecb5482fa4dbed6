"""Supervised fine-tuning as in LLaVA-v1.5 (`--task LM`): projector alignment and instruction tuning.

LLaVA's names that used to live here can still be imported from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.console import digest_of_file, end_on_interrupt, log
from dama.finished import Call
from dama.image_table import ImageTable, table_of_images
from dama.train.checkpoints import PROVENANCE_FILE, resume_point
from dama.train.provenance import provenance_of, step_settings
from llava.conversation import get_template
from llava.estimate.preflight import preflight
from llava.model.llava_arch import start_rows_as_mean
from llava.train.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments, parse_arguments
from llava.train.base_model import validate_base
from llava.train.checkpoints import (
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    is_finished,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
)
from llava.train.llava_trainer import LLaVATrainer
from llava.train.preprocess import (
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
)
from llava.train.setup_model import find_all_linear_names, setup_model
from llava.train.sft_data import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    make_supervised_data_module,
    supervised_rows,
    supervised_settings,
)
from llava.train.sft_rows import checked_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DataArguments", "DataCollatorForSupervisedDataset", "LazySupervisedDataset", "ModelArguments",
    "TrainingArguments", "find_all_linear_names", "get_mm_adapter_state_maybe_zero_3", "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3", "make_supervised_data_module", "maybe_zero_3", "preprocess",
    "preprocess_llama_2", "preprocess_mpt", "preprocess_multimodal", "preprocess_plain", "preprocess_v1",
    "rank0_print", "safe_save_model_for_hf_trainer", "smart_tokenizer_and_embedding_resize", "train",
]  # fmt: skip


def rank0_print(*args: Any) -> None:
    """Prints on the first process only."""
    log(" ".join(str(arg) for arg in args))


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model: Any
) -> None:
    """Adds special tokens; the rows they get in both embedding tables start as the mean of the others."""
    added = tokenizer.add_special_tokens(special_tokens_dict)
    model.resize_token_embeddings(len(tokenizer))
    if added:
        start_rows_as_mean(model, added)


def train(attn_implementation: str | None = None, *, argv: Sequence[str] | None = None) -> Any:
    """Parses flags, trains, saves; returns the trainer."""
    return run(parse_arguments(argv), attn_implementation)


def run(arguments: Arguments, attn_implementation: str | None = None, *, call: Call | None = None) -> Any:
    """Trains and saves; None when --output_dir holds the finished model of the same inputs already.

    Args:
        call: gets its receipt when the model is finished.
    """
    model_args, data_args, args = arguments
    validate_base(arguments)
    read = checked_rows(
        str(data_args.data_path), data_args.image_folder or [], data_args.on_bad_image,
        template=get_template(str(model_args.version)), progress=args.process_index == 0,
    )  # fmt: skip
    data_digest = digest_of_file(str(data_args.data_path))
    provenance = provenance_of(arguments, data={"path": str(data_args.data_path), "digest": data_digest})
    checkpoint = resume_point(args)
    if is_finished(args.output_dir, provenance, checkpoint):
        return None
    preflight(arguments, read.rows)
    provenance["training"] = step_settings(args)  # --auto_micro_batch has chosen the layout now
    model, tokenizer, image_processor = setup_model(arguments, attn_implementation)
    settings = supervised_settings(arguments, model, image_processor)
    used = supervised_rows(read, tokenizer, settings, model.get_vision_tower().tokens_per_image)
    provenance["rows"] = {"trained": len(used.rows), "skipped": len(used.skipped)}
    log(f"rows: {len(used.rows)} to train on, {len(used.skipped)} skipped")
    data = make_supervised_data_module(tokenizer, settings, template=settings.template, rows=used.rows)
    trainer = LLaVATrainer(model=model, processing_class=tokenizer, args=args, provenance=provenance, **data)
    train_and_save(trainer, checkpoint)
    images = list(dict.fromkeys(row["image"] for row in read.rows if "image" in row))
    tower = model.get_vision_tower()
    table = table_of_images(images, data_args.image_folder or [])
    remember_training(call, arguments, table, [tower.folder] if tower else [])
    for name, reason in used.skipped:
        log(f"skipped {name}: {reason}")
    return trainer


def remember_training(call: Call | None, arguments: Arguments, table: ImageTable, files: Sequence[str]) -> None:
    """Write the receipt of a finished training, on the first rank.

    Args:
        files: folders that the call read besides those that its flags name.
    """
    _, data_args, args = arguments
    if call is not None and args.process_index == 0:
        call.remember([Path(args.output_dir) / PROVENANCE_FILE], table, data_args.image_folder or [], files)


def train_and_save(trainer: Any, checkpoint: Path | None) -> None:
    """Trains from the start or from a checkpoint, see `resume_point`, then writes the model into --output_dir."""
    folder = Path(trainer.args.output_dir)
    if checkpoint is not None:
        log(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    trainer.model.config.use_cache = True
    trainer.save_final(str(folder))
    log(f"training: {trainer.state.global_step} steps -> {folder}")


if __name__ == "__main__":
    end_on_interrupt()
    train()
