#!/usr/bin/env bash
# Visual instruction tuning with LoRA on a base quantised to 4 bits.
# Global batch: 128 on 8 GPUs. See common.sh for what the environment sets; further flags go to train_mem.py.
set -euo pipefail
STAGE=finetune-qlora ZERO=${ZERO:-scripts/zero2.json} BATCH=${BATCH:-16} LEARNING_RATE=${LEARNING_RATE:-2e-4} SAVE_STEPS=50000
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
PROJECTOR=${PROJECTOR:-checkpoints/llava-v1.5-pretrain/mm_projector.bin}
FLAGS=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --pretrain_mm_mlp_adapter "$PROJECTOR"
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --bits 4)
source "$(dirname "$0")/common.sh"
