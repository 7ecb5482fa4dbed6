#!/usr/bin/env bash
# HallusionBench: 1,129 yes/no questions on figures and edited figures; right alone, per figure, per pair.
#   bash scripts/eval_hallusionbench.sh CHECKPOINT [--compare BASE] [--limit N]
#   bash scripts/eval_hallusionbench.sh CHECKPOINT --mode llm --judge-base-url URL --judge-model NAME
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 1,129 short answers: about 5 minutes on one 80 GB GPU (an estimate).
# The images come by hand, from the authors' drive.
# Expected, judged by gpt-4 (as printed by the authors): LLaVA-1.5-13B question 46.94, pair 10.55, figure 24.86.
# By rules (--mode rules, the default: the leading yes or no) "Yes" to everything gives 42.87, 3.96, 7.23. The two modes
# are not comparable.
# Output: runs/eval/<checkpoint>/hallusionbench/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate hallusionbench --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate hallusionbench "$@"
