#!/usr/bin/env bash
# Reference log-probs over the GPUs of several machines: each task of the job takes its shard, one model on each GPU.
#   MODEL=liuhaotian/llava-v1.5-7b DATA=pairs.jsonl IMAGES=images OUTPUT=runs/dama sbatch --ntasks 16 scripts/slurm/reference.sh
# Further flags go to `python -m dama reference`. Interrupted or requeued with as many tasks, it continues. The folders
# must lie on a disk that all machines see. Run scripts/setup.sh before. scripts/dama_7b.sh with the same DATA, IMAGES and
# OUTPUT finds the stage complete and goes on. --dry-run first prints the commands.
#SBATCH --job-name=dama-reference
#SBATCH --ntasks=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
# Under sbatch the script is a copy without its neighbors.
case " $* " in *" --help "*) source "$(dirname "$0")/../help.sh" ;; esac
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" # sbatch runs a copy of this file that lies elsewhere
source scripts/checks.sh

dry_run=false
if [ "${1:-}" = --dry-run ]; then
    dry_run=true
    shift
fi
OUT=${OUTPUT:-checkpoints/dama_7b}/reference
workers=${SLURM_CPUS_PER_TASK:-8}
digits SLURM_CPUS_PER_TASK "$workers" 1
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    $dry_run || "$@"
}

export PATH="$PWD/.venv/bin:$PATH"
# --kill-on-bad-exit: where one task fails the others need not go on; what they have done is kept.
run srun --mpi=none --kill-on-bad-exit=1 python -m dama reference \
    --model_name_or_path "${MODEL:-liuhaotian/llava-v1.5-7b}" \
    --data "${DATA:-playground/data/pairs.jsonl}" --image_folder "${IMAGES:-playground/data/images}" \
    --on_bad_image skip --on_long_pair skip --precision bf16 --model_max_length 2048 --batch_size 4 \
    --workers "$workers" --out "$OUT" "$@"
# The last task has merged the shards, unless the disk showed two that ended together each other's files too late.
if ! grep -qs '"complete": true' "$OUT/manifest.json"; then run python -m dama merge "$OUT"; fi
