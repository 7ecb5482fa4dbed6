#!/usr/bin/env bash
# Preference data without people and LLaVA-v1.5-7B aligned with it, with PDS-DPO's models and settings (arXiv 2412.17417):
# SD3-medium draws 4 candidates a prompt, ImageReward keeps one, three LLaVA-1.6 answer, ArmoRM ranks; LoRA r 128,
# learning rate 1e-5, 2 epochs. Hardware: one GPU of 80 GB; for 9,000 prompts about two days, most of it for pictures.
#   --dry-run      print every command
#   --trust_remote_code  run the code that comes with REWARD, which may do anything; ArmoRM, the default, needs it
#   --rounds N     N more rounds (RLAIF-V's way): the policy itself answers, 8 samples; default 0, the paper's one round
# From the environment: PROMPTS, QUESTIONS (files of lines, one each), MODEL, OUTPUT, GPUS, IMAGE_REWARD (ImageReward's
# code is its own: a server of yours behind http:URL, see `python -m dama synth --help`; without one a CLIP ranks),
# REWARD (ArmoRM's code comes with its weights; http-text:URL reaches a server),
# STRATEGY (both: DAMA; none: the paper's plain DPO). Further flags go to train_mem.py.
# Needs SD3's licence accepted on its page.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
source scripts/checks.sh
source scripts/gpus.sh

dry_run=false rounds=0 trust=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=true && shift ;;
        --trust_remote_code) trust=(--trust_remote_code) && shift ;;
        --rounds) digits --rounds "${2:-}" && rounds=$2 && shift 2 ;;
        *) break ;;
    esac
done
PROMPTS=${PROMPTS:-playground/data/synth/prompts.txt}
QUESTIONS=${QUESTIONS:-playground/data/synth/questions.txt}
MODEL=${MODEL:-liuhaotian/llava-v1.5-7b}
OUTPUT=${OUTPUT:-checkpoints/synthalign_7b}
GPUS=${GPUS:-1}
digits GPUS "$GPUS" 1
read -ra launch <<<"$(launch_on "$GPUS")"
IMAGE_REWARD=${IMAGE_REWARD:-clip:ViT-L-14-336-quickgelu}
REWARD=${REWARD:-text:RLHFlow/ArmoRM-Llama3-8B-v0.1}
STRATEGY=${STRATEGY:-both}
if ! $dry_run && [ "$REWARD" = text:RLHFlow/ArmoRM-Llama3-8B-v0.1 ] && [ ${#trust[@]} -eq 0 ]; then
    echo "synthalign_7b.sh: error: REWARD $REWARD runs code that comes with its weights, expected --trust_remote_code" >&2
    echo "Remedy: read that code and give the flag, or give another REWARD" >&2
    exit 1
fi

run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    $dry_run || "$@"
}

align() { # align FOLDER CHECKPOINT [FLAGS]: hardness, reference and training on FOLDER/pairs.jsonl
    local folder=$1 checkpoint=$2
    shift 2
    local data=(--image_folder "$OUTPUT/pictures" --on_bad_image skip)
    run python -m dama hardness --data "$folder/pairs.jsonl" "${data[@]}" --clip ViT-L-14-336-quickgelu \
        --pretrained openai --precision bf16 --batch_size 64 --out "$folder/hardness"
    run python -m dama synth report --out "$folder" --hardness "$folder/hardness"
    run python -m dama reference --data "$folder/pairs.jsonl" "${data[@]}" --on_long_pair skip \
        --model_name_or_path "$checkpoint" --precision bf16 --model_max_length 2048 --batch_size 4 \
        --out "$folder/reference"
    run deepspeed "${launch[@]}" llava/train/train_mem.py --deepspeed scripts/zero2.json --task DPO \
        --model_name_or_path "$checkpoint" --version v1 --image_aspect_ratio pad \
        --data_path "$folder/pairs.jsonl" "${data[@]}" --on_long_pair skip \
        --hardness "$folder/hardness" --reference "$folder/reference" --strategy "$STRATEGY" --dpo_beta 0.1 \
        --lora_enable True --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --mm_projector_lr 2e-5 \
        --learning_rate 1e-5 --num_train_epochs 2 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0. \
        --per_device_train_batch_size 1 --gradient_accumulation_steps $((16 / GPUS)) \
        --auto_micro_batch True --bf16 True --gradient_checkpointing True --auto_checkpointing True --model_max_length 2048 --dataloader_num_workers 4 \
        --save_strategy epoch --save_total_limit 1 --logging_steps 5 --report_to tensorboard \
        --output_dir "$folder/lora" "$@"
    [ -d "$folder/merged" ] || run python scripts/merge_lora_weights.py --model-path "$folder/lora" \
        --model-base "$checkpoint" --save-model-path "$folder/merged"
    run python -m eval.evaluate objhal "$folder/merged" --out "$folder/eval"
}

if [ $((16 % GPUS)) -ne 0 ]; then
    echo "GPUS: 16 pairs a step cannot be spread evenly over $GPUS; set it to one of 1, 2, 4, 8, 16" >&2
    exit 1
fi
missing=()
for file in "$PROMPTS" "$QUESTIONS"; do
    $dry_run || [ -f "$file" ] || missing+=("$file: no such file; one line a prompt, and the question about it")
done
if [ ${#missing[@]} -gt 0 ]; then
    printf '%s\n' "${missing[@]}" >&2
    exit 1
fi
$dry_run || bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

run python -m dama synth images --prompts "$PROMPTS" --questions "$QUESTIONS" --out "$OUTPUT/pictures" \
    --text_to_image stabilityai/stable-diffusion-3-medium-diffusers --guidance 5 7 9 11 --steps 28 --image_batch 4
run python -m dama synth rank-images --out "$OUTPUT/pictures" --image_reward "$IMAGE_REWARD"
# One answer of each model, as the paper; their chat template is used, where the paper's code sends the bare question.
run python -m dama synth respond --pictures "$OUTPUT/pictures" --out "$OUTPUT/round-1" \
    --responder hf:llava-hf/llava-v1.6-mistral-7b-hf --responder hf:llava-hf/llava-v1.6-vicuna-13b-hf \
    --responder hf:llava-hf/llava-v1.6-vicuna-7b-hf --load_4bit --samples 1 --temperature 1.0 --max_new_tokens 1000
run python -m dama synth rank-responses --out "$OUTPUT/round-1" --reward "$REWARD" "${trust[@]}"
align "$OUTPUT/round-1" "$MODEL" "$@"
for ((round = 2; round <= rounds + 1; round++)); do
    policy=$OUTPUT/round-$((round - 1))/merged here=$OUTPUT/round-$round
    run python -m dama synth respond --pictures "$OUTPUT/pictures" --out "$here" --responder "llava:$policy" \
        --samples 8 --temperature 0.7 --max_new_tokens 1000 --seed "$round"
    run python -m dama synth rank-responses --out "$here" --reward "$REWARD" "${trust[@]}" --length_balance 0.25
    align "$here" "$policy" "$@"
done
