"""DeepSpeed's ZeRO-2 engine on one rank over NCCL, with fewer layers of the 7B shape: memory, and AdamW's time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llava.rehearsal import training
from llava.rehearsal.engine import single_rank_world
from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report
from scripts.gpu.models import count_of, free, gib, measure_step, plan_of, shape_of

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 8
PAIRS = 1
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone: NCCL's, in rehearsals torch's fake one."""
    if is_rehearsed():
        with single_rank_world(1, numbers=True):
            yield
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(report: Report) -> None:
    """Time steps of DeepSpeed's ZeRO-2 on one rank with every optimizer."""
    with one_rank(), tempfile.TemporaryDirectory() as name:
        trainer: training.WithDeepSpeed | None = None
        for optimizer in OPTIMIZERS:
            with report.case(f"{LAYERS} layers, {count_of(PAIRS)}, {optimizer}") as found:
                words = ("--optim", optimizer, "--deepspeed", str(ROOT / "scripts/zero2.json"))
                plan = plan_of(Path(name), shape_of(LAYERS), *words, "--per_device_train_batch_size", str(PAIRS))
                args = plan.arguments[2]
                args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
                args.hf_deepspeed_config.trainer_config_process(args)
                before = torch.cuda.memory_allocated()
                trainer = training.WithDeepSpeed(training.build(plan), args)
                measure_step(plan, trainer, PAIRS, found, optimizer=True, model=trainer.model.module)
                found["peak_bytes"] -= before
                if trainer.model.skipped_steps:
                    raise ValueError(f"expected steps of AdamW, DeepSpeed skipped {trainer.model.skipped_steps}")
            trainer = None
            free()
    report.line = "; ".join(map(words_of, OPTIMIZERS, report.cases.values()))


def words_of(optimizer: str, found: dict) -> str:
    """Summary of one optimizer: milliseconds and peak beside its estimate."""
    if "peak_bytes" not in found:
        return f"{optimizer}: {'out of memory' if 'out_of_memory' in found else 'error'}"
    peaks = f"{gib(found['peak_bytes'])} GiB, estimated {gib(found['estimated_bytes'])}"
    return f"{optimizer}: {found['ms']['optimizer']:.1f} ms a step of it, peak {peaks}"
