"""The yes or no that a free answer begins with."""

from __future__ import annotations

import re

from dama.chat import after_thoughts
from llava.eval.eval_pope import Reply, is_undecided

_LEADING = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def read_leading(text: str) -> Reply | None:
    """Return the yes or no that the answer begins with, in any case; None for other answers, also for "No idea".

    A reasoning model's thoughts, and tags around its answer, are left out.
    """
    text = after_thoughts(text)
    found = _LEADING.match(text)
    if found is None or is_undecided(text.strip().split(".")[0].lower()):
        return None
    return "yes" if found[1].lower() == "yes" else "no"
