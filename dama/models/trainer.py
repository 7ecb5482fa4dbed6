"""The preference trainer on Hugging Face models: what it saves is an ordinary checkpoint with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from dama.console import atomic_file
from dama.models.family import HubFamily
from dama.train.provenance import write_model_card
from dama.train.trainer import PreferenceTrainer

SENTENCEPIECE = "tokenizer.model"


class HubTrainer(PreferenceTrainer):
    """PreferenceTrainer whose checkpoints have a model card and a processor."""

    family: HubFamily

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load all weights by the names that the model's class gives them in files, see `read_weights`."""
        if self.args.lora_enable or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        read_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        super()._save(str(folder), state_dict)
        keep_vocabulary(self.family.name, folder)
        if self.provenance is not None:
            write_model_card(folder, self.provenance, model="vision-language model", library="transformers")


def read_weights(model: Any, folder: str) -> None:
    """Load a checkpoint's weights into a model by from_pretrained of its class.

    transformers' trainer takes the file's names for the model's: where they differ it would go on from the base.
    """
    read = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(read.state_dict())


def keep_vocabulary(base: str, folder: Path) -> None:
    """Copy the base's sentencepiece file, which transformers leaves out beside tokenizer.json and others read."""
    try:
        found = cached_file(base, SENTENCEPIECE)
    except OSError:  # the base has none, or is out of reach
        return
    content = Path(str(found)).read_bytes()
    with atomic_file(folder / SENTENCEPIECE, len(content)) as file:
        file.write(content)
