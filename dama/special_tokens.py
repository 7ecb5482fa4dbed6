"""Special tokens that are spelled out in text of users, data or models: they must not end or forge a turn."""

from __future__ import annotations

import re
from typing import Any

BREAK = "\u200b"  # zero-width space: a reader sees the same text


def escaped(text: str, tokenizer: Any, *more: str) -> str:
    """The text for a chat template, with a BREAK inside every spelling of a special token; other texts stay.

    A template's prompt is tokenized with its special tokens, so those that a text brings along must be spelled
    differently.

    Args:
        text: text from a user or a file.
        tokenizer: Hugging Face tokenizer.
        *more: further spellings, such as a processor's placeholder of an image.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spellings = {name for name in {*special, *tokenizer.all_special_tokens, *more} if len(name) > 1}
    if not any(spelling in text for spelling in spellings):
        return text
    longest_first = sorted(map(re.escape, spellings), key=len, reverse=True)
    starts = {match.start() for match in re.finditer(f"(?={'|'.join(longest_first)})", text)}
    return "".join(character + BREAK if place in starts else character for place, character in enumerate(text))


def placeholders(processor: Any) -> list[str]:
    """What a processor's prompts hold in place of an image, a video or a sound."""
    names = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
    return [name for name in names if isinstance(name, str)]
