"""LoRA of rank 128 on the 7B shape as scripts/dama_7b_lora.sh trains it, at several micro-batches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llava.rehearsal import training
from scripts.gpu.block import Report
from scripts.gpu.models import count_of, measure_step, plan_of, shape_of, short
from scripts.gpu.step7b import checkpointing

LORA = ("--lora_enable", "True", "--lora_r", "128", "--lora_alpha", "256", "--mm_projector_lr", "2e-5")
PAIRS = (1, 4, 16)
WITHOUT_CHECKPOINTING = (1, 4)


def measure(report: Report) -> None:
    """Time LoRA steps of the 7B shape with and without gradient checkpointing."""
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(Path(name), shape_of(), *LORA)
        trainer = training.Alone(training.build(plan), plan.arguments[2])
        for pairs in WITHOUT_CHECKPOINTING:
            with report.case(f"{count_of(pairs)}, no gradient checkpointing") as found:
                measure_step(plan, trainer, pairs, found, optimizer=True, model=llava_of(trainer))
        llava_of(trainer).enable_input_require_grads()
        with checkpointing(plan, trainer.module):
            for pairs in PAIRS:
                with report.case(count_of(pairs)) as found:
                    measure_step(plan, trainer, pairs, found, optimizer=True, model=llava_of(trainer))
    report.line = "; ".join(f"{name}: {short(found)}" for name, found in report.cases.items())


def llava_of(trainer: training.Alone) -> Any:
    """The LLaVA inside PEFT's wrapper."""
    return trainer.module.get_base_model()
