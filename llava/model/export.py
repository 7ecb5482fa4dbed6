"""LLaVA's layout <-> llava-hf's (LlavaForConditionalGeneration), a LoRA merged on the way, checked by equal logits.

python -m llava.model.export --to hf|llava [--model-base BASE] SRC DST
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dama.console import log, report_error
from dama.notices import without_loading_bars
from llava.constants import DEFAULT_IM_START_TOKEN
from llava.conversation import get_template, image_placeholder
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model, read_checkpoint
from llava.model.write import check_space, new_folder, write_llava
from llava.model.write_hf import write_hf
from llava.supported import validate_supported_model


def export(source: str, destination: str | Path, to: str, model_base: str | None = None) -> dict[str, float]:
    """Writes the checkpoint `source` (full, LoRA or projector on a base, either layout) to a new folder.

    Args:
        to: 'hf' or 'llava'.

    Returns:
        the largest difference of a logit between source and export on one image and prompt, by image backend:
        {"pil": ..., "torchvision": ...}, the latter with `to='hf'` only.

    Raises:
        FileExistsError: the destination is not empty. OSError: the disk is too full.
        ValueError: the two do not agree; nothing is left behind then.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"--to: expected 'hf' or 'llava', got {to!r}")
    with new_folder(destination) as folder:
        checkpoint, tokenizer = read_checkpoint(source, model_base)
        check_space(checkpoint, folder)
        (write_hf if to == "hf" else write_llava)(checkpoint, tokenizer, folder)
        del checkpoint
        gc.collect()
        differences = compare(source, model_base, folder, to)
    for backend, difference in differences.items():
        log(f"largest difference of a logit, {backend} images: {difference:.3g}")
    log(f"written: {destination}")
    return differences


def compare(source: str, base: str | None, exported: Path, to: str) -> dict[str, float]:
    """Loads both, asks both the same, and refuses an export whose answer is another.

    Rounding is all that may differ: 1e-4 of the largest logit in float32, 2e-2 in half precision.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = llava_logits(source, base, device)
    if to == "hf":
        theirs = {backend: hf_logits(exported, backend, device) for backend in ("pil", "torchvision")}
    else:
        theirs = {"pil": llava_logits(str(exported), None, device)}
    shapes = {backend: tuple(logits.shape) for backend, logits in theirs.items()}
    if any(len(logits) != len(ours) for logits in theirs.values()):
        raise ValueError(f"export of '{source}': expected logits of {tuple(ours.shape)}, got {shapes}; not written")
    width = min(ours.shape[1], *(shape[1] for shape in shapes.values()))
    found = {b: (ours[:, :width].float() - x[:, :width].float()).abs().max().item() for b, x in theirs.items()}
    bound = (1e-4 if ours.dtype == torch.float32 else 2e-2) * ours.float().abs().max().item()
    if not found["pil"] <= bound:
        raise ValueError(
            f"export of '{source}': expected the same logits within {bound:.2g}, got a difference of {found['pil']:.3g}"
            "; not written. Please report it with the checkpoint's config.json."
        )
    return found


def llava_logits(source: str, base: str | None, device: str) -> Tensor:
    """[T, V] logits of this repository's model on the sample image and prompt, in the checkpoint's own precision."""
    loaded = load_pretrained_model(source, base, "", device_map={"": device}, device=device, dtype="auto")
    tokenizer, model, processor, _ = loaded
    ids = tokenizer_image_token(sample_prompt(model.config), tokenizer, return_tensors="pt")[None].to(device)
    pixels = process_images([sample_image()], processor, model.config).to(device, model.dtype)
    with torch.inference_mode():
        return model(ids, images=pixels).logits[0].cpu()


def hf_logits(folder: Path, backend: str, device: str) -> Tensor:
    """[T, V'] logits of transformers' own model and processor on the same."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    with without_loading_bars():
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map={"": device})
    processor = AutoProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False)
    start_end = DEFAULT_IM_START_TOKEN in processor.tokenizer.get_vocab()
    prompt = sample_prompt(argparse.Namespace(mm_use_im_start_end=start_end))
    inputs = processor(images=sample_image(), text=prompt, return_tensors="pt").to(device, model.dtype)
    with torch.inference_mode():
        return model(**inputs).logits[0].cpu()


def sample_prompt(config: Any) -> str:
    """Return the prompt that both layouts are compared on."""
    conversation = get_template("vicuna_v1").copy()
    image = image_placeholder(getattr(config, "mm_use_im_start_end", False))
    conversation.append_message(conversation.roles[0], f"{image}\nWhat is in this picture?")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def sample_image() -> Image.Image:
    """Stripes and a gradient, wider than high, so that padding, cropping and resizing all show."""
    width, height = 120, 70
    image = Image.new("RGB", (width, height))
    image.putdata([(2 * x, 3 * y, 255 * (x // 9 % 2)) for y in range(height) for x in range(width)])
    return image


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", choices=("hf", "llava"), required=True, help="layout of the export")
    parser.add_argument("--model-base", help="base of a LoRA or projector folder; the one it names when left out")
    parser.add_argument("source", metavar="SRC", help="checkpoint: a folder or a hub name")
    parser.add_argument("destination", metavar="DST", help="new folder")
    args = parser.parse_args(argv)
    try:
        validate_supported_model(args.source, "SRC")
        validate_supported_model(args.model_base, "--model-base")
    except ValueError as error:
        report_error(error, "export")
        sys.exit(2)
    export(args.source, args.destination, args.to, args.model_base)


if __name__ == "__main__":
    main()
