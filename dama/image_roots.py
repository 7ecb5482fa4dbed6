"""Paths below image folders with their symbolic links followed, each folder resolved once in a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path


def resolved_folders(folders: Sequence[Path]) -> list[Path]:
    """The folders' real paths. A folder that is replaced by another one while the process runs is not seen."""
    return [_resolved(os.path.join(os.getcwd(), folder)) for folder in folders]


def resolve_below(folder: Path, relative: str) -> Path:
    """The real path of `relative`, which need not exist, below a folder that is resolved already.

    Links are looked for in the file's own name each time, in its parent folders once.
    """
    parent, name = os.path.split(relative)
    if name in ("", ".", ".."):
        return (folder / relative).resolve()
    path = f"{_resolved(os.path.join(folder, parent)) if parent else folder}/{name}"
    return Path(path).resolve() if os.path.islink(path) else Path(path)


@lru_cache(maxsize=1 << 16)
def _resolved(folder: str) -> Path:
    return Path(folder).resolve()
