"""The reference model of LLaVA-1.5 as a model family, by the training's own set-up."""

from __future__ import annotations

import torch

from dama.train.family import ModelFamily
from llava.supported import is_hub_model
from llava.train.arguments import Arguments
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model


def reference_family(arguments: Arguments) -> ModelFamily:
    """Load pi_ref as `model_name_or_path` names it, on its device and in evaluation mode."""
    args = arguments[2]
    if is_hub_model(arguments[0].model_name_or_path):
        return hub_family(arguments)
    model, tokenizer, _ = setup_model(arguments, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # from here on each rank works alone, and may end before the others
    return LlavaFamily.of(arguments, model.to(args.device).eval(), tokenizer)


def hub_family(arguments: Arguments) -> ModelFamily:
    """The same of a model other than LLaVA-1.5."""
    from dama.models.setup import setup_family

    args = arguments[2]
    family = setup_family(arguments, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    family.model.to(args.device).eval()
    return family
