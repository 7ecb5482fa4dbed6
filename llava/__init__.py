"""LLaVA-v1.5: model, training, evaluation and serving. Importing the package imports neither torch nor transformers."""

import sys
from typing import Any

from dama.console import end_on_interrupt
from dama.notices import hold_back_quantization_notices, leave_out_library_notices

if sys.argv[:1] == ["-m"]:  # python -m llava...: the module's own long imports follow
    end_on_interrupt()

__all__ = ["LlavaLlamaForCausalLM"]

hold_back_quantization_notices()
leave_out_library_notices()


def __getattr__(name: str) -> Any:
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
