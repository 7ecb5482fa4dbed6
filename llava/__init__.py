"""LLaVA-v1.5: model, training, evaluation and serving. Importing the package imports neither torch nor transformers."""

import sys
from pathlib import Path
from typing import Any

from dama.console import end_on_interrupt
from dama.flag_table import check_module_flags
from dama.notices import hold_back_quantization_notices, leave_out_library_notices

if sys.argv[:1] == ["-m"]:  # python -m llava...: the module's own long imports follow
    end_on_interrupt()
    check_module_flags(Path(__file__).with_name("flags.json"))
if Path(sys.argv[0] if sys.argv else "").name in ("-m", "train.py", "train_dpo.py"):
    from llava.train.flag_names import check_command_flags

    check_command_flags()

__all__ = ["LlavaLlamaForCausalLM"]

hold_back_quantization_notices()
leave_out_library_notices()


def __getattr__(name: str) -> Any:
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
