"""QLoRA on the 7B shape: adapters of rank 128 over a base of 4 bits, with gradient checkpointing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llava.rehearsal import training
from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report
from scripts.gpu.lora7b import LORA, llava_of
from scripts.gpu.models import count_of, measure_step, plan_of, shape_of, short

QLORA = (
    *LORA[:-2], "--bits", "4", "--freeze_mm_mlp_adapter", "True", "--reference", "base",
    "--gradient_checkpointing", "True",
)  # fmt: skip
PAIRS = (1, 4, 8)


def measure(report: Report) -> None:
    """Time QLoRA steps of the 7B shape."""
    if is_rehearsed():
        report.leave_out("4 bits", "bitsandbytes' kernels cannot be rehearsed")
        report.line = "left out: bitsandbytes' kernels cannot be rehearsed"
        return
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(Path(name), shape_of(), *QLORA)
        trainer = training.Alone(training.build(plan), plan.arguments[2])
        for pairs in PAIRS:
            with report.case(count_of(pairs)) as found:
                measure_step(plan, trainer, pairs, found, optimizer=True, model=llava_of(trainer))
    report.line = "; ".join(f"{name}: {short(found)}" for name, found in report.cases.items())
