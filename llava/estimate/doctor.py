"""What a training will meet on this machine, on a page.

`python -m dama doctor --config-of scripts/dama_7b.sh` looks at the flags that the script would train with: libraries,
data, memory, disk, one batch; every training begins with the short form, llava/estimate/preflight.py.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dama import cli
from dama.console import say
from dama.images import ImageFolder, load_image, missing_folders, resolve_image
from dama.losses import preference_loss, reward_gap
from dama.pairs import PairsError, PreferencePair, distinct_images, parse_pairs
from dama.train.family import shown_images
from llava.conversation import get_template
from llava.estimate.memory import (
    FP32,
    ModelShape,
    TensorPeak,
    Training,
    Zero,
    estimate,
    trained_parameters,
    weight_bytes,
)
from llava.estimate.preflight import (
    GIB,
    Plan,
    backends,
    configs_of,
    fault_text,
    gpus,
    host_memory,
    lengths_of,
    longest_items,
    longest_rows,
    look_at_disk,
    look_at_memory,
    memory_of_each,
    reserved,
    size,
    why_no_gpu,
)
from llava.train.arguments import (
    Arguments,
    dataclasses_of,
    find_faults,
    translate_flags,
)
from llava.train.checkpoints import version_of
from llava.train.dpo_data import DPODataset, PairCollator
from llava.train.family import ImagePreparation
from llava.train.sft_data import Row, make_supervised_data_module, read_rows, supervised_settings

COMMAND = "train_mem.py"
SHOWN = 3  # rows of data
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "flash_attn")
NEEDED = {"torch": (2, 11), "transformers": (5, 17)}  # at least


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
    plan = plan_of_flags(training[start + 1 :], ranks_of(training[:start]), written)
    hardness = stages.get("hardness", {})
    if "--clip" in hardness and not Path(hardness["--clip"]).is_dir():
        plan.clip = hardness["--clip"], hardness.get("--pretrained", "openai")
    plan.faults += faults
    return plan


def ranks_of(launcher: Sequence[str]) -> int:
    """Processes that a deepspeed command starts on this machine."""
    options = _values(launcher)
    if "--include" in options:
        return len(options["--include"].partition(":")[2].split(","))
    return int(options.get("--num_gpus", 1))


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
    words = translate_flags(words)[0]
    values = _values(words)
    config = values.get("--deepspeed")
    cuda = values.get("--use_cpu", "false").lower() not in ("true", "1")
    if config is not None:
        at = words.index("--deepspeed")
        words = words[:at] + words[at + 2 :]
    if not torch.cuda.is_available():  # transformers would refuse bf16 before all else is said
        optimizer = ["--optim", "adamw_torch_fused"] * (cuda and "--optim" not in words)  # as on a GPU
        words = [*words, *optimizer, "--use_cpu", "True"]
    arguments = dataclasses_of(words)
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
        plan.faults.append(f"GPU: {why_no_gpu()}")
    elif plan.cuda and plan.ranks > len(found):
        plan.faults.append(f"GPU: {plan.ranks} asked for, {len(found)} found; set GPUS")
    plan.note("backends", backends(plan))
    zero = Training.of(plan.arguments, plan.ranks, plan.cuda, False).zero
    if zero and (zero.offload_optimizer or not plan.cuda) and not shutil.which(os.environ.get("CXX", "g++")):
        plan.faults.append("g++: not found; DeepSpeed compiles an operation for CPUs with it (Debian: g++)")


# --- Data and model ---------------------------------------------------------------------------------------------------


def look_at_data(plan: Plan) -> list[PreferencePair] | list[Row]:
    """The pairs, with the first ones shown, or fine-tuning's rows; none where they cannot be read."""
    _, data_args, args = plan.arguments
    data, images = Path(str(data_args.data_path)), data_args.image_folder or ["None"]
    missing = []
    if not data.is_file():
        missing.append(f"data: no file '{data}'; set DATA, or --data_path, to preference pairs in JSON or JSONL")
    missing += [
        f"images: no folder '{folder}'; set IMAGES, or --image_folder, to where image paths start"
        for folder in missing_folders(images)
    ]
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


def look_at_rows(plan: Plan, data: Path, images: ImageFolder) -> list[Row]:
    model_args, data_args, _ = plan.arguments
    try:
        template = get_template(str(model_args.version))
        rows = read_rows(str(data), images, data_args.on_bad_image, template=template)
    except ValueError as error:
        plan.faults.append(f"data: {error}")
        return []
    plan.note("data", f"{len(rows)} conversations, {sum('image' in row for row in rows)} with a picture")
    return rows


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


def look_at_host(plan: Plan, shape: ModelShape) -> None:
    """Every rank loads all weights into the host's memory, under ZeRO-3 its part; offloaded states stay there."""
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    zero = run.zero or Zero()
    needed = weight_bytes(shape, replace(run, zero=replace(zero, offload_weights=False))) * plan.ranks
    needed += zero.offload_optimizer * trained_parameters(shape, run).total(shape.layers) * 4 * FP32
    if plan.cuda and needed > host_memory():
        plan.faults.append(f"memory: {size(host_memory())} on this host, about {size(needed)} needed to load the model")


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
    while count and reserved(needed_for(count), plan.cuda, args.gradient_checkpointing) > memory_of_each(plan):
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
        data = DPODataset(pairs, data_args.image_folder or [], ImagePreparation(processor, model.config))
        images = torch.stack([data.pixels(image) for image in shown_images(pairs)])
        return PairCollator(patches, args.shared_prefix)(pairs) | {"images": images}
    template, rows = get_template(str(model_args.version)), longest_rows(items, patches)[:count]
    settings = supervised_settings(arguments, model, processor)
    module = make_supervised_data_module(tokenizer, settings, template=template, rows=rows)
    return module["data_collator"]([*module["train_dataset"]])


def first_loss(model: Any, batch: dict[str, Tensor], args: Any) -> Tensor:
    """The DPO loss of a model that is its own reference: log 2, with the gradient of a first step."""
    sums = model(**batch, logp_chunk=args.logp_chunk)
    chosen, rejected = sums.logps.chunk(2)
    R = reward_gap(chosen, rejected, chosen.detach(), rejected.detach())
    return preference_loss(R, args.dpo_beta).mean()


# --- The page ---------------------------------------------------------------------------------------------------------


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


def rehearse(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Starts the rehearsal in a process of its own; its exit status, 1 where memory runs out."""
    from llava.rehearsal.launch import GIB as CARD
    from llava.rehearsal.launch import environment

    plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
    smallest = min((memory for _, memory in gpus()), default=0) / GIB
    words = ["--config-of", args.config_of, *flags] if args.config_of else flags
    command = [sys.executable, "-m", "llava.rehearsal.training", str(plan.ranks), *words]
    return subprocess.run(command, env=environment(args.gpu_memory or smallest or CARD), check=False).returncode


def run_doctor(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Print the page; 1 if something is missing. `flags` go to the script, or to training."""
    if args.rehearse:
        return rehearse(args, flags)
    plan = plan_of_script(args.config_of, flags) if args.config_of else plan_of_flags(flags, args.ranks)
    examine(plan)
    for title, text in plan.notes:
        say(f"{title:<12}{text}")
    say(fault_text(plan.faults) if plan.faults else "all there")
    return 1 if plan.faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `python -m dama doctor` with these words."""
    return cli.main(["doctor", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
