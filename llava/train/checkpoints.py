"""What is saved and under which names: full weights, projector, LoRA with what trained beside it, the model card."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama.console import say, write_atomic, write_json
from dama.stage import differences
from dama.train.signing import SEAL_FILE, TRAINER_STATE, files_to_seal, refuse_unsigned, signed, signing_key
from llava.model.checkpoint import VOCABULARY_TABLES

Named = Iterable[tuple[str, Any]]
PROJECTOR_KEYS = ["mm_projector", "vision_resampler"]
TOWER_PREFIX = "model.vision_tower."
NON_LORA_FILE = "non_lora_trainables.bin"
PROVENANCE_FILE = "dama_provenance.json"
FLAGS = {  # what to call the fields of a provenance in errors
    "flags.": "--", "base": "--model_name_or_path", "data.path": "--data_path", "data.digest": "--data_path (content)",
    "data.data": "--data_path", "data.hardness": "--hardness", "data.reference": "--reference",
    "data.delta_bar": "--delta_bar", "data.pairs": "pairs to train on", "data.skipped": "pairs skipped",
}  # fmt: skip
NOT_RECORDED = re.compile(
    r"_token$|^local_rank$|_dir$|^disable_tqdm$|^accelerator_config$|^report_to$|^logging_|^log_|^dataloader_|^save_total"
    r"|^model_name_or_path$|^data_path$|^hardness$|^reference$|^image_folder$|^deepspeed$|^use_cpu$"
    r"|^resume_from_checkpoint$|^trust_checkpoint$"
    # How a step is computed, not what.
    r"|^auto_checkpointing$|^gradient_checkpointing$|^activation_checkpointing$|^check_memory$|^debug_sync$|^compile_layers$|^float32_logits$"
)
# transformers' flags that every result depends on; its others are recorded where they are not at their default.
ALWAYS_RECORDED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "bf16", "fp16", "seed", "full_determinism", "train_sampling_strategy",
)  # fmt: skip
DEFAULT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # on CPUs and on GPUs


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


# --- The model card --------------------------------------------------------------------------------------------------


def provenance_of(arguments: Any, **more: Any) -> dict[str, Any]:
    """Base model, flags, step, library versions, revision of this repository, and whatever else the task knows."""
    model_args, data_args, args = arguments
    return {
        "base": model_args.model_name_or_path,
        **more,
        "flags": recorded_flags(model_args, data_args, args),
        "training": step_settings(args),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "accelerate", "deepspeed", "peft")},
        "python": platform.python_version(),
        "revision": repository_revision(),
    }


def is_finished(output_dir: str | Path, provenance: dict[str, Any], resumed: Path | None = None) -> bool:
    """Whether the folder holds the finished model of these inputs, and says so.

    `resumed` is the checkpoint to continue from where it is not the folder's last.

    Raises:
        ValueError: it holds a finished or half-finished model of others, every differing field is named; or a
            checkpoint to continue from that another number of ranks saved.
    """
    folder = Path(output_dir)
    last = resumed or last_whole_checkpoint(folder)
    if last is not None:
        refuse_other_provenance(last, provenance)
    if not (folder / PROVENANCE_FILE).is_file():
        if last is not None:
            refuse_other_world(last)
        return False
    refuse_other_provenance(folder, provenance)
    say(f"training: complete in {folder}, skipped")
    return True


def resume_point(args: Any) -> Path | None:
    """The checkpoint that a run continues from: --resume_from_checkpoint, else the last whole one in --output_dir.

    Nothing of it is loaded before its signature is checked. None where the run starts anew or is finished.

    Raises:
        ValueError: the checkpoint is incomplete, of another number of ranks, without optimizer states, or not signed by
            this user's key (unless --trust_checkpoint).
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    signing_key()  # a key that cannot be written is found now, not at the first save
    if asked is None or asked.lower() in ("true", "false"):
        checkpoint = None if (folder / PROVENANCE_FILE).is_file() else last_whole_checkpoint(folder)
    else:
        checkpoint = Path(asked)
        if lacking := lacking_in_checkpoint(checkpoint):
            raise ValueError(
                f"--resume_from_checkpoint '{checkpoint}': expected a complete checkpoint of this trainer, found no "
                f"whole {lacking[0]}; its save was interrupted, or other software wrote it. Name another one."
            )
    if checkpoint is None:
        return None
    refuse_other_world(checkpoint)
    refuse_weights_only(checkpoint)
    refuse_unsigned(checkpoint, trust=args.trust_checkpoint)
    return checkpoint


def refuse_weights_only(checkpoint: Path) -> None:
    """Raise unless the checkpoint has the optimizer's states, without which a run would not go on as it was."""
    if not ((checkpoint / "optimizer.pt").is_file() or any(checkpoint.glob("global_step*"))):
        raise ValueError(
            f"{checkpoint}: expected the optimizer's states to continue from it, found none: it was saved with "
            "--save_only_model. Give another --output_dir, and this folder as --model_name_or_path to start from it."
        )


def version_of(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def refuse_other_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Raises unless the model in the folder comes from the same base, data and flags."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return
    made, fields = json.loads(path.read_text()), ("base", "data", "flags")
    old = {field: made.get(field) for field in fields}
    new = json.loads(json.dumps({field: provenance.get(field) for field in fields}))
    old["flags"], new["flags"] = comparable_flags(old["flags"] or {}, new["flags"] or {})
    changed = differences(old, new, FLAGS)
    if changed:
        raise ValueError(
            f"--output_dir: {folder} holds a model of other inputs ({'; '.join(changed)}). "
            "Give another --output_dir, or remove that folder."
        )


def comparable_flags(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two records of flags without those that only one of them has and that have their default there.

    A revision that recorded fewer flags left out those at their default.
    """
    defaults = default_flags()

    def compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in record.items()
            if not NOT_RECORDED.search(name) and (name in other or value not in defaults.get(name, ()))
        }

    return compared(old, new), compared(new, old)


def default_flags() -> dict[str, tuple[Any, ...]]:
    """The value that each flag of training has where it is not given, or the values, where the machine decides."""
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

    entries = [
        entry
        for group in (ModelArguments, DataArguments, TrainingArguments)
        for entry in group.__dataclass_fields__.values()
        if entry.default is not MISSING
    ]
    return {entry.name: (plain(entry.default),) for entry in entries} | {"optim": DEFAULT_OPTIMIZERS}


def seal_checkpoint(checkpoint: str | Path, world_size: int) -> None:
    """List a checkpoint's files, their sizes and signed digests in SEAL_FILE.

    For one process to call when every rank has written its last file (weights, optimizer shards, generators' states)
    and before older checkpoints are deleted. What comes later, the trainer's own state, shows by itself whether it is
    whole: it is JSON, from which no code is run.
    """
    folder = Path(checkpoint)
    sizes = {name: (folder / name).stat().st_size for name in files_to_seal(folder)}
    write_json(folder / SEAL_FILE, signed(folder, {"world_size": world_size, "sizes": sizes}))


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint-N that was written to its end; one that a kill cut short is passed over, and said so."""
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        lacking = lacking_in_checkpoint(path)
        if not lacking:
            return path
        say(f"{path} is incomplete (its save or its removal was interrupted; no whole {lacking[0]}), passed over")
    return None


def lacking_in_checkpoint(checkpoint: str | Path) -> list[str]:
    """The files that a checkpoint should have and that are missing or cut short; none where it is whole."""
    folder = Path(checkpoint)
    seal = _read_json(folder / SEAL_FILE)
    if not isinstance(seal, dict) or not isinstance(seal.get("sizes"), dict) or "world_size" not in seal:
        return [SEAL_FILE]
    sizes = {name: path.stat().st_size for name in seal["sizes"] if (path := folder / name).is_file()}
    lacking = [name for name, size in seal["sizes"].items() if sizes.get(name) != size]
    return lacking if _read_json(folder / TRAINER_STATE) else [*lacking, TRAINER_STATE]


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where it is absent, cut short or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None


def refuse_other_world(checkpoint: Path) -> None:
    """Raises unless as many ranks run as saved the checkpoint: optimizer shards and data order are theirs."""
    saved_by = json.loads((checkpoint / SEAL_FILE).read_text())["world_size"]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved_by != ranks:
        raise ValueError(
            f"{checkpoint}: expected the {saved_by} rank(s) that saved it to continue from it, got {ranks}. "
            f"Start {saved_by} rank(s), or give another --output_dir to begin anew."
        )


def recorded_flags(*groups: Any) -> dict[str, Any]:
    """The flags that a result depends on, as plain values: this repository's own and ALWAYS_RECORDED, defaults
    included, and those of transformers that are not at their default.

    Left out are those that name places, print more or less, differ between ranks, or are secrets.
    """
    flags = {}
    for group in groups:
        own = {*type(group).__annotations__, *ALWAYS_RECORDED}
        for name, entry in type(group).__dataclass_fields__.items():
            value = getattr(group, name, None)
            wanted = name in own or (entry.init and not name.startswith("_") and value != entry.default)
            if wanted and value not in ({}, [], None) and not NOT_RECORDED.search(name):
                flags[name] = plain(value)
    return dict(sorted(flags.items()))


def plain(value: Any) -> Any:
    """A flag's value as JSON has it: an enum by its value, and whatever has no counterpart as text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, list):
        return str([plain(item) for item in value])
    return value if value is None or isinstance(value, int | float | bool | str) else str(value)


def step_settings(args: Any) -> dict[str, Any]:
    """What an optimizer step consists of in this training, and what flags that were not given come to."""
    micro_batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    items = micro_batch * args.world_size * accumulation
    settings = {
        "ranks": args.world_size,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
    }
    if args.task != "DPO":
        return settings | {"rows_per_step": items}
    config = args.weighting()
    selected = items if config.selects == "off" else config.count_kept(items)
    return settings | {"pairs_per_step": items, "pairs_selected": selected}


def repository_revision() -> str:
    """The commit that this code is of, with a + where files differ from it; 'unknown' outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def write_model_card(folder: str | Path, provenance: dict[str, Any]) -> None:
    """README.md for people and PROVENANCE_FILE for programs."""
    flags = provenance["flags"]
    rows = "\n".join(f"| `--{name}` | {value} |" for name, value in flags.items())
    step = "\n".join(
        f"| {name.replace('_', ' ')} | {value} |" for name, value in provenance.get("training", {}).items()
    )
    details = {name: value for name, value in provenance.items() if name not in ("flags", "base", "training")}
    task = "aligned with DAMA (arXiv 2502.01943)" if flags.get("task") == "DPO" else "fine-tuned on instructions"
    card = f"""---
base_model: {provenance["base"]}
library_name: llava
pipeline_tag: image-text-to-text
---

# {Path(folder).resolve().name}

A LLaVA-v1.5 model, {task}, from `{provenance["base"]}`.

| training | value |
|---|---|
{step}

| flag | value |
|---|---|
{rows}

```json
{json.dumps(details, indent=2, ensure_ascii=False)}
```
"""
    write_atomic(Path(folder) / "README.md", card)
    write_json(Path(folder) / PROVENANCE_FILE, provenance)
