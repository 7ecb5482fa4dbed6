"""Preflight: what a training will meet on this machine, said before anything long starts.

`python -m dama doctor --config-of scripts/dama_7b.sh` prints a page on the flags that the script would train with;
every training begins with the short form, `preflight`.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from dama.console import report_error, say, write_json
from dama.losses import preference_loss, reward_gap
from dama.pairs import PairsError, PreferencePair, distinct_images, load_image, parse_pairs, resolve_image
from dama.shared_prefix import attention_backend
from llava.conversation import get_template
from llava.tokenization import load_tokenizer
from llava.train.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    find_faults,
    translate_flags,
)
from llava.train.checkpoints import version_of
from llava.train.dpo_data import DataCollatorForDPODataset, DPODataset, PreparedPair, common_length, encode_pair
from llava.train.memory import (
    FP32,
    ModelShape,
    TensorPeak,
    Training,
    Zero,
    estimate,
    estimate_step,
    trained_parameters,
    weight_bytes,
)
from llava.train.preprocess import preprocess, preprocess_multimodal
from llava.train.sft_data import Row, make_supervised_data_module, read_rows, supervised_settings
from llava.train.throughput import PairLength

COMMAND = "train_mem.py"
GIB = 1 << 30
RESERVE = int(1.5 * GIB)  # of a GPU: CUDA's context, the collectives' buffers, fragments
TOLERANCE = 1.15  # a training whose estimate is this much above a GPU's memory is refused
LONGEST = 64  # pairs whose lengths are looked at
PROMPT = 64  # tokens of a template with a short question
SHOWN = 3  # rows of data
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "flash_attn")
NEEDED = {"torch": (2, 11), "transformers": (5, 17)}  # at least
SHAPES = {  # of checkpoints that are named before they are downloaded
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
CLIP_NAME = "openai/clip-vit-large-patch14-336"
CLIP_SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
EPILOG = """\
Further flags go to the script, or without one to the training: python -m dama doctor --task DPO --data_path ...
"""


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


# --- The flags --------------------------------------------------------------------------------------------------------


def plan_of_script(script: str, more: Sequence[str]) -> Plan:
    """Flags, ranks and stages of the training that a script would start, from what its --dry-run prints."""
    if "--dry-run" not in text_of(Path(script)):  # it would start
        raise ValueError(f"--config-of: expected a script with --dry-run, such as scripts/dama_7b.sh, got {script!r}")
    done = subprocess.run(["bash", script, "--dry-run", *more], capture_output=True, text=True, check=False)
    commands = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    faults = done.stderr.strip().splitlines() if done.returncode else []
    training = next((words for words in commands if any(word.endswith(COMMAND) for word in words)), None)
    if training is None:
        raise ValueError("\n".join([f"--config-of {script}: expected it to call {COMMAND}, found no call", *faults]))
    start = next(i for i, word in enumerate(training) if word.endswith(COMMAND))
    stages = {words[3]: _values(words[4:]) for words in commands if words[:3] == ["python", "-m", "dama"]}
    written = [values["--out"] for values in stages.values() if "--out" in values]
    plan = plan_of_flags(training[start + 1 :], int(_values(training[:start]).get("--num_gpus", 1)), written)
    hardness = stages.get("hardness", {})
    if "--clip" in hardness and not Path(hardness["--clip"]).is_dir():
        plan.clip = hardness["--clip"], hardness.get("--pretrained", "openai")
    plan.faults += faults
    return plan


def text_of(script: Path) -> str:
    """A script's text, behind that of what it sources from its folder; empty where there is none."""
    if not script.is_file():
        return ""
    text = script.read_text()
    sourced = re.findall(r'^source .*/([\w.]+)"?$', text, re.MULTILINE)
    return "".join(text_of(script.parent / name) for name in sourced) + text


def _values(words: Sequence[str]) -> dict[str, str]:
    return {flag: value for flag, value in zip(words, words[1:]) if flag.startswith("--")}


def plan_of_flags(words: Sequence[str], ranks: int, written: Sequence[str] = ()) -> Plan:
    """From the flags of train_mem.py. Nothing is started: DeepSpeed's file is only noted.

    Args:
        written: folders that stages before the training will write.
    """
    from transformers import HfArgumentParser

    words = translate_flags(words)[0]
    values = _values(words)
    config = values.get("--deepspeed")
    cuda = values.get("--use_cpu", "false").lower() not in ("true", "1")
    if config is not None:
        at = words.index("--deepspeed")
        words = words[:at] + words[at + 2 :]
    if not torch.cuda.is_available():  # transformers would refuse bf16 before all else is said
        words = [*words, "--use_cpu", "True"]
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), prog=COMMAND)
    arguments = parser.parse_args_into_dataclasses(words)
    later = tuple(f"--{name}:" for name, folder in vars(arguments[1]).items() if folder in written)
    said_below = ("--data_path:", "--image_folder:", *later)
    faults = [fault for fault in find_faults(*arguments) if not fault.startswith(said_below)]
    arguments[2].deepspeed = config
    return Plan(arguments, ranks, cuda, faults=faults)


# --- Libraries and the machine ----------------------------------------------------------------------------------------


def look_at_libraries(plan: Plan) -> None:
    args = plan.arguments[2]
    found = {name: version_of(name) for name in LIBRARIES}
    plan.note("libraries", ", ".join([f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in found.items())]))
    for name, least in NEEDED.items():
        if tuple(int(part) for part in found[name].split("+")[0].split(".")[:2]) < least:
            plan.faults.append(
                f"{name}: expected {least[0]}.{least[1]} or newer, got {found[name]}; run scripts/setup.sh"
            )
    wanted = {"deepspeed": args.deepspeed, "peft": args.lora_enable, "bitsandbytes": args.bits < 16}
    for name, flag in wanted.items():
        if flag and found[name] == "absent":
            plan.faults.append(f"{name}: not installed, and the flags need it; run scripts/setup.sh")
    if args.deepspeed and not Path(args.deepspeed).is_file():
        plan.faults.append(f"--deepspeed: expected a JSON file such as scripts/zero2.json, got {args.deepspeed!r}")
        args.deepspeed = None


def look_at_machine(plan: Plan) -> None:
    """GPUs, cores, memory of the host, and what will compute on them."""
    found = gpus() if plan.cuda else []
    names = [f"{name} ({size(memory)})" for name, memory in found]
    plan.note("machine", ", ".join([*names, f"{os.cpu_count()} cores", f"{size(host_memory())} of memory"]))
    if plan.cuda and not found:
        plan.faults.append("GPU: none found; for a run without one see scripts/dama_tiny.sh")
    elif plan.cuda and plan.ranks > len(found):
        plan.faults.append(f"GPU: {plan.ranks} asked for, {len(found)} found; set GPUS")
    plan.note("backends", backends(plan))
    zero = Training.of(plan.arguments, plan.ranks, plan.cuda, False).zero
    if zero and (zero.offload_optimizer or not plan.cuda) and not shutil.which(os.environ.get("CXX", "g++")):
        plan.faults.append("g++: not found; DeepSpeed compiles an operation for CPUs with it (Debian: g++)")


def backends(plan: Plan) -> str:
    """What computes: attention, collectives, precision, DeepSpeed's stage."""
    args = plan.arguments[2]
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    attention = attention_backend(plan.device, torch.bfloat16 if run.half else torch.float32)
    return ", ".join([
        f"attention by {attention}{' with the prefix shared' * run.shared_prefix}",
        "nccl" if plan.cuda else "gloo",
        "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        f"DeepSpeed ZeRO-{run.stage}" if run.zero else "no DeepSpeed",
    ])  # fmt: skip


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of every GPU that this process can see."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(gpu.name, gpu.total_memory) for gpu in found]


def host_memory() -> int:
    """Bytes of memory that this host, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 1024**2:.1f} MiB"


# --- Data and model ---------------------------------------------------------------------------------------------------


def look_at_data(plan: Plan) -> list[PreferencePair] | list[Row]:
    """The pairs, with the first ones shown, or fine-tuning's rows; none where they cannot be read."""
    _, data_args, args = plan.arguments
    data, images = Path(str(data_args.data_path)), Path(str(data_args.image_folder))
    missing = []
    if not data.is_file():
        missing.append(f"data: no file '{data}'; set DATA, or --data_path, to preference pairs in JSON or JSONL")
    if not images.is_dir():
        missing.append(f"images: no folder '{images}'; set IMAGES, or --image_folder, to where image paths start")
    plan.faults += missing
    if missing:
        return []
    if args.task != "DPO":
        return look_at_rows(plan, data, images)
    try:
        pairs, faults = parse_pairs(data)
    except PairsError as error:
        pairs, faults = [], [str(error)]
    plan.faults += [f"data: {fault}" for fault in faults[:3]]
    plan.note("data", f"{len(pairs)} pairs on {len(distinct_images(pairs))} images, {len(faults)} rows with faults")
    for pair in pairs[:SHOWN]:
        try:
            width, height = load_image(resolve_image(images, pair.image)).size
            shown = f"{pair.image} {width} x {height}"
        except (ValueError, OSError) as error:
            shown = f"{pair.image}: {error}"
            if data_args.on_bad_image == "fail":
                plan.faults.append(f"images: {shown}")
        words = len(pair.chosen.split()), len(pair.rejected.split())
        plan.note("", f"{pair.id}: {shown}, {pair.question[:50]!r}, {words[0]} and {words[1]} words")
    return pairs


def look_at_rows(plan: Plan, data: Path, images: Path) -> list[Row]:
    try:
        rows = read_rows(str(data), str(images))
    except ValueError as error:
        plan.faults.append(f"data: {error}")
        return []
    plan.note("data", f"{len(rows)} conversations, {sum('image' in row for row in rows)} with a picture")
    return rows


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


def look_at_model(plan: Plan) -> ModelShape | None:
    from huggingface_hub import constants

    model_args, _, args = plan.arguments
    source = str(model_args.model_name_or_path)
    there = Path(source).is_dir() or hub_has(source)
    if not there:
        plan.faults.append(
            f"model: '{source}' is no folder, is not in the local cache, and the hub did not answer; set MODEL, or "
            "--model_name_or_path, to a LLaVA-v1.5 checkpoint folder"
        )
    if plan.clip and not has_clip_weights(*plan.clip):
        weights = ":".join(plan.clip)
        plan.faults.append(f"CLIP: the weights {weights} are not in the local cache, and the hub did not answer")
    constants.HF_HUB_OFFLINE |= not there  # what is asked below would be asked five more times, with pauses
    try:
        shape = ModelShape.of(*configs_of(model_args, args.cache_dir))
    except (OSError, ValueError) as error:
        plan.note("model", f"sizes not known ({str(error).splitlines()[0]})")
        return None
    total = shape.parameters.total(shape.layers) + shape.tower_parameters
    trained = trained_parameters(shape, Training.of(plan.arguments, plan.ranks, plan.cuda, False)).total(shape.layers)
    plan.note(
        "model",
        f"{source}: {total / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained; {shape.layers} layers "
        f"of width {shape.width}, {shape.patches} positions a picture",
    )
    return shape


def hub_has(name: str, file: str = "config.json") -> bool:
    """Whether a hub model can be had: from the local cache, or from the hub within 10 seconds."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file), str) or model_info(name, timeout=10).id is not None
    except Exception:  # any failure means the same to the user: not to be had from here
        return False


def has_clip_weights(architecture: str, tag: str) -> bool:
    """Whether open_clip's weights can be had, from the local cache or from the hub."""
    import open_clip

    name = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rstrip("/")
    return bool(name) and hub_has(name, "open_clip_config.json")


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
        both = encode_pair(pair, tokenizer, template, model_args.mm_use_im_start_end)
        if max(len(answer.input_ids) for answer in both) - 1 + patches <= args.model_max_length:
            found.append(PreparedPair(pair, *both, 0.0, 0.0, 0.0))
        if len(found) == LONGEST:
            break
    return found


def length_of(item: PreparedPair, patches: int) -> PairLength:
    shared = common_length(item)
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


def fit_micro_batch(
    arguments: Arguments, shape: ModelShape, lengths: Sequence[PairLength], ranks: int, cuda: bool, memory: int
) -> tuple[int, int] | None:
    """(per_device_train_batch_size, gradient_accumulation_steps) of the largest micro-batch that fits into `memory`
    bytes, with as many pairs in a step; None where not even single pairs fit."""
    args = arguments[2]
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    for micro_batch in range(pairs, 0, -1):
        layout = micro_batch, pairs // micro_batch
        if pairs % micro_batch:
            continue
        if estimate_step(arguments, shape, lengths, ranks, cuda, layout).peak <= memory - RESERVE * cuda:
            return layout
    return None


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
    """The estimate beside what there is; the micro-batch that fits, which --auto_micro_batch puts into the flags."""
    args = plan.arguments[2]
    there = smallest_of_all_ranks(memory_of_each(plan), plan.device)
    fitting = fit_micro_batch(plan.arguments, shape, lengths, plan.ranks, plan.cuda, there)
    if args.auto_micro_batch and fitting:
        use_layout(args, fitting)
    micro_batch, accumulation = plan.layout
    longest = max(lengths, key=lambda pair: pair.positions)
    plan.note(
        "step",
        f"{micro_batch * plan.ranks * accumulation} {'pairs' if args.task == 'DPO' else 'rows'} = {micro_batch} x "
        f"{plan.ranks} rank(s) x {accumulation} micro-batch(es), the longest of "
        f"{' + '.join(str(length) for length in astuple(longest) if length)} positions ({known})",
    )
    needed = estimate_step(plan.arguments, shape, lengths, plan.ranks, plan.cuda, plan.layout)
    unit = "GPU" if plan.cuda else "rank"
    fits = f"micro-batches of up to {fitting[0]} fit" if fitting else "not even micro-batches of 1 fit"
    plan.note(
        "memory",
        f"about {size(needed.peak)} on each {unit}, most in the phase of the {needed.highest} (weights "
        f"{size(needed.weights)}, optimiser {size(needed.optimiser)}, gradients {size(needed.gradients)}, activations "
        f"{size(needed.activations)})" + (f", of {size(there)}: {fits}" if there else ""),
    )
    if there and (needed.peak > TOLERANCE * there or (args.auto_micro_batch and not fitting)):
        smaller = f"--per_device_train_batch_size {fitting[0]}, " if fitting else ""
        plan.faults.append(
            f"{unit} memory: {size(there)} on each, about {size(needed.peak)} needed on {plan.ranks} {unit}(s); use "
            f"{smaller}--gradient_checkpointing True, more {unit}s, ZERO=scripts/zero3.json, or scripts/dama_7b_lora.sh"
        )


def look_at_host(plan: Plan, shape: ModelShape) -> None:
    """Every rank loads all weights into the host's memory, under ZeRO-3 its part; offloaded states stay there."""
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    zero = run.zero or Zero()
    needed = weight_bytes(shape, replace(run, zero=replace(zero, offload_weights=False))) * plan.ranks
    needed += zero.offload_optimizer * trained_parameters(shape, run).total(shape.layers) * 4 * FP32
    if plan.cuda and needed > host_memory():
        plan.faults.append(f"memory: {size(host_memory())} on this host, about {size(needed)} needed to load the model")


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
        plan.note("trial save", f"written, read and removed in {trial_save(folder):.2f} s")
    except (OSError, ValueError) as error:
        plan.faults.append(f"trial save: '{folder}' cannot be written to: {error}")


def trial_save(folder: Path) -> float:
    """Seconds that a small checkpoint took: weights, trainer's states, a JSON file. Nothing of it is left.

    Raises:
        OSError, ValueError: it cannot be written, or reads back differently.
    """
    from safetensors.torch import load_file, save_file

    began = time.perf_counter()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.arange(1 << 18, dtype=torch.float32)}
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as name:
            place = Path(name)
            save_file(weights, place / "model.safetensors")
            torch.save(weights, place / "optimizer.pt")
            write_json(place / "state.json", {})
            read = [load_file(place / "model.safetensors"), torch.load(place / "optimizer.pt", weights_only=True)]
            if not all(torch.equal(back["weight"], weights["weight"]) for back in read):
                raise ValueError("what was written reads back differently")
    finally:
        for place in made:
            place.rmdir()
    return time.perf_counter() - began


# --- One batch --------------------------------------------------------------------------------------------------------


def try_one_batch(plan: Plan, shape: ModelShape, items: Sequence[PreferencePair] | Sequence[Row]) -> None:
    """A micro-batch of the longest pairs or conversations, or as many as fit, forward and backward on one device."""
    from accelerate.utils import send_to_device

    from llava.train.setup_model import setup_model

    args = plan.arguments[2]
    kind = "pairs" if args.task == "DPO" else "rows"
    run = Training.of(plan.arguments, 1, plan.cuda, False)
    run = replace(run, zero=run.zero and Zero())
    lengths = lengths_of(plan.arguments, items, shape.patches)[0]

    def needed_for(count: int) -> int:
        estimated = estimate(shape, run, lengths[:count])
        phases = (level for name, level in estimated.phases.items() if name != "optimiser")
        return max(phases) - estimated.optimiser

    count = min(args.per_device_train_batch_size, len(lengths))
    while count and needed_for(count) > memory_of_each(plan) - RESERVE:
        count -= 1
    if not count:
        plan.note("one batch", f"left out: one of the {kind} needs {size(needed_for(1))}")
        return
    model, tokenizer, processor = setup_model(plan.arguments)
    model = model.to(args.device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = first_batch(plan.arguments, items, count, shape.patches, model, tokenizer, processor)
    batch = send_to_device(batch, args.device)
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    began = time.perf_counter()
    with (
        TensorPeak(args.device, [*model.parameters(), *model.buffers(), *tensors]) as used,
        torch.autocast(args.device.type, torch.bfloat16, enabled=run.half and run.zero is None),
    ):
        loss = first_loss(model, batch, args) if args.task == "DPO" else model(**batch).loss
        loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    seconds = time.perf_counter() - began
    plan.note(
        "one batch",
        f"{count} of the longest {kind} forward and backward in {seconds:.1f} s, loss {loss.item():.4f}, gradient norm "
        f"{norm:.3g}; {size(used.peak)} at the peak without optimiser, estimated {size(needed_for(count))}",
    )
    if not math.isfinite(norm):
        plan.faults.append(f"one batch: expected a finite gradient, got a norm of {norm}")


def first_batch(
    arguments: Arguments, items: Sequence[Any], count: int, patches: int, model: Any, tokenizer: Any, processor: Any
) -> dict[str, Tensor]:
    """A micro-batch of the `count` longest, as training would collate them."""
    model_args, data_args, args = arguments
    if args.task == "DPO":
        pairs = longest_items(items, arguments, tokenizer, patches)[:count]
        data = DPODataset(pairs, str(data_args.image_folder), processor, model.config)
        return DataCollatorForDPODataset(tokenizer, data, args.shared_prefix)(pairs)
    template, rows = get_template(str(model_args.version)), longest_rows(items, patches)[:count]
    settings = supervised_settings(arguments, model, processor)
    module = make_supervised_data_module(tokenizer, settings, template=template, rows=rows)
    return module["data_collator"]([*module["train_dataset"]])


def first_loss(model: Any, batch: dict[str, Tensor], args: Any) -> Tensor:
    """The DPO loss of a model that is its own reference: log 2, with the gradient of a first step."""
    sums = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["targets"],
        images=batch["images"].to(model.dtype),
        image_index=batch["image_index"],
        tails=batch.get("tails"),
        logp_chunk=args.logp_chunk,
    )
    chosen, rejected = sums.logps.chunk(2)
    R = reward_gap(chosen, rejected, chosen.detach(), rejected.detach())
    return preference_loss(R, args.dpo_beta).mean()


# --- The short form and the page --------------------------------------------------------------------------------------


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


def examine(plan: Plan) -> None:
    """Everything, one batch only if all else is there."""
    look_at_libraries(plan)
    look_at_machine(plan)
    items = look_at_data(plan)
    shape = look_at_model(plan)
    if shape is not None:
        try:
            look_at_memory(plan, shape, *lengths_of(plan.arguments, items, shape.patches))
        except ValueError as error:  # of flags that are among the faults already
            plan.note("memory", f"not estimated: {error}")
        look_at_host(plan, shape)
    look_at_disk(plan, shape, len(items))
    if shape is not None and items and not plan.faults and Path(str(plan.arguments[0].model_name_or_path)).is_dir():
        try_one_batch(plan, shape, items)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dama doctor", description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--config-of", "--config_of", metavar="SCRIPT", help="script whose training is looked at")
    parser.add_argument("--ranks", type=int, default=1, help="processes, without a script. Default: %(default)s")
    args, flags = parser.parse_known_args(argv)
    try:
        plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
        examine(plan)
    except (ValueError, OSError) as error:
        report_error(error, "dama doctor")
        return 1
    for title, text in plan.notes:
        say(f"{title:<12}{text}")
    say(fault_text(plan.faults) if plan.faults else "all there")
    return 1 if plan.faults else 0


if __name__ == "__main__":
    sys.exit(main())
