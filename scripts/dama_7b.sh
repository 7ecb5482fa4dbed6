#!/usr/bin/env bash
# DAMA on LLaVA-v1.5-7B, all parameters. Hardware: 4 or 8 GPUs of 80 GB (the paper: 4 A100, 22k pairs x 4 epochs in 7 h).
# From the environment: MODEL, DATA (JSON or JSONL of pairs), IMAGES (their folder), OUTPUT, GPUS, MICRO_BATCH,
# LEARNING_RATE, ZERO (DeepSpeed's configuration).
# --dry-run first prints every command; further flags go to train_mem.py.
set -euo pipefail
NAME=dama_7b
MODEL=${MODEL:-liuhaotian/llava-v1.5-7b}
DEFAULT_MICRO_BATCH=4 LEARNING_RATE=${LEARNING_RATE:-5e-7}
EXTRA=()
source "$(dirname "$0")/dama.sh"
