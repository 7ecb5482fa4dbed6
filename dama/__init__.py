"""DAMA: what makes preference optimization data- and model-aware, and the stages around it."""

import sys

from dama.console import end_on_interrupt
from dama.version import __version__

__all__ = ["__version__"]

if sys.argv[:1] == ["-m"]:  # python -m dama...: the module's own long imports follow
    end_on_interrupt()
