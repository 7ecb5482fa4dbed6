"""The benchmarks, one module per benchmark: load, prompt, parse, score."""

import sys

from dama.console import end_on_interrupt

if sys.argv[:1] == ["-m"]:  # python -m eval...: the module's own long imports follow
    end_on_interrupt()
