"""A tiny CLIP for the tests of hardness: random weights in a folder as open_clip writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def write_tiny_clip(folder: Path, seed: int = 0, config: dict[str, Any] = MODEL_CFG) -> Path:
    """Writes open_clip_config.json and open_clip_model.safetensors; another seed gives other weights."""
    torch.manual_seed(seed)
    towers = {name: value for name, value in config["text_cfg"].items() if name != "hf_tokenizer_name"}
    model = open_clip.CLIP(**config | {"text_cfg": towers})
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
