"""Code that comes with a checkpoint: run only where a flag allows it, never after a question on standard input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RemoteCodeError(ValueError):
    """A checkpoint needs code of its own, which nobody allowed."""


@contextmanager
def remote_code_refused(subject: str, remedy: str) -> Iterator[None]:
    """Load checkpoints inside with `trust_remote_code` as the user's flag says.

    transformers asks on standard input where a library that calls it, such as open_clip, does not say whether to run a
    checkpoint's code. Here it refuses instead. Raises RemoteCodeError with `subject` and `remedy`.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # transformers' own way to answer no
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        message = f"{subject}: loading it would run code that comes with it, which may do anything"
        raise RemoteCodeError(f"{message}\nRemedy: {remedy}") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
