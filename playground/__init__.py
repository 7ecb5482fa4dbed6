"""Things to try the repository on: the embedded TinyCOCO, and where real data goes."""

import sys

from dama.console import end_on_interrupt

if sys.argv[:1] == ["-m"]:  # python -m playground...: the module's own long imports follow
    end_on_interrupt()
