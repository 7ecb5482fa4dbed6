"""DAMA: what makes preference optimization data- and model-aware, and the stages around it."""

import sys

from dama.console import end_on_interrupt

__version__ = "0.2.0"  # the only place: pyproject.toml reads it here

if sys.argv[:1] == ["-m"]:  # python -m dama...: the module's own long imports follow
    end_on_interrupt()
