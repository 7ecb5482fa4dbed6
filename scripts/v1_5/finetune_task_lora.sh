#!/usr/bin/env bash
# Further tuning of a LLaVA-v1.5 checkpoint with LoRA on data of one's own.
# Global batch: 128 on 8 GPUs. See common.sh for what the environment sets; further flags go to train_mem.py.
set -euo pipefail
STAGE=task-lora ZERO=${ZERO:-scripts/zero3.json} BATCH=${BATCH:-16} LEARNING_RATE=${LEARNING_RATE:-2e-4} SAVE_STEPS=50000
DATA=${DATA:-playground/data/custom.json}
MODEL=${MODEL:-liuhaotian/llava-v1.5-13b}
FLAGS=(--version v1 --image_aspect_ratio pad --group_by_modality_length True
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5)
source "$(dirname "$0")/common.sh"
