"""The version, in the only place: pyproject.toml reads it here.

In a module of its own: where the working folder has a folder `dama` without code, `dama` itself may be that one.
"""

__version__ = "0.2.0"
