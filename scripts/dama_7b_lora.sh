#!/usr/bin/env bash
# DAMA on LLaVA-v1.5-7B with LoRA (rank 128). Hardware: one GPU of 40 to 80 GB. The micro-batch is the largest that fits.
# From the environment: MODEL, DATA (JSON or JSONL of pairs), IMAGES (their folder), OUTPUT, GPUS, MICRO_BATCH,
# LEARNING_RATE, ZERO (DeepSpeed's configuration).
# --dry-run first prints every command; further flags go to train_mem.py.
set -euo pipefail
NAME=dama_7b_lora
MODEL=${MODEL:-liuhaotian/llava-v1.5-7b}
DEFAULT_MICRO_BATCH=16 LEARNING_RATE=${LEARNING_RATE:-1e-5}
EXTRA=(--auto_micro_batch True --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5)
source "$(dirname "$0")/dama.sh"
