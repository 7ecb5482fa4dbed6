#!/usr/bin/env bash
# Object HalBench: 300 descriptions of COCO pictures, and the objects in them that are not in the picture.
#   bash scripts/eval_objhal.sh CHECKPOINT [--compare BASE] [--limit N]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 300 answers with 3 beams: about 15 minutes on one 80 GB GPU (an estimate).
# Expected for LLaVA-v1.5-7B, response / mention level: --mode rules 55.7 / 16.0 (as printed by UE-DPO), --mode llm
# 53.6 / 25.2 (as printed by mDPO; its nouns come from spaCy: `python -m spacy download en_core_web_trf` once, in .venv,
# else rules find them and the figures say so). The two modes are not comparable.
# Output: runs/eval/<checkpoint>/objhal/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate objhal --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate objhal "$@"
