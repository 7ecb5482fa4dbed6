#!/usr/bin/env bash
# The body that dama_7b.sh, dama_13b.sh, dama_7b_lora.sh and dama_vlm.sh share; they set NAME, MODEL, the micro-batch and the learning
# rate. The paper's settings: 16 pairs a step over all GPUs, 12 of them selected, beta 0.1, 4 epochs, cosine with warm-up
# 0.1, bf16, ZeRO-2.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
source scripts/checks.sh
source scripts/gpus.sh

dry_run=false
if [ "${1:-}" = --dry-run ]; then
    dry_run=true
    shift
fi
MODEL=${MODEL:?set by the script that calls this one}
DATA=${DATA:-playground/data/pairs.jsonl}
IMAGES=${IMAGES:-playground/data/images}
OUTPUT=${OUTPUT:-checkpoints/$NAME}
GPUS=${GPUS:-$(visible_gpus | wc -l)}
MICRO_BATCH=${MICRO_BATCH:-$DEFAULT_MICRO_BATCH}
ZERO=${ZERO:-scripts/zero2.json}
if ! declare -p LAYOUT >/dev/null 2>&1; then LAYOUT=(--version v1 --image_aspect_ratio pad); fi # LLaVA-1.5's; none for other models
read -ra loss <<<"${LOSS:-dpo}" # such as LOSS=mdpo, or LOSS="dpo:0.8 sft:1"; see docs/objectives.md
TOKEN_WEIGHTS=${TOKEN_WEIGHTS:-none} # or segments:5, visual
views=(--loss "${loss[@]}" --token_weights "$TOKEN_WEIGHTS" ${CORRUPTION:+--corruption "$CORRUPTION"}) # the second image's
if ! declare -p PROCESSOR >/dev/null 2>&1; then PROCESSOR=(); fi # flags of the image processor, the same in both stages
CLIP=ViT-L-14-336-quickgelu
pairs_per_step=16
digits GPUS "$GPUS"
digits MICRO_BATCH "$MICRO_BATCH" 1

run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    $dry_run || "$@"
}

$dry_run || bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
# Everything that is missing is reported at once, before anything starts. It reads what a dry run prints.
run python -m dama doctor --config-of "scripts/$(basename "$0")" "$@"
if [ "$GPUS" -eq 0 ]; then GPUS=1; fi # only a dry run comes here without a GPU
read -ra launch <<<"$(launch_on "$GPUS")"
pairs_per_gpu=$((GPUS < pairs_per_step ? pairs_per_step / GPUS : 1))
if [ "$MICRO_BATCH" -gt "$pairs_per_gpu" ]; then MICRO_BATCH=$pairs_per_gpu; fi

run python -m dama hardness --data "$DATA" --image_folder "$IMAGES" --on_bad_image skip \
    --clip "$CLIP" --pretrained openai --precision bf16 --batch_size 64 --out "$OUTPUT/hardness"
run python -m dama reference --data "$DATA" --image_folder "$IMAGES" --on_bad_image skip --on_long_pair skip \
    --model_name_or_path "$MODEL" --precision bf16 --model_max_length 2048 --batch_size 4 \
    "${views[@]}" "${PROCESSOR[@]}" --out "$OUTPUT/reference"
run deepspeed "${launch[@]}" llava/train/train_mem.py --deepspeed "$ZERO" --task DPO \
    --model_name_or_path "$MODEL" "${LAYOUT[@]}" \
    --data_path "$DATA" --image_folder "$IMAGES" --on_bad_image skip --on_long_pair skip \
    --hardness "$OUTPUT/hardness" --reference "$OUTPUT/reference" \
    "${views[@]}" \
    --strategy both --variant paper --dpo_beta 0.1 --select_ratio 0.75 --gamma 0.9 \
    --num_train_epochs 4 --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --warmup_steps 0.1 --weight_decay 0. \
    --per_device_train_batch_size "$MICRO_BATCH" \
    --gradient_accumulation_steps $((pairs_per_gpu / MICRO_BATCH)) \
    --bf16 True --gradient_checkpointing True --auto_checkpointing True --model_max_length 2048 --dataloader_num_workers 4 \
    --eval_pairs 0.01 --eval_strategy epoch --save_strategy epoch --save_total_limit 1 \
    --metric_for_best_model eval_loss --logging_steps 5 --report_to tensorboard \
    "${PROCESSOR[@]}" "${EXTRA[@]}" --output_dir "$OUTPUT" "$@"

# Behind the commands: the doctor reads them, and names this beside all else that is wrong.
fault=
if [ $((pairs_per_step % GPUS)) -ne 0 ]; then
    fault="GPUS: $pairs_per_step pairs a step cannot be spread evenly over $GPUS; set GPUS to 1, 2, 4, 8 or 16"
elif [ $((pairs_per_gpu % MICRO_BATCH)) -ne 0 ]; then
    fault="MICRO_BATCH: $pairs_per_gpu pairs a step on each of $GPUS GPU(s) are no multiple of $MICRO_BATCH; set it to 1, 2, 4 or 8"
fi
if [ -n "$fault" ]; then
    echo "$fault" >&2
    exit 1
fi
