"""DPO and supervised fine-tuning of the golden checkpoint, every number computed.

In a child: python -m tests.cuda.trainings OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from llava.train import train, train_dpo
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    "--model_name_or_path", "llava-v1.5-tiny", "--version", "v1", "--image_folder", "images", "--disable_tqdm", "True",
    "--logging_steps", "1", "--num_train_epochs", "1", "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip
DPO = [
    *COMMON, "--task", "DPO", "--image_aspect_ratio", "square", "--data_path", "dama/rlaifv_records.json", "--variant",
    "paper", "--delta_bar", "0.0482190464911681", "--learning_rate", "1e-3",
]  # fmt: skip
SFT = [*COMMON, "--task", "LM", "--data_path", "sft/records.json", "--learning_rate", "5e-4"]
FOUR = ["--per_device_train_batch_size", "4"]
# LoRA without dropout, whose zeros differ between devices.
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0"]
WAYS = {
    "dpo plain": [*DPO, *FOUR],
    "dpo accumulation": [*DPO, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
    "dpo lora": [*DPO, *FOUR, *LORA],
    "dpo zero2": [*DPO, *FOUR, "--deepspeed", str(ROOT / "scripts" / "zero2.json")],
    "dpo zero3": [*DPO, *FOUR, "--deepspeed", str(ROOT / "scripts" / "zero3.json")],
    "sft plain": [*SFT, "--per_device_train_batch_size", "2"],
    "sft lora": [*SFT, "--per_device_train_batch_size", "2", *LORA],
    "sft zero2": [*SFT, "--per_device_train_batch_size", "2", "--deepspeed", str(ROOT / "scripts" / "zero2.json")],
}


def without_deepspeed(words: list[str]) -> list[str]:
    at = words.index("--deepspeed") if "--deepspeed" in words else len(words)
    return words[:at] + words[at + 2 :]


def steps_of(words: list[str]) -> list[dict[str, float]]:
    """Loss and gradient norm of every step of a training, in the golden folder."""
    run = train_dpo.run if "DPO" in words else train.run
    before = os.getcwd()
    os.chdir(GOLDEN)
    try:
        with tempfile.TemporaryDirectory() as out:
            trainer = run(parse_arguments([*words, "--output_dir", out]))
    finally:
        os.chdir(before)
    return [{name: float(row[name]) for name in ("loss", "grad_norm")} for row in trainer.state.log_history
            if "loss" in row]  # fmt: skip


def main(out: str) -> None:
    from llava.rehearsal.engine import single_rank_world
    from llava.rehearsal.mode import NullMode, counts

    def rehearse(way: str) -> dict[str, Any]:
        before = counts()["gemms"]
        with NullMode(everything=True):
            steps = steps_of(WAYS[way])
        return {"steps": steps, "gemms": counts()["gemms"] - before}

    alone = [way for way, words in WAYS.items() if "--deepspeed" not in words]
    results = {way: rehearse(way) for way in alone}
    with single_rank_world(1, numbers=True):
        results |= {way: rehearse(way) for way in WAYS if way not in alone}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
