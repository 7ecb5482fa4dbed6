#!/usr/bin/env bash
# MM-Vet: 218 questions on six capabilities, graded from 0 to 1 by a judge.
#   bash scripts/eval_mmvet.sh CHECKPOINT [--compare BASE] --judge-base-url URL [--judge-model NAME]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 218 answers: about 5 minutes on one 80 GB GPU (an estimate); 218 judge calls of about 700 tokens a run.
# Expected for LLaVA-v1.5-7B: 31.2, 30.8, 31.2 (three runs of the authors' own grades by gpt-4-0613, which the scorer
# reproduces). A judge of another version grades the same answers otherwise (27.9 in 2025, LLaVA issue 1905).
# Output: runs/eval/<checkpoint>/mmvet/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate mmvet --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate mmvet "$@"
