"""How much memory a training step will need on each GPU, from configs alone; and how much one did need.

The estimate follows the step: what is resident, what a micro-batch's forward pass keeps, what is added while the loss,
each decoder layer and the optimizer are at work. All sizes are bytes unless they are called parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dama.shared_prefix import PackedGroup
from dama.train.steps import IMAGES_AT_ONCE
from dama.train.throughput import PairLength
from llava.estimate.sizes import FOUR_BITS, FP32, HALF, LayerSizes, Load, ModelShape, Training


def trained_parameters(shape: ModelShape, run: Training) -> LayerSizes:
    """Count the trained parameters of each part.

    LoRA trains adapters of r (in + out) parameters for each matrix of a decoder layer, instead of the matrices (Hu et
    al. 2021).
    """
    projector = shape.parameters.projector * run.trains_projector
    if run.method == "full":
        return shape.parameters._replace(projector=projector)
    if run.method == "head":
        return LayerSizes(0, projector, 0, shape.width * shape.vocabulary)
    ends = 2 * (shape.width + shape.queries) + 2 * (shape.width + shape.keys) + 3 * (shape.width + shape.intermediate)
    return LayerSizes(0, projector, run.lora_rank * ends, 0)


def weight_bytes(shape: ModelShape, run: Training) -> int:
    """All weights; ZeRO-3 shares them out over the ranks (Rajbhandari et al. 2020, section 5.3)."""
    parts, layers = shape.parameters, shape.layers
    total = (parts._replace(layer=0).total(layers) + shape.tower_parameters) * run.weight
    total += int(layers * parts.layer * {16: run.weight, 8: 1, 4: FOUR_BITS}[run.bits])
    if run.method == "lora":
        total += layers * trained_parameters(shape, run).layer * run.adapter
    if run.zero and run.zero.offload_weights:
        return 0
    return total // run.ranks if run.stage == 3 else total


def gathered_bytes(shape: ModelShape, run: Training) -> int:
    """ZeRO-3: weights that are whole at a time, as many as its `max_live_parameters` allow."""
    if run.zero is None or run.stage < 3:
        return 0
    everything = shape.parameters.total(shape.layers) + shape.tower_parameters
    return min(everything, run.zero.max_live) * run.weight


def share(shape: ModelShape, run: Training) -> int:
    """Trained parameters that one rank's optimizer updates; from ZeRO-1 on they are shared out."""
    return trained_parameters(shape, run).total(shape.layers) // (run.ranks if run.stage else 1)


def optimizer_bytes(shape: ModelShape, run: Training) -> int:
    """Bytes of the optimizer's states on one rank.

    Adam has two moments of each weight of the rank's share, and under DeepSpeed, except in fp32 without ZeRO, an fp32
    copy of the weight (Rajbhandari et al. 2020, section 3.1).
    """
    if run.zero and run.zero.offload_optimizer:
        return 0
    copy = run.zero is not None and (run.half or run.stage > 0)
    return share(shape, run) * FP32 * (2 + copy)


def tokens_of(run: Training, pairs: Sequence[PairLength]) -> int:
    """T: packed with the shared prefix; else rows padded to the longest, one for each view of a pair."""
    if run.shared_prefix:
        return sum(pair.tokens for pair in pairs)
    return sum(pair.rows for pair in pairs) * max(pair.longest for pair in pairs)


def groups_of(pairs: Sequence[PairLength]) -> list[PackedGroup]:
    """The groups of all pairs, each with an image."""
    return [group for pair in pairs for group in pair.groups]


def attention_bytes(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> int:
    """Saved by one layer's attention: queries, keys, values, output, and a logsumexp for each head and position.

    With the shared prefix its keys and values are there once for each answer; torch's attention, unlike varlen kernels,
    also has a mask for every answer but a group's first and joins outputs. Padded rows need no mask: they are causal. A
    dense mask is [groups, T, T].
    """
    t, b = tokens_of(run, pairs), run.factor
    queries, keys, sums = t * shape.queries * b, 2 * t * shape.keys * b, t * shape.heads * FP32
    if shape.dense_mask and run.shared_prefix:  # a key for every query's head, and the mask as numbers
        rows = groups_of(pairs)
        return 4 * queries + sums + len(rows) * max(group.positions for group in rows) ** 2 * b
    if not run.shared_prefix:
        return 2 * queries + keys + sums
    further = [(group.prefix, answer) for group in groups_of(pairs) for answer in group.answers[1:]]
    kernel = 2 * queries + keys + 2 * sum(prefix for prefix, _ in further) * shape.keys * b + sums
    if run.varlen:
        return kernel
    masks = sum(answer * (prefix + answer) for prefix, answer in further) * b
    return kernel + masks + queries * run.keeps_inputs


def layer_bytes(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> int:
    """Saved by one decoder layer for its backward pass (Korthikanti et al. 2022, section 4.1, for LLaMA's layer).

    Two norms, in fp32; what trained matrices multiply; attention; in the MLP silu's input and output and the other
    factor. With dropout each of LoRA's seven matrices has an input of its own, and a mask.
    """
    t, d, f = tokens_of(run, pairs), shape.width, shape.intermediate
    norms = (shape.normed or 2 * d) * (FP32 + run.weight * (run.method == "full")) + 2 * FP32
    of_each = 5 * d + f  # queries, keys, values, gate, up; down
    if run.method == "lora" and run.lora_dropout > 0:
        inputs = (of_each + shape.queries) * (run.factor + (1 if run.cuda else run.adapter))
    elif not run.keeps_inputs:
        inputs = 0
    elif run.autocast or (run.method == "lora" and run.adapter != run.factor):
        inputs = of_each * HALF  # cast anew for each matrix
    else:
        inputs = (2 * d + f) * run.factor
    mlp = 3 * f * run.product
    return t * (norms + inputs + 7 * run.lora_rank * run.factor + mlp) + attention_bytes(shape, run, pairs)


def logit_bytes(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> tuple[int, int]:
    """(kept, while they are differentiated) of the logits [M, V].

    Log-probs keep those of one chunk of the answers' positions and need an fp32 buffer of that size, two where logits
    are in half precision (dama.logps.TargetLogps). Fine-tuning keeps an fp32 log-softmax of all positions, and
    cross-entropy's gradient needs two more.
    """
    numbers = shape.vocabulary * min(predictions_of(run, pairs), run.logp_chunk or sys.maxsize)
    if run.logp_chunk is None:
        return FP32 * numbers, 2 * FP32 * numbers
    if run.float32_logits:
        return FP32 * numbers, FP32 * numbers
    return run.factor * numbers, FP32 * numbers * (2 if run.half else 1)


def predictions_of(run: Training, pairs: Sequence[PairLength]) -> int:
    """M: the answers' tokens; in fine-tuning all positions."""
    return tokens_of(run, pairs) if run.logp_chunk is None else sum(sum(pair.answers) for pair in pairs)


def image_bytes(shape: ModelShape, run: Training, images: int) -> int:
    """While the frozen tower runs: every layer's output (LLaVA reads one of the last), and the MLP of one."""
    rows = min(images, IMAGES_AT_ONCE) * (shape.patches + 1) * run.weight
    return rows * ((shape.tower_layers + 1) * shape.tower_width + 2 * shape.tower_intermediate)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU: what is resident, what a micro-batch keeps, and the level that each phase of a step reaches."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Highest level of all phases, in bytes."""
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        """The phase that reaches the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def estimate(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> Estimate:
    """Peak of a training step whose micro-batch holds these pairs (rows, in supervised fine-tuning)."""
    weights, optimizer = weight_bytes(shape, run), optimizer_bytes(shape, run)
    level = weights + optimizer + gathered_bytes(shape, run) + gradients_before(shape, run)
    t, d = tokens_of(run, pairs), shape.width
    border = t * d * run.weight  # hidden states between two layers
    layer = layer_bytes(shape, run, pairs) + HALF * shape.parameters.layer * run.autocast
    projected = shape.patches * (shape.tower_width + 2 * d) * run.factor * run.trains_projector
    images = len(groups_of(pairs))
    below = images * (projected + shape.pixels * FP32)
    above = t * d * (FP32 + run.weight * (run.method == "full")) + predictions_of(run, pairs) * d * run.factor
    kept = border if run.checkpointing else layer
    saved = below + shape.layers * kept + above
    logits, differentiated = logit_bytes(shape, run, pairs)
    head = trained_parameters(shape, run).head * run.gradient
    summed = predictions_of(run, pairs) > (run.logp_chunk or sys.maxsize)  # the output layer's gradient, over chunks

    def in_layer(index: int) -> int:
        recomputed = layer * run.checkpointing
        casts = FP32 * (run.method == "lora" and run.adapter != run.factor)
        work = border + 2 * t * shape.intermediate * (run.product + casts)
        return below + (index + 1) * kept + recomputed + work + gradients_at(shape, run, index)

    phases = {
        "images": image_bytes(shape, run, images),
        "loss": saved + 2 * border + logits + differentiated + head * summed,
        "output layer": saved + max(logits + head * (3 if summed else 1), gradients_at(shape, run, shape.layers)),
        "layers": max(in_layer(0), in_layer(shape.layers - 1)),
    }
    phases = {name: level + size for name, size in phases.items()}
    phases["optimizer"] = weights + optimizer + optimizer_work(shape, run)
    return Estimate(weights, optimizer, gradient_bytes(shape, run), saved, phases)


def estimate_step(
    arguments: Any, shape: ModelShape, pairs: Sequence[PairLength], ranks: int, cuda: bool, layout: tuple[int, int],
    **changes: Any,
) -> Estimate:  # fmt: skip
    """Peak of a step as the flags describe it, if it meets the longest of these pairs (rows, in fine-tuning).

    Args:
        layout: per_device_train_batch_size and gradient_accumulation_steps, whatever the flags say.
        changes: fields of `Training` that are to be other than the flags say.
    """
    load = Load.of(arguments[2], ranks, *layout)
    longest = sorted(pairs, key=lambda pair: pair.tokens, reverse=True) * load.pairs
    run = replace(Training.of(arguments, ranks, cuda, load.several), **changes)
    return estimate(shape, run, longest[: load.pairs])


def gradient_bytes(shape: ModelShape, run: Training) -> int:
    """Bytes of the gradients at the end of the backward pass.

    They are of all trained weights, from ZeRO-2 on of the rank's share; a GPU whose optimizer is offloaded has none
    (Rajbhandari et al. 2020, section 5.2).
    """
    if run.stage < 2:
        return trained_parameters(shape, run).total(shape.layers) * run.gradient
    return 0 if run.zero and run.zero.offload_optimizer else share(shape, run) * run.gradient


def bucket_bytes(shape: ModelShape, run: Training) -> int:
    """DeepSpeed's buffers that gradients are reduced in, two where that overlaps the backward pass; "auto" is D^2."""
    if run.zero is None or run.stage == 0:
        return 0
    size = shape.width**2 if run.zero.bucket is None else run.zero.bucket
    return size * run.gradient * (2 if run.zero.overlaps and run.stage < 3 else 1)


def gradients_before(shape: ModelShape, run: Training) -> int:
    """There when a micro-batch begins: gradients of the step's micro-batches so far, and buffers that stay."""
    kept = gradient_bytes(shape, run)
    if run.stage == 3:
        return kept + bucket_bytes(shape, run)
    in_buckets = kept if run.zero is None and run.ranks > 1 else 0  # DistributedDataParallel's
    return kept * run.accumulates + in_buckets


def gradients_at(shape: ModelShape, run: Training, index: int) -> int:
    """Added when the backward pass has come down to decoder layer `index`, or to the output layer above the last.

    They grow where each rank keeps them all, and in stage 2 the rank's share of them. From ZeRO-2 on there are also
    those of the weight that is just differentiated, in stage 3 a second time, cut up.
    """
    trained, layers = trained_parameters(shape, run), shape.layers
    newest = (trained.head if index == layers else shape.width * shape.intermediate) * run.gradient
    if run.stage == 3:
        return 2 * newest
    if run.stage == 2:
        done = 1.0 if run.accumulates else (trained.head + trained.layer * (layers - index)) / trained.total(layers)
        return newest + int(done * gradient_bytes(shape, run)) + bucket_bytes(shape, run)
    grown = (trained.head + trained.layer * (layers - index)) * run.gradient
    return bucket_bytes(shape, run) + (newest if run.accumulates else grown)


def optimizer_work(shape: ModelShape, run: Training) -> int:
    """Bytes while AdamW steps, beside weights and states.

    These are gradients, under DeepSpeed an fp32 copy of them, and beside it what is larger: the flat copy that this one
    is made of, or square roots of second moments, of all weights at a time on a GPU (none with fused AdamW), on a CPU
    twice those of one weight, which is the whole share under DeepSpeed.
    """
    if run.zero and run.zero.offload_optimizer:
        return 0
    mine = share(shape, run)
    flat = run.zero is not None and (run.half or run.stage > 0)
    if run.zero and run.stage == 3:
        mine = min(mine, run.zero.sub_group)
    roots = 0 if run.fused else mine if run.cuda else 2 * (mine if flat else shape.matrix)
    beside = max(FP32 * roots, mine * run.gradient * (flat and run.stage == 2))
    return gradient_bytes(shape, run) + FP32 * mine * flat + beside
