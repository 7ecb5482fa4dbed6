"""LLaVA-v1.5: model, training, evaluation and serving. Importing the package imports neither torch nor transformers."""

from typing import Any

__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str) -> Any:
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
