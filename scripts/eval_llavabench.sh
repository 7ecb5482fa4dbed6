#!/usr/bin/env bash
# LLaVA-Bench (In-the-Wild): 60 questions, each answer set against text-only GPT-4's by a judge.
#   bash scripts/eval_llavabench.sh CHECKPOINT [--compare BASE] --judge-base-url URL [--judge-model NAME]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 60 answers: about 2 minutes on one 80 GB GPU (an estimate); 60 judge calls of about 1,000 tokens.
# Expected for LLaVA-v1.5-7B: 64.8, 65.3, 66.3 (three runs of the authors' own reviews by gpt-4-0314, which the scorer
# reproduces). Absolute values depend on the judge: one with GPT-4o gives 82.3 (PEA-DPO).
# Output: runs/eval/<checkpoint>/llavabench/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate llavabench --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate llavabench "$@"
