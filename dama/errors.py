"""Error messages: many problems of one subject in one message."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_ERRORS = 20


def error_list(subject: str, errors: Sequence[str], remedy: str) -> str:
    """Format many errors as one message: their number, the first 20, and the remedy."""
    lines = [f"{subject}: {len(errors)} error{'s' if len(errors) != 1 else ''}"]
    lines += [f"  {error}" for error in errors[:SHOWN_ERRORS]]
    if len(errors) > SHOWN_ERRORS:
        lines.append(f"  ... and {len(errors) - SHOWN_ERRORS} more")
    return "\n".join([*lines, f"Remedy: {remedy}"])
