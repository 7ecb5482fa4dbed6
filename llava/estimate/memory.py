"""How much memory a training step will need on each GPU, from configs alone; and how much one did need.

The estimate follows the step: what is resident, what a micro-batch's forward pass keeps, what is added while the loss,
each decoder layer and the optimiser are at work. All sizes are bytes unless they are called parameters.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dama.shared_prefix import SDPA, attention_backend
from dama.train.steps import IMAGES_AT_ONCE, StepPlan
from dama.train.throughput import PairLength
from dama.weighting import Variant

FP32, HALF = 4, 2  # bytes
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # ... 64 weights have a scale of one byte, 256 scales one of four


# --- What the memory depends on: the model's sizes, and how it is trained ---------------------------------------------


class Parts(NamedTuple):
    """Numbers of parameters, or bytes, of a model's parts."""

    embedding: int
    projector: int
    layer: int  # of each decoder layer
    head: int  # the last norm and the output layer

    def total(self, layers: int) -> int:
        return self.embedding + self.projector + layers * self.layer + self.head


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaVA."""

    layers: int
    width: int  # D
    queries: int  # heads x width of a head
    keys: int  # key heads x width of a head
    heads: int
    intermediate: int  # F, of the MLP
    vocabulary: int  # V
    parameters: Parts
    matrix: int  # parameters of the largest matrix
    tower_parameters: int
    tower_layers: int
    tower_width: int
    tower_intermediate: int
    patches: int  # positions of a picture
    pixels: int  # numbers of a picture

    @staticmethod
    def of(config: Any, tower: Any) -> ModelShape:
        """From the model's and the tower's config; parameters are counted on the meta device, which holds no weights.

        Args:
            config: LlavaConfig with the fields of tower and projector. tower: CLIPVisionConfig.
        """
        from transformers import CLIPVisionModel

        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        with torch.device("meta"):
            model, vision = LlavaLlamaForCausalLM(config), CLIPVisionModel(tower)
        sizes = {name: p.numel() for name, p in model.named_parameters()}

        def count(*parts: str) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(parts))

        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        patches = (tower.image_size // tower.patch_size) ** 2
        return ModelShape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            queries=config.num_attention_heads * head,
            keys=(config.num_key_value_heads or config.num_attention_heads) * head,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            parameters=Parts(
                count("model.embed_tokens."),
                count("model.mm_projector.", "model.image_newline"),
                count("model.layers.0."),
                count("model.norm.", "lm_head."),
            ),
            matrix=max(sizes.values()),
            tower_parameters=sum(p.numel() for p in vision.parameters()),
            tower_layers=tower.num_hidden_layers,
            tower_width=tower.hidden_size,
            tower_intermediate=tower.intermediate_size,
            patches=patches + (getattr(config, "mm_vision_select_feature", None) == "cls_patch"),
            pixels=3 * tower.image_size**2,
        )


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's JSON file says that memory depends on; sizes in numbers, `None` for "auto"."""

    stage: int = 0
    bucket: int | None = 500_000_000
    overlaps: bool = False  # communication and computation
    max_live: int = 1_000_000_000  # stage 3: parameters gathered at a time
    sub_group: int = 1_000_000_000  # stage 3: parameters stepped at a time
    offload_optimizer: bool = False
    offload_weights: bool = False

    @staticmethod
    def read(path: str | Path) -> Zero:
        config = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
        stage = int(config.get("stage", 0))
        bucket = config.get("reduce_bucket_size", Zero.bucket)

        def is_offloaded(what: str) -> bool:
            return config.get(f"offload_{what}", {}).get("device", "none") != "none"

        return Zero(
            stage,
            None if bucket == "auto" else int(bucket),
            bool(config.get("overlap_comm", stage == 3)),
            int(config.get("stage3_max_live_parameters", Zero.max_live)),
            int(config.get("sub_group_size", Zero.sub_group)),
            is_offloaded("optimizer"),
            is_offloaded("param"),
        )


@dataclass(frozen=True)
class Training:
    """How a model is trained, as far as its memory depends on it."""

    method: str  # what learns: full, lora, head (the output layer, with --freeze_backbone), or projector (alone)
    zero: Zero | None = None  # None without DeepSpeed
    ranks: int = 1
    half: bool = False  # bf16 or fp16
    cuda: bool = False
    varlen: bool = False  # attention by a varlen kernel
    shared_prefix: bool = True
    checkpointing: bool = False
    logp_chunk: int | None = 1024  # None: logits of all positions, as supervised fine-tuning has them
    trains_projector: bool = True
    lora_rank: int = 0
    lora_dropout: float = 0.0
    bits: int = 16
    accumulates: bool = False  # several micro-batches have a backward pass in one step
    fused: bool = False  # AdamW in one kernel, without work of its own
    float32_logits: bool = False  # of the log-probs, in half precision

    @staticmethod
    def of(arguments: Any, ranks: int, cuda: bool, accumulates: bool) -> Training:
        """As the flags say; `arguments` are Model-, Data- and TrainingArguments."""
        model_args, _, args = arguments
        half = bool(args.bf16 or args.fp16)
        less = {"projector": model_args.tune_mm_mlp_adapter, "lora": args.lora_enable}
        less["head"] = model_args.freeze_backbone
        device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
        dpo = args.task == "DPO"
        backend = attention_backend(device, torch.bfloat16 if half else torch.float32)
        return Training(
            method=next((method for method, chosen in less.items() if chosen), "full"),
            zero=Zero.read(args.deepspeed) if isinstance(args.deepspeed, str) else None,
            ranks=ranks,
            half=half,
            cuda=cuda,
            varlen=backend != SDPA,
            shared_prefix=dpo and args.shared_prefix,
            checkpointing=args.gradient_checkpointing,
            logp_chunk=args.logp_chunk if dpo else None,
            trains_projector=not args.freeze_mm_mlp_adapter,
            lora_rank=args.lora_r if args.lora_enable else 0,
            lora_dropout=args.lora_dropout if args.lora_enable else 0.0,
            bits=args.bits,
            accumulates=accumulates,
            fused=str(getattr(args.optim, "value", args.optim)).endswith("fused"),
            float32_logits=half and cuda and dpo and args.float32_logits,
        )

    @property
    def stage(self) -> int:
        return self.zero.stage if self.zero else 0

    @property
    def autocast(self) -> bool:
        """fp32 weights whose matrix products are in half precision: bf16 without DeepSpeed, all weights trained."""
        return self.half and self.zero is None and (self.method != "lora" or self.bits < 16)

    @property
    def weight(self) -> int:
        """Bytes of a weight that is not quantised."""
        return HALF if self.half and not self.autocast else FP32

    @property
    def rows(self) -> int:
        """Padded rows of a pair, or of a conversation."""
        return 1 if self.logp_chunk is None else 2

    @property
    def keeps_inputs(self) -> bool:
        """Whether a decoder layer's matrices are trained on what they are given, undisturbed by dropout."""
        return self.method == "full" or (self.method == "lora" and self.lora_dropout == 0)

    @property
    def factor(self) -> int:
        """Bytes of a number that goes into a matrix product, or into attention."""
        return HALF if self.half else FP32

    @property
    def product(self) -> int:
        """Bytes of a number that comes out of a decoder layer's matrix product; quantised ones answer in fp32."""
        return self.factor if self.bits == 16 else FP32

    @property
    def gradient(self) -> int:
        """Bytes of a gradient's number."""
        return self.adapter if self.method == "lora" else self.weight

    @property
    def adapter(self) -> int:
        """Bytes of an adapter's weight: PEFT keeps fp32 unless DeepSpeed casts the whole model."""
        return HALF if self.half and self.zero else FP32


class Load(NamedTuple):
    """What the backward pass of a step runs on at a time."""

    pairs: int  # on one rank
    several: bool  # micro-batches in a step

    @staticmethod
    def of(args: Any, ranks: int, micro_batch: int, accumulation: int) -> Load:
        """Of these TrainingArguments in another layout: where pairs are selected before the first gradient, fewer than
        the micro-batch holds."""
        config = args.weighting()
        looks_ahead = accumulation > 1 or (args.lora_enable and args.lora_dropout > 0)
        if args.task != "DPO" or config.variant is Variant.RELEASED or config.is_static or not looks_ahead:
            return Load(micro_batch, accumulation > 1)
        pairs = micro_batch * ranks * accumulation
        selected = pairs if config.selects == "off" else config.count_kept(pairs)
        micro_batches = StepPlan.of(selected, ranks, micro_batch).micro_batches
        return Load(-(-selected // (ranks * micro_batches)), micro_batches > 1)


# --- What is resident -------------------------------------------------------------------------------------------------


def trained_parameters(shape: ModelShape, run: Training) -> Parts:
    """Of each part. LoRA trains adapters of r (in + out) parameters for each matrix of a decoder layer, instead of the
    matrices (Hu et al. 2021)."""
    projector = shape.parameters.projector * run.trains_projector
    if run.method == "full":
        return shape.parameters._replace(projector=projector)
    if run.method == "head":
        return Parts(0, projector, 0, shape.width * shape.vocabulary)
    ends = 2 * (shape.width + shape.queries) + 2 * (shape.width + shape.keys) + 3 * (shape.width + shape.intermediate)
    return Parts(0, projector, run.lora_rank * ends, 0)


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
    """Trained parameters that one rank's optimiser updates; from ZeRO-1 on they are shared out."""
    return trained_parameters(shape, run).total(shape.layers) // (run.ranks if run.stage else 1)


def optimiser_bytes(shape: ModelShape, run: Training) -> int:
    """Adam's two moments of each weight of the share, and under DeepSpeed, but for fp32 without ZeRO, an fp32 copy of
    the weight (Rajbhandari et al. 2020, section 3.1)."""
    if run.zero and run.zero.offload_optimizer:
        return 0
    copy = run.zero is not None and (run.half or run.stage > 0)
    return share(shape, run) * FP32 * (2 + copy)


# --- What a micro-batch adds ------------------------------------------------------------------------------------------


def positions_of(run: Training, pairs: Sequence[PairLength]) -> int:
    """T: packed with the shared prefix; else rows padded to the longest, two a pair in preference optimisation."""
    if run.shared_prefix:
        return sum(pair.positions for pair in pairs)
    return run.rows * len(pairs) * max(pair.prefix + max(pair.chosen, pair.rejected) for pair in pairs)


def attention_bytes(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> int:
    """Saved by one layer's attention: queries, keys, values, output, and a logsumexp for each head and position.

    With the shared prefix its keys and values are there once for each answer; torch's attention, unlike varlen kernels,
    also has a mask for the rejected answer and joins outputs. Padded rows need no mask: they are causal.
    """
    t, b = positions_of(run, pairs), run.factor
    queries, keys, sums = t * shape.queries * b, 2 * t * shape.keys * b, t * shape.heads * FP32
    if not run.shared_prefix:
        return 2 * queries + keys + sums
    kernel = 2 * queries + keys + 2 * sum(pair.prefix for pair in pairs) * shape.keys * b + sums
    if run.varlen:
        return kernel
    masks = sum(pair.rejected * (pair.prefix + pair.rejected) for pair in pairs) * b
    return kernel + masks + queries * run.keeps_inputs


def layer_bytes(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> int:
    """Saved by one decoder layer for its backward pass (Korthikanti et al. 2022, section 4.1, for LLaMA's layer).

    Two norms, in fp32; what trained matrices multiply; attention; in the MLP silu's input and output and the other
    factor. With dropout each of LoRA's seven matrices has an input of its own, and a mask.
    """
    t, d, f = positions_of(run, pairs), shape.width, shape.intermediate
    norms = 2 * (FP32 * d + run.weight * d * (run.method == "full") + FP32)
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
    return positions_of(run, pairs) if run.logp_chunk is None else sum(p.chosen + p.rejected for p in pairs)


def picture_bytes(shape: ModelShape, run: Training, pictures: int) -> int:
    """While the frozen tower runs: every layer's output (LLaVA reads one of the last), and the MLP of one."""
    rows = min(pictures, IMAGES_AT_ONCE) * (shape.patches + 1) * run.weight
    return rows * ((shape.tower_layers + 1) * shape.tower_width + 2 * shape.tower_intermediate)


# --- The step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU: what is resident, what a micro-batch keeps, and the level that each phase of a step reaches."""

    weights: int
    optimiser: int
    gradients: int
    activations: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        """The phase that reaches the peak."""
        return max(self.phases, key=self.phases.__getitem__)


def estimate(shape: ModelShape, run: Training, pairs: Sequence[PairLength]) -> Estimate:
    """Peak of a training step whose micro-batch holds these pairs (rows, in supervised fine-tuning)."""
    weights, optimiser = weight_bytes(shape, run), optimiser_bytes(shape, run)
    level = weights + optimiser + gathered_bytes(shape, run) + gradients_before(shape, run)
    t, d = positions_of(run, pairs), shape.width
    border = t * d * run.weight  # hidden states between two layers
    layer = layer_bytes(shape, run, pairs) + HALF * shape.parameters.layer * run.autocast
    projected = shape.patches * (shape.tower_width + 2 * d) * run.factor * run.trains_projector
    below = len(pairs) * (projected + shape.pixels * FP32)
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
        "pictures": picture_bytes(shape, run, len(pairs)),
        "loss": saved + 2 * border + logits + differentiated + head * summed,
        "output layer": saved + max(logits + head * (3 if summed else 1), gradients_at(shape, run, shape.layers)),
        "layers": max(in_layer(0), in_layer(shape.layers - 1)),
    }
    phases = {name: level + size for name, size in phases.items()}
    phases["optimiser"] = weights + optimiser + optimiser_work(shape, run)
    return Estimate(weights, optimiser, gradient_bytes(shape, run), saved, phases)


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
    longest = sorted(pairs, key=lambda pair: pair.positions, reverse=True) * load.pairs
    run = replace(Training.of(arguments, ranks, cuda, load.several), **changes)
    return estimate(shape, run, longest[: load.pairs])


def gradient_bytes(shape: ModelShape, run: Training) -> int:
    """Of all trained weights at the end of the backward pass; from ZeRO-2 on of the rank's share, none on a GPU whose
    optimiser is offloaded (Rajbhandari et al. 2020, section 5.2)."""
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


def optimiser_work(shape: ModelShape, run: Training) -> int:
    """While AdamW steps: gradients, under DeepSpeed an fp32 copy of them, and beside it what is larger: the flat copy
    that this one is made of, or square roots of second moments, of all weights at a time on a GPU (none with fused
    AdamW), on a CPU twice those of one weight, which is the whole share under DeepSpeed."""
    if run.zero and run.zero.offload_optimizer:
        return 0
    mine = share(shape, run)
    flat = run.zero is not None and (run.half or run.stage > 0)
    if run.zero and run.stage == 3:
        mine = min(mine, run.zero.sub_group)
    roots = 0 if run.fused else mine if run.cuda else 2 * (mine if flat else shape.matrix)
    beside = max(FP32 * roots, mine * run.gradient * (flat and run.stage == 2))
    return gradient_bytes(shape, run) + FP32 * mine * flat + beside


# --- What one did need ------------------------------------------------------------------------------------------------


class TensorPeak:
    """Highest sum of tensors' bytes while the block runs: PyTorch's own count on a GPU, on a CPU the sum of its
    allocator's events (resident memory would count libraries, and what was freed but not given back).

    Args:
        before: tensors that exist already; a CPU's allocator does not tell.
    """

    def __init__(self, device: torch.device, before: Iterable[Tensor]) -> None:
        self.device, self.peak = device, 0
        self.before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in before}.values())
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports the GPU that is not there
        self.events = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> TensorPeak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()  # what an earlier block made would be freed in this one
            self.events.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self.events.__exit__(*error)
        recorded: Any = self.events.profiler
        changes = (event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]")
        self.peak = self.before + max(accumulate(changes), default=0)
