#!/usr/bin/env bash
# Preference pairs from reward models alone, on TinyCOCO: the scene generator draws, a tiny CLIP is the reward, the SFT
# model answers; then DAMA, and Object HalBench before and after, beside the same answers ranked by the truth.
#   bash scripts/synthalign_tiny.sh               400 prompts, 300 held-out scenes: under 6 minutes on 2 quiet cores
#   bash scripts/synthalign_tiny.sh --rounds 2    a second round samples from the model that the first one trained
#   bash scripts/synthalign_tiny.sh --smoke       the same stages on less data
# A second call skips what is finished. RUN names the output folder; further arguments go to the trainings.
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
source scripts/checks.sh

rounds=1 prompts=400 scenes=300 epochs=4
folder=runs/synth_tiny smoke=()
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) digits --rounds "${2:-}" 1 && rounds=$2 && shift 2 ;;
        --smoke) prompts=48 scenes=40 epochs=1 folder=runs/synth_smoke smoke=(--smoke) && shift ;;
        *) break ;;
    esac
done
run=${RUN:-$folder}
source scripts/tinycoco.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

synth() { # synth STEP OUT [FLAGS]: `python -m dama synth` with the scene generator in place of diffusers
    local step=$1 out=$2
    shift 2
    python -m playground.tinycoco.synth pairs "$step" --out "$out" --image_reward clip:$world/clip \
        --reward clip:$world/clip --device cpu "$@"
}

align() { # align FOLDER CHECKPOINT [FLAGS]: hardness, reference and DAMA on FOLDER/pairs.jsonl, from CHECKPOINT
    local folder=$1 checkpoint=$2
    shift 2
    local data=(--data "$folder/pairs.jsonl" --image_folder "$run/pictures")
    python -m dama hardness "${data[@]}" --clip $world/clip --out "$folder/hardness"
    python -m dama reference "${data[@]}" --model_name_or_path "$checkpoint" --model_max_length 512 \
        --out "$folder/reference"
    python llava/train/train_mem.py --use_cpu True --task DPO --model_name_or_path "$checkpoint" --version v1 \
        --image_aspect_ratio pad --data_path "$folder/pairs.jsonl" --image_folder "$run/pictures" \
        --hardness "$folder/hardness" --reference "$folder/reference" --strategy both --dpo_beta 0.1 \
        --learning_rate "$rate" --lr_scheduler_type cosine --warmup_steps 0.1 --num_train_epochs $epochs \
        --per_device_train_batch_size 16 --model_max_length 512 --save_strategy epoch --save_total_limit 1 \
        --logging_steps 5 --report_to none --output_dir "$folder/dama" "$@"
}

# 100 steps: fewer than dama_tiny.sh takes, so three times its learning rate. The first choice, not tuned. 300 scenes,
# response-level / recall: SFT 49.7 / 96.4, reward's pairs 21.0 / 91.5, the truth's 15.7 / 87.5.
rate=3e-5
began=$SECONDS
stage "held-out scenes" python -m playground.tinycoco scenes --out "$run/data" --pairs 0 --scenes $scenes
stage "prompts" python -m playground.tinycoco.synth prompts --out "$run/prompts.jsonl" --count $prompts
stage "images" synth images "$run/pictures" --prompts "$run/prompts.jsonl" --image_format png --image_batch 16
stage "rank-images" synth rank-images "$run/pictures"
stage "captions: SFT" caption sft $world/llava
policy=$world/llava
models=("SFT=$policy")
for ((round = 1; round <= rounds; round++)); do
    here=$run/round-$round
    stage "round $round: respond" synth respond "$here" --pictures "$run/pictures" --responder "llava:$policy" \
        --samples 8 --temperature 1.0 --max_new_tokens 96 --batch_size 16 --seed "$round"
    stage "round $round: rank-responses" synth rank-responses "$here" --length_balance 0.25
    stage "round $round: DAMA" align "$here" "$policy" "$@"
    stage "round $round: report" synth report "$here" --hardness "$here/hardness"
    policy=$here/dama
    stage "captions: round $round" caption "round_$round" "$policy"
    models+=("Round $round=$policy")
done
# The same answers of round 1, ranked by what is drawn: what the best reward could do.
stage "truth: pairs" python -m playground.tinycoco.synth truth --pictures "$run/pictures" --answers "$run/round-1" \
    --out "$run/truth/pairs.jsonl"
stage "truth: DAMA" align "$run/truth" $world/llava "$@"
stage "captions: truth" caption truth "$run/truth/dama"
stage "table and report" python -m playground.tinycoco.synth report --run "$run" \
    --models "${models[@]}" "Truth=$run/truth/dama" "${smoke[@]}"
echo "all stages: $((SECONDS - began)) s"
