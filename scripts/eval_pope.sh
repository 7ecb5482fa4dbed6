#!/usr/bin/env bash
# POPE: 8,910 questions whether a thing is in a COCO picture (--mode official: 9,000).
#   bash scripts/eval_pope.sh CHECKPOINT [--compare BASE] [--limit N]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 8,910 answers of a word: about 30 minutes on one 80 GB GPU (an estimate).
# Expected: LLaVA-v1.5-13B mean F1 85.95 (the authors' own answers, which the scorer reproduces); for 7B 86.1 is printed
# (PDS-DPO).
# Output: runs/eval/<checkpoint>/pope/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate pope --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate pope "$@"
