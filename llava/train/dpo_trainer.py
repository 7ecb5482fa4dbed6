"""The preference trainer on LLaVA-1.5, under the released DAMA code's name."""

from __future__ import annotations

from typing import Any

from dama.train.family import ModelFamily
from dama.train.trainer import PreferenceTrainer
from llava.train.dpo_data import DPODataset
from llava.train.family import LlavaFamily
from llava.train.llava_trainer import LLaVATrainer


class LLaVA15DPOTrainer(PreferenceTrainer, LLaVATrainer):
    """Trains on preference pairs with DPO, DAMA or beta-DPO, as the flags say; see PreferenceTrainer.

    Args:
        model: LlavaLlamaForCausalLM with its vision tower loaded, or a PeftModel of one.
        family: the model's family, where it exists already.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: Any,
        *,
        train_dataset: DPODataset,
        family: ModelFamily | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            family or LlavaFamily(model, tokenizer, args), tokenizer, args, train_dataset=train_dataset, **kwargs
        )
