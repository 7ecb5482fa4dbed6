"""Loads a Hugging Face vision-language model for answering: full checkpoints, and adapters over one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from dama.fingerprint import digest_of_checkpoint
from dama.hub import go_offline_without_hub
from dama.models.families import family_of
from dama.models.files import files_of, listed, validate_complete
from dama.models.setup import HEAD, load_processor
from dama.notices import without_loading_bars
from dama.train.setup import keep_packing, quantization_config

ADAPTER_CONFIG = "adapter_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
ADAPTER_PARTS = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*"]  # of a hub repository


@dataclass(frozen=True)
class ProcessorOptions:
    """How a processor prepares images and prompts, see `dama.models.setup.load_processor`.

    Attributes:
        system_prompt: text of a system turn before each question; none where empty.
        min_pixels, max_pixels: of an image after scaling; the checkpoint's where None.
        processor_option: NAME=VALUE, the value as JSON.
    """

    system_prompt: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    processor_option: tuple[str, ...] = ()

    def changes(self) -> list[str]:
        """What differs from the checkpoint's own preparation, in words."""
        sizes = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        changed = [f"{name} {value}" for name, value in sizes.items() if value is not None]
        return ["system prompt"] * bool(self.system_prompt) + changed + list(self.processor_option)


class HubCheckpoint:
    """A checkpoint's files: a full model, or a PEFT adapter and the model under it.

    Args:
        source: folder or hub name. base: the model under an adapter, where it is not the one that its config names.

    Raises:
        ValueError: an adapter that names no base.
    """

    def __init__(self, source: str, base: str | None = None) -> None:
        self.source = source
        folder = adapter_folder(source)
        self.adapter = folder
        self.base = source
        if folder is not None:
            named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if not (base or named):
                raise ValueError(f"adapter '{source}': expected its base model, got none; give it as --model-base")
            self.base = base or named

    def identity(self) -> dict[str, Any]:
        """Digest of the weights, those of the base included."""
        if self.adapter is None:
            return {"weights": digest_of_checkpoint(self.source)}
        return {"weights": digest_of_checkpoint(str(self.adapter)), "base": digest_of_checkpoint(self.base)}

    def processor(self, options: ProcessorOptions) -> Any:
        """The checkpoint's own processor; the base's where an adapter has none beside it."""
        own = self.adapter is not None and any((self.adapter / name).is_file() for name in PROCESSOR_FILES)
        with files_of(self.source):
            family = family_of(self.config())
            return load_processor(str(self.adapter) if own else self.base, options, adapt=family.adapted_processor)

    def config(self) -> Any:
        """The model's config."""
        return AutoConfig.from_pretrained(self.base, trust_remote_code=False)

    def context(self) -> int | None:
        """Most tokens of prompt, images and answer; None where the config does not say."""
        with files_of(self.source):
            config = self.config()
        return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)

    def model(self, *, device: str, dtype: torch.dtype, bits: int = 16) -> Any:
        """The model in evaluation mode, an adapter merged into its weights (in 4 and 8 bits it stays beside them).

        Args:
            device: cpu, cuda (all GPUs that it takes) or cuda:N. bits: 16, or 8 or 4 by bitsandbytes.

        Raises:
            ValueError: weights are missing, or it needs code that comes with the checkpoint.
            ImportError: 4 or 8 bits without bitsandbytes.
        """
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
        if bits != 16:
            options["quantization_config"] = quantization_config(bits == 8, [HEAD], compute_dtype=dtype)
        if device.startswith("cuda"):
            options["device_map"] = "auto" if device == "cuda" else {"": device}
        with files_of(self.source), without_loading_bars():
            model, found = AutoModelForImageTextToText.from_pretrained(self.base, **options)
        validate_complete(self.base, found)
        keep_packing(model)
        if self.adapter is not None:
            model = with_adapter(model, self.adapter, merge=bits == 16)
        return model.eval()


def adapter_folder(source: str) -> Path | None:
    """The folder of a PEFT adapter, fetched where it is a hub's; None for a full model."""
    if Path(source).is_dir():
        return Path(source) if (Path(source) / ADAPTER_CONFIG).is_file() else None
    from huggingface_hub import hf_hub_download, snapshot_download

    go_offline_without_hub(source)
    try:
        hf_hub_download(source, ADAPTER_CONFIG)
    except (OSError, ValueError):  # none there, or out of reach: the loading of a full model names the reason
        return None
    return Path(snapshot_download(source, allow_patterns=ADAPTER_PARTS))


def with_adapter(model: Any, folder: Path, *, merge: bool) -> Any:
    """A model under its adapter. Raises ValueError for weights that the adapter's config does not describe."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    adapted = PeftModel.from_pretrained(model, str(folder))
    given = set(load_peft_weights(str(folder), device="cpu"))
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := wanted - given:
        raise ValueError(
            f"adapter '{folder}': expected the weights that {ADAPTER_CONFIG} describes for this base; missing: "
            f"{listed(sorted(missing))}; unknown: {listed(sorted(given - wanted))}. Give the base that it was trained "
            "on as --model-base"
        )
    return adapted.merge_and_unload() if merge else adapted.get_base_model()
