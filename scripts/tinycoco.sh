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
    answers "$2" questions.jsonl 96 32 "$run/captions/$1"
}

answer() { # answer NAME CHECKPOINT: the ability benchmark
    answers "$2" ability.jsonl 16 128 "$run/ability/$1"
}

answers() { # answers CHECKPOINT FILE TOKENS BATCH OUT
    python -m llava.eval.generate --model-path "$1" --question-file "$run/data/$2" --image-folder "$run/data/images" \
        "${template[@]}" --max-new-tokens "$3" --batch-size "$4" --out "$5"
}
