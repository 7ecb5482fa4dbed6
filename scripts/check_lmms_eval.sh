#!/usr/bin/env bash
# lmms-eval itself runs eval/lmms_tasks on TinyCOCO: with the tiny model, and on recorded answers with right, wrong and
# unparsable ones for every task; every score must equal this repository's scorer's on the same answers.
#   bash scripts/check_lmms_eval.sh [FOLDER]      # FOLDER for what it writes, runs/check_lmms by default
# Hardware: 2 CPU cores, about 5 minutes, and a download of lmms-eval with what it needs beside .venv (20 MB).
# Expected: one line per metric, and "equal" at the end; exit code 1 where a score differs. Not part of the tests, since
# lmms-eval has its own environment, LMMS_VENV (default: .venv-lmms); a file in it makes .venv's packages visible there.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
OUT=${1:-runs/check_lmms}
VERSION=0.7.3
LMMS_VENV=${LMMS_VENV:-.venv-lmms}
PORT=${PORT:-8767}
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DAMA_BENCH_DATA=$OUT/bench

if [ ! -x "$LMMS_VENV/bin/python" ] || ! "$LMMS_VENV/bin/python" -c "import lmms_eval" 2> /dev/null; then
    .venv/bin/python -m venv "$LMMS_VENV"
    .venv/bin/python - > "$LMMS_VENV/dama.pth" << 'EOF'
import sysconfig
print(sysconfig.get_path("purelib"))
EOF
    mv "$LMMS_VENV/dama.pth" "$("$LMMS_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # What `python -m lmms_eval` imports for these tasks; all that it declares would be 3 GB, with other pins.
    "$LMMS_VENV/bin/pip" install --quiet aiohttp decord loguru evaluate jsonlines pytablewriter sacrebleu tenacity \
        python-dotenv tqdm-multiprocess sqlitedict chardet
    "$LMMS_VENV/bin/pip" install --quiet --no-deps "lmms-eval==$VERSION" # last: complete where it is there
fi

.venv/bin/python -m playground.tinycoco benchmarks --out "$OUT/bench" --scenes 12
.venv/bin/python -m eval.lmms_tasks.data
[ -d "$OUT/model" ] || .venv/bin/python -m llava.model.export --to hf playground/tinycoco/weights/llava "$OUT/model"
.venv/bin/python scripts/check_lmms_eval.py record "$OUT/recorded"

.venv/bin/python -m playground.tinycoco judge --port "$PORT" &
judge=$!
trap 'kill $judge' EXIT
export DAMA_JUDGE_BASE_URL=http://127.0.0.1:$PORT/v1 DAMA_JUDGE_MODEL=rules DAMA_JUDGE_OUT=$OUT/judge

run() { # run NAME MODEL ARGUMENTS: all four tasks
    rm -rf "${OUT:?}/$1"
    "$LMMS_VENV/bin/python" -m lmms_eval --model "$2" --model_args "$3" --include_path eval/lmms_tasks \
        --tasks dama_objhal,dama_amber_g,dama_amber_d,dama_mmhal --batch_size 1 --log_samples --output_path "$OUT/$1"
}
run recorded_results from_log "logs=$OUT/recorded"
run model_results llava_hf "pretrained=$OUT/model,device=cpu,device_map=cpu,dtype=float32"
.venv/bin/python scripts/check_lmms_eval.py compare "$OUT/recorded_results" "$OUT/model_results" --judge "$OUT/judge"
