"""A step of the 7B shape in bf16, forward and backward: time and memory, and what each lever changes."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dpo_step import Settings, batch_of, plain_step, trl_step
from measure import PeakMemory, Shape, time_of, write_checkpoint
from torch.profiler import ProfilerActivity, profile

from dama.train.throughput import PairLength
from llava.estimate.plan import Plan
from llava.rehearsal import training
from llava.rehearsal.launch import is_rehearsed
from llava.train.setup_model import compile_layers
from scripts.gpu.block import Report
from scripts.gpu.models import (
    REPEATS,
    Stopwatch,
    WithoutOptimizer,
    count_of,
    first_synchronization,
    free,
    gib,
    measure_step,
    one_step,
    plan_of,
    shape_of,
    short,
)

PAIRS = (1, 4, 8)
MICRO_BATCH = 4  # at which levers are tried
FEWER_LAYERS = 8  # where AdamW's states must fit, too
OTHER_LENGTHS = 6  # steps
TRACED = 20  # kernels that are listed
CANNOT_REHEARSE = "Triton's kernels cannot be rehearsed"


def measure(report: Report) -> None:
    """Time DPO steps of the 7B shape, then single levers, AdamW, TRL and compiled layers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_of(folder / "model", shape_of())
        trainer = WithoutOptimizer(training.build(plan, torch.bfloat16))
        for pairs in PAIRS:
            with report.case(count_of(pairs)) as found:
                measure_step(plan, trainer, pairs, found, optimizer=False)
            report.line = line_of(report)
        levers(report, plan, trainer, folder)
        del trainer
        free()
        with_adamw(report, folder)
        with_trl(report, folder)
        compiled(report, plan)
    report.line = line_of(report)


def levers(report: Report, plan: Plan, trainer: WithoutOptimizer, folder: Path) -> None:
    """The cases on the model that has been measured without them."""
    model, args = trainer.model, plan.arguments[2]
    with report.case("synchronizations in the forward pass") as found:
        batch = training.random_batch(plan, [shape_of().pair] * MICRO_BATCH)
        found["first"] = first_synchronization(lambda: training.forward(model, batch, args))
    with report.case("trace") as found:
        trace(plan, trainer, report.out.with_name("trace.json.gz"), found)
    with checkpointing(plan, model), report.case(f"{MICRO_BATCH} pairs, gradient checkpointing") as found:
        measure_step(plan, trainer, MICRO_BATCH, found, optimizer=False)
    with report.case(f"{MICRO_BATCH} pairs, bf16 logits") as found, float32_logits(plan, model, False):
        measure_step(plan, trainer, MICRO_BATCH, found, optimizer=False)
    for pairs in PAIRS[:2]:
        with report.case(f"{count_of(pairs)}, padded rows") as found:
            padded_rows(model, folder, pairs, found)
    with checkpointing(plan, model), report.case(f"{MICRO_BATCH} pairs, padded rows, gradient checkpointing") as found:
        padded_rows(model, folder, MICRO_BATCH, found)


def compiled(report: Report, plan: Plan) -> None:
    """--compile_layers on a model of its own, which stays compiled; last, because compiling may take long."""
    name = f"{MICRO_BATCH} pairs, compiled layers"
    if is_rehearsed():
        report.leave_out(name, CANNOT_REHEARSE)
        return
    with report.case(name) as found:
        trainer = WithoutOptimizer(training.build(plan, torch.bfloat16))
        compile_layers(trainer.model)
        measure_step(plan, trainer, MICRO_BATCH, found, optimizer=False)
    with report.case(f"{name}, other lengths in each step") as found:
        found["ms"] = [round(ms, 2) for ms in steps_of_other_lengths(plan, trainer)]


def steps_of_other_lengths(plan: Plan, trainer: WithoutOptimizer) -> list[float]:
    """Milliseconds of steps on pairs whose lengths no step before had: what compiling costs in a training."""
    watch = Stopwatch(trainer.model.get_vision_tower())
    found = []
    for step in range(OTHER_LENGTHS):
        lengths = [
            PairLength.of(shape_of().pair.prefix, 60 + 17 * step + 11 * k, 190 - 13 * step + 7 * k)
            for k in range(MICRO_BATCH)
        ]
        batch = training.random_batch(plan, lengths)
        found.append(one_step(trainer, batch, plan.arguments[2], watch)["step"])
    watch.close()
    return found


@contextmanager
def checkpointing(plan: Plan, model: Any) -> Iterator[None]:
    """--gradient_checkpointing True, for the estimate too."""
    args = plan.arguments[2]
    args.gradient_checkpointing = True
    model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        args.gradient_checkpointing = False
        model.gradient_checkpointing_disable()


@contextmanager
def float32_logits(plan: Plan, model: Any, value: bool) -> Iterator[None]:
    """--float32_logits, for the estimate too."""
    args = plan.arguments[2]
    before, args.float32_logits, model.float32_logits = args.float32_logits, value, value
    try:
        yield
    finally:
        args.float32_logits = model.float32_logits = before


def trace(plan: Plan, trainer: WithoutOptimizer, file: Path, found: dict[str, Any]) -> None:
    """torch.profiler's trace of a step in a file for Perfetto, and the kernels that take most of its time."""
    args = plan.arguments[2]
    batch = training.random_batch(plan, [shape_of().pair] * MICRO_BATCH)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not is_rehearsed())
    with profile(activities=activities) as profiler:
        trainer.backward(training.forward(trainer.model, batch, args), True)
        torch.cuda.synchronize()
    trainer.step()
    profiler.export_chrome_trace(str(file))
    found["file"] = file.name
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    found["kernels_ms"] = {event.key[:120]: round(event.self_device_time_total / 1000, 2) for event in kernels[:TRACED]}


# --- Others' ways ----------------------------------------------------------------------------------------------------


def measure_whole(step: Callable[[], Any], model: Any, pairs: int, found: dict[str, Any]) -> None:
    """Milliseconds of whole steps, forward and backward, and their peak memory."""
    device = torch.device("cuda", 0)
    model.zero_grad(set_to_none=True)
    memory = PeakMemory(device)
    times = []
    for _ in range(1 + REPEATS):
        times.append(time_of(step, device).clock)
        model.zero_grad(set_to_none=True)
    seconds = sorted(times[1:])[REPEATS // 2]
    found |= {"pairs": pairs, "ms": {"step": round(1000 * seconds, 2)}, "pairs_per_second": round(pairs / seconds, 3),
              "peak_bytes": memory.before + memory.bytes}  # fmt: skip


def padded_rows(model: Any, folder: Path, pairs: int, found: dict[str, Any]) -> None:
    """How the released code computes (see scripts/bench/dpo_step.py)."""
    settings = Settings(folder, shape_of(), pairs, threads=1, steps=REPEATS)
    measure_whole(plain_step(model, batch_of(settings, shared_prefix=False)), model, pairs, found)


def with_trl(report: Report, folder: Path) -> None:
    """TRL's trainer on a random model of the exported shape, with its reference model and with given log-probs."""
    missing = [package for package in ("trl", "datasets") if not importlib.util.find_spec(package)]
    if missing or is_rehearsed():
        report.leave_out("TRL", f"{', '.join(missing)} not installed" if missing else CANNOT_REHEARSE)
        return
    settings = Settings(folder / "trl", shape_of(), MICRO_BATCH, threads=1, steps=REPEATS)
    for name, given in ((f"{MICRO_BATCH} pairs, TRL", False), (f"{MICRO_BATCH} pairs, TRL, reference given", True)):
        with report.case(name) as found:
            model, processor = exported(settings)
            # The reference shares the policy's weights: its time counts, a second copy of them does not.
            model, step = trl_step(settings, model, processor, given, copy.copy(model))
            measure_whole(step, model, MICRO_BATCH, found)
        model = step = None
        free()


def exported(settings: Settings) -> tuple[Any, Any]:
    """Return a random LlavaForConditionalGeneration on the GPU, and its processor.

    A narrow model of this vocabulary is exported for the files; its config then gets the shape's sizes.
    """
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    from llava.model.builder import read_checkpoint
    from llava.model.write_hf import write_hf

    folder, shape = settings.folder, settings.shape
    if not (folder / "hf").exists():
        narrow = replace(shape, layers=1, width=64, heads=4, intermediate=64, tower_layers=1, tower_width=32,
                         tower_heads=2)  # fmt: skip
        write_checkpoint(folder, narrow, torch.device("cpu"), settings.dtype)
        (folder / "hf").mkdir()
        write_hf(*read_checkpoint(str(folder)), folder / "hf")
    config = LlavaConfig.from_pretrained(folder / "hf")
    set_sizes(config, shape)
    with settings.device:
        model = training.of_type(settings.dtype, lambda: LlavaForConditionalGeneration(config))
    return model.train(), AutoProcessor.from_pretrained(folder / "hf")


def set_sizes(config: Any, shape: Shape) -> None:
    """Makes a config of llava-hf's layout one of this shape."""
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = shape.layers, shape.width, shape.intermediate
    text.num_attention_heads = text.num_key_value_heads = shape.heads
    text.head_dim = shape.width // shape.heads
    vision.num_hidden_layers, vision.hidden_size = shape.tower_layers, shape.tower_width
    vision.intermediate_size, vision.num_attention_heads = 4 * shape.tower_width, shape.tower_heads


# --- The optimizer ---------------------------------------------------------------------------------------------------


def with_adamw(report: Report, folder: Path) -> None:
    """Whole steps of a training in fp32 under autocast, whose optimizer states fit because there are fewer layers."""
    trainer: training.Alone | None = None
    for name in ("adamw_torch_fused", "adamw_torch"):
        with report.case(f"1 pair, {FEWER_LAYERS} layers, {name}") as found:
            plan = plan_of(folder / name, shape_of(FEWER_LAYERS), "--optim", name)
            trainer = training.Alone(training.build(plan), plan.arguments[2])
            measure_step(plan, trainer, 1, found, optimizer=True, model=trainer.module)
        trainer = None
        free()


def line_of(report: Report) -> str:
    """Pairs a second at each size, and the ratios to padded rows and TRL where both were measured."""
    cases = report.cases
    parts = [f"{count_of(pairs)}: {short(cases.get(count_of(pairs)))}" for pairs in PAIRS]
    ours, ratios = rate(cases, f"{MICRO_BATCH} pairs"), []
    for other in ("padded rows", "TRL", "gradient checkpointing", "compiled layers"):
        theirs = rate(cases, f"{MICRO_BATCH} pairs, {other}")
        if ours and theirs:
            ratios.append(f"{ours / theirs:.2f} times {other}")
    if ratios:
        parts.append(f"speed at {MICRO_BATCH}: {', '.join(ratios)}")
    checked = cases.get("synchronizations in the forward pass", {})
    if "first" in checked:
        parts.append(f"synchronizations in forward: {checked['first'] or 'none'}")
    if (four := cases.get(f"{MICRO_BATCH} pairs", {})).get("peak_bytes"):
        parts.append(f"peak {gib(four['peak_bytes'])} GiB, estimated {gib(four['estimated_bytes'])}")
    return "; ".join(parts)


def rate(cases: dict[str, Any], name: str) -> float | None:
    """Pairs per second of a case; None if it did not run or did not fit."""
    return cases.get(name, {}).get("pairs_per_second")
