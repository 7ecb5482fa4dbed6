"""What the memory of a training step depends on: the model's layer sizes and how it is trained.

All sizes are bytes unless they are called parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dama.shared_prefix import SDPA, attention_backend
from dama.train.steps import StepPlan
from dama.weighting import Variant

FP32, HALF = 4, 2  # bytes
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # ... 64 weights have a scale of one byte, 256 scales one of four


class LayerSizes(NamedTuple):
    """Numbers of parameters, or bytes, of a model's parts."""

    embedding: int
    projector: int
    layer: int  # of each decoder layer
    head: int  # the last norm and the output layer

    @staticmethod
    def of(sizes: Mapping[str, int]) -> LayerSizes:
        """Add up the sizes of a LLaVA's parameters by name."""

        def count(*parts: str) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(parts))

        return LayerSizes(
            count("model.embed_tokens."),
            count("model.mm_projector.", "model.image_newline"),
            count("model.layers.0."),
            count("model.norm.", "lm_head."),
        )

    def total(self, layers: int) -> int:
        """Sum over all layers."""
        return self.embedding + self.projector + layers * self.layer + self.head


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model."""

    layers: int
    width: int  # D
    queries: int  # heads x width of a head
    keys: int  # key heads x width of a head
    heads: int
    intermediate: int  # F, of the MLP
    vocabulary: int  # V
    parameters: LayerSizes
    matrix: int  # parameters of the largest matrix
    tower_parameters: int
    tower_layers: int
    tower_width: int
    tower_intermediate: int
    patches: int  # positions of an image
    pixels: int  # numbers of an image
    normed: int = 0  # numbers of a token that a layer's norms read; 0: two norms of the width
    dense_mask: bool = False  # attention by a mask of a row for each group

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
            parameters=LayerSizes.of(sizes),
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
        """Read DeepSpeed's JSON file."""
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
        """ZeRO stage; 0 without DeepSpeed."""
        return self.zero.stage if self.zero else 0

    @property
    def autocast(self) -> bool:
        """fp32 weights whose matrix products are in half precision: bf16 without DeepSpeed, all weights trained."""
        return self.half and self.zero is None and (self.method != "lora" or self.bits < 16)

    @property
    def weight(self) -> int:
        """Bytes of a weight that is not quantized."""
        return HALF if self.half and not self.autocast else FP32

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
        """Bytes of a number that comes out of a decoder layer's matrix product; quantized ones answer in fp32."""
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
        """Return the load of these TrainingArguments in another layout.

        Where pairs are selected before the first gradient, it is fewer pairs than the micro-batch has.
        """
        config = args.weighting()
        looks_ahead = accumulation > 1 or (args.lora_enable and args.lora_dropout > 0)
        if args.task != "DPO" or config.variant is Variant.RELEASED or config.is_static or not looks_ahead:
            return Load(micro_batch, accumulation > 1)
        pairs = micro_batch * ranks * accumulation
        selected = pairs if config.selects == "off" else config.count_kept(pairs)
        micro_batches = StepPlan.of(selected, ranks, micro_batch).micro_batches
        return Load(-(-selected // (ranks * micro_batches)), micro_batches > 1)
