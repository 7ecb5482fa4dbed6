"""What is saved and under which names: full weights, projector, LoRA with what trained beside it, the model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama.train import provenance as records
from llava.model.checkpoint import VOCABULARY_TABLES
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

Named = Iterable[tuple[str, Any]]
PROJECTOR_KEYS = ["mm_projector", "vision_resampler"]
TOWER_PREFIX = "model.vision_tower."
NON_LORA_FILE = "non_lora_trainables.bin"


def maybe_zero_3(param: Any, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """A parameter's value on the CPU, gathered from all ranks first where ZeRO-3 has spread it."""
    if not hasattr(param, "ds_id"):
        return param.detach().cpu().clone()
    from deepspeed import zero

    with zero.GatheredParameters([param]):
        return param.data.detach().cpu().clone()


def get_mm_adapter_state_maybe_zero_3(named_params: Named, keys_to_match: list[str]) -> dict[str, Tensor]:
    """The parameters whose name contains one of the keys."""
    return {name: maybe_zero_3(p) for name, p in matching(dict(named_params), keys_to_match).items()}


def matching(state: dict[str, Any], keys_to_match: list[str]) -> dict[str, Any]:
    """The entries whose name contains one of the keys."""
    return {name: value for name, value in state.items() if any(key in name for key in keys_to_match)}


def get_peft_state_maybe_zero_3(named_params: Named, bias: str) -> dict[str, Tensor]:
    """The adapter's parameters, with biases as LoRA's `bias` says: none, all, or those of adapted layers."""
    parameters = dict(named_params)
    if bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"lora_bias: expected none, all or lora_only, got {bias!r}")
    adapted = {name.split("lora_")[0] + "bias" for name in parameters if "lora_" in name}

    def belongs(name: str) -> bool:
        if "lora_" in name:
            return True
        return (bias == "all" and "bias" in name) or (bias == "lora_only" and name in adapted)

    return {name: maybe_zero_3(p) for name, p in parameters.items() if belongs(name)}


def get_peft_state_non_lora_maybe_zero_3(named_params: Named, require_grad_only: bool = True) -> dict[str, Tensor]:
    """What trains beside the adapter (the projector)."""
    return {
        name: maybe_zero_3(p)
        for name, p in named_params
        if "lora_" not in name and (p.requires_grad or not require_grad_only)
    }


def names_beside_adapter(model: Any) -> list[str]:
    """Parameters to save beside a LoRA adapter: what trains with it, and vocabulary tables that grew for new tokens."""
    grown = VOCABULARY_TABLES if model.tables_grown else ()
    return [
        name
        for name, p in model.named_parameters()
        if "lora_" not in name and (p.requires_grad or name.endswith(grown))
    ]


def safe_save_model_for_hf_trainer(trainer: Any, output_dir: str) -> None:
    """Saves the trained model once, by one process, as LLaVA's layout wants it."""
    if trainer.args.lora_enable:
        save_lora(trainer, output_dir)
    else:
        trainer.save_model(output_dir)


def save_lora(trainer: Any, output_dir: str) -> None:
    """adapter_config.json, adapter weights, config.json and non_lora_trainables.bin, beside the tokenizer."""
    model, args = trainer.model, trainer.args
    adapter = get_peft_state_maybe_zero_3(model.named_parameters(), args.lora_bias)
    wanted = set(names_beside_adapter(model))
    beside = {name: maybe_zero_3(p) for name, p in model.named_parameters() if name in wanted}
    if not args.should_save:
        return
    model.config.save_pretrained(output_dir)
    model.save_pretrained(output_dir, state_dict=adapter)
    torch.save(beside, Path(output_dir) / NON_LORA_FILE)
    trainer.processing_class.save_pretrained(output_dir)
    keep_tower_inside(model, output_dir)
    if trainer.provenance is not None:
        write_model_card(output_dir, trainer.provenance)


def without_frozen_tower(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Drops the vision tower's weights unless they were trained: they have a home of their own."""
    if getattr(config, "unfreeze_mm_vision_tower", False):
        return state_dict
    return {name: value for name, value in state_dict.items() if not name.startswith(TOWER_PREFIX)}


def keep_tower_inside(model: Any, folder: str | Path) -> None:
    """Copies a vision tower that lay inside the base's folder into the saved model's, which names it relatively."""
    tower = model.get_vision_tower()
    destination = Path(folder) / str(model.config.mm_vision_tower)
    if tower is not None and tower.inside_checkpoint and not destination.exists():
        # A copy that a kill cut short must not pass for the tower when the save is repeated.
        partial = destination.with_name(f".{destination.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tower.folder, partial)
        partial.rename(destination)


def is_finished(output_dir: str | Path, provenance: dict[str, Any], resumed: Path | None = None) -> bool:
    """Return whether the folder contains the finished model of these inputs; see `dama.train.provenance`."""
    groups = (ModelArguments, DataArguments, TrainingArguments)
    return records.is_finished(output_dir, provenance, resumed, groups=groups)


def write_model_card(folder: str | Path, provenance: dict[str, Any]) -> None:
    """Write the model card of a LLaVA-v1.5 model, with its provenance."""
    records.write_model_card(folder, provenance, model="LLaVA-v1.5 model", library="llava")
