"""Preflight: what a training would miss on this machine, in one message before anything starts."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dama.console import say

GIB = 1 << 30
ACTIVATIONS_GIB = 6.0  # a micro-batch under activation checkpointing, CUDA context and fragmentation
LORA_SHARE = 0.05  # LoRA's parameters beside the base's, rank 128


def gpu_memory_needed(billions: float, gpus: int, method: str, zero: int = 2) -> float:
    """GiB on each GPU in bf16. ZeRO-2: weights whole, 2 bytes a parameter; gradients, fp32 master and Adam moments,
    2 + 12 bytes a trained parameter, shared out. ZeRO-3 shares the weights out too. LoRA trains 5 % of the parameters.
    """
    trained = billions if method == "full" else billions * LORA_SHARE
    weights = 2 * billions / (max(1, gpus) if zero == 3 else 1)
    return 1e9 * (weights + (2 + 12) * trained / max(1, gpus)) / GIB + ACTIVATIONS_GIB


def host_memory_needed(billions: float, gpus: int) -> float:
    """GiB of the host: every rank loads the checkpoint's largest part before it moves on, about 2 bytes a parameter."""
    return 1e9 * 2 * billions * min(gpus, 8) / GIB / 2 + 8


def disk_needed(billions: float, method: str) -> float:
    """GiB for two checkpoints with optimiser state and the final model."""
    return 1e9 * (2 * 14 * billions + 2 * billions if method == "full" else 2 * 14 * billions * LORA_SHARE) / GIB + 2


def find_missing(args: argparse.Namespace) -> list[str]:
    """One line for each thing that is missing, with its remedy."""
    missing = []
    if not Path(args.data).is_file():
        missing.append(f"DATA: no file '{args.data}'; set DATA to preference pairs in JSON or JSONL")
    if not Path(args.images).is_dir():
        missing.append(f"IMAGES: no folder '{args.images}'; set IMAGES to the folder that image paths start from")
    if not Path(args.model).is_dir() and not hub_has(args.model):
        missing.append(
            f"MODEL: '{args.model}' is no folder, is not in the local cache, and the hub did not answer; set MODEL to "
            "a LLaVA-v1.5 checkpoint folder"
        )
    if args.clip and not has_clip_weights(*args.clip.split(":")):
        missing.append(f"CLIP: the weights {args.clip} are not in the local cache, and the hub did not answer")
    missing += gpu_faults(args)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if memory < (wanted := host_memory_needed(args.billions, args.gpus)):
        missing.append(f"memory: {memory:.0f} GiB on this host, about {wanted:.0f} GiB needed to load the model")
    parent = next(p for p in [Path(args.output), *Path(args.output).absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free / GIB
    if free < (wanted := disk_needed(args.billions, args.method)):
        missing.append(f"disk: {free:.0f} GiB free at '{parent}', about {wanted:.0f} GiB needed; set OUTPUT elsewhere")
    return missing


def gpu_faults(args: argparse.Namespace) -> list[str]:
    found = torch.cuda.device_count()
    if found == 0 or args.gpus == 0:
        return ["GPU: none found; for a run without one see scripts/dama_tiny.sh"]
    faults = []
    if args.gpus > found:
        faults.append(f"GPUS: {args.gpus} asked for, {found} found")
    if args.pairs_per_step % args.gpus:
        works = [n for n in range(1, args.pairs_per_step + 1) if args.pairs_per_step % n == 0]
        faults.append(
            f"GPUS: {args.pairs_per_step} pairs a step cannot be spread evenly over {args.gpus}; set GPUS to one of "
            f"{', '.join(map(str, works))}"
        )
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(min(args.gpus, found))) / GIB
    needed = gpu_memory_needed(args.billions, args.gpus, args.method, args.zero)
    if memory < needed:
        faults.append(
            f"GPU memory: {memory:.0f} GiB on each, about {needed:.0f} GiB needed for {args.billions:g} billion "
            f"parameters on {args.gpus} GPU(s); use more GPUs, ZERO=scripts/zero3.json, or scripts/dama_7b_lora.sh"
        )
    return faults


def hub_has(name: str, file: str = "config.json") -> bool:
    """Whether a hub model can be had: from the local cache, or from the hub within 10 seconds."""
    from huggingface_hub import model_info, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file), str):
        return True
    try:
        return model_info(name, timeout=10).id is not None
    except Exception:  # any failure means the same to the user: not to be had from here
        return False


def has_clip_weights(architecture: str, tag: str) -> bool:
    """Whether open_clip's weights can be had, from the local cache or from the hub."""
    import open_clip

    name = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rstrip("/")
    return bool(name) and hub_has(name, "open_clip_config.json")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.train.doctor", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data", required=True, help="file of preference pairs")
    parser.add_argument("--images", required=True, help="folder of their images")
    parser.add_argument("--output", required=True, help="folder that checkpoints will go to")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs to be used")
    parser.add_argument("--billions", type=float, required=True, help="parameters, in billions")
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="what is trained")
    parser.add_argument("--zero", type=int, choices=(2, 3), default=2, help="DeepSpeed's ZeRO stage")
    parser.add_argument("--clip", help="open_clip architecture:weights that the hardness stage will fetch")
    parser.add_argument("--pairs_per_step", type=int, default=16, help="N of the paper")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    missing = find_missing(args)
    if missing:
        say("\n  - ".join([f"{len(missing)} thing(s) missing for this training:", *missing]))
        return 1
    needed = gpu_memory_needed(args.billions, args.gpus, args.method, args.zero)
    say(f"preflight: all there; about {needed:.0f} GiB will be used on each of {args.gpus} GPU(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
