"""Preflight: what a training will need on this machine, said before anything long starts.

`preflight` begins every training; llava/estimate/doctor.py puts the same and more on a page.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.console import say, write_json, writing
from dama.pairs import PreferencePair
from dama.shared_prefix import TORCH_VARLEN, attention_backend, flash_attn_problem
from dama.train.data import ImageChoice
from dama.train.family import PreparedPair, common_length
from dama.train.throughput import PairLength
from llava.conversation import get_template
from llava.estimate.memory import FP32, ModelShape, Training, Zero, estimate_step, trained_parameters
from llava.tokenization import load_tokenizer
from llava.train.arguments import Arguments
from llava.train.dpo_data import encode_pair
from llava.train.preprocess import preprocess, preprocess_multimodal
from llava.train.sft_data import Row

GIB = 1 << 30
CONTEXT = int(1.5 * GIB)  # of a GPU: CUDA's context and the collectives' buffers
# Share of the peak by which torch's allocator reserves more than tensors need, with and without gradient checkpointing,
# as rehearsed for the 7B and 13B scripts (docs/hardware.md).
FRAGMENTS = {True: 0.13, False: 0.27}
ENOUGH = 4  # pairs in a micro-batch: more are hardly faster
LONGEST = 64  # pairs whose lengths are looked at
PROMPT = 64  # tokens of a template with a short question
SHAPES = {  # of checkpoints that are named before they are downloaded
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
OLDEST_DRIVER = {12: 525, 13: 580}  # of NVIDIA's, by CUDA's major version (CUDA toolkit release notes)
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}  # of the trial save's miniature
CLIP_NAME = "openai/clip-vit-large-patch14-336"
CLIP_SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


@dataclass
class Plan:
    """A training that is to be started, and what has been found out about it."""

    arguments: Arguments
    ranks: int
    cuda: bool  # meant for GPUs, whether there are any or not
    clip: tuple[str, str] | None = None  # open_clip's architecture and weights, which the hardness stage will fetch
    notes: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def note(self, title: str, text: str) -> None:
        self.notes.append((title, text))

    @property
    def layout(self) -> tuple[int, int]:
        args = self.arguments[2]
        return args.per_device_train_batch_size, args.gradient_accumulation_steps

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda and torch.cuda.is_available() else "cpu")


# --- The machine and the model ----------------------------------------------------------------------------------------


def backends(plan: Plan) -> str:
    """What computes: attention, collectives, precision, DeepSpeed's stage."""
    args = plan.arguments[2]
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    attention = attention_backend(plan.device, torch.bfloat16 if run.half else torch.float32)
    problem = flash_attn_problem() or ""
    unusable = f" (flash_attn {problem})" if attention == TORCH_VARLEN and problem.startswith("installed") else ""
    return ", ".join([
        f"attention by {attention}{unusable}{' with the prefix shared' * run.shared_prefix}",
        "nccl" if plan.cuda else "gloo",
        "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        f"DeepSpeed ZeRO-{run.stage}" if run.zero else "no DeepSpeed",
    ])  # fmt: skip


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of every GPU that this process can see."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(gpu.name, gpu.total_memory) for gpu in found]


def why_no_gpu() -> str:
    """What keeps torch from the GPUs of this machine, and what helps; 'none found' where there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA build; run scripts/setup.sh"
    driver = driver_version()
    if driver is None:
        return "none found; for a run without one see scripts/dama_tiny.sh"
    needed = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]))
    if needed and int(driver.partition(".")[0]) < needed:
        return (
            f"the NVIDIA driver is {driver}, torch {torch.__version__} for CUDA {torch.version.cuda} needs {needed} or "
            "newer; update the driver, or set TORCH_INDEX_URL to PyTorch's wheels for an older CUDA (such as cu126, "
            "for drivers from 525) and run scripts/setup.sh again"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"none visible with CUDA_VISIBLE_DEVICES={visible!r}; nvidia-smi finds driver {driver}"
    return f"torch {torch.__version__} finds none, nvidia-smi finds driver {driver}; see `nvidia-smi` and `dmesg`"


def driver_version() -> str | None:
    """Of NVIDIA's driver, such as '580.65.06'; None where nvidia-smi finds no GPU."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.strip().splitlines()[:1]
    return first[0].strip() if first and first[0].strip()[:1].isdigit() else None


def host_memory() -> int:
    """Bytes of memory that this host, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 1024**2:.1f} MiB"


def configs_of(model_args: Any, cache_dir: str | None = None) -> tuple[Any, Any]:
    """(LlavaConfig as training will set it up, CLIPVisionConfig).

    Of a checkpoint that is not at hand by its name: LLaVA-v1.5's of 7 and 13 billion parameters are known.
    """
    from transformers import CLIPVisionConfig

    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.multimodal_encoder.builder import locate_vision_tower

    source = str(model_args.model_name_or_path)
    try:
        config = LlavaConfig.from_pretrained(source, cache_dir=cache_dir)
    except OSError as error:
        known = [sizes for name, sizes in SHAPES.items() if f"-{name}" in source.lower()]
        if not known:
            raise OSError(f"'{source}': no config.json at hand, and no sizes known by this name") from error
        config = LlavaConfig(vocab_size=32000, mm_vision_tower=CLIP_NAME, mm_projector_type="mlp2x_gelu", **known[-1])
    for name in ("mm_projector_type", "mm_vision_select_feature", "mm_patch_merge_type"):
        setattr(config, name, getattr(model_args, name) or getattr(config, name, None))
    config.mm_projector_type = config.mm_projector_type or "linear"
    config.mm_vision_tower = model_args.vision_tower or getattr(config, "mm_vision_tower", None)
    if config.mm_vision_tower is None:
        raise ValueError(f"'{source}': names no vision tower; give one with --vision_tower")
    try:
        tower = CLIPVisionConfig.from_pretrained(locate_vision_tower(config.mm_vision_tower, source))
    except OSError:
        if not str(config.mm_vision_tower).endswith(CLIP_NAME.partition("/")[2]):
            raise
        tower = CLIPVisionConfig(**CLIP_SHAPE)
    config.mm_vision_select_layer, config.mm_hidden_size = -2, tower.hidden_size  # any layer is as large
    return config, tower


# --- Lengths ----------------------------------------------------------------------------------------------------------


def lengths_of(
    arguments: Arguments, items: Sequence[PreferencePair] | Sequence[Row], patches: int
) -> tuple[list[PairLength], str]:
    """(lengths of about the longest pairs, or rows of fine-tuning, that training does not leave out; how known).

    Without data the longest that --model_max_length allows.
    """
    model_args, _, args = arguments
    limit = args.model_max_length
    try:
        tokenizer = load_tokenizer(str(model_args.model_name_or_path), model_max_length=limit, padding_side="right")
    except (OSError, ValueError):
        tokenizer = None
    if args.task == "DPO":
        pairs = cast("Sequence[PreferencePair]", items)
        if pairs and tokenizer:
            longest = [length_of(item, patches) for item in longest_items(pairs, arguments, tokenizer, patches)]
            if longest:
                return longest, "tokenised"
        if pairs:
            return [guessed_length(pair, patches) for pair in pairs], "a token for 3 characters"
    elif items and tokenizer:
        rows = longest_rows(cast("Sequence[Row]", items), patches)
        return [row_length(row, arguments, tokenizer, patches) for row in rows], "tokenised"
    answer = max(1, limit - patches - PROMPT)
    return [PairLength(patches + PROMPT, answer, answer * (args.task == "DPO"))], "--model_max_length"


def guessed_length(pair: PreferencePair, patches: int) -> PairLength:
    return PairLength(patches + PROMPT + len(pair.question) // 3, len(pair.chosen) // 3, len(pair.rejected) // 3)


def longest_items(
    pairs: Sequence[PreferencePair], arguments: Arguments, tokenizer: Any, patches: int
) -> list[PreparedPair]:
    """About the longest pairs that fit into --model_max_length, without figures: tokenised in the order of their
    characters until there are enough."""
    model_args, _, args = arguments
    template, found = get_template(str(model_args.version)), []
    for pair in sorted(pairs, key=lambda p: -len(p.question + p.chosen + p.rejected)):
        both = encode_pair(pair, tokenizer, template, bool(model_args.mm_use_im_start_end))
        if max(len(answer.input_ids) for answer in both) - 1 + patches <= args.model_max_length:
            found.append(PreparedPair(pair, both, ImageChoice().images(pair)))
        if len(found) == LONGEST:
            break
    return found


def length_of(item: PreparedPair, patches: int) -> PairLength:
    shared = common_length(item.rows)
    chosen, rejected = (len(answer.input_ids) - shared for answer in (item.chosen, item.rejected))
    return PairLength(shared - 1 + patches, chosen, rejected)


def longest_rows(rows: Sequence[Row], patches: int) -> list[Row]:
    """About the longest conversations, by their characters."""
    return sorted(rows, key=lambda row: -(patches * ("image" in row) + len(words_of(row)) / 4))[:LONGEST]


def row_length(row: Row, arguments: Arguments, tokenizer: Any, patches: int) -> PairLength:
    """What goes over --model_max_length is cut in training, the picture's positions put in afterwards."""
    model_args, data_args, args = arguments
    source, template = copy.deepcopy(row["conversations"]), get_template(str(model_args.version))
    if has_image := "image" in row:
        flags = SimpleNamespace(
            is_multimodal=data_args.is_multimodal, mm_use_im_start_end=model_args.mm_use_im_start_end
        )
        (source,) = preprocess_multimodal([source], flags)
    (ids,) = preprocess([source], tokenizer, has_image=has_image, template=template)["input_ids"]
    positions = min(len(ids), args.model_max_length) + has_image * (patches - 1)
    return PairLength(min(positions, args.model_max_length), 0, 0)


def words_of(row: Row) -> str:
    return " ".join(str(turn["value"]) for turn in row["conversations"])


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory_of_each(plan: Plan) -> int:
    """Bytes of the smallest of the GPUs that this process can see, or a rank's part of the host's memory."""
    if not plan.cuda:
        return host_memory() // plan.ranks
    return min((memory for _, memory in gpus()[: plan.ranks]), default=0)


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
    """(per_device_train_batch_size, gradient_accumulation_steps) of the largest micro-batch that fits into `memory`
    bytes, with as many pairs in a step; None where not even single pairs fit.

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


def settle_memory(plan: Plan, shape: ModelShape, lengths: Sequence[PairLength], memory: int) -> None:
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
        use_layout(args, with_it)


def use_layout(args: Any, layout: tuple[int, int]) -> None:
    """Changes the flags, and in a run under DeepSpeed its configuration, which transformers filled in from them."""
    args.per_device_train_batch_size, args.gradient_accumulation_steps = layout
    if getattr(args, "hf_deepspeed_config", None) is not None:
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)


def look_at_memory(plan: Plan, shape: ModelShape, lengths: Sequence[PairLength], known: str) -> None:
    """The estimate beside what there is; `settle_memory` chooses what the flags leave to it."""
    args = plan.arguments[2]
    there = smallest_of_all_ranks(memory_of_each(plan), plan.device)
    settle_memory(plan, shape, lengths, there)
    fitting = fit_micro_batch(plan.arguments, shape, lengths, plan.ranks, plan.cuda, there)
    micro_batch, accumulation = plan.layout
    longest = max(lengths, key=lambda pair: pair.positions)
    plan.note(
        "step",
        f"{micro_batch * plan.ranks * accumulation} {'pairs' if args.task == 'DPO' else 'rows'} = {micro_batch} x "
        f"{plan.ranks} rank(s) x {accumulation} micro-batch(es), the longest of "
        f"{' + '.join(str(length) for length in astuple(longest) if length)} positions ({known})",
    )
    needed = estimate_step(plan.arguments, shape, lengths, plan.ranks, plan.cuda, plan.layout)
    taken = reserved(needed.peak, plan.cuda, args.gradient_checkpointing)
    unit = "GPU" if plan.cuda else "rank"
    fits = f"micro-batches of up to {fitting[0]} fit" if fitting else "not even micro-batches of 1 fit"
    plan.note(
        "memory",
        f"about {size(needed.peak)} on each {unit}{f', {size(taken)} reserved' * plan.cuda}, most in the phase of the "
        f"{needed.highest} (weights {size(needed.weights)}, optimiser {size(needed.optimiser)}, gradients "
        f"{size(needed.gradients)}, activations {size(needed.activations)}"
        f"{', recomputed' * args.gradient_checkpointing})" + (f", of {size(there)}: {fits}" if there else ""),
    )
    if there and taken > there and args.check_memory:
        plan.faults.append(
            f"{unit} memory: {size(there)} on each, about {size(taken)} needed on {plan.ranks} {unit}(s) "
            f"({size(needed.peak)} of tensors); use {'; or '.join(remedies(plan, shape, lengths, there))}; or "
            "--check_memory False to try all the same"
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
    """Those whose longer answer fits into `limit` positions with its prefix."""
    return [pair for pair in lengths if pair.prefix + max(pair.chosen, pair.rejected) <= limit]


# --- Disk -------------------------------------------------------------------------------------------------------------


def checkpoint_bytes(shape: ModelShape, run: Training) -> tuple[int, int]:
    """(a checkpoint, the final model) on disk.

    The model without its frozen tower, or what was trained of it; Adam's moments; under DeepSpeed fp32 copies of the
    trained weights too, and the model once more as the engine holds it.
    """
    trained, layers = trained_parameters(shape, run), shape.layers
    adapters = layers * trained.layer * run.adapter + trained.projector * run.weight
    model = shape.parameters.total(layers) * run.weight if run.method == "full" else adapters
    states = trained.total(layers) * FP32 * (3 if run.zero and (run.half or run.stage) else 2)
    whole = (shape.parameters.total(layers) + shape.tower_parameters) * run.weight
    engine = 0 if run.zero is None else adapters if run.method == "lora" else whole
    return model + states + engine, model


def checkpoints_at_a_time(args: Any, steps: float) -> int:
    """Those that are kept, the best of them beside the last, and the one that is being written."""
    saves = {"no": 0, "steps": steps / max(1, args.save_steps)}.get(args.save_strategy.value, args.num_train_epochs)
    best = args.metric_for_best_model is not None
    return math.ceil(min(saves, (args.save_total_limit or saves) + best + 1))


def look_at_disk(plan: Plan, shape: ModelShape | None, pairs: int) -> None:
    """Room for the checkpoints; and a small one written, read and removed."""
    args = plan.arguments[2]
    folder = Path(args.output_dir).absolute()
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(parent).free
    if shape is not None:
        each, model = checkpoint_bytes(shape, Training.of(plan.arguments, plan.ranks, plan.cuda, False))
        steps = pairs * args.num_train_epochs / (math.prod(plan.layout) * plan.ranks)
        count = checkpoints_at_a_time(args, args.max_steps if args.max_steps > 0 else steps)
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        plan.note(
            "disk",
            f"{count} checkpoint(s) of {size(each)} at a time and the model of {size(model)}; {size(free)} free at "
            f"'{parent}', {size(there)} used there already",
        )
        if free + there < (needed := count * each + model):
            plan.faults.append(
                f"disk: {size(free)} free at '{parent}', about {size(needed)} needed; set OUTPUT, or --output_dir, "
                "elsewhere, or --save_total_limit lower"
            )
    try:
        plan.note("trial save", f"written, read and removed in {trial_save(folder, plan.arguments):.2f} s")
    except (OSError, ValueError) as error:
        plan.faults.append(f"trial save: '{folder}' cannot be written to: {error}")


def trial_save(folder: Path, arguments: Arguments | None = None) -> float:
    """Seconds that a small checkpoint took: weights, trainer's states, a JSON file. Nothing of it is left.

    With `arguments` a miniature of the model that this training will save is written and loaded, too.

    Raises:
        OSError, ValueError: it cannot be written, reads back differently, or what was saved cannot be loaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    began = time.perf_counter()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.arange(1 << 18, dtype=torch.float32)}
    try:
        needed = 2 * weights["weight"].nbytes
        with (
            writing(folder, needed, RuntimeError, SafetensorError),
            tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as name,
        ):
            place = Path(name)
            save_file(weights, place / "model.safetensors")
            torch.save(weights, place / "optimizer.pt")
            write_json(place / "state.json", {})
            read = [load_file(place / "model.safetensors"), torch.load(place / "optimizer.pt", weights_only=True)]
            if not all(torch.equal(back["weight"], weights["weight"]) for back in read):
                raise ValueError("what was written reads back differently")
            if arguments is not None and not is_deepspeed_zero3_enabled():  # whose loading is collective
                load_miniature(place, arguments)
    finally:
        for place in made:
            place.rmdir()
    return time.perf_counter() - began


def load_miniature(place: Path, arguments: Arguments) -> None:
    """Save a model of width 8 with this training's flags, tokenizer and vocabulary, and load it as users will.

    Nothing is done for a checkpoint that is not at hand. Random numbers of the training are not drawn from.
    """
    from transformers import CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava.model.builder import load_pretrained_model
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model_args, _, args = arguments
    try:
        config, tower = configs_of(model_args, args.cache_dir)
        tokenizer = load_tokenizer(str(model_args.model_name_or_path))
    except OSError:
        return
    config.update(SMALL | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": SMALL["hidden_size"]})
    tower.update(SMALL)
    config.mm_vision_tower, config.mm_hidden_size = str(place / "tower"), SMALL["hidden_size"]
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        setattr(config, name, bool(getattr(model_args, name)))
    with torch.random.fork_rng(devices=[]):
        CLIPVisionModel(tower).save_pretrained(place / "tower")
        CLIPImageProcessorPil(crop_size=tower.image_size).save_pretrained(place / "tower")
        model = LlavaLlamaForCausalLM(config)
        flags = SimpleNamespace(**vars(model_args) | {"pretrain_mm_mlp_adapter": None})
        model.initialize_vision_tokenizer(flags, tokenizer)
        model.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
        load_pretrained_model(str(place / "model"), None, "trial", device="cpu")


# --- Before a training ------------------------------------------------------------------------------------------------


def preflight(arguments: Arguments, items: Sequence[PreferencePair] | Sequence[Row]) -> None:
    """Before a training loads its model: memory, disk, a trial save; two lines. Every rank calls it.

    With --auto_micro_batch it sets per_device_train_batch_size and gradient_accumulation_steps. Nothing else changes:
    no random number is drawn, and no tensor made on a GPU but the one that ranks compare.

    Raises:
        ValueError: listing what would make the training fail.
    """
    args = arguments[2]
    plan = Plan(arguments, args.world_size, args.device.type == "cuda")
    try:
        shape = ModelShape.of(*configs_of(arguments[0], args.cache_dir))
    except (OSError, ValueError) as error:
        shape = None
        plan.note("memory", f"not estimated: {str(error).splitlines()[0]}")
    if shape is not None:
        look_at_memory(plan, shape, *lengths_of(arguments, items, shape.patches))
    if args.process_index == 0:
        look_at_disk(plan, shape, len(items))
    if plan.faults:
        raise ValueError(fault_text(plan.faults))
    said = dict(plan.notes)
    say(f"preflight: {said['memory']}")
    say(f"preflight: {'; '.join([said['disk'], backends(plan)]) if 'disk' in said else backends(plan)}")


def fault_text(faults: Sequence[str]) -> str:
    return "\n  - ".join([f"{len(faults)} thing(s) missing for this training:", *faults])
