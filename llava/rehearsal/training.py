"""A training's steps on the null device: the memory of each phase, by torch's allocator and DeepSpeed's engine.

`python -m dama doctor --rehearse` starts it. Model, engine, optimizer and micro-batches have the sizes that the flags
and the data give them; weights are never read, so a 7B model takes 1 GB of this machine's memory. The process is rank 0
of as many as the training has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, is_deepspeed_zero3_enabled

from dama.console import log, report_error
from dama.losses import ViewLogps
from dama.train.setup import enable_checkpointing, precision_of_weights
from dama.train.throughput import PairLength
from dama.views import View, by_image
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.estimate.configs import configs_of
from llava.estimate.fit import check_memory
from llava.estimate.lengths import lengths_of, views_of
from llava.estimate.machine import format_bytes
from llava.estimate.plan import Plan
from llava.estimate.sizes import Load, ModelShape
from llava.model.attention import SHARED_PREFIX
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import ForwardPlan
from llava.rehearsal.engine import single_rank_world
from llava.rehearsal.mode import NullMode
from llava.train.setup_model import with_lora

STEPS = 2  # what the first step leaves behind is in the way of the second


@dataclass(frozen=True)
class Level:
    """Bytes of the device at the most during a phase, and what the allocator had taken for them."""

    phase: str
    peak: int
    reserved: int


@dataclass
class Rehearsal:
    """Results of a rehearsal.

    They are the phases in their order, waits of the host in the first micro-batch's forward pass, and the phase in
    which memory ran out.
    """

    levels: list[Level] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    ran_out_in: str | None = None

    @property
    def peak(self) -> int:
        """Highest level of all phases, in bytes."""
        return max((level.peak for level in self.levels), default=0)

    @property
    def reserved(self) -> int:
        """Most bytes that the allocator reserved."""
        return max((level.reserved for level in self.levels), default=0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a block; an out-of-memory error in it is noted and goes on."""
        torch.cuda.reset_peak_memory_stats()
        try:
            yield
        except torch.OutOfMemoryError:
            self.ran_out_in = name
            raise
        finally:
            self.levels.append(Level(name, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))


def rehearse(plan: Plan, lengths: Sequence[PairLength]) -> Rehearsal:
    """Two optimizer steps on the longest of `lengths`, as one rank of `plan.ranks`.

    Raises:
        ValueError: the flags want what the null device cannot run (quantized weights).
    """
    args, found = plan.arguments[2], Rehearsal()
    if args.bits != 16:
        raise ValueError(f"--bits {args.bits}: bitsandbytes' kernels cannot be rehearsed; see the doctor's estimate")
    load = Load.of(args, plan.ranks, *plan.layout)
    longest = (sorted(lengths, key=lambda pair: pair.tokens, reverse=True) * load.pairs)[: load.pairs]
    with NullMode() as mode, suppress(torch.OutOfMemoryError):  # `found` names the phase
        steps(plan, longest, 1 + load.several, found, mode)
    return found


def steps(plan: Plan, pairs: list[PairLength], micro_batches: int, found: Rehearsal, mode: NullMode) -> None:
    """Model, engine, and STEPS optimizer steps of so many micro-batches."""
    args = plan.arguments[2]
    with found.phase("model"):
        model = build(plan)
    with found.phase("engine"):
        trainer = WithDeepSpeed(model, args) if args.deepspeed else Alone(model, args)
    for step in range(1, STEPS + 1):
        for micro in range(1, micro_batches + 1):
            name = f"step {step}, micro-batch {micro}" if micro_batches > 1 else f"step {step}"
            with found.phase(f"{name}: images"):
                batch = random_batch(plan, pairs)
            mode.syncs.clear()
            with found.phase(f"{name}: forward"):
                loss = forward(trainer.model, batch, args)
            found.waits = found.waits or dict(mode.syncs)
            with found.phase(f"{name}: backward"):
                trainer.backward(loss, micro == micro_batches)
            del loss, batch
        with found.phase(f"step {step}: optimizer"):
            trainer.step()


# --- Model and micro-batches -----------------------------------------------------------------------------------------


def build(plan: Plan, dtype: torch.dtype | None = None) -> Any:
    """The model as setup_model makes it, without a checkpoint: random weights, made on the device.

    Args:
        dtype: precision of the weights, if another than training would choose.
    """
    model_args, _, args = plan.arguments
    config, tower_config = configs_of(model_args, args.cache_dir)
    config._attn_implementation = SHARED_PREFIX
    dtype = dtype or precision_of_weights(args)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
    with torch.device("cuda", 0), torch.no_grad(), zero_init(args):
        model = of_type(dtype, lambda: LlavaLlamaForCausalLM(config))
        tower = CLIPVisionTower("", config, delay_load=True)
        tower.vision_tower = of_type(half, lambda: CLIPVisionModel(tower_config)).requires_grad_(False)
        tower.is_loaded = True
        projector = of_type(dtype, lambda: build_vision_projector(config))
        if args.bits == 4:
            quantize(model.model.layers, args)
    llava = model
    llava.float32_logits = args.float32_logits
    llava.config.use_cache = False
    if args.lora_enable:  # before the tower is there, or its layers would get adapters too
        del llava.model.mm_projector
        model = with_lora(model, args)
    llava.model.vision_tower, llava.model.mm_projector = tower, projector.requires_grad_(True)
    freeze(llava, plan.arguments)
    if args.gradient_checkpointing:
        llava.enable_input_require_grads()
        enable_checkpointing(model, args.gradient_checkpointing_kwargs)
    return model.train()


def quantize(layers: torch.nn.Module, args: Any) -> None:
    """Put linear layers of 4 bits in the place of all linear layers, as `--bits 4` loads a checkpoint."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    compute = torch.bfloat16 if args.bf16 else torch.float16
    stored = {"quant_type": args.quant_type, "compress_statistics": args.double_quant}
    for parent in [*layers.modules()]:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, torch.nn.Linear):
                bias = layer.bias is not None
                small = Linear4bit(layer.in_features, layer.out_features, bias, compute, device="meta", **stored)
                small.weight = Params4bit(layer.weight.data, requires_grad=False, module=small, **stored)
                setattr(parent, name, small.to(layer.weight.device))


def of_type(dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """Make something under a default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def zero_init(args: Any) -> Any:
    """Under ZeRO-3 weights are spread over the ranks as they are made."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    deepspeed.init_distributed()  # which finds the fake process group
    return deepspeed.zero.Init(config_dict_or_path=args.hf_deepspeed_config.config)


def freeze(llava: Any, arguments: Any) -> None:
    """What the flags do not train."""
    model_args, _, args = arguments
    if model_args.freeze_backbone:
        llava.model.requires_grad_(False)
        llava.model.mm_projector.requires_grad_(True)
    if model_args.tune_mm_mlp_adapter:
        llava.requires_grad_(False)
        llava.model.mm_projector.requires_grad_(True)
    if args.freeze_mm_mlp_adapter:
        llava.model.mm_projector.requires_grad_(False)


def random_batch(plan: Plan, pairs: Sequence[PairLength]) -> dict[str, Any]:
    """A micro-batch of these lengths on the device, each group of views with an image of its own."""
    model_args, _, args = plan.arguments
    config, tower = configs_of(model_args, args.cache_dir)
    patches, dpo = (tower.image_size // tower.patch_size) ** 2, args.task == "DPO"
    generator = torch.Generator().manual_seed(0)
    groups = [group for pair in pairs for group in pair.groups]

    def row_of(prefix: int, answer: int) -> tuple[Tensor, Tensor]:
        row = torch.randint(3, config.vocab_size - 1, (prefix + answer - patches + 1,), generator=generator)
        row[1] = IMAGE_TOKEN_INDEX
        target = row.clone()
        target[: prefix - patches + 1 if dpo else 2] = IGNORE_INDEX
        return row, target

    lengths = [patches] * len(groups)
    if dpo and args.shared_prefix:
        ids, labels = zip(*(row_of(group.prefix, sum(group.answers)) for group in groups))
        images = [[number] for number in range(len(groups))]
        tails, owners = [group.answers for group in groups], owners_of(len(pairs), views_of(args))
        forward_plan = ForwardPlan.of_groups(ids, labels, images, lengths, tails, owners)
    else:
        rows = [(i, group.prefix, answer) for i, group in enumerate(groups) for answer in group.answers or (0,)]
        ids, labels = zip(*(row_of(prefix, answer) for _, prefix, answer in rows))
        forward_plan = ForwardPlan.of_rows(ids, labels, [[number] for number, _, _ in rows], lengths)
    side = tower.image_size
    pixels = torch.randn(len(groups), 3, side, side, generator=generator).pin_memory()
    device = torch.device("cuda", 0)
    return {"plan": forward_plan.to(device), "images": pixels.to(device, non_blocking=True)}


def owners_of(pairs: int, views: Sequence[View]) -> list[int]:
    """The row of the log-probs of every answer in the order of `PackedRows`: view x pairs + pair."""
    return [view * pairs + pair for pair in range(pairs) for group in by_image(views) for view in group]


def forward(model: Any, batch: dict[str, Any], args: Any) -> Tensor:
    """The loss: of pairs the flags' objective against a reference of zeros, of rows the model's own."""
    if args.task != "DPO":
        return model(**batch).loss
    sums, loss = model(**batch, logp_chunk=args.logp_chunk), args.preference_loss()
    policy, tokens = (values.view(len(loss.views), -1) for values in sums)
    logps = ViewLogps(loss.views, policy, torch.zeros_like(policy), tokens)
    return loss(logps, torch.full_like(policy[0], args.dpo_beta)).mean()


# --- What trains it --------------------------------------------------------------------------------------------------


def optimizer_of(model: Any, args: Any) -> Any:
    """AdamW as the flags name it, over groups with and without weight decay."""
    from transformers import Trainer

    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrices]} for matrices in (True, False)]
    return cls([group for group in groups if group["params"]], **options)


class Alone:
    """One process without DeepSpeed, in half precision under autocast where weights are in fp32."""

    def __init__(self, model: Any, args: Any) -> None:
        half = args.bf16 or args.fp16
        self.autocast = torch.autocast("cuda", torch.bfloat16 if args.bf16 else torch.float16, enabled=half)
        self.module, self.optimizer = model, optimizer_of(model, args)

    def model(self, **batch: Any) -> Any:
        """Run the forward pass."""
        with self.autocast:
            return self.module(**batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass; `last` ends the accumulation."""
        loss.backward()

    def step(self) -> None:
        """Run the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class WithDeepSpeed:
    """DeepSpeed's own engine, its configuration filled in from the flags as transformers does."""

    def __init__(self, model: Any, args: Any) -> None:
        import deepspeed

        args.hf_deepspeed_config.trainer_config_finalize(args, model, 1000)
        config = args.hf_deepspeed_config.config
        config["gradient_accumulation_steps"], config["train_batch_size"] = 1, config["train_micro_batch_size_per_gpu"]
        config["train_batch_size"] *= args.world_size
        offloaded = "offload_optimizer" in config["zero_optimization"]
        optimizer = None if offloaded else optimizer_of(model, args)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass; `last` ends the accumulation."""
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Run the optimizer."""
        self.model.step()


# --- The page --------------------------------------------------------------------------------------------------------


def describe(found: Rehearsal, memory: int) -> None:
    """Phases with their peaks, and whether the device had enough."""
    log(f"{'phase':<28}{'peak':>12}{'reserved':>12}")
    for level in found.levels:
        log(f"{level.phase:<28}{format_bytes(level.peak):>12}{format_bytes(level.reserved):>12}")
    waits = sum(found.waits.values())
    log(f"host-device synchronizations in the forward pass: {waits}")
    for site, count in found.waits.items():
        log(f"  {count} x {site}")
    if found.ran_out_in:
        log(f"out of memory in {found.ran_out_in}: {format_bytes(memory)} do not suffice")
    else:
        reserved = format_bytes(found.reserved)
        log(f"fits into {format_bytes(memory)}: {reserved} reserved at the most, beside the driver's own")


def planned(words: Sequence[str], ranks: int) -> tuple[Plan, list[PairLength]]:
    """The training of a script (`--config-of SCRIPT FLAGS`) or of flags, and the lengths of its data."""
    from llava.estimate.checks import check_data
    from llava.estimate.flags import plan_of_flags, plan_of_script

    script = words[1] if words[:1] == ["--config-of"] else None
    plan = plan_of_script(script, words[2:]) if script else plan_of_flags(words, ranks)
    args = plan.arguments[2]
    shape = ModelShape.of(*configs_of(plan.arguments[0], args.cache_dir))
    lengths, known = lengths_of(plan.arguments, check_data(plan), shape.patches)
    check_memory(plan, shape, lengths, known)
    if args.deepspeed:
        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
    return plan, lengths


def main(argv: Sequence[str]) -> int:
    """In a process on the null device: RANKS, and what `planned` takes."""
    ranks, words = int(argv[0]), list(argv[1:])
    with single_rank_world(ranks):
        try:
            plan, lengths = planned(words, ranks)
            found = rehearse(plan, lengths)
        except (ValueError, OSError) as error:
            report_error(error, "dama doctor --rehearse")
            return 2
    for title, text in plan.notes:
        if title in ("step", "memory"):
            log(f"{title:<12}{text}")
    describe(found, torch.cuda.get_device_properties(0).total_memory)
    return 1 if found.ran_out_in else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
