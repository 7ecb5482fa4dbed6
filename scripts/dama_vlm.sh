#!/usr/bin/env bash
# DAMA on any vision-language model of Hugging Face, all parameters but the vision encoder's (LORA=1: adapters of rank 128
# alone). Hardware for a 7B model: 4 or 8 GPUs of 80 GB, with LORA=1 one; docs/models.md lists what can be trained.
# From the environment: MODEL, DATA (JSON or JSONL of pairs), IMAGES (their folder), OUTPUT, GPUS, MICRO_BATCH,
# LEARNING_RATE, ZERO (DeepSpeed's configuration), MAX_PIXELS (of an image, where the resolution follows it), LOSS.
# --dry-run first prints every command; further flags go to train_mem.py.
set -euo pipefail
NAME=dama_vlm
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
DEFAULT_MICRO_BATCH=2 LAYOUT=() EXTRA=() PROCESSOR=()
if [ -n "${MAX_PIXELS:-}" ]; then PROCESSOR=(--max_pixels "$MAX_PIXELS"); fi
if [ "${LORA:-0}" = 1 ]; then
    LEARNING_RATE=${LEARNING_RATE:-1e-5}
    EXTRA=(--lora_enable True --lora_r 128 --lora_alpha 256)
fi
LEARNING_RATE=${LEARNING_RATE:-5e-7}
source "$(dirname "$0")/dama.sh"
