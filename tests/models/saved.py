"""Tiny models of tests.models.tiny_hub as checkpoints on disk, and images of different sizes to ask them about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.models.tiny_hub import build

SIZES = [(40, 30), (30, 44), (56, 56), (112, 40)]


def sample_images() -> list[Image.Image]:
    """Noise of four sizes, each in its own colors."""
    found = []
    for number, size in enumerate(SIZES):
        torch.manual_seed(number)
        noise = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8)
        found.append(Image.fromarray(noise.numpy()))
    return found


def save(family: str, folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """Write a model and its processor to a folder, and return them."""
    model, processor = build(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_adapter(family: str, base: Path, folder: Path, seed: int = 1) -> Any:
    """Write a LoRA adapter with random weights over the model in `base`; return the PeftModel."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=r".*(language|text)_model.*\.(q_proj|v_proj)")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return adapted.eval()
