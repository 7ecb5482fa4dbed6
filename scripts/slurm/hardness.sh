#!/usr/bin/env bash
# Hardness of the preference pairs over the GPUs of several machines: each task of the job takes its shard.
#   DATA=pairs.jsonl IMAGES=images OUTPUT=runs/dama sbatch --ntasks 16 scripts/slurm/hardness.sh [FLAGS]
# Further flags go to `python -m dama hardness`. Interrupted or requeued with as many tasks, it continues. The folders must
# lie on a disk that all machines see. Run scripts/setup.sh before. scripts/dama_7b.sh with the same DATA, IMAGES and OUTPUT
# finds the stage complete and goes on. --dry-run first prints the commands.
#SBATCH --job-name=dama-hardness
#SBATCH --ntasks=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
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
OUT=${OUTPUT:-checkpoints/dama_7b}/hardness
workers=${SLURM_CPUS_PER_TASK:-12}
digits SLURM_CPUS_PER_TASK "$workers" 1
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    $dry_run || "$@"
}

export PATH="$PWD/.venv/bin:$PATH"
# --kill-on-bad-exit: where one task fails the others need not go on; what they have done is kept.
run srun --mpi=none --kill-on-bad-exit=1 python -m dama hardness \
    --data "${DATA:-playground/data/pairs.jsonl}" --image_folder "${IMAGES:-playground/data/images}" \
    --on_bad_image skip --clip ViT-L-14-336-quickgelu --precision bf16 --batch_size 64 \
    --workers "$workers" --out "$OUT" "$@"
# The last task has merged the shards, unless the disk showed two that ended together each other's files too late.
if ! grep -qs '"complete": true' "$OUT/manifest.json"; then run python -m dama merge "$OUT"; fi
