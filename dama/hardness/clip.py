"""CLIP similarity c(I, s) of images and statements, with an open_clip model by name or from a local folder.

Models in Hugging Face format are read by dama.hardness.hub_clip.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dama.console import digest_of
from dama.hub import go_offline_without_hub
from dama.images import load_image
from dama.remote_code import remote_code_refused

DEFAULT_MODEL = "ViT-L-14-336-quickgelu"  # the vision tower of LLaVA-1.5; the paper scores with the same CLIP
DEFAULT_PRETRAINED = "openai"
RANDOM = "random"
HUB = "hf-hub:"
RANDOM_SEED = 0
TEXTS_PER_BATCH = 256
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ClipError(ValueError):
    """A CLIP that is unavailable or would give wrong scores."""


@dataclass(frozen=True)
class TextTokens:
    """A CLIP's tokenizer and the ids of a text before open_clip would cut it. Worker processes have a copy."""

    tokenizer: Any
    context_length: int  # tokens, start and end token counted

    def ids(self, text: str) -> list[int]:
        """Token ids with start and end token, of any length; "<end_of_text>" in the text is text."""
        if hasattr(self.tokenizer, "encode"):
            return [self.tokenizer.sot_token_id, *_encode_as_text(self.tokenizer, text), self.tokenizer.eot_token_id]
        ids = self.tokenizer.tokenizer(self.tokenizer.clean_fn(text)).input_ids
        # In this mode a start, an end and, after the padding, a class token come in place of the tokenizer's own.
        return [*ids, 0, 0, 0] if self.tokenizer.tokenizer_mode == "clips" else list(ids)

    def count(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.ids(text))

    def batch(self, texts: Sequence[str], rows: Sequence[list[int]]) -> Tensor:
        """[B, context] as open_clip's tokenizer gives it; `rows` are the texts' ids, none longer than the context."""
        if not hasattr(self.tokenizer, "encode"):
            return self.tokenizer(list(texts))
        batch = torch.zeros(len(rows), self.context_length, dtype=torch.long)
        for place, row in zip(batch, rows):
            place[: len(row)] = torch.tensor(row)
        return batch


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    """open_clip's ids of a text, in which the spelling of a special token stays text.

    The spellings are sought after cleaning, which makes "&lt;end_of_text&gt;" one of them.
    """
    text = tokenizer.clean_fn(text)
    spellings = [re.escape(tokenizer.decoder[token]) for token in tokenizer.all_special_ids]
    # Cut behind the first character of each, a bracket, where a word ends anyway.
    cuts = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(spellings)})", text)]
    if not cuts:
        return _encode_clean(tokenizer, text)
    ends = [*cuts, len(text)]
    return [token for start, end in zip([0, *cuts], ends) for token in _encode_clean(tokenizer, text[start:end])]


def _encode_clean(tokenizer: Any, text: str) -> list[int]:
    """open_clip's ids without cleaning: done twice it would turn "&amp;lt;" into a bracket after all."""
    plain = copy(tokenizer)
    plain.clean_fn = str
    return plain.encode(text)


@dataclass(frozen=True)
class ClipScorer:
    """A frozen CLIP on its device, with its own preprocessing and tokenizer."""

    model: nn.Module
    preprocess: Callable[[Any], Any]  # PIL image -> [3, H, W], or {name: tensor}
    tokens: TextTokens
    device: torch.device
    identity: dict[str, str]  # what the scores depend on, for a stage's fingerprint

    @property
    def logit_scale(self) -> float:
        """Exp of the learned temperature, about 100 for OpenAI's models."""
        return float(self.model.get_parameter("logit_scale").detach().float().exp())

    @property
    def logit_bias(self) -> float:
        """What SigLIP adds to its logits, about -12; 0 for a CLIP without."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach().float())

    def encode_images(self, paths: Sequence[Path], batch_size: int = 32, workers: int = 0) -> Tensor:
        """[N, D] float32 on the device, of length 1 each."""
        batches = [list(paths[start : start + batch_size]) for start in range(0, len(paths), batch_size)]
        return torch.cat(list(self.iter_images(batches, workers)))

    def iter_images(self, batches: Sequence[Sequence[Path]], workers: int = 0) -> Iterator[Tensor]:
        """[n, D] float32 on the device for each batch of paths; `workers` processes decode ahead (0: this one does).

        On a GPU the batch is only queued: the next one's pixels are fetched while it is computed.
        """
        for pixels in self.iter_pixels(batches, workers):
            yield self.encode_pixels(pixels)

    def iter_pixels(self, batches: Sequence[Sequence[Path]], workers: int = 0) -> Iterator[Any]:
        """[n, 3, H, W] on the CPU, or {name: [n, ...]}, decoded and preprocessed, in the precision of the model."""
        flat = [path for batch in batches for path in batch]
        indices = iter(range(len(flat)))
        sampler = [[next(indices) for _ in batch] for batch in batches]
        pinned = self.device.type == "cuda"
        dataset: Any = _Images(flat, self.preprocess, PRECISIONS[self.identity["precision"]])
        yield from DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pinned)

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[n, D] float32 on the device, of length 1 each, from [n, 3, H, W]."""
        model: Any = self.model
        features = model.encode_image(pixels.to(self.device, non_blocking=True), normalize=False)
        return F.normalize(features.float(), dim=-1)

    def encode_texts(self, texts: Sequence[str], ids: Sequence[list[int]] | None = None) -> Tensor:
        """[N, D] float32 on the device, of length 1 each; texts of about equal length share a batch.

        `ids` are the texts' `tokens.ids`, where they are known already. Raises ClipError for a text beyond the context
        length: open_clip would cut it without a word.
        """
        ids = [self.tokens.ids(text) for text in texts] if ids is None else ids
        lengths = [len(row) for row in ids]
        if texts and max(lengths) > self.tokens.context_length:
            text = texts[lengths.index(max(lengths))]
            remedy = "split it first (dama.hardness.split.fit_to_context)"
            got = f"{max(lengths)} tokens, the text tower takes {self.tokens.context_length}"
            raise ClipError(f"statement of {got}: {text[:80]!r}\nRemedy: {remedy}")
        order = sorted(range(len(texts)), key=lambda index: lengths[index])
        parts = []
        for start in range(0, len(order), TEXTS_PER_BATCH):
            rows = order[start : start + TEXTS_PER_BATCH]
            batch = self.tokens.batch([texts[row] for row in rows], [ids[row] for row in rows])
            parts.append(self._encode_ids(batch, lengths[rows[-1]]))
        if not parts:
            return torch.empty(0, 0)
        return torch.cat(parts)[torch.tensor(order, device=self.device).argsort()]

    @torch.inference_mode()
    def _encode_ids(self, ids: Tensor, longest: int) -> Tensor:
        """[B, D] from [B, context]; a causal tower gets only the first `longest` positions.

        It pools at the end token, which sees nothing after itself, so later positions change nothing but the cost.
        """
        shortened = _shortened_text_tower(self.model, longest)
        if shortened:
            if not torch.equal(ids[:, longest:], ids[:, -1:].expand(-1, ids.shape[1] - longest)):
                raise ClipError("CLIP's tokenizer pads on the left\nRemedy: set its padding_side to right")
            ids = ids[:, :longest]
        features = torch.func.functional_call(_TextTower(self.model), shortened, (ids.to(self.device),))
        return F.normalize(features.float(), dim=-1)


class _TextTower(nn.Module):
    """encode_text as a forward, in which parameters can be replaced for one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids, normalize=False)


class _Images:
    """What the decoding processes run: one image read and preprocessed."""

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Any], Any], dtype: torch.dtype) -> None:
        self.paths, self.preprocess, self.dtype = paths, preprocess, dtype

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        found = self.preprocess(load_image(self.paths[index]))
        return found.to(self.dtype) if isinstance(found, Tensor) else {k: self._cast(v) for k, v in found.items()}

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


def _shortened_text_tower(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Positions and causal mask cut to `length`, by parameter name; empty where the tower must see its full context."""
    separate = isinstance(getattr(model, "text", None), nn.Module)
    tower: Any = model.text if separate else model
    pool = getattr(tower, "pool_type" if separate else "text_pool_type", None)
    mask = getattr(tower, "attn_mask", None)
    if pool not in ("argmax", "eos") or mask is None or getattr(tower, "cls_emb", None) is not None:
        return {}
    prefix = "model.text." if separate else "model."
    return {
        f"{prefix}positional_embedding": tower.positional_embedding[:length],
        f"{prefix}attn_mask": mask[:length, :length],
    }


def fetch_later(values: Tensor) -> Callable[[], list[float]]:
    """Start the copy of [N] to the CPU; the result, when called, waits for that copy and not for work queued since."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return wait


# ---------------------------------------------------------------------------------------------------------- loading


def load_clip(model: str, pretrained: str | None, device: str | torch.device, precision: str = "fp32") -> ClipScorer:
    """Load a CLIP or SigLIP for scoring.

    `model` is the name of an open_clip architecture, with `pretrained` one of its tags (None: openai), a file of
    weights, or "random" for seeded random ones; or, with weights of their own, "hf-hub:ORG/NAME" or a folder as
    open_clip writes it, and ORG/NAME or a folder in Hugging Face format. Raises ClipError for what clip_errors finds,
    and for weights that are unavailable or do not fit.
    """
    errors = clip_errors(model, pretrained)
    if errors:
        raise ClipError("\n".join(errors))
    from dama.hardness.hub_clip import is_hub_format, load_hub_clip

    if is_hub_format(model):
        return load_hub_clip(model, torch.device(device), precision)
    with remote_code_refused(f"CLIP {model}", "give a CLIP whose tokenizer and text tower need no code of their own"):
        return _load_clip(model, pretrained, torch.device(device), precision)


def _load_clip(model: str, pretrained: str | None, device: torch.device, precision: str) -> ClipScorer:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = Path(model).is_dir()
    name = f"local-dir:{model}" if folder else model
    tag = None if folder or model.startswith(HUB) else pretrained or DEFAULT_PRETRAINED
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        torch.manual_seed(RANDOM_SEED)
        weights = {"require_pretrained": False} if tag == RANDOM else {"pretrained": tag, "require_pretrained": True}
        if weights["require_pretrained"] and not (tag and Path(tag).exists()):
            go_offline_without_hub(model.removeprefix(HUB))
        try:
            # The weights stay on the CPU until their digest is taken.
            network = open_clip.create_model(name, precision=precision, output_dict=False, **weights)
        except (RuntimeError, OSError, ValueError, KeyError, UserWarning) as error:
            remedy = "a tag is fetched at its first use; without network give a folder with the weights as --clip"
            raise ClipError(f"CLIP {model} ({tag or 'its own weights'}): {error}\nRemedy: {remedy}") from error
    tokenizer = open_clip.get_tokenizer(name)
    _refuse_cutting_tokenizers(tokenizer, model)
    if hasattr(tokenizer, "tokenizer"):  # Hugging Face's inside
        tokenizer.tokenizer.split_special_tokens = True  # "</s>" in an answer is text
    config = network.visual.preprocess_cfg
    identity = {
        "model": Path(model).name if folder else model,
        "pretrained": Path(tag).name if tag else "local" if folder else "hub",
        "weights": weights_digest(network),
        "preprocess": digest_of(config),
        "precision": precision,
    }
    network = network.to(device).eval().requires_grad_(False)
    preprocess = image_transform_v2(PreprocessCfg(**config), is_train=False)
    return ClipScorer(network, preprocess, TextTokens(tokenizer, tokenizer.context_length), device, identity)


def _refuse_cutting_tokenizers(tokenizer: Any, model: str) -> None:
    """Tokenizers that drop words at random, as training may want it, and kinds whose ids cannot be counted."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    plain = isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None
    if not plain and not isinstance(tokenizer, HFTokenizer):
        kind = type(tokenizer).__name__
        remedy = "take out text_cfg.tokenizer_kwargs, or another --clip"
        raise ClipError(f"CLIP {model}: its tokenizer ({kind}) is not supported\nRemedy: {remedy}")


def clip_errors(model: str, pretrained: str | None) -> list[str]:
    """What is wrong with a choice of CLIP, each with a remedy, seen without loading or fetching anything."""
    from dama.hardness.hub_clip import hub_errors, is_hub_format

    if is_hub_format(model):
        return hub_errors(model, pretrained)
    try:
        import open_clip
    except ImportError as error:
        return [f"open_clip cannot be imported ({error})\nRemedy: pip install open_clip_torch"]
    if Path(model).is_dir():
        return _folder_errors(Path(model), pretrained)
    if model.startswith(HUB):
        return [_own_weights_error(model, pretrained)] if pretrained is not None else []
    if model not in open_clip.list_models():
        remedy = f"a name from open_clip.list_models(), such as {DEFAULT_MODEL}, ORG/NAME, or an existing folder"
        return [f"--clip {model}: neither a folder nor an architecture of open_clip\nRemedy: {remedy}"]
    tag = pretrained or DEFAULT_PRETRAINED
    if tag == RANDOM or Path(tag).is_file():
        return []
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        remedy = f"one of {', '.join([*tags, RANDOM])}, or a file"
        return [f"--pretrained {tag}: {model} has no such weights\nRemedy: {remedy}"]
    return _quick_gelu_errors(model, tag)


def _folder_errors(folder: Path, pretrained: str | None) -> list[str]:
    remedy = (
        f"Remedy: a folder as open_clip writes it, with {CONFIG_NAME} and {WEIGHTS_NAME}, or as transformers saves it, "
        "with config.json"
    )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    errors = [f"--clip {folder}: no {name} in it\n{remedy}" for name in missing]
    if pretrained is not None:
        errors.append(_own_weights_error(str(folder), pretrained))
    return errors


def _own_weights_error(model: str, pretrained: str) -> str:
    return f"--pretrained {pretrained}: {model} has its own weights\nRemedy: leave it out"


def _quick_gelu_errors(model: str, tag: str) -> list[str]:
    """open_clip only warns when weights trained with QuickGELU meet a model with GELU, and the scores are wrong."""
    import open_clip

    model_has = bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))
    tag_has = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    if model_has == tag_has:
        return []
    other = f"{model}-quickgelu"
    remedy = f"--clip {other}" if tag_has and other in open_clip.list_models() else "another --clip or --pretrained"
    got = f"{tag}'s weights were trained {'with' if tag_has else 'without'} QuickGELU, {model} is the other kind"
    return [f"QuickGELU mismatch: {got}, and its scores would be wrong\nRemedy: {remedy}"]


def weights_digest(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over all names, shapes, types and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
