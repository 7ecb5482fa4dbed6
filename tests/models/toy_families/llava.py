"""A family in one file: LLaVA checkpoints whose processor has no chat template, and whose rows hold 1,000 tokens."""

from __future__ import annotations

from typing import Any

from dama.models.family import HubFamily
from tests.models.tiny_hub import template


class Family(HubFamily):
    """Everything of a Hugging Face model but the template and the length of a row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_tokens = min(self.max_tokens, 1000)

    @staticmethod
    def adapted_processor(processor: Any) -> Any:
        """The processor with the template that its checkpoint lacks."""
        processor.chat_template = processor.chat_template or template("<image>")
        return processor
