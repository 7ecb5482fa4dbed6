"""Run one micro-batch forward and backward, with its peak memory beside the estimate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dama.losses import ViewLogps
from dama.models.setup import setup_family
from dama.pairs import PreferencePair
from dama.train.data import PairDataset
from dama.train.family import shown_images
from dama.train.setup import enable_checkpointing
from dama.train.throughput import PairLength
from llava.conversation import get_template
from llava.estimate.fit import memory_of_each, reserved
from llava.estimate.hub import longest_of
from llava.estimate.lengths import lengths_of, longest_items, longest_rows, views_of
from llava.estimate.machine import format_bytes
from llava.estimate.measure import TensorPeak
from llava.estimate.memory import estimate
from llava.estimate.plan import Plan
from llava.estimate.sizes import ModelShape, Training, Zero
from llava.supported import is_hub_model
from llava.train.arguments import Arguments
from llava.train.dpo_data import DPODataset, PairCollator
from llava.train.family import ImagePreparation
from llava.train.sft_data import Row, make_supervised_data_module, supervised_settings


def try_one_batch(plan: Plan, shape: ModelShape, items: Sequence[PreferencePair] | Sequence[Row]) -> None:
    """Run the longest pairs or conversations, or as many as fit, forward and backward on one device."""
    args = plan.arguments[2]
    kind = "pairs" if args.task == "DPO" else "rows"
    run = Training.of(plan.arguments, 1, plan.cuda, False)
    run = replace(run, zero=run.zero and Zero())
    lengths = lengths_of(plan.arguments, items, shape.patches)[0]
    count = min(args.per_device_train_batch_size, len(lengths))
    while count:
        needed = bytes_without_optimizer(shape, run, lengths[:count])
        if reserved(needed, plan.cuda, args.gradient_checkpointing) <= memory_of_each(plan):
            break
        count -= 1
    else:
        needed = bytes_without_optimizer(shape, run, lengths[:1])
        plan.note("one batch", f"left out: one of the {kind} needs {format_bytes(needed)}")
        return
    loss, norm, peak, seconds = run_one_batch(plan.arguments, items, count, shape.patches, run)
    plan.note(
        "one batch",
        f"{count} of the longest {kind} forward and backward in {seconds:.1f} s, loss {loss:.4f}, gradient norm "
        f"{norm:.3g}; {format_bytes(peak)} at the peak without optimizer, estimated {format_bytes(needed)}",
    )
    if not math.isfinite(norm):
        plan.errors.append(f"one batch: expected a finite gradient, got a norm of {norm}")


def bytes_without_optimizer(shape: ModelShape, run: Training, lengths: Sequence[PairLength]) -> int:
    """Peak bytes of a forward and backward pass on these pairs or rows."""
    estimated = estimate(shape, run, lengths)
    phases = (level for name, level in estimated.phases.items() if name != "optimizer")
    return max(phases) - estimated.optimizer


def run_one_batch(
    arguments: Arguments, items: Sequence[Any], count: int, patches: int, run: Training
) -> tuple[float, float, int, float]:
    """Run the `count` longest items forward and backward.

    Returns:
        loss, norm of the gradient, peak of the tensors' bytes, seconds.
    """
    from accelerate.utils import send_to_device

    from llava.train.setup_model import setup_model

    args = arguments[2]
    if is_hub_model(arguments[0].model_name_or_path):
        model, batch = hub_batch(arguments, items, count)
    else:
        model, tokenizer, processor = setup_model(arguments)
        model = model.to(args.device).train()
        batch = first_batch(arguments, items, count, patches, model, tokenizer, processor)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    batch = send_to_device(batch, args.device)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    tensors += [value for image in batch.get("images", ()) if isinstance(image, dict) for value in image.values()]
    began = time.perf_counter()
    with (
        TensorPeak(args.device, [*model.parameters(), *model.buffers(), *tensors]) as used,
        torch.autocast(args.device.type, torch.bfloat16, enabled=run.half and run.zero is None),
    ):
        loss = first_loss(model, batch, args) if args.task == "DPO" else model(**batch).loss
        loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    return loss.item(), norm, used.peak, time.perf_counter() - began


def hub_batch(arguments: Arguments, items: Sequence[Any], count: int) -> tuple[Any, dict[str, Any]]:
    """A Hugging Face model on its device, and the keywords of its call for the `count` longest pairs."""
    family = setup_family(arguments)
    pairs = longest_of(arguments, items)[:count]
    data = PairDataset(pairs, arguments[1].image_folder or [], family.prepare_image)
    images = [data.pixels(image) for image in shown_images(pairs)]
    return family.module.to(arguments[2].device).train(), family.collate(pairs) | {"images": images}


def first_batch(
    arguments: Arguments, items: Sequence[Any], count: int, patches: int, model: Any, tokenizer: Any, processor: Any
) -> dict[str, Tensor]:
    """A micro-batch of the `count` longest, as training would collate them."""
    model_args, data_args, args = arguments
    if args.task == "DPO":
        pairs = longest_items(items, arguments, tokenizer, patches)[:count]
        data = DPODataset(pairs, data_args.image_folder or [], ImagePreparation(processor, model.config))
        images = torch.stack([data.pixels(image) for image in shown_images(pairs)])
        return PairCollator(patches, args.shared_prefix, views_of(args))(pairs) | {"images": images}
    template, rows = get_template(str(model_args.version)), longest_rows(items, patches)[:count]
    settings = supervised_settings(arguments, model, processor)
    module = make_supervised_data_module(tokenizer, settings, template=template, rows=rows)
    return module["data_collator"]([*module["train_dataset"]])


def first_loss(model: Any, batch: dict[str, Tensor], args: Any) -> Tensor:
    """The loss of a model that is its own reference, with the gradient of a first step: log 2 for DPO."""
    chunk = {"chunk" if "pairs" in batch else "logp_chunk": args.logp_chunk}
    sums = model(**batch, **chunk)
    loss = args.preference_loss()
    policy, tokens = (values.view(len(loss.views), -1) for values in sums)
    logps = ViewLogps(loss.views, policy, policy.detach(), tokens)
    return loss(logps, torch.full_like(policy[0], args.dpo_beta)).mean()
