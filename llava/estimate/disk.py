"""Room on disk for checkpoints, and a small one written and read back."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.console import write_json, writing
from llava.estimate.configs import configs_of
from llava.estimate.machine import format_bytes
from llava.estimate.memory import trained_parameters
from llava.estimate.plan import Plan
from llava.estimate.sizes import FP32, ModelShape, Training
from llava.supported import is_hub_model
from llava.tokenization import load_tokenizer
from llava.train.arguments import Arguments

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}  # of the trial save's miniature


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


def check_disk(plan: Plan, shape: ModelShape | None, pairs: int) -> None:
    """Check that checkpoints have room, and that a small one can be written, read and removed.

    Args:
        pairs: training pairs, or rows of fine-tuning.
    """
    folder = Path(plan.arguments[2].output_dir).absolute()
    if shape is not None:
        check_space(plan, shape, pairs, folder)
    try:
        plan.note("trial save", f"written, read and removed in {trial_save(folder, plan.arguments):.2f} s")
    except (OSError, ValueError) as error:
        plan.errors.append(f"trial save: '{folder}' cannot be written to: {error}")


def check_space(plan: Plan, shape: ModelShape, pairs: int, folder: Path) -> None:
    """Note the checkpoints' size beside the free space; an error where it is too small."""
    args = plan.arguments[2]
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    each, model = checkpoint_bytes(shape, Training.of(plan.arguments, plan.ranks, plan.cuda, False))
    steps = pairs * args.num_train_epochs / (math.prod(plan.layout) * plan.ranks)
    count = checkpoints_at_a_time(args, args.max_steps if args.max_steps > 0 else steps)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    plan.note(
        "disk",
        f"{count} checkpoint(s) of {format_bytes(each)} at a time and the model of {format_bytes(model)}; "
        f"{format_bytes(free)} free at '{parent}', {format_bytes(used)} used there already",
    )
    if free + used < (needed := count * each + model):
        plan.errors.append(
            f"disk: {format_bytes(free)} free at '{parent}', about {format_bytes(needed)} needed; set OUTPUT, or "
            "--output_dir, elsewhere, or --save_total_limit lower"
        )


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
            if arguments is not None and has_miniature(arguments):
                load_miniature(place, arguments)
    finally:
        for place in made:
            place.rmdir()
    return time.perf_counter() - began


def has_miniature(arguments: Arguments) -> bool:
    """Whether a small model of this training's kind can be made.

    It can for LLaVA-1.5, except under ZeRO-3, whose loading is collective.
    """
    return not (is_deepspeed_zero3_enabled() or is_hub_model(arguments[0].model_name_or_path))


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
