"""Trainings of the golden checkpoint in fp32 on the GPU: their losses against the CPU's, step by step."""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import torch

from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report
from scripts.gpu.zero2 import one_rank
from tests.cuda.trainings import DPO, FOUR, LORA, WAYS, steps_of, without_deepspeed

# Both in fp32, in sums of another order; AdamW's first steps magnify that where a gradient is about zero.
TOLERANCES = {"loss": 1e-3, "grad_norm": 1e-2}
# Its layers compute in half precision.
QUANTIZED = {"dpo qlora": [*DPO, *FOUR, *LORA, "--bits", "4", "--reference", "base", "--freeze_mm_mlp_adapter", "True"]}
ROUNDED = {"loss": 1e-2, "grad_norm": 5e-2}
REHEARSED = ("dpo plain", "dpo lora")
NEEDS = {"--deepspeed": "deepspeed", "--bits": "bitsandbytes"}  # flag -> package


def measure(report: Report) -> None:
    """Train the golden checkpoint on the GPU in every way and compare losses with the CPU's."""
    torch.backends.cudnn.allow_tf32 = False  # the convolution of the vision tower would round to 10 bits
    ways = {way: WAYS[way] for way in REHEARSED} if is_rehearsed() else WAYS | QUANTIZED
    for flag, package in NEEDS.items():
        if not importlib.util.find_spec(package):
            for way in [way for way, words in ways.items() if flag in words]:
                report.leave_out(way, f"{package} not installed")
                del ways[way]
    # A process that CUDA has not been started in may be forked; a real driver is better left alone.
    with ProcessPoolExecutor(1, get_context("fork" if is_rehearsed() else "spawn")) as cpu:
        expected = {way: cpu.submit(steps_on_cpu, without_deepspeed(words)) for way, words in ways.items()}
        for way in [way for way, words in ways.items() if "--deepspeed" not in words]:
            compare(report, way, ways[way], expected[way])
        if zero := [way for way, words in ways.items() if "--deepspeed" in words]:
            with one_rank():
                for way in zero:
                    compare(report, way, ways[way], expected[way])
    worst = max((found["loss"] for found in report.cases.values() if "loss" in found), default=float("nan"))
    report.line = f"{len(report.cases) - report.failed} of {len(report.cases)} trainings give the CPU's losses, "
    report.line += f"largest difference {worst:.1e} of a loss"


def steps_on_cpu(words: list[str]) -> list[dict[str, float]]:
    """Log lines of the same training on half of the CPU cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return steps_of([*words, "--use_cpu", "True"])


def compare(report: Report, way: str, words: list[str], expected: Future[list[dict[str, float]]]) -> None:
    """Largest relative difference of losses and gradient norms; beyond the tolerance the case fails."""
    with report.case(way) as found:
        steps, on_cpu = steps_of(words), expected.result()
        found["steps"] = len(steps)
        if len(steps) != len(on_cpu):
            raise ValueError(f"expected {len(on_cpu)} steps as on the CPU, got {len(steps)}")
        for name, tolerance in (ROUNDED if way in QUANTIZED else TOLERANCES).items():
            apart = [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(steps, on_cpu)]
            found[name] = max(apart)
            if not found[name] <= tolerance:
                raise ValueError(f"{name}: expected the CPU's within {tolerance:g}, got {found[name]:.2g} apart")
