"""A CLIP or SigLIP in Hugging Face format: images and statements through its own processor and feature functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dama.console import digest_of
from dama.hardness.clip import PRECISIONS, ClipError, ClipScorer, TextTokens, weights_digest
from dama.hub import go_offline_without_hub
from dama.remote_code import remote_code_refused

CONFIG_NAME = "config.json"
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")
PROBES = ("A cat.", "Two dogs on the grass, a kite and 3 people.")
SAME = 1e-4  # cosine distance of features of one text that padding does not change, in float32


@dataclass(frozen=True)
class HubTokens(TextTokens):
    """The tokenizer of such a model; in a text the spelling of a special token is text."""

    def ids(self, text: str) -> list[int]:
        """Token ids with what the tokenizer adds, of any length."""
        return list(self.tokenizer(text, truncation=False, split_special_tokens=True, verbose=False).input_ids)

    def batch(self, texts: Sequence[str], rows: Sequence[list[int]]) -> Any:
        """{name: [B, context]} as the tokenizer pads to the context, its attention mask included where it gives one."""
        rows_of = {"input_ids": [list(row) for row in rows]}
        return dict(self.tokenizer.pad(rows_of, "max_length", self.context_length, return_tensors="pt"))


@dataclass(frozen=True)
class HubPixels:
    """One RGB image as the model's processor prepares it: {name: tensor}.

    Its image processor alone may do otherwise: SigLIP 2's number of patches is a default of the whole.
    """

    processor: Any

    def __call__(self, image: Any) -> dict[str, Tensor]:
        """Without the batch dimension."""
        return {name: value[0] for name, value in self.processor(images=[image], return_tensors="pt").items()}


@dataclass(frozen=True)
class HubScorer(ClipScorer):
    """A frozen model with `get_image_features` and `get_text_features`, on its device.

    Attributes:
        pads: whether a statement's features depend on the padding up to the context length, as SigLIP's do.
    """

    pads: bool = True

    @torch.inference_mode()
    def encode_pixels(self, pixels: Any) -> Tensor:
        """[n, D] float32 on the device, of length 1 each, from {name: [n, ...]}."""
        model: Any = self.model
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in pixels.items()}
        return F.normalize(features_of(model.get_image_features(**inputs)).float(), dim=-1)

    @torch.inference_mode()
    def _encode_ids(self, ids: Any, longest: int) -> Tensor:
        """[B, D] from {name: [B, context]}, cut to the longest statement where padding changes nothing."""
        model: Any = self.model
        length = self.tokens.context_length if self.pads else longest
        inputs = {name: value[:, :length].to(self.device) for name, value in ids.items()}
        return F.normalize(features_of(model.get_text_features(**inputs)).float(), dim=-1)


def features_of(output: Any) -> Tensor:
    """[B, D] of what a feature function returns, which has been a tensor and is an output with `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output


def is_hub_format(model: str) -> bool:
    """Whether a choice of CLIP names a model in Hugging Face format: a folder with config.json, or ORG/NAME."""
    if Path(model).is_dir():
        return (Path(model) / CONFIG_NAME).is_file() and not (Path(model) / "open_clip_config.json").is_file()
    organization, slash, name = model.partition("/")
    return bool(slash and organization and name) and "/" not in name and not organization.startswith((".", "hf-hub:"))


def hub_errors(model: str, pretrained: str | None) -> list[str]:
    """Collect what is wrong with such a choice, seen without loading or fetching anything."""
    errors = []
    if pretrained is not None:
        errors.append(f"--pretrained {pretrained}: {model} has its own weights\nRemedy: leave it out")
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        remedy = "a folder as transformers saves it, with the model's processor"
        errors.append(f"--clip {model}: no {' or '.join(PROCESSOR_NAMES)} in it\nRemedy: {remedy}")
    return errors


def load_hub_clip(model: str, device: torch.device, precision: str = "fp32") -> HubScorer:
    """Load a CLIP or SigLIP by AutoModel and AutoProcessor.

    Args:
        model: folder, or ORG/NAME on the hub.

    Raises:
        ClipError: it is unavailable, has no weights, or has no features of images and texts.
        RemoteCodeError: it needs code that comes with it.
    """
    with remote_code_refused(f"CLIP {model}", "give a CLIP that transformers itself runs"):
        network, processor = _load(model)
    tokens = HubTokens(processor.tokenizer, context_of(network, processor.tokenizer))
    identity = {
        "model": Path(model).name if Path(model).is_dir() else model,
        "pretrained": "local" if Path(model).is_dir() else "hub",
        "weights": weights_digest(network),
        "preprocess": digest_of([processor.image_processor.to_dict(), shapes_of(HubPixels(processor))]),
        "tokenizer": digest_of(
            [len(processor.tokenizer), tokens.batch(PROBES, probes_of(tokens))["input_ids"].tolist()]
        ),
        "precision": precision,
    }
    network = network.eval().requires_grad_(False)
    scorer = HubScorer(network, HubPixels(processor), tokens, torch.device("cpu"), identity)
    pads = padding_matters(scorer)
    return replace(scorer, model=network.to(device, PRECISIONS[precision]), device=device, pads=pads)


def _load(model: str) -> tuple[nn.Module, Any]:
    """(network in float32, processor)."""
    from transformers import AutoModel, AutoProcessor

    remedy = "a folder or hub name of a CLIP or SigLIP in Hugging Face format, with all weights and its processor"
    go_offline_without_hub(model)
    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        network, found = AutoModel.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ImportError) as error:
        raise ClipError(f"CLIP {model}: {str(error).splitlines()[0]}\nRemedy: {remedy}") from error
    missing = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if missing:
        raise ClipError(f"CLIP {model}: expected all weights, got none for {', '.join(missing[:5])}\nRemedy: {remedy}")
    parts = [name for name in ("image_processor", "tokenizer") if getattr(processor, name, None) is None]
    parts += [name for name in ("get_image_features", "get_text_features") if not hasattr(network, name)]
    if parts:
        raise ClipError(f"CLIP {model}: {type(network).__name__} has no {', '.join(parts)}\nRemedy: {remedy}")
    return network, processor


def shapes_of(pixels: HubPixels) -> dict[str, list[int]]:
    """Shapes of a small image's inputs, in which defaults of the processor show."""
    return {name: list(value.shape) for name, value in sorted(pixels(Image.new("RGB", (48, 36))).items())}


def context_of(network: Any, tokenizer: Any) -> int:
    """Tokens that the text tower takes: its positions, or fewer where the tokenizer says so."""
    text = network.config.get_text_config()
    return min(text.max_position_embeddings, tokenizer.model_max_length)


def probes_of(tokens: TextTokens) -> list[list[int]]:
    """Ids of the probes, cut to the context where it is very short."""
    return [tokens.ids(text)[: tokens.context_length] for text in PROBES]


def padding_matters(scorer: HubScorer) -> bool:
    """Whether a text's features change with the padding behind it.

    SigLIP was trained on texts padded to its context and pools at the last position; CLIP pools at the end of the text.
    """
    rows = probes_of(scorer.tokens)
    batch = scorer.tokens.batch(PROBES, rows)
    whole = replace(scorer, pads=True)._encode_ids(batch, 0)
    for row, text, expected in zip(rows, PROBES, whole):
        if len(row) == scorer.tokens.context_length:
            continue
        alone = replace(scorer, pads=False)._encode_ids(scorer.tokens.batch([text], [row]), len(row))
        if 1 - float(alone[0] @ expected) > SAME:
            return True
    return False
