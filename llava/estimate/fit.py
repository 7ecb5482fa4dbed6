"""Fit a training step into the memory there is, or name what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dama.train.throughput import PairLength
from llava.estimate import machine
from llava.estimate.lengths import PROMPT
from llava.estimate.machine import GIB, format_bytes
from llava.estimate.memory import Estimate, estimate_step
from llava.estimate.plan import Plan
from llava.estimate.sizes import ModelShape, Zero
from llava.train.arguments import Arguments

CONTEXT = int(1.5 * GIB)  # of a GPU: CUDA's context and the collectives' buffers
# Share of the peak by which torch's allocator reserves more than tensors need, with and without gradient checkpointing,
# as rehearsed for the 7B and 13B scripts (docs/hardware.md).
FRAGMENTS = {True: 0.13, False: 0.27}
ENOUGH = 4  # pairs in a micro-batch: more are hardly faster


def memory_of_each(plan: Plan) -> int:
    """Bytes of the smallest of the GPUs that this process can see, or a rank's part of the host's memory."""
    if not plan.cuda:
        return machine.host_memory() // plan.ranks
    return min((memory for _, memory in machine.gpus()[: plan.ranks]), default=0)


def smallest_of_all_ranks(value: int, device: torch.device) -> int:
    """The same on every rank, so that they decide alike."""
    if not torch.distributed.is_initialized():
        return value
    smallest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return int(smallest)


def reserved(peak: int, cuda: bool, checkpointing: bool) -> int:
    """Bytes of a GPU that a step with this peak takes: fragments, CUDA's context and the collectives' come on top."""
    return int(peak * (1 + FRAGMENTS[checkpointing])) + CONTEXT if cuda else peak


def fit_micro_batch(
    arguments: Arguments, shape: ModelShape, lengths: Sequence[PairLength], ranks: int, cuda: bool, memory: int,
    **changes: Any,
) -> tuple[int, int] | None:  # fmt: skip
    """Find the largest micro-batch that fits into `memory` bytes, with as many pairs in a step.

    Returns:
        (per_device_train_batch_size, gradient_accumulation_steps); None where not even single pairs fit.

    Args:
        changes: fields of llava.estimate.memory.Training that are to be other than the flags say.
    """
    args = arguments[2]
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    checkpointing = bool(changes.get("checkpointing", args.gradient_checkpointing))
    for micro_batch in range(pairs, 0, -1):
        layout = micro_batch, pairs // micro_batch
        if pairs % micro_batch:
            continue
        peak = estimate_step(arguments, shape, lengths, ranks, cuda, layout, **changes).peak
        if reserved(peak, cuda, checkpointing) <= memory:
            return layout
    return None


def choose_layout(plan: Plan, shape: ModelShape, lengths: Sequence[PairLength], memory: int) -> None:
    """--auto_micro_batch and --auto_checkpointing: the fastest way of a step that fits into `memory` bytes.

    Without gradient checkpointing where a micro-batch as large as with it fits, or one that is ENOUGH; else with it.
    """
    args = plan.arguments[2]

    def fitting(checkpointing: bool) -> tuple[int, int] | None:
        return fit_micro_batch(
            plan.arguments, shape, lengths, plan.ranks, plan.cuda, memory, checkpointing=checkpointing
        )

    with_it, without = fitting(args.gradient_checkpointing), fitting(False)
    if args.auto_checkpointing and args.gradient_checkpointing and without:
        wanted = min((with_it or without)[0], ENOUGH) if args.auto_micro_batch else plan.layout[0]
        if without[0] >= wanted:
            args.gradient_checkpointing, with_it = False, without
            if hasattr(args, "activation_checkpointing"):  # what newer releases of transformers read
                args.activation_checkpointing = False
    if args.auto_micro_batch and with_it:
        apply_layout(args, with_it)


def apply_layout(args: Any, layout: tuple[int, int]) -> None:
    """Changes the flags, and in a run under DeepSpeed its configuration, which transformers filled in from them."""
    args.per_device_train_batch_size, args.gradient_accumulation_steps = layout
    if getattr(args, "hf_deepspeed_config", None) is not None:
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)


def check_memory(plan: Plan, shape: ModelShape, lengths: Sequence[PairLength], source: str) -> None:
    """Compare the estimate with the memory available, after `choose_layout` has set what the flags leave open.

    Args:
        source: how the lengths are known.
    """
    args = plan.arguments[2]
    available = smallest_of_all_ranks(memory_of_each(plan), plan.device)
    choose_layout(plan, shape, lengths, available)
    plan.note("step", describe_step(plan, lengths, source))
    needed = estimate_step(plan.arguments, shape, lengths, plan.ranks, plan.cuda, plan.layout)
    taken = reserved(needed.peak, plan.cuda, args.gradient_checkpointing)
    largest = fit_micro_batch(plan.arguments, shape, lengths, plan.ranks, plan.cuda, available)
    fits = f"micro-batches of up to {largest[0]} fit" if largest else "not even micro-batches of 1 fit"
    of_available = f", of {format_bytes(available)}: {fits}" if available else ""
    plan.note("memory", describe_memory(plan, needed, taken) + of_available)
    if available and taken > available and args.check_memory:
        unit = "GPU" if plan.cuda else "rank"
        plan.errors.append(
            f"{unit} memory: {format_bytes(available)} on each, about {format_bytes(taken)} needed on {plan.ranks} "
            f"{unit}(s) ({format_bytes(needed.peak)} of tensors); use "
            f"{'; or '.join(remedies(plan, shape, lengths, available))}; or --check_memory False to try all the same"
        )


def describe_step(plan: Plan, lengths: Sequence[PairLength], source: str) -> str:
    """Describe a step's layout and its longest item."""
    micro_batch, accumulation = plan.layout
    items = "pairs" if plan.arguments[2].task == "DPO" else "rows"
    longest = max(lengths, key=lambda pair: pair.tokens)
    return (
        f"{micro_batch * plan.ranks * accumulation} {items} = {micro_batch} x {plan.ranks} rank(s) x {accumulation} "
        f"micro-batch(es), the longest of {longest} tokens ({source})"
    )


def describe_memory(plan: Plan, needed: Estimate, taken: int) -> str:
    """Describe an estimate by its parts; `taken` is what the allocator reserves, in bytes."""
    unit = "GPU" if plan.cuda else "rank"
    in_reserve = f", {format_bytes(taken)} reserved" if plan.cuda else ""
    recomputed = ", recomputed" if plan.arguments[2].gradient_checkpointing else ""
    return (
        f"about {format_bytes(needed.peak)} on each {unit}{in_reserve}, most in the phase of the {needed.highest} "
        f"(weights {format_bytes(needed.weights)}, optimizer {format_bytes(needed.optimizer)}, gradients "
        f"{format_bytes(needed.gradients)}, activations {format_bytes(needed.activations)}{recomputed})"
    )


def remedies(plan: Plan, shape: ModelShape, lengths: Sequence[PairLength], memory: int) -> list[str]:
    """What would make a step fit into `memory` bytes, each by itself; found by the same estimate."""
    args, found = plan.arguments[2], []

    def fitting(ranks: int = plan.ranks, pairs: Sequence[PairLength] = lengths, **changes: Any) -> int | None:
        layout = fit_micro_batch(plan.arguments, shape, pairs, ranks, plan.cuda, memory, **changes)
        return layout[0] if layout else None

    if micro := fitting():
        found.append(f"--per_device_train_batch_size {micro}")
    if not args.gradient_checkpointing and fitting(checkpointing=True):
        found.append("--gradient_checkpointing True")
    zero = Zero.read(args.deepspeed) if isinstance(args.deepspeed, str) else None
    if zero and zero.stage < 3 and fitting(zero=replace(zero, stage=3)):
        found.append("ZERO=scripts/zero3.json")
    more = (plan.ranks * factor for factor in (2, 4, 8, 16))
    if zero and (enough := next((ranks for ranks in more if fitting(ranks)), None)):
        found.append(f"{enough} GPUs" if plan.cuda else f"{enough} ranks")
    limits = range(args.model_max_length // 128 * 128, shape.patches + 2 * PROMPT, -128)
    shorter = (limit for limit in limits if (kept := pairs_within(lengths, limit)) and fitting(pairs=kept))
    if limit := next(shorter, None):
        found.append(f"shorter answers (--model_max_length {limit}{' --on_long_pair skip' * (args.task == 'DPO')})")
    if not args.lora_enable and fitting(method="lora", lora_rank=128, lora_dropout=0.05):
        found.append("LoRA (scripts/dama_7b_lora.sh, or --lora_enable True)")
    return found or ["a smaller model, or GPUs with more memory"]


def pairs_within(lengths: Sequence[PairLength], limit: int) -> list[PairLength]:
    """Those whose longest row fits into `limit` tokens."""
    return [pair for pair in lengths if pair.longest <= limit]
