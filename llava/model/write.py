"""Write a checkpoint in LLaVA's layout, complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dama.console import write_json
from llava.model.checkpoint import COMPUTED, EMBEDDINGS, Checkpoint
from llava.model.multimodal_encoder.builder import locate_vision_tower
from llava.model.utils import Weights, read_weights, write_weights

TOWER_FOLDER = "vision_tower"


def complete_tower(checkpoint: Checkpoint) -> tuple[CLIPVisionConfig, Weights, CLIPImageProcessorPil]:
    """The tower's config, all its weights under hub names, and the image processor, from wherever they are."""
    if not getattr(checkpoint.config, "mm_vision_tower", None):
        raise ValueError(f"'{checkpoint.config._name_or_path}': expected mm_vision_tower in config.json, got none")
    if checkpoint.tower_config is not None and checkpoint.image_processor is not None:
        return checkpoint.tower_config, checkpoint.tower, checkpoint.image_processor
    from llava.model.source import fetch

    folder = fetch(
        locate_vision_tower(checkpoint.config.mm_vision_tower, checkpoint.config._name_or_path), is_tower=True
    )
    weights = checkpoint.tower or {
        f"vision_model.{name.removeprefix('vision_model.')}": t
        for name, t in read_weights(folder).items()
        if not name.startswith(("text_model.", "text_projection", "logit_scale", "visual_projection"))
        and not COMPUTED.fullmatch(name)
    }
    return CLIPVisionConfig.from_pretrained(folder), weights, CLIPImageProcessorPil.from_pretrained(folder)


def write_llava(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> None:
    """Weights, config.json and tokenizer as LLaVA has them; the tower beside them unless a hub has the same one."""
    name = getattr(checkpoint.config, "mm_vision_tower", None)  # a language model alone has none
    name = name and locate_vision_tower(name, checkpoint.config._name_or_path)
    if checkpoint.tower or (name and Path(name).is_dir()):
        tower_config, tower, image_processor = complete_tower(checkpoint)
        (folder / TOWER_FOLDER).mkdir()
        write_weights(folder / TOWER_FOLDER, tower)
        tower_config.architectures = ["CLIPVisionModel"]
        tower_config.save_pretrained(folder / TOWER_FOLDER)
        image_processor.save_pretrained(folder / TOWER_FOLDER)
        name = TOWER_FOLDER
    write_weights(folder, checkpoint.weights)
    write_json(folder / "config.json", llava_config(checkpoint) | ({"mm_vision_tower": name} if name else {}))
    ids = {key: getattr(checkpoint.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llava_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with the names that the libraries of LLaVA's time read: torch_dtype, rope_theta, rope_scaling."""
    fields = checkpoint.config.to_diff_dict()
    rope = dict(fields.pop("rope_parameters", None) or {"rope_theta": 10000.0, "rope_type": "default"})
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    fields["rope_theta"] = theta
    fields["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    fields = {key: value for key, value in fields.items() if key not in ("dtype", "_name_or_path")}
    fields["torch_dtype"] = str(checkpoint.weights[EMBEDDINGS].dtype).removeprefix("torch.")
    return fields | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that gets its name when all went well, and is removed when not.

    Raises:
        FileExistsError: something of that name is there already, and no empty folder.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"expected a new or empty folder to write to, got '{destination}': name another")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        temporary.replace(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_space(checkpoint: Checkpoint, folder: Path) -> None:
    """Raises unless the disk has room for the weights, a new tower and some more."""
    needed = sum(t.nbytes for t in [*checkpoint.weights.values(), *checkpoint.tower.values()]) * 1.02 + 1e9 * (
        not checkpoint.tower
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"disk of '{folder}': expected {needed / 1e9:.1f} GB free for the export, got {free / 1e9:.1f}")
