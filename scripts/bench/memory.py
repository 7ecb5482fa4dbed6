"""The estimate of a training step's peak memory (llava/estimate/memory.py) against what real steps need.

Two steps of the trainer, on random weights of 46 million parameters (a Qwen2.5-VL: 48) and pairs of 636 + 120 + 110
positions, each case in fresh processes: bytes of tensors, counted by PyTorch's allocator. ZeRO runs on two real ranks
over gloo.

    PYTHONPATH=. python scripts/bench/memory.py                          # one CPU thread a rank, about 10 minutes
    PYTHONPATH=. python scripts/bench/memory.py --shape 7b --only lora   # LLaVA-v1.5-7B's shape on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vlm_step
from measure import SHAPES, Shape, random_pairs, write_checkpoint, write_images
from PIL import Image

from dama.console import end_on_interrupt, log, write_json
from dama.train.throughput import PairLength

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2  # the optimiser's states are there from the first one's end on
PAIRS = 8
MIB = 1 << 20
CHECKPOINTING = ["--gradient_checkpointing", "True"]
PLAIN = ["--shared_prefix", "False"]
LORA = ["--lora_enable", "True", "--lora_r", "16"]
PROJECTOR = ["--tune_mm_mlp_adapter", "True"]
MDPO = ["--loss", "mdpo", "--corruption", "blank"]
SYMMPO = ["--loss", "symmpo", "--corruption", "blank"]
BF16 = ["--bf16", "True"]


class Case(NamedTuple):
    """A training whose peak is both estimated and measured."""

    flags: list[str]
    micro_batch: int = 2
    accumulation: int = 1
    zero: int = 0  # stage, on two ranks; 0: one rank without DeepSpeed
    long_answers: bool = False
    hub: bool = False  # a Qwen2.5-VL instead of LLaVA-1.5


CASES = {
    "full, 1 pair": Case([], 1),
    "full": Case([]),
    "full, 4 pairs": Case([], 4),
    "full, checkpointing": Case(CHECKPOINTING),
    "full, checkpointing, 4 pairs": Case(CHECKPOINTING, 4),
    "full, long answers": Case([], long_answers=True),
    "full, checkpointing, long answers": Case(CHECKPOINTING, long_answers=True),
    "full, chunks of 64 positions": Case(["--logp_chunk", "64"]),
    "full, 2 micro-batches a step": Case([], accumulation=2),
    "full, padded rows": Case(PLAIN),
    "full, padded rows, checkpointing": Case([*PLAIN, *CHECKPOINTING]),
    "full, padded rows, bf16 autocast": Case([*PLAIN, *BF16]),
    "LoRA": Case(LORA),
    "LoRA, checkpointing, 4 pairs": Case([*LORA, *CHECKPOINTING], 4),
    "LoRA, no dropout, padded rows": Case([*LORA, *PLAIN, "--lora_dropout", "0"]),
    "LoRA, bf16": Case([*LORA, *BF16]),
    "full, mdpo": Case(MDPO),
    "full, mdpo, checkpointing": Case([*MDPO, *CHECKPOINTING]),
    "full, mdpo, padded rows": Case([*MDPO, *PLAIN]),
    "full, symmpo": Case(SYMMPO),
    "LoRA, symmpo": Case([*LORA, *SYMMPO]),
    "projector": Case(PROJECTOR),
    "projector, checkpointing": Case([*PROJECTOR, *CHECKPOINTING]),
    "ZeRO-2, full": Case([], zero=2),
    "ZeRO-2, full, bf16, checkpointing": Case([*BF16, *CHECKPOINTING], zero=2),
    "ZeRO-2, full, 2 micro-batches a step": Case([], accumulation=2, zero=2),
    "ZeRO-2, LoRA": Case(LORA, zero=2),
    "ZeRO-3, full, bf16": Case(BF16, zero=3),
    "Qwen2.5-VL, full": Case([], hub=True),
    "Qwen2.5-VL, full, checkpointing": Case(CHECKPOINTING, hub=True),
    "Qwen2.5-VL, full, padded rows": Case(PLAIN, hub=True),
    "Qwen2.5-VL, LoRA": Case(LORA, hub=True),
}


def shape_of(name: str, case: Case) -> Shape:
    """The shape, with the pair's answers lengthened where the case asks for it."""
    shape = SHAPES[name]
    return replace(shape, pair=PairLength.of(shape.pair.prefix, 480, 440)) if case.long_answers else shape


# --- One case, in processes of its own --------------------------------------------------------------------------------


def flags_of(case: Case, folder: Path) -> list[str]:
    """Training flags of the case."""
    checkpoint = folder / ("qwen" if case.hub else "checkpoint")
    common = {
        "--task": "DPO", "--model_name_or_path": checkpoint, "--data_path": checkpoint / "config.json",
        "--image_folder": checkpoint if case.hub else folder, "--output_dir": folder / "out", "--max_steps": STEPS,
        "--save_strategy": "no", "--per_device_train_batch_size": case.micro_batch,
        "--gradient_accumulation_steps": case.accumulation, "--use_cpu": not torch.cuda.is_available(),
        "--check_reference": False, "--disable_tqdm": True, "--report_to": "none",
    }  # fmt: skip
    deepspeed = ["--deepspeed", str(ROOT / f"scripts/zero{case.zero}.json")] if case.zero else []
    return [str(word) for pair in common.items() for word in pair] + deepspeed + case.flags


def measure(case: Case, shape: Shape, folder: Path) -> dict[str, Any]:
    """Bytes that this rank needed and the estimate, by phase."""
    from llava.estimate.measure import TensorPeak
    from llava.estimate.memory import estimate_step
    from llava.train.arguments import parse_arguments

    arguments = parse_arguments(flags_of(case, folder))
    trainer, sizes, length = hub_training(arguments, folder) if case.hub else llava_training(arguments, folder, shape)
    model = trainer.model
    with TensorPeak(arguments[2].device, [*model.parameters(), *model.buffers()]) as needed:
        trainer.train()
    layout = case.micro_batch, case.accumulation
    cuda, ranks = torch.cuda.is_available(), arguments[2].world_size
    estimated = estimate_step(arguments, sizes, [length], ranks, cuda, layout)
    return {"measured": needed.peak, "estimated": estimated.peak, "phases": estimated.phases}


def llava_training(arguments: Any, folder: Path, shape: Shape) -> tuple[Any, Any, PairLength]:
    """A trainer of LLaVA-1.5, its sizes, and a pair's length."""
    from transformers import CLIPVisionConfig

    from llava.estimate.lengths import length_of, views_of
    from llava.estimate.sizes import ModelShape
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.train.dpo_data import DPODataset
    from llava.train.dpo_trainer import LLaVA15DPOTrainer
    from llava.train.family import ImagePreparation
    from llava.train.setup_model import setup_model

    model, tokenizer, processor = setup_model(arguments)
    views = views_of(arguments[2])
    items = random_pairs(shape, PAIRS, views)
    pairs = DPODataset(items, folder, ImagePreparation(processor, model.config))
    sizes = ModelShape.of(
        LlavaConfig.from_pretrained(folder / "checkpoint"),
        CLIPVisionConfig.from_pretrained(folder / "checkpoint/vision_tower"),
    )
    trainer = LLaVA15DPOTrainer(model, tokenizer, arguments[2], train_dataset=pairs)
    return trainer, sizes, length_of(items[0], shape.patches, views)


def hub_training(arguments: Any, folder: Path) -> tuple[Any, Any, PairLength]:
    """A trainer of a Qwen2.5-VL whose images have about as many tokens, its sizes, and a pair's length."""
    from dama.models.setup import setup_family
    from dama.models.trainer import HubTrainer
    from dama.pairs import PreferencePair
    from dama.train.data import PairDataset
    from llava.estimate.hub import hub_lengths, hub_shape

    family = setup_family(arguments)
    items = vlm_step.random_items(vlm_step.SHAPES["cpu"], PAIRS)
    sizes = hub_shape(arguments, [PreferencePair(str(n), f"{n}.png", "?", "a", "b") for n in range(PAIRS)])
    trainer = HubTrainer(
        family,
        family.processor,
        arguments[2],
        train_dataset=PairDataset(items, [folder / "qwen"], family.prepare_image),
    )
    return trainer, sizes, hub_lengths(arguments, items)[0]


def write_qwen(folder: Path) -> None:
    """A Qwen2.5-VL of random weights in the shape of scripts/bench/vlm_step.py, its processor and images."""
    shape = vlm_step.SHAPES["cpu"]
    vlm_step.random_model(shape, torch.device("cpu"), torch.float32).save_pretrained(folder)
    processor, side = vlm_step.qwen_processor(vlm_step.tokenizer()), shape.grid * vlm_step.PATCH
    processor.image_processor = type(processor.image_processor)(
        patch_size=vlm_step.PATCH, merge_size=vlm_step.MERGE, min_pixels=side**2, max_pixels=side**2
    )
    processor.save_pretrained(folder)
    for number in range(PAIRS):
        Image.effect_noise((side, side), 50).convert("RGB").save(folder / f"{number}.png")


def results_of(name: str, folder: Path) -> Path:
    """Folder for the case's results, one file for each rank."""
    return folder / "results" / str([*CASES].index(name))


def launch(name: str, shape: str, folder: Path) -> dict[str, Any]:
    """The figures of the rank that needed most."""
    case, binaries = CASES[name], Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(binaries / "deepspeed"), "--quiet", "--num_gpus", "2", "--master_port", str(port)]
    words = [*(start if case.zero else [sys.executable]), __file__, "--shape", shape, "--only", name]
    environment = {"OMP_NUM_THREADS": "1", "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*words, "--worker", str(folder)], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    found = [json.loads(path.read_text()) for path in results_of(name, folder).glob("*.json")]
    if done.returncode or not found:
        raise RuntimeError(f"{name}: ended with {done.returncode}\n{done.stderr[-3000:]}")
    return max(found, key=lambda figures: figures["measured"])


# --- All cases --------------------------------------------------------------------------------------------------------


def error_of(figures: dict[str, Any]) -> float:
    """Relative error of the estimate; positive where it is too large."""
    return figures["estimated"] / figures["measured"] - 1


def line_of(name: str, figures: dict[str, Any]) -> str:
    """Row of the table, in MiB, with the phase of the estimated peak."""
    measured, estimated = (figures[which] / MIB for which in ("measured", "estimated"))
    phase = max(figures["phases"], key=figures["phases"].__getitem__)
    return f"{name:<42}{measured:>10.1f}{estimated:>11.1f}{error_of(figures):>+9.1%}  {phase}"


def main() -> None:
    """Estimate and measure every case and print the table; with --worker, measure one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="of model and pairs. Default: cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", metavar="FILE", help="write the figures, too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()  # DeepSpeed's launcher adds --local_rank
    if args.worker:
        figures = measure(CASES[args.only], shape_of(args.shape, CASES[args.only]), args.worker)
        write_json(results_of(args.only, args.worker) / f"{os.environ.get('RANK', '0')}.json", figures)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, shape = Path(name), SHAPES[args.shape]
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        write_checkpoint(folder / "checkpoint", shape, torch.device("cpu"), dtype)
        chosen = [name for name in CASES if args.only in name]
        if any(CASES[name].hub for name in chosen):
            write_qwen(folder / "qwen")
        write_images(folder, shape, PAIRS)
        log(f"{'MiB on the rank that needs most':<42}{'measured':>10}{'estimated':>11}{'error':>9}  peak in")
        table = {}
        for case in chosen:
            table[case] = launch(case, args.shape, folder)
            log(line_of(case, table[case]))
    errors = [abs(error_of(figures)) for figures in table.values()]
    log(f"largest error {max(errors):.1%}, mean {sum(errors) / len(errors):.1%}, of {len(errors)} cases")
    if args.json:
        write_json(args.json, table)


if __name__ == "__main__":
    end_on_interrupt()
    main()
