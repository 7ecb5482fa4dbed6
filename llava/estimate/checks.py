"""Checks of libraries, machine, data and model, each adding notes and errors to the plan."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dama.hub import TIMEOUT_S, go_offline_without_hub
from dama.images import ImageFolder, load_image, missing_folders, resolve_image
from dama.models.chat import ChatTemplate
from dama.pairs import PairsError, PreferencePair, distinct_images, parse_pairs
from dama.train.arguments import ZERO
from dama.train.data import ImageChoice
from dama.train.provenance import version_of
from llava.conversation import get_template
from llava.estimate import machine
from llava.estimate.hub import own_processor
from llava.estimate.lengths import views_of
from llava.estimate.machine import format_bytes, gpu_problem
from llava.estimate.memory import trained_parameters, weight_bytes
from llava.estimate.plan import Plan, backends
from llava.estimate.shapes import shape_of
from llava.estimate.sizes import FP32, ModelShape, Training, Zero
from llava.supported import is_hub_model, validate_trained_model
from llava.train.arguments import Arguments
from llava.train.sft_data import Row, read_rows

SHOWN = 3  # rows of data
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "flash_attn")
NEEDED = {"torch": (2, 11), "transformers": (5, 17)}  # at least


def check_libraries(plan: Plan) -> None:
    """Note the versions of libraries; an error where one is missing or too old for the flags."""
    args = plan.arguments[2]
    found = {name: version_of(name) for name in LIBRARIES}
    plan.note("libraries", ", ".join([f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in found.items())]))
    for name, least in NEEDED.items():
        if tuple(int(part) for part in found[name].split("+")[0].split(".")[:2]) < least:
            plan.errors.append(
                f"{name}: expected {least[0]}.{least[1]} or newer, got {found[name]}; run scripts/setup.sh, or pip"
            )
    wanted = {"deepspeed": args.deepspeed, "peft": args.lora_enable, "bitsandbytes": args.bits < 16}
    for name, flag in wanted.items():
        if flag and found[name] == "absent":
            plan.errors.append(f"{name}: not installed, and the flags need it; run scripts/setup.sh, or pip")
    if args.deepspeed and not Path(args.deepspeed).is_file():
        expected = f"a JSON file such as scripts/zero2.json, or one of {', '.join(ZERO)}"
        plan.errors.append(f"--deepspeed: expected {expected}, got {args.deepspeed!r}")
        args.deepspeed = None


def check_machine(plan: Plan) -> None:
    """Note GPUs, cores and memory of the host, and what will compute on them."""
    found = machine.gpus() if plan.cuda else []
    names = [f"{name} ({format_bytes(memory)})" for name, memory in found]
    memory = f"{format_bytes(machine.host_memory())} of memory"
    plan.note("machine", ", ".join([*names, f"{os.cpu_count()} cores", memory]))
    if plan.cuda and not found:
        plan.errors.append(f"GPU: {gpu_problem()}")
    elif plan.cuda and plan.ranks > len(found):
        plan.errors.append(f"GPU: {plan.ranks} asked for, {len(found)} found; set GPUS")
    plan.note("backends", backends(plan))
    zero = Training.of(plan.arguments, plan.ranks, plan.cuda, False).zero
    if zero and (zero.offload_optimizer or not plan.cuda) and not shutil.which(os.environ.get("CXX", "g++")):
        plan.errors.append("g++: not found; DeepSpeed compiles an operation for CPUs with it (Debian: g++)")


def check_data(plan: Plan) -> list[PreferencePair] | list[Row]:
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
    plan.errors += missing
    if missing:
        return []
    if args.task != "DPO":
        return check_rows(plan, data, images)
    try:
        pairs, errors = parse_pairs(data)
    except PairsError as error:
        pairs, errors = [], [str(error)]
    plan.errors += [f"data: {error}" for error in errors[:3]]
    plan.note("data", f"{len(pairs)} pairs on {len(distinct_images(pairs))} images, {len(errors)} rows with errors")
    try:
        ImageChoice.of(pairs, views_of(args), args)
    except ValueError as error:
        plan.errors.append(f"data: {error}")
    for pair in pairs[:SHOWN]:
        try:
            widths = [load_image(resolve_image(images, name)).size for name in pair.own_images]
            named = [f"{name} {width} x {height}" for name, (width, height) in zip(pair.own_images, widths)]
            shown = ", ".join(named) or "texts alone"
        except (ValueError, OSError) as error:
            shown = f"{pair.image}: {error}"
            if data_args.on_bad_image == "fail":
                plan.errors.append(f"images: {shown}")
        words = len(pair.chosen.split()), len(pair.rejected.split())
        plan.note("", f"{pair.id}: {shown}, {pair.question[:50]!r}, {words[0]} and {words[1]} words")
    return pairs


def check_rows(plan: Plan, data: Path, images: ImageFolder) -> list[Row]:
    """Read the conversations of fine-tuning; none where they have errors."""
    model_args, data_args, _ = plan.arguments
    try:
        template = get_template(str(model_args.version))
        rows = read_rows(str(data), images, data_args.on_bad_image, template=template)
    except ValueError as error:
        plan.errors.append(f"data: {error}")
        return []
    plan.note("data", f"{len(rows)} conversations, {sum('image' in row for row in rows)} with an image")
    return rows


def check_model(plan: Plan, items: Sequence[PreferencePair] | Sequence[Row] = ()) -> ModelShape | None:
    """Check that model and CLIP weights are available, and return the model's sizes where they are known."""
    model_args, _, args = plan.arguments
    source = str(model_args.model_name_or_path)
    there = Path(source).is_dir() or hub_has(source)
    if not there:
        plan.errors.append(
            f"model: '{source}' is no folder, is not in the local cache, and the hub did not answer; set MODEL, or "
            "--model_name_or_path, to a checkpoint's folder"
        )
    elif args.task == "DPO":
        plan.errors += preference_obstacles(plan.arguments)
    if plan.clip and not has_clip_weights(*plan.clip):
        weights = ":".join(plan.clip)
        plan.errors.append(f"CLIP: the weights {weights} are not in the local cache, and the hub did not answer")
    try:
        shape = shape_of(plan.arguments, items)
    except (OSError, ValueError) as error:
        plan.note("model", f"sizes not known ({str(error).splitlines()[0]})")
        return None
    total = shape.parameters.total(shape.layers) + shape.tower_parameters
    trained = trained_parameters(shape, Training.of(plan.arguments, plan.ranks, plan.cuda, False)).total(shape.layers)
    plan.note(
        "model",
        f"{source}: {total / 1e6:,.1f} million parameters, {trained / 1e6:,.1f} million trained; {shape.layers} layers "
        f"of width {shape.width}, {shape.patches} positions an image",
    )
    return shape


def preference_obstacles(arguments: Arguments) -> list[str]:
    """What would stop preference training when it reads the model's processor."""
    source = arguments[0].model_name_or_path
    try:
        validate_trained_model(source, "--model_name_or_path")
        if is_hub_model(source):
            ChatTemplate(own_processor(arguments), arguments[0].system_prompt)
    except (OSError, ValueError) as error:
        return [f"model: {str(error).splitlines()[0]}"]
    return []


def check_host(plan: Plan, shape: ModelShape) -> None:
    """Check that the host can hold all weights once per rank (under ZeRO-3 its part) and offloaded states."""
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    zero, available = run.zero or Zero(), machine.host_memory()
    needed = weight_bytes(shape, replace(run, zero=replace(zero, offload_weights=False))) * plan.ranks
    needed += zero.offload_optimizer * trained_parameters(shape, run).total(shape.layers) * 4 * FP32
    if plan.cuda and needed > available:
        plan.errors.append(
            f"memory: {format_bytes(available)} on this host, about {format_bytes(needed)} needed to load the model"
        )


def hub_has(name: str, file: str = "config.json") -> bool:
    """Whether a hub model can be had: from the local cache, or from the hub."""
    from huggingface_hub import model_info, try_to_load_from_cache

    go_offline_without_hub(name)
    try:
        return isinstance(try_to_load_from_cache(name, file), str) or model_info(name, timeout=TIMEOUT_S).id is not None
    except Exception:  # any failure means the same to the user: not to be had from here
        return False


def has_clip_weights(architecture: str, tag: str) -> bool:
    """Whether a CLIP's weights are available, from the local cache or from the hub."""
    import open_clip

    if "/" in architecture:  # ORG/NAME, in open_clip's or in Hugging Face format
        own = architecture.startswith("hf-hub:")
        return hub_has(architecture.removeprefix("hf-hub:"), "open_clip_config.json" if own else "config.json")

    name = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rstrip("/")
    return bool(name) and hub_has(name, "open_clip_config.json")
