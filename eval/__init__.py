"""The benchmarks, one module per benchmark: load, prompt, parse, score."""

import sys
from pathlib import Path

from dama.console import end_on_interrupt
from dama.flag_table import check_module_flags

if sys.argv[:1] == ["-m"]:  # python -m eval...: the module's own long imports follow
    end_on_interrupt()
    check_module_flags(Path(__file__).with_name("flags.json"))
