#!/usr/bin/env bash
# Sourced by dama_tiny.sh and synthalign_tiny.sh once `run`, their output folder, is set: set-up, and what they share.
set -euo pipefail
source "$(dirname "$0")/help.sh"
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
world=playground/tinycoco/weights

stage() { # stage NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "   $name: $((SECONDS - began)) s"
}

template=(--conv-mode v1) # of a LLaVA's prompts; other models have their own

caption() { # caption NAME CHECKPOINT
    python -m llava.eval.generate --model-path "$2" --question-file "$run/data/questions.jsonl" \
        --image-folder "$run/data/images" "${template[@]}" --max-new-tokens 96 --batch-size 32 --out "$run/captions/$1"
}
