#!/usr/bin/env bash
# The body of the LLaVA-v1.5 scripts beside it. They set STAGE and the flags that differ; from the environment come MODEL
# (language model or checkpoint), VISION_TOWER, DATA, IMAGES, PROJECTOR, OUTPUT, GPUS, BATCH
# (on each GPU), LEARNING_RATE, ZERO (DeepSpeed's configuration), and --dry-run prints the command.
set -euo pipefail
source "$(dirname "$0")/../help.sh"
cd "$(dirname "$0")/../.."
source scripts/checks.sh
source scripts/gpus.sh

dry_run=false
if [ "${1:-}" = --dry-run ]; then
    dry_run=true
    shift
fi
MODEL=${MODEL:-lmsys/vicuna-13b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
IMAGES=${IMAGES:-playground/data}
OUTPUT=${OUTPUT:-checkpoints/llava-v1.5-$STAGE}
GPUS=${GPUS:-$(visible_gpus | wc -l)}
digits GPUS "$GPUS"
if [ "$GPUS" -eq 0 ]; then GPUS=1; fi # a dry run, or a CPU with --use_cpu True

read -ra launch <<<"$(launch_on "$GPUS")"
command=(deepspeed "${launch[@]}" llava/train/train_mem.py --deepspeed "$ZERO" --task LM
    --model_name_or_path "$MODEL" --vision_tower "$VISION_TOWER" --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --data_path "$DATA" --image_folder "$IMAGES" --output_dir "$OUTPUT"
    --bf16 True --num_train_epochs 1 --per_device_train_batch_size "$BATCH" --gradient_accumulation_steps 1
    --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.
    --model_max_length 2048 --gradient_checkpointing True --auto_checkpointing True --dataloader_num_workers 4 --logging_steps 1
    --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1 --report_to tensorboard
    "${FLAGS[@]}" "$@")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
if ! $dry_run; then
    visible=$(visible_gpus | wc -l)
    if [ "${DS_ACCELERATOR:-}" != cpu ] && [ "$visible" -lt "$GPUS" ]; then
        echo "GPUS: $GPUS asked for, $visible visible; lower GPUS, or train on CPUs with DS_ACCELERATOR=cpu and --use_cpu True" >&2
        exit 1
    fi
    bash scripts/setup.sh
    PATH="$PWD/.venv/bin:$PATH" exec "${command[@]}"
fi
