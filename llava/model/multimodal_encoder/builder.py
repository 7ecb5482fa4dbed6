"""Chooses the vision tower that a config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def locate_vision_tower(name: str, checkpoint: str | Path | None = None) -> str:
    """Where the tower is: a folder inside the checkpoint, a local folder, or else a hub name, in this order.

    Raises:
        FileNotFoundError: `name` is neither a folder nor of the form `owner/name` that a hub has.
    """
    candidates = ([Path(checkpoint) / name] if checkpoint and not Path(name).is_absolute() else []) + [Path(name)]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    searched = ", ".join(f"'{folder}'" for folder in candidates)
    raise FileNotFoundError(
        f"vision tower {name!r} of checkpoint '{checkpoint}': expected a folder with a config.json, found none at "
        f"{searched}. Put the tower there, or pass --vision_tower with its folder or hub name."
    )


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """The tower named by `mm_vision_tower` of a config (or `vision_tower` of ModelArguments).

    Keyword arguments go to the tower (`delay_load`).
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not name:
        raise ValueError("vision tower: expected a folder or hub name in mm_vision_tower, got none")
    return CLIPVisionTower(name, args=vision_tower_cfg, **kwargs)
