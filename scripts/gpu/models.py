"""What the blocks on the 7B shape share: random models on the GPU, micro-batches, timed steps."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import SHAPES, Shape, write_configs
from torch import Tensor

from dama.train.throughput import ModelSize, PairLength, peak_flops, step_flops
from llava.estimate.configs import configs_of
from llava.estimate.memory import estimate
from llava.estimate.plan import Plan
from llava.estimate.sizes import ModelShape, Training, Zero
from llava.rehearsal import training
from llava.rehearsal.launch import is_rehearsed
from llava.train.arguments import parse_arguments
from llava.train.family import size_of

REPEATS = 1 if is_rehearsed() else 3  # steps that are timed, after one that warms up


def shape_of(layers: int | None = None) -> Shape:
    """LLaVA-v1.5-7B's shape with pairs of 636 + 120 + 110 positions; a tiny one in rehearsals."""
    shape = SHAPES["tiny" if is_rehearsed() else "7b"]
    return replace(shape, layers=min(layers, shape.layers)) if layers else shape


def plan_of(folder: Path, shape: Shape, *flags: str) -> Plan:
    """A training of this shape on one GPU in bf16, as these flags of train_mem.py change it."""
    write_configs(folder, shape)
    words = {
        "--task": "DPO", "--model_name_or_path": folder, "--data_path": folder / "config.json",
        "--image_folder": folder, "--output_dir": folder / "out", "--bf16": True, "--report_to": "none",
        "--check_reference": False,
    }  # fmt: skip
    arguments = parse_arguments([*(str(word) for pair in words.items() for word in pair), *flags])
    return Plan(arguments, ranks=1, cuda=True)


class WithoutOptimizer:
    """A model in half precision without optimizer: the time and the memory of forward and backward passes alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients in half precision."""
        loss.backward()

    def step(self) -> None:
        """Free the gradients in place of an update."""
        self.model.zero_grad(set_to_none=True)


def estimated_peak(plan: Plan, pairs: list[PairLength], optimizer: bool) -> int:
    """Bytes of llava.estimate.memory's estimate of a step that trains on these pairs at once."""
    args = plan.arguments
    shape = ModelShape.of(*configs_of(args[0], args[2].cache_dir))
    run = Training.of(args, 1, True, False)
    if optimizer:
        return estimate(shape, run, pairs).peak
    of_step = estimate(shape, replace(run, zero=Zero()), pairs)  # as under DeepSpeed, all weights in half precision
    return max(size for phase, size in of_step.phases.items() if phase != "optimizer") - of_step.optimizer


# --- Timing ----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """CUDA events at the ends of a step's phases; the vision tower's begin and end come from hooks."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.marks: list[tuple[str, torch.cuda.Event]] = []
        self.hooks = [
            tower.register_forward_pre_hook(lambda *_: self.mark("forward")),
            tower.register_forward_hook(lambda *_: self.mark("tower")),
        ]

    def mark(self, phase: str) -> None:
        """The end of a stretch that belongs to this phase."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def milliseconds(self) -> dict[str, float]:
        """Of each phase, and of all of them as "step"."""
        torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:]):
            found[phase] += before.elapsed_time(after)
        return dict(found) | {"step": sum(found.values())}

    def close(self) -> None:
        """Remove the hooks from the vision tower."""
        for hook in self.hooks:
            hook.remove()


def one_step(trainer: Any, batch: dict[str, Any], args: Any, watch: Stopwatch) -> dict[str, float]:
    """Milliseconds of the phases of one step."""
    watch.marks.clear()
    watch.mark("begin")
    loss = training.forward(trainer.model, batch, args)
    watch.mark("forward")
    trainer.backward(loss, True)
    watch.mark("backward")
    trainer.step()
    watch.mark("optimizer")
    return watch.milliseconds()


def measure_step(
    plan: Plan, trainer: Any, pairs: int, found: dict[str, Any], *, optimizer: bool, model: Any = None
) -> None:
    """Writes into `found`: ms by phase, pairs a second, MFU, peak and estimated bytes.

    Args:
        trainer: has `model`, `backward` and `step`, as those of llava.rehearsal.training.
        optimizer: whether it steps one.
        model: the model inside a wrapper that has no `get_vision_tower`.
    """
    args, llava = plan.arguments[2], model or trainer.model
    lengths = [shape_of().pair] * pairs
    found["pairs"], found["estimated_bytes"] = pairs, estimated_peak(plan, lengths, optimizer)
    batch = training.random_batch(plan, lengths)
    watch = Stopwatch(llava.get_vision_tower())
    try:
        llava.zero_grad(set_to_none=True)  # of an earlier case
        torch.cuda.reset_peak_memory_stats()
        times = [one_step(trainer, batch, args, watch) for _ in range(1 + REPEATS)][1:]
    finally:
        watch.close()
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    found["ms"] = {phase: round(statistics.median(t[phase] for t in times), 2) for phase in times[0]}
    add_rates(found, size_of(llava), lengths, bool(args.lora_enable))


def add_rates(found: dict[str, Any], size: ModelSize, lengths: list[PairLength], frozen_weights: bool) -> None:
    """Pairs a second, and MFU where the card's peak is known; an optimizer's time is not counted."""
    seconds = sum(found["ms"][phase] for phase in ("tower", "forward", "backward")) / 1000
    flops = step_flops(size, [pair.groups for pair in lengths], [True] * len(lengths), len(lengths), frozen_weights)
    peak = peak_flops(torch.device("cuda", 0))
    found["pairs_per_second"] = round(len(lengths) / seconds, 3)
    found["mfu"] = peak and round(flops / seconds / peak, 4)


def free() -> None:
    """Gives back what the last case's model had."""
    gc.collect()
    torch.cuda.empty_cache()


def first_synchronization(work: Callable[[], Any]) -> str | None:
    """Where the host first waits for the GPU in this work; None where it never does."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "-packages" not in f.filename]
        return f"{Path((own or frames)[-1].filename).name}:{(own or frames)[-1].lineno} <- {error}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def count_of(pairs: int) -> str:
    """Number of pairs with its unit, as cases are named."""
    return f"{pairs} pair" + "s" * (pairs > 1)


def gib(size: float) -> str:
    """Bytes in GiB, one decimal."""
    return f"{size / 2**30:.1f}"


def short(found: dict[str, Any] | None) -> str:
    """A case in a few words."""
    if found is None:
        return "not measured"
    if "out_of_memory" in found:
        return "out of memory"
    if "error" in found:
        return "error"
    mfu = f", MFU {found['mfu']:.1%}" if found.get("mfu") else ""
    return f"{found['pairs_per_second']:.2f} pairs/s{mfu}, {gib(found['peak_bytes'])} GiB"
