#!/usr/bin/env bash
# All nine benchmarks, then one table (runs/eval/summary.txt) and a radar chart (radar.png). The table marks each metric
# as hallucination or ability; with --compare, a line below it lists how ability changed against BASE.
#   bash scripts/eval_all.sh CHECKPOINT [--compare BASE] [--judge-base-url URL] [--limit N]
# Hardware: any GPU that holds the model, several are all used; about 2 hours on one of 80 GB (an estimate).
# Without a judge the answers of mmhal, llavabench and mmvet are kept and can be judged later. A benchmark whose data
# cannot be had is named and left out. Expected figures: in the scripts of each benchmark.
# All flags: `python -m eval.evaluate all --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate all "$@"
