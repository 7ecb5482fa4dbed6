#!/usr/bin/env bash
# What only a GPU can show, on one GPU of 40 GB or more, in at most 8 minutes:
#   kernels     packed attention against padded rows, in bf16 and fp32, head widths 36 to 264, grouped queries
#   tiny        trainings of the golden checkpoint against the CPU's losses
#   step7b      forward and backward of the 7B shape at 1, 4 and 8 pairs: ms of each phase, peak memory against the
#               estimate, MFU, synchronizations, a profiler trace; gradient checkpointing, --compile_layers,
#               --float32_logits and fused AdamW on and off; against padded rows and TRL
#   lora7b      LoRA of rank 128 at 1, 4 and 16 pairs
#   qlora7b     QLoRA of rank 128 over 4 bits at 1, 4 and 8 pairs
#   vlm7b       forward and backward of Qwen2.5-VL-7B's shape at 4 pairs: packed, compiled, rows apart, TRL
#   noise       log-probs and R of pairs packed and alone, with logits in bf16 and fp32, and the limits that follow
#   zero2       DeepSpeed's ZeRO-2 engine with NCCL on 8 layers: peak memory against the estimate, fused AdamW or not
#   generation  tokens a second of the 7B shape at batches of 1 and 16
#   hardness    images a second of CLIP ViT-L-14-336
# Weights are random and made on the GPU: nothing is downloaded, nothing large is written. Every block prints a line;
# all results go to runs/gpu_check/CARD.json, logs and the trace to the folder of that name.
#   bash scripts/gpu_check.sh [--blocks kernels,noise] [--out FILE] [--minutes 8]
#   bash scripts/gpu_check.sh --rehearse     small shapes on a simulated GPU, on any Linux machine; times mean nothing
# Runs in .venv where it exists, else with python3, which needs torch, transformers, accelerate, peft, sentencepiece,
# pillow and pytest. Blocks whose package is missing are left out and named: deepspeed (zero2), trl and datasets (a case
# of step7b), open_clip_torch (hardness), bitsandbytes (qlora7b, a case of tiny). Packages can be brought along without
# being installed:
#   pip install --no-deps --target site deepspeed hjson msgpack py-cpuinfo einops
#   PYTHONPATH=site bash scripts/gpu_check.sh
# From the environment: REVISION, of a copy without .git; PYTHON, the interpreter.
set -euo pipefail
source "$(dirname "$0")/help.sh"
source "$(dirname "$0")/gpus.sh"
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
# One GPU: the first of those that this shell may use.
first=$(visible_gpus | head -n 1)
if [ -n "$first" ]; then export CUDA_VISIBLE_DEVICES=$first; fi
export PYTHONPATH=$PWD:$PWD/scripts/bench${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m scripts.gpu "$@"
