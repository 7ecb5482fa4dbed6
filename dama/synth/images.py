"""Step `images`: several candidate images to each prompt, from a text-to-image model; unusable ones are counted.

Seeds and guidance scales are PDS-DPO's: candidate k of prompt i is drawn with scale k and seed 1000 i + k.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dama.console import write_atomic
from dama.remote_code import remote_code_refused
from dama.stage import Record, open_stage
from dama.synth.prompts import IMAGES, Prompt, checkpoint_identity, chunks_of, prompts_digest, step_folder

GUIDANCE = (5.0, 7.0, 9.0, 11.0)
SEEDS_A_PROMPT = 1000
FORMATS = {"jpg": ("JPEG", {"quality": 95}), "png": ("PNG", {})}
FLAT = 2 / 255  # a channel that varies by less shows nothing

REFUSED = "refused by the safety checker"
NOT_FINITE = "the picture has values that are not numbers"
ONE_COLOR = "the image is of one color"
REPEATED = "the same picture as another candidate"


class Drawn(NamedTuple):
    """A image, or why there is none."""

    picture: Image.Image | None
    error: str = ""


class TextToImage(Protocol):
    """Whatever draws images from prompts."""

    def identity(self) -> Record:
        """What the images depend on besides prompt, guidance and seed, for the fingerprint."""

    def draw(self, prompts: Sequence[str], guidance: float, seeds: Sequence[int]) -> list[Drawn]:
        """A image of each prompt from its own seed, whatever else is drawn beside it."""


class DiffusersPainter:
    """Any text-to-image DiffusionPipeline by name or folder, loaded when it is first needed.

    Args:
        steps: of denoising. size: width and height in pixels, None: the model's own. device: also of the weights, which
            are float16 on a GPU and float32 on a CPU.
    """

    def __init__(self, name: str, *, steps: int = 28, size: tuple[int, int] | None = None, device: str = "cpu") -> None:
        self.name, self.steps, self.size, self.device = name, steps, size, device

    @cached_property
    def pipeline(self) -> Any:
        """Load the diffusers pipeline."""
        import torch
        from diffusers import DiffusionPipeline

        dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        with remote_code_refused(f"text-to-image {self.name}", "give a pipeline that needs no code of its own"):
            pipeline = DiffusionPipeline.from_pretrained(self.name, dtype=dtype, use_safetensors=True)
        for tokenizer in (pipeline.components.get(name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")):
            if tokenizer is not None:
                tokenizer.split_special_tokens = True  # "<|endoftext|>" in a prompt is text
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def identity(self) -> Record:
        """Identify the pipeline and its settings in the fingerprint."""
        precision = "float16" if self.device.startswith("cuda") else "float32"
        return checkpoint_identity(self.name) | {"steps": self.steps, "size": self.size, "precision": precision}

    def draw(self, prompts: Sequence[str], guidance: float, seeds: Sequence[int]) -> list[Drawn]:
        """Draw one image per prompt and seed."""
        import torch

        size = {"width": self.size[0], "height": self.size[1]} if self.size else {}
        made = self.pipeline(
            prompt=list(prompts),
            guidance_scale=guidance,
            num_inference_steps=self.steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",  # as images, values that are no numbers would turn black without a word
            **size,
        )
        refused = getattr(made, "nsfw_content_detected", None) or [False] * len(prompts)
        return [Drawn(None, REFUSED) if no else picture_of(pixels) for pixels, no in zip(made.images, refused)]


def picture_of(pixels: NDArray[Any]) -> Drawn:
    """[H, W, 3] in [0, 1] as an image."""
    if not np.isfinite(pixels).all():
        return Drawn(None, NOT_FINITE)
    return Drawn(Image.fromarray((255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)))


# --------------------------------------------------------------------------------------------------------------- step


def run_images(
    artist: TextToImage,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    guidance: Sequence[float] = GUIDANCE,
    seed: int = 0,
    batch_size: int = 4,
    suffix: str = "jpg",
    overwrite: bool = False,
) -> Record:
    """Draw a candidate for each guidance scale into out/stages/images; returns the manifest.

    A record is {id, prompt, question, candidate, guidance, seed, image, digest, fault}; `image` is null where
    there is an error. `batch_size` counts prompts drawn at once.
    """
    folder = step_folder(out, IMAGES)
    chunks = chunks_of(list(enumerate(prompts)), batch_size)
    fingerprint = {"prompts": prompts_digest(prompts), "artist": artist.identity(), "guidance": list(guidance),
                   "seed": seed, "batch_size": batch_size, "format": suffix}  # fmt: skip
    sizes = [len(chunk) * len(guidance) for chunk in chunks]
    with open_stage(folder, IMAGES, fingerprint, sizes, overwrite=overwrite) as stage:
        stage.fill(lambda number: _draw_chunk(artist, chunks[number], folder, guidance, seed, suffix), "picture")
        return stage.conclude(_summarize, {}) or {}


def _draw_chunk(
    artist: TextToImage,
    chunk: Sequence[tuple[int, Prompt]],
    folder: Path,
    guidance: Sequence[float],
    seed: int,
    suffix: str,
) -> list[Record]:
    texts = [prompt.prompt for _, prompt in chunk]
    drawn = []
    for k, scale in enumerate(guidance):
        seeds = [seed + SEEDS_A_PROMPT * index + k for index, _ in chunk]
        drawn.append(list(zip(artist.draw(texts, scale, seeds), seeds)))
    records = []
    for (_, prompt), candidates in zip(chunk, zip(*drawn)):
        taken: set[str] = set()
        for k, (one, its_seed) in enumerate(candidates):
            name = f"{prompt.id}-{k}.{suffix}"
            records.append(
                {"id": prompt.id, "prompt": prompt.prompt, "question": prompt.question, "candidate": k,
                 "guidance": guidance[k], "seed": its_seed, **_keep(one, folder / name, suffix, taken)}
            )  # fmt: skip
    return records


def _keep(drawn: Drawn, path: Path, suffix: str, taken: set[str]) -> Record:
    """Write a usable image; `taken` holds the digests of the prompt's other candidates' pixels."""
    error = drawn.error
    if drawn.picture is not None:
        picture = drawn.picture.convert("RGB")
        digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        error = ONE_COLOR if is_flat(picture) else REPEATED if digest in taken else ""
        taken.add(digest)
    if error or drawn.picture is None:
        return {"image": None, "digest": None, "fault": error or "no picture"}
    kind, options = FORMATS[suffix]
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    write_atomic(path, buffer.getvalue())
    return {"image": path.name, "digest": hashlib.sha256(buffer.getvalue()).hexdigest()[:16], "fault": ""}


def is_flat(picture: Image.Image) -> bool:
    """Black, or any other single color."""
    return all(high - low < 255 * FLAT for low, high in picture.getextrema())  # type: ignore[misc]


def _summarize(records: list[Record], _: list[Record]) -> Record:
    errors = Counter(record["fault"] for record in records if record["fault"])
    usable = len(records) - errors.total()
    return {"candidates": len(records), "usable": usable, "faults": dict(sorted(errors.items()))}
