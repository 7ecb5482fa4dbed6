"""Sealed checkpoints: which are complete, and from which one a training run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dama.console import log, write_json
from dama.train.signing import SEAL_FILE, TRAINER_STATE, files_to_seal, signed, signing_key, validate_signature

PROVENANCE_FILE = "dama_provenance.json"  # in a finished model's folder and in its checkpoints


def log_finished(folder: str | Path) -> None:
    """Log that a finished model is left as it is."""
    log(f"training: complete in {folder}, skipped")


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
        checkpoint = None if (folder / PROVENANCE_FILE).is_file() else last_complete_checkpoint(folder)
    else:
        checkpoint = Path(asked)
        if missing := missing_files(checkpoint):
            raise ValueError(
                f"--resume_from_checkpoint '{checkpoint}': expected a complete checkpoint of this trainer, found no "
                f"whole {missing[0]}; its save was interrupted, or other software wrote it. Name another one."
            )
    checkpoint = of_first_rank(checkpoint)
    if checkpoint is None:
        return None
    validate_world_size(checkpoint)
    validate_optimizer_states(checkpoint)
    validate_signature(checkpoint, trust=args.trust_checkpoint)
    return checkpoint


def of_first_rank(checkpoint: Path | None) -> Path | None:
    """The first rank's choice: another rank that looks earlier, or through another machine's cache, may see less."""
    from torch import distributed

    if not distributed.is_initialized():
        return checkpoint
    chosen = [checkpoint]
    distributed.broadcast_object_list(chosen, src=0)
    return chosen[0]


def validate_optimizer_states(checkpoint: Path) -> None:
    """Raise unless the checkpoint has the optimizer's states, without which a run would not go on as it was."""
    if not ((checkpoint / "optimizer.pt").is_file() or any(checkpoint.glob("global_step*"))):
        raise ValueError(
            f"{checkpoint}: expected the optimizer's states to continue from it, found none: it was saved with "
            "--save_only_model. Give another --output_dir, and this folder as --model_name_or_path to start from it."
        )


def seal_checkpoint(checkpoint: str | Path, world_size: int) -> None:
    """List a checkpoint's files, their sizes and signed digests in SEAL_FILE.

    For one process to call when every rank has written its last file (weights, optimizer shards, generators' states)
    and before older checkpoints are deleted. What comes later, the trainer's own state, shows by itself whether it is
    whole: it is JSON, from which no code is run.
    """
    folder = Path(checkpoint)
    sizes = {name: (folder / name).stat().st_size for name in files_to_seal(folder)}
    write_json(folder / SEAL_FILE, signed(folder, {"world_size": world_size, "sizes": sizes}))


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint-N that was written to its end; one that a kill cut short is passed over, and said so."""
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        missing = missing_files(path)
        if not missing:
            return path
        log(f"{path} is incomplete (its save or its removal was interrupted; no whole {missing[0]}), passed over")
    return None


def missing_files(checkpoint: str | Path) -> list[str]:
    """The files that a checkpoint should have and that are missing or cut short; none where it is whole."""
    folder = Path(checkpoint)
    seal = _read_json(folder / SEAL_FILE)
    if not isinstance(seal, dict) or not isinstance(seal.get("sizes"), dict) or "world_size" not in seal:
        return [SEAL_FILE]
    sizes = {name: path.stat().st_size for name in seal["sizes"] if (path := folder / name).is_file()}
    missing = [name for name, size in seal["sizes"].items() if sizes.get(name) != size]
    return missing if _read_json(folder / TRAINER_STATE) else [*missing, TRAINER_STATE]


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where it is absent, cut short or none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None


def validate_world_size(checkpoint: Path) -> None:
    """Raises unless as many ranks run as saved the checkpoint: optimizer shards and data order are theirs."""
    saved_by = json.loads((checkpoint / SEAL_FILE).read_text())["world_size"]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if saved_by != ranks:
        raise ValueError(
            f"{checkpoint}: expected the {saved_by} rank(s) that saved it to continue from it, got {ranks}. "
            f"Start {saved_by} rank(s), or give another --output_dir to begin anew."
        )
