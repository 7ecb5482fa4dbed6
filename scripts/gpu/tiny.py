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


def measure(report: Report) -> None:
    """Train the golden checkpoint on the GPU in every way and compare losses with the CPU's."""
    torch.backends.cudnn.allow_tf32 = False  # the convolution of the vision tower would round to 10 bits
    ways = REHEARSED if is_rehearsed() else [*WAYS]
    if not importlib.util.find_spec("deepspeed"):
        for way in [way for way in ways if "--deepspeed" in WAYS[way]]:
            report.leave_out(way, "deepspeed not installed")
        ways = [way for way in ways if "--deepspeed" not in WAYS[way]]
    quantized = {} if is_rehearsed() else QUANTIZED
    if not importlib.util.find_spec("bitsandbytes"):
        for way in quantized:
            report.leave_out(way, "bitsandbytes not installed")
        quantized = {}
    # A process that CUDA has not been started in may be forked; a real driver is better left alone.
    with ProcessPoolExecutor(1, get_context("fork" if is_rehearsed() else "spawn")) as cpu:
        expected = {way: cpu.submit(steps_on_cpu, without_deepspeed(WAYS[way])) for way in ways}
        expected |= {way: cpu.submit(steps_on_cpu, words) for way, words in quantized.items()}
        for way in [way for way in ways if "--deepspeed" not in WAYS[way]]:
            compare(report, way, WAYS[way], expected[way])
        for way, words in quantized.items():
            compare(report, way, words, expected[way], ROUNDED)
        if zero := [way for way in ways if "--deepspeed" in WAYS[way]]:
            with one_rank():
                for way in zero:
                    compare(report, way, WAYS[way], expected[way])
    worst = max((found["loss"] for found in report.cases.values() if "loss" in found), default=float("nan"))
    report.line = f"{len(report.cases) - report.failed} of {len(report.cases)} trainings give the CPU's losses, "
    report.line += f"largest difference {worst:.1e} of a loss"


def steps_on_cpu(words: list[str]) -> list[dict[str, float]]:
    """Log lines of the same training on half of the CPU cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return steps_of([*words, "--use_cpu", "True"])


def compare(
    report: Report,
    way: str,
    words: list[str],
    expected: Future[list[dict[str, float]]],
    tolerances: dict[str, float] = TOLERANCES,
) -> None:
    """Largest relative difference of losses and gradient norms; beyond the tolerance the case fails."""
    with report.case(way) as found:
        steps, on_cpu = steps_of(words), expected.result()
        found["steps"] = len(steps)
        if len(steps) != len(on_cpu):
            raise ValueError(f"expected {len(on_cpu)} steps as on the CPU, got {len(steps)}")
        for name, tolerance in tolerances.items():
            apart = [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(steps, on_cpu)]
            found[name] = max(apart)
            if not found[name] <= tolerance:
                raise ValueError(f"{name}: expected the CPU's within {tolerance:g}, got {found[name]:.2g} apart")
