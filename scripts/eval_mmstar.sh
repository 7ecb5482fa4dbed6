#!/usr/bin/env bash
# MMStar: 1,500 multiple-choice questions that need the image, six capabilities; what alignment should not lower.
#   bash scripts/eval_mmstar.sh CHECKPOINT [--compare BASE] [--limit N]
#   bash scripts/eval_mmstar.sh CHECKPOINT --blind [--text_only RESULTS]   # multi-modal gain, leakage
# RESULTS are those of the language model alone, made by `--mode text_only`.
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 1,500 answers of a letter: about 5 minutes on one 80 GB GPU (an estimate), twice that with --blind.
# Expected: LLaVA-NeXT-34B total 52.07 (the authors' own answers, which the scorer reproduces).
# Output: runs/eval/<checkpoint>/mmstar/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate mmstar --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate mmstar "$@"
