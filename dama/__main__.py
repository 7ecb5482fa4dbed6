"""`python -m dama <command>`."""

import sys

from dama.cli import main

if __name__ == "__main__":
    sys.exit(main())
