"""The tiny LLaVA before alignment: a LLaMA decoder fine-tuned on captions that name absent things."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dama.console import write_json
from playground.tinycoco.captions import QUESTIONS, noisy_caption
from playground.tinycoco.scenes import draw, sample_scene

REPOSITORY = Path(__file__).resolve().parents[2]
DECODER: dict[str, Any] = {
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOISE = 0.78  # share of training captions into which absent companions may be written
SCENES = 12_000
EPOCHS = 2
BATCH = 32
LEARNING_RATE = 2e-3


def new_checkpoint(folder: Path, vision_tower: Path, tokenizer: Path, seed: int = 0) -> None:
    """A LLaVA of random weights in the original layout, its vision tower and tokenizer inside its folder."""
    import torch

    from llava.model import LlavaConfig, LlavaLlamaForCausalLM
    from llava.tokenization import load_tokenizer

    words = load_tokenizer(tokenizer, model_max_length=512)
    tower = json.loads((vision_tower / "config.json").read_text())
    torch.manual_seed(seed)
    config = LlavaConfig(
        vocab_size=len(words),
        mm_vision_tower="vision_tower",
        mm_hidden_size=tower["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
        use_mm_proj=True,
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        **DECODER,
    )
    LlavaLlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    shutil.copytree(vision_tower, folder / "vision_tower", dirs_exist_ok=True)


def write_conversations(folder: Path, scenes: int, noise: float, seed: int = 0) -> None:
    """`scenes` images of the training stream and captions.json in LLaVA's format."""
    rng = random.Random(f"sft/{seed}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(scenes), desc="training scenes", unit="scene"):
        scene = sample_scene(index, "train")
        name = f"{scene.id}.png"
        draw(scene).save(folder / "images" / name)
        turns = (("human", f"<image>\n{rng.choice(QUESTIONS)}"), ("gpt", noisy_caption(scene, rng, noise)))
        rows.append({"id": scene.id, "image": name, "conversations": [{"from": w, "value": t} for w, t in turns]})
    write_json(folder / "captions.json", rows)


def fine_tune(start: Path, data: Path, out: Path, *, epochs: float, learning_rate: float, seed: int = 0) -> None:
    """Instruction tuning by the repository's own train_mem.py, `--task LM`."""
    flags = {
        "task": "LM",
        "model_name_or_path": start,
        "version": "v1",
        "data_path": data / "captions.json",
        "image_folder": data / "images",
        "image_aspect_ratio": "pad",
        "output_dir": out,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": BATCH,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "adam_beta2": 0.98,
        "model_max_length": 512,
        "save_strategy": "no",
        "logging_steps": 50,
        "seed": seed,
        "use_cpu": True,
        "dataloader_num_workers": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    # Threads that wait by spinning would take the cores from the process that prepares images.
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    command = [sys.executable, str(REPOSITORY / "llava" / "train" / "train_mem.py"), *words]
    subprocess.run(command, check=True, env=environment)


def ship(trained: Path, tower: Path, folder: Path) -> None:
    """Rounds the trained model to fp16 once and puts it, with its tower, where the repository keeps it."""
    import torch

    from llava.model.builder import load_llava
    from llava.tokenization import load_tokenizer

    model = load_llava(str(trained), dtype=torch.float32).half()
    model.config.mm_vision_tower = "vision_tower"
    model.config.use_cache = True
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    load_tokenizer(trained).save_pretrained(folder)
    shutil.copytree(tower, folder / "vision_tower")
