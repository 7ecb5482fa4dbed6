#!/usr/bin/env bash
# Visual instruction tuning of all weights on the 665K mix. LLaVA-v1.5-13B: 20 h on 8 A100 of 80 GB.
# Global batch: 128 on 8 GPUs. See common.sh for what the environment sets; further flags go to train_mem.py.
set -euo pipefail
STAGE=finetune ZERO=${ZERO:-scripts/zero3.json} BATCH=${BATCH:-16} LEARNING_RATE=${LEARNING_RATE:-2e-5} SAVE_STEPS=50000
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
PROJECTOR=${PROJECTOR:-checkpoints/llava-v1.5-pretrain/mm_projector.bin}
FLAGS=(--version v1 --image_aspect_ratio pad --group_by_modality_length True --pretrain_mm_mlp_adapter "$PROJECTOR")
source "$(dirname "$0")/common.sh"
