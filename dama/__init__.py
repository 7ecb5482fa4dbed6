"""DAMA: what makes preference optimization data- and model-aware, and the stages around it."""

import sys

from dama.console import end_on_interrupt
from dama.lazy_imports import compile_when_used, load_when_used, scan_models_once

if sys.argv[:1] == ["-m"]:  # python -m dama...: the module's own long imports follow
    end_on_interrupt()
load_when_used("bitsandbytes", "datasets")
compile_when_used("deepspeed.runtime.zero.muon.original_muon")
scan_models_once()
