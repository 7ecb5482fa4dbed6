#!/usr/bin/env bash
# DAMA on LLaVA-v1.5-13B, all parameters. Hardware: 8 GPUs of 80 GB.
# From the environment: MODEL, DATA (JSON or JSONL of pairs), IMAGES (their folder), OUTPUT, GPUS, MICRO_BATCH,
# LEARNING_RATE, ZERO (DeepSpeed's configuration).
# --dry-run first prints every command; further flags go to train_mem.py.
set -euo pipefail
NAME=dama_13b
MODEL=${MODEL:-liuhaotian/llava-v1.5-13b}
DEFAULT_MICRO_BATCH=2 LEARNING_RATE=${LEARNING_RATE:-5e-7}
EXTRA=()
source "$(dirname "$0")/dama.sh"
