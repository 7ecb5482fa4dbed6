"""A step of the shape of Qwen2.5-VL-7B in bf16, forward and backward: packed, compiled, rows apart, TRL."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import vlm_step
from dpo_step import trl_step_on
from vlm_step import QwenSettings, QwenShape, random_model, step_of, trl_batch

from dama.models.setup import decoder_of
from dama.models.way import Way
from llava.rehearsal.launch import is_rehearsed
from scripts.gpu.block import Report
from scripts.gpu.models import REPEATS, free
from scripts.gpu.step7b import measure_whole
from tests.models.tiny_hub import qwen_processor, tokenizer

PAIRS = 4


def measure(report: Report) -> None:
    """Time Qwen2.5-VL 7B packed, as rows, in TRL and with compiled layers."""
    if is_rehearsed():
        report.leave_out("all", "the model reads image sizes from the device, where a simulated GPU has none")
        report.line = report.left_out["all"]
        return
    shape: QwenShape = vlm_step.SHAPES["7b"]
    with tempfile.TemporaryDirectory() as name:
        settings = QwenSettings(Path(name), shape, PAIRS, threads=1, steps=REPEATS)
        for case, way in (("packed", Way.KERNEL), ("rows", Way.ROWS)):
            with report.case(case) as found:
                model = new_model(settings)
                measure_whole(step_of(settings, model, way), model, PAIRS, found)
            model = None
            free()
        report.line = line_of(report)
        with_trl(report, settings)
        with report.case("packed, compiled layers") as found:
            model = new_model(settings)
            for layer in decoder_of(model).layers:  # type: ignore[union-attr]
                layer.compile(dynamic=True)
            measure_whole(step_of(settings, model, Way.KERNEL), model, PAIRS, found)
    report.line = line_of(report)


def new_model(settings: QwenSettings) -> Any:
    """A randomly initialized model on the GPU."""
    return random_model(settings.shape, settings.device, settings.dtype)


def with_trl(report: Report, settings: QwenSettings) -> None:
    """Time TRL's step on the same batch, with and without reference log-probs given."""
    missing = [package for package in ("trl", "datasets") if not importlib.util.find_spec(package)]
    if missing:
        report.leave_out("TRL", f"{', '.join(missing)} not installed")
        return
    for case, given in (("TRL", False), ("TRL, reference given", True)):
        with report.case(case) as found:
            model = new_model(settings)
            # The reference shares the policy's weights: its time counts, a second copy of them does not.
            processor = qwen_processor(tokenizer())
            model, step = trl_step_on(settings, model, processor, trl_batch(settings), given, copy.copy(model))
            measure_whole(step, model, PAIRS, found)
        model = step = None
        free()


def line_of(report: Report) -> str:
    """Pairs per second and peak of every case, and the packed case's speed relative to the others."""
    ours = report.cases.get("packed", {}).get("pairs_per_second")
    parts = []
    for case, found in report.cases.items():
        rate = found.get("pairs_per_second")
        ratio = f" ({ours / rate:.2f} times)" if ours and rate and case != "packed" else ""
        said = f"{rate:.2f} pairs/s{ratio}, {found['peak_bytes'] / 2**30:.1f} GiB" if rate else "error"
        parts.append(f"{case}: {'out of memory' if 'out_of_memory' in found else said}")
    return "; ".join(parts)
