#!/usr/bin/env bash
# CHAIR on COCO: detailed descriptions of 500 val2014 images, and the objects in them that are not in the image.
#   bash scripts/eval_chair.sh CHECKPOINT [--compare BASE] [--image_ids FILE] [--mode 512|128|64] [--limit N]
# The images are POPE's 500 unless --image_ids lists others; the protocol names the list by its digest.
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 500 descriptions of up to 512 tokens: about 10 minutes on one 80 GB GPU (an estimate).
# Expected for LLaVA-v1.5-7B: CHAIRs 46 to 55, CHAIRi 13 to 17, as papers print them for 500 images of their own choice;
# figures for other images are not comparable.
# Output: runs/eval/<checkpoint>/chair/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate chair --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate chair "$@"
