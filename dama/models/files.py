"""What can be wrong with a checkpoint's files, and that none of its code is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dama.remote_code import remote_code_refused

REMEDY = "give a model that transformers itself runs"
NAMED = 5  # names that an error lists


@contextmanager
def files_of(source: str) -> Iterator[None]:
    """Load a checkpoint's parts inside, none of its code.

    Raises:
        FileNotFoundError: files are missing or out of reach. RemoteCodeError: it needs code that comes with it.
    """
    try:
        with remote_code_refused(f"checkpoint '{source}'", REMEDY):
            yield
    except OSError as error:
        raise FileNotFoundError(
            f"checkpoint '{source}': expected a folder or the name of a model on the hub, with weights, config.json "
            f"and the files of its processor; transformers says: {str(error).splitlines()[0]}"
        ) from error


def validate_complete(source: str, found: Any) -> None:
    """Raise ValueError where weights were missing or of another shape, which transformers fills with random ones."""
    missing = sorted(found["missing_keys"])
    others = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"])
    if missing or others:
        raise ValueError(
            f"checkpoint '{source}': expected all weights that its config.json describes; missing: "
            f"{listed(missing)}; of another shape: {listed(others)}. Was the download or the training interrupted?"
        )


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown or "none"
