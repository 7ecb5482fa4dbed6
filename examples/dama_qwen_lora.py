"""DAMA on Qwen2.5-VL with LoRA, from Python: hardness, reference log-probs, training.

    python examples/dama_qwen_lora.py --data pairs.jsonl --image_folder images --out runs/qwen

pairs.jsonl has one pair a line, such as
    {"idx": 1, "image_path": "a.jpg", "question": "What is this?", "chosen": "A cat.", "rejected": "A cat and a dog."}
The three stages run in this process, on one GPU (bf16) or, for tiny models, on the CPU. A second call skips what is
finished. Flags that are not listed below go to the training, as in --num_train_epochs 1; `python -m dama train
--help_all` lists them. Afterwards ask the model:

    python -m llava.serve.cli --model-path runs/qwen/adapter --image-file images/a.jpg

The tests run this script on a tiny model of Qwen2.5-VL's architecture; no real weights were trained with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from dama.cli import main as dama


def build_parser() -> argparse.ArgumentParser:
    """Flags of this example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="preference pairs: JSON list or JSONL")
    parser.add_argument("--image_folder", required=True, metavar="DIR", help="folder that image paths are relative to")
    parser.add_argument("--out", default="runs/qwen", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--model", default="Qwen/Qwen2.5-VL-3B-Instruct", metavar="NAME|DIR", help="default: %(default)s"
    )
    parser.add_argument("--clip", default="ViT-L-14-336-quickgelu", metavar="NAME|DIR", help="default: %(default)s")
    parser.add_argument(
        "--max_pixels", type=int, default=602112, metavar="N",
        help="most pixels of an image, which bounds its tokens: 28 x 28 for one (default: %(default)s, 768 tokens)",
    )  # fmt: skip
    return parser


def stages_of(args: argparse.Namespace, more: Sequence[str], on_gpu: bool) -> list[list[str]]:
    """The three commands, as `python -m dama` takes them."""
    data = ["--data", args.data, "--image_folder", args.image_folder]
    model = ["--model", args.model, "--max_pixels", str(args.max_pixels)]
    hardness, reference, adapter = (f"{args.out}/{name}" for name in ("hardness", "reference", "adapter"))
    lora = ["--lora_enable", "True", "--lora_r", "128", "--lora_alpha", "256", "--learning_rate", "1e-5"]
    # 16 pairs a step, of which DAMA selects 12.
    step = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--num_train_epochs", "4"]
    schedule = ["--lr_scheduler_type", "cosine", "--warmup_steps", "0.1", "--logging_steps", "5"]
    hardware = ["--bf16", "True", "--gradient_checkpointing", "True"] if on_gpu else ["--use_cpu", "True"]
    return [
        ["hardness", *data, "--clip", args.clip, "--out", hardness],
        ["reference", *data, *model, "--precision", "bf16" if on_gpu else "fp32", "--out", reference],
        ["train", *data, *model, "--hardness", hardness, "--reference", reference, "--out", adapter]
        + [*lora, *step, *schedule, *hardware, *more],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages one after the other; return the exit status of the first that fails, else 0."""
    args, more = build_parser().parse_known_args(argv)
    for stage in stages_of(args, more, torch.cuda.is_available()):
        if status := dama(stage):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
