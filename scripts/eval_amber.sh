#!/usr/bin/env bash
# AMBER: what 1,004 descriptions invent, and 14,216 yes/no questions.
#   bash scripts/eval_amber.sh CHECKPOINT [--compare BASE] [--limit N]
# Hardware: any GPU that holds the model (several are all used), or a CPU.
# 1,004 long and 14,216 short answers: about 1 hour on one 80 GB GPU (an estimate).
# Expected for LLaVA-v1.5-7B (AMBER's README): CHAIR 7.8, Cover 51.0, Hal 36.4, Cog 4.2, accuracy 72.0, F1 74.7, and
# score 83.5.
# Its pictures come by hand, from the authors' Google Drive. Words are found by nltk's tagger and compared by spaCy's
# vectors, as the original does: once, in .venv, `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng
# wordnet`, `python -m spacy download en_core_web_lg`, `python -m eval.amber FOLDER`. Without, figures are labelled so.
# Output: runs/eval/<checkpoint>/amber/; DAMA_BENCH_DATA names a folder with the data.
# All flags: `python -m eval.evaluate amber --help`.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m eval.evaluate amber "$@"
