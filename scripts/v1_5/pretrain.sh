#!/usr/bin/env bash
# Feature alignment: trains the projector on 558K captions. LLaVA-v1.5-13B: 5.5 h on 8 A100.
# Global batch: 256 on 8 GPUs. See common.sh for what the environment sets; further flags go to train_mem.py.
set -euo pipefail
STAGE=pretrain ZERO=${ZERO:-scripts/zero2.json} BATCH=${BATCH:-32} LEARNING_RATE=${LEARNING_RATE:-1e-3} SAVE_STEPS=24000
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
FLAGS=(--version plain --tune_mm_mlp_adapter True --image_aspect_ratio square)
source "$(dirname "$0")/common.sh"
