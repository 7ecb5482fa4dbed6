"""The tiny LLaVA before alignment: a LLaMA decoder fine-tuned on questions, and captions that name absent things."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dama.console import write_json
from playground.tinycoco.captions import QUESTIONS, noisy_caption
from playground.tinycoco.questions import Turns, thing_turns, training_turns
from playground.tinycoco.scenes import Scene, draw, sample_scene

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
SCENES = 10_000  # of the training stream


class Stage(NamedTuple):
    """A fine-tuning: conversations by kind, about the training scenes in turn, in the file NAME.json."""

    name: str
    captions: int
    things: int  # conversations of thing_turns
    mixed: int  # of training_turns around a caption
    batch: int
    learning_rate: float
    schedule: str  # of the learning rate


# A model that describes learns to find a thing that it is asked for where questions about single things are most of the
# loss: in conversations of all kinds their few tokens count for little, and three times as many steps were not enough.
# Without captions among them it would forget how to describe. With yes/no questions about colors and sides among them
# it did not learn to find in as many steps (58 instead of 95 % of the colors), and those stayed at chance.
STAGES = (
    Stage("captions", 16_000, 0, 0, 32, 2e-3, "cosine"),
    Stage("things", 6_000, 14_000, 0, 16, 1.5e-3, "constant_with_warmup"),
    Stage("conversations", 8_000, 0, 5_000, 16, 1.5e-3, "cosine"),
)


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


def write_conversations(folder: Path, stages: Sequence[Stage] = STAGES, scenes: int = SCENES, seed: int = 0) -> None:
    """The images of the training scenes, and the file of each stage in LLaVA's format."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = [sample_scene(index, "train") for index in range(scenes)]
    for scene in tqdm(drawn, desc="training scenes", unit="scene"):
        draw(scene).save(folder / "images" / f"{scene.id}.png")
    for stage in stages:
        rng, in_turn = random.Random(f"sft/{seed}/{stage.name}"), cycle(drawn)
        rows = [
            {"id": scene.id, "image": f"{scene.id}.png", "conversations": list(_messages(kind(scene, rng)))}
            for kind, count in ((described, stage.captions), (thing_turns, stage.things), (mixed_turns, stage.mixed))
            for _, scene in zip(range(count), in_turn)
        ]
        write_json(folder / f"{stage.name}.json", rows)


def described(scene: Scene, rng: random.Random) -> Turns:
    """A caption of the noise that the model learns."""
    return [(rng.choice(QUESTIONS), noisy_caption(scene, rng, NOISE))]


def mixed_turns(scene: Scene, rng: random.Random) -> Turns:
    """Questions of all kinds around a caption, half of the time behind it."""
    turns = training_turns(scene, rng)
    place = 0 if rng.random() < 0.5 else rng.randint(1, len(turns))
    return turns[:place] + described(scene, rng) + turns[place:]


def _messages(turns: Turns) -> Iterator[dict[str, str]]:
    """Of a conversation about an image, which the first question has before it."""
    for number, (question, answer) in enumerate(turns):
        yield {"from": "human", "value": "<image>\n" * (number == 0) + question}
        yield {"from": "gpt", "value": answer}


def train(work: Path, seed: int = 0) -> Path:
    """From work/start, stage after stage, with data in work/sft; returns the last folder."""
    write_conversations(work / "sft", seed=seed)
    start = work / "start"
    for stage in STAGES:
        out = work / f"trained_on_{stage.name}"
        fine_tune(start, work / "sft", stage, out, seed)
        start = out
    return start


def fine_tune(start: Path, data: Path, stage: Stage, out: Path, seed: int = 0) -> None:
    """Instruction tuning by the repository's own train_mem.py, `--task LM`."""
    flags = {
        "task": "LM",
        "model_name_or_path": start,
        "version": "v1",
        "data_path": data / f"{stage.name}.json",
        "image_folder": data / "images",
        "image_aspect_ratio": "pad",
        "output_dir": out,
        "num_train_epochs": 1,
        "per_device_train_batch_size": stage.batch,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": stage.schedule,
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "adam_beta2": 0.98,
        "model_max_length": 512,
        "save_strategy": "no",
        "logging_steps": 50,
        "group_by_modality_length": True,
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
