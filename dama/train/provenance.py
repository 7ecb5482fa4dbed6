"""Record what a model was trained from, and compare it with what a training run is about to use."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dama.console import write_atomic, write_json
from dama.stage import differences
from dama.train.checkpoints import PROVENANCE_FILE, last_complete_checkpoint, log_finished, validate_world_size
from dama.version import __version__

Defaults = dict[str, tuple[Any, ...]]  # values of each flag that is not given
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
    r"|^auto_micro_batch$|^auto_checkpointing$|^gradient_checkpointing$|^activation_checkpointing$|^check_memory$|^debug_sync$|^compile_layers$|^float32_logits$"
)
# transformers' flags that every result depends on; its others are recorded where they are not at their default.
ALWAYS_RECORDED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "bf16", "fp16", "seed", "full_determinism", "train_sampling_strategy",
)  # fmt: skip
# What flags that are not given come to: on CPUs and on GPUs; with a loss of one or two images.
DEFAULTS_THAT_DEPEND: Defaults = {"optim": ("adamw_torch", "adamw_torch_fused"), "corruption": ("crop",)}

CARD = """\
---
base_model: {base}
library_name: {library}
pipeline_tag: image-text-to-text
---

# {name}

A {model}, {task}, from `{base}`.

| training | value |
|---|---|
{step}

| flag | value |
|---|---|
{flags}

```json
{details}
```
"""


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


def is_finished(
    output_dir: str | Path, provenance: dict[str, Any], resumed: Path | None = None, *, groups: Sequence[type] = ()
) -> bool:
    """Return whether the folder contains the finished model of these inputs, and log it.

    Args:
        resumed: the checkpoint to continue from where it is not the folder's last.
        groups: the dataclasses of the flags, whose defaults an older record may omit.

    Raises:
        ValueError: the folder contains a finished or half-finished model of other inputs (every differing field is
            named), or a checkpoint to continue from that another number of ranks saved.
    """
    folder, defaults = Path(output_dir), default_flags(groups)
    last = resumed or last_complete_checkpoint(folder)
    if last is not None:
        validate_provenance(last, provenance, defaults, folder)
    if not (folder / PROVENANCE_FILE).is_file():
        if last is not None:
            validate_world_size(last)
        return False
    validate_provenance(folder, provenance, defaults, folder)
    log_finished(folder)
    return True


def version_of(library: str) -> str:
    """Return the version of an installed library, or "absent"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def validate_provenance(folder: Path, provenance: dict[str, Any], defaults: Defaults, output_dir: Path) -> None:
    """Raise ValueError unless the model in the folder, a part of output_dir, is of the same base, data and flags."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return
    made, names = json.loads(path.read_text()), ("base", "data", "flags")
    old = {name: made.get(name) for name in names}
    new = json.loads(json.dumps({name: provenance.get(name) for name in names}))
    old["flags"], new["flags"] = comparable_flags(old["flags"] or {}, new["flags"] or {}, defaults)
    changed = differences(old, new, FLAGS)
    if changed:
        raise ValueError(
            f"--output_dir: {folder} holds a model of other inputs ({'; '.join(changed)}). "
            f"Give another --output_dir, or remove {output_dir} to train anew."
        )


def comparable_flags(
    old: dict[str, Any], new: dict[str, Any], defaults: Defaults
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two records of flags without those that only one of them has and that have their default there.

    A revision that recorded fewer flags left out those at their default.
    """

    def compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in ((name, without_brackets(value)) for name, value in record.items())
            if not NOT_RECORDED.search(name) and (name in other or value not in defaults.get(name, ()))
        }

    return compared(old, new), compared(new, old)


def default_flags(groups: Sequence[type]) -> Defaults:
    """Return the value of each flag that is not given, or its values, where the machine decides."""
    entries = [entry for group in groups for entry in fields(group)]
    made = {entry.name: entry.default_factory() for entry in entries if entry.default_factory is not MISSING}
    given = {entry.name: entry.default for entry in entries if entry.default is not MISSING}
    return {name: (plain(value),) for name, value in (made | given).items()} | DEFAULTS_THAT_DEPEND


def recorded_flags(*groups: Any) -> dict[str, Any]:
    """Return the flags that a result depends on, as plain values.

    They are this repository's own and ALWAYS_RECORDED, defaults included, and those of transformers that are not at
    their default.

    Left out are those that name places, print more or less, differ between ranks, or are secrets.
    """
    flags = {}
    for group in groups:
        own = {*own_flags(type(group)), *ALWAYS_RECORDED}
        for name, entry in type(group).__dataclass_fields__.items():
            value = getattr(group, name, None)
            wanted = name in own or (entry.init and not name.startswith("_") and value != entry.default)
            if wanted and value not in ({}, [], None) and not NOT_RECORDED.search(name):
                flags[name] = plain(value)
    return dict(sorted(flags.items()))


def own_flags(group: type) -> set[str]:
    """The flags that this repository's classes declare, not transformers'."""
    ours = [cls for cls in group.__mro__ if not cls.__module__.startswith("transformers")]
    return {name for cls in ours for name in vars(cls).get("__annotations__", {})}


def plain(value: Any) -> Any:
    """A flag's value as JSON has it: an enum by its value, a list as its words, whatever has no counterpart as text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, list):
        return " ".join(str(plain(item)) for item in value)
    return value if value is None or isinstance(value, int | float | bool | str) else str(value)


def without_brackets(value: Any) -> Any:
    """A list's words, also where an earlier revision recorded it as `['dpo']`."""
    if isinstance(value, str) and value.startswith("['") and value.endswith("']"):
        return value[2:-2].replace("', '", " ")
    return value


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
    """The commit that this code is of, with a + where files differ from it; outside a repository its version."""
    root = Path(__file__).resolve().parents[2]
    try:
        _git(root, "ls-files", "--error-unmatch", __file__)  # an environment may lie in another repository
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


def write_model_card(folder: str | Path, provenance: dict[str, Any], *, model: str, library: str) -> None:
    """Write README.md for people and PROVENANCE_FILE for programs.

    Args:
        model: what the model is, such as "LLaVA-v1.5 model".
        library: what loads it, such as "llava" or "transformers".
    """
    flags = provenance["flags"]
    details = {name: value for name, value in provenance.items() if name not in ("flags", "base", "training")}
    card = CARD.format(
        base=provenance["base"],
        library=library,
        name=Path(folder).resolve().name,
        model=model,
        task="aligned with DAMA (arXiv 2502.01943)" if flags.get("task") == "DPO" else "fine-tuned on instructions",
        step="\n".join(
            f"| {name.replace('_', ' ')} | {value} |" for name, value in provenance.get("training", {}).items()
        ),
        flags="\n".join(f"| `--{name}` | {value} |" for name, value in flags.items()),
        details=json.dumps(details, indent=2, ensure_ascii=False),
    )
    write_atomic(Path(folder) / "README.md", card)
    write_json(Path(folder) / PROVENANCE_FILE, provenance)
