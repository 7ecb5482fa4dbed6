#!/usr/bin/env bash
# MMHal-Bench: 96 questions, rated from 0 to 6 by a judge.
#   bash scripts/eval_mmhal.sh CHECKPOINT [--compare BASE] --judge-base-url URL [--judge-model NAME]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 96 answers with 3 beams: about 5 minutes on one 80 GB GPU (an estimate); 96 judge calls of about 2,000 tokens.
# Expected for LLaVA-v1.5-7B, score / hallucination rate: 2.11 / 54 % (as printed by mDPO), 2.36 / 51 % (TPR), 2.01 /
# 61 % (UE-DPO): it depends on the judge, so judge the model that you compare with yourself (--compare).
# On TinyCOCO, without a download, a local judge that rates by rules: see playground/tinycoco/judge.py.
# Output: runs/eval/<checkpoint>/mmhal/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate mmhal --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate mmhal "$@"
