"""Prompts and answers as a model's own chat template writes them, as token ids.

A row is the rendered prompt, the answer, and the token that ends the answer's turn. Only the last two are supervised.
What the template writes behind that token is left out: the model ends there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from dama.console import digest_of
from dama.models.suffix import suffix_template, takes_suffix
from dama.styles import ASSISTANT, SYSTEM, USER, Conversation
from dama.texts import IMAGE_TOKEN

PROBE = "Yes, indeed."  # an answer that no template changes
IGNORED_TOKENS = {"", " "}


class ChatTemplate:
    """A processor's chat template, its tokenizer, and what ends an answer.

    Args:
        processor: with `tokenizer` and `chat_template`.
        system: text of a system turn, for conversations without one; none where empty.

    Raises:
        ValueError: the processor has no template, or one that does not begin a conversation with its own prompt.
    """

    def __init__(self, processor: Any, system: str = "") -> None:
        self.processor, self.system = processor, system
        self.tokenizer = processor.tokenizer
        self.template = getattr(processor, "chat_template", None)
        if not self.template and takes_suffix(processor):
            self.template = suffix_template(processor)
        if not self.template:
            raise ValueError(
                "chat template: expected one in the checkpoint's processor, got none; preference training needs a "
                "model that follows instructions (usually named -Instruct, -it or -hf)"
            )
        probe = ((USER, f"{IMAGE_TOKEN}?"),)
        (prompt,), (whole,) = self.prompts([probe]), self._render([(*probe, (ASSISTANT, PROBE))])
        lead, found, self.tail = self._after(prompt, whole).partition(PROBE)
        if not found:
            raise ValueError(f"chat template: expected the answer {PROBE!r} as it is, got {(lead + self.tail)!r}")
        self.end = self._end_of_turn()

    def _messages(self, turns: Conversation) -> list[dict[str, Any]]:
        """Messages of the form that templates take, with a placeholder where a text shows an image."""
        if self.system and turns[0][0] != SYSTEM:
            turns = ((SYSTEM, self.system), *turns)
        return [{"role": role, "content": parts_of(text)} for role, text in turns]

    def _render(self, conversations: Sequence[Conversation], *, asks: bool = False) -> list[str]:
        return self.processor.apply_chat_template(
            [self._messages(turns) for turns in conversations],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=asks,
        )

    @staticmethod
    def _after(prompt: str, whole: str) -> str:
        if not whole.startswith(prompt):
            raise ValueError(
                "chat template: expected a conversation to begin with its prompt, so that the answer can be told from "
                f"it, got {prompt[-80:]!r} and then {whole[max(0, len(prompt) - 80) :][:120]!r}"
            )
        return whole[len(prompt) :]

    def _end_of_turn(self) -> str:
        """The first special token behind an answer; the tokenizer's end token where the template writes none."""
        special = [text for text in self.special_texts if text in self.tail]
        if special:
            return min(special, key=self.tail.index)
        if not self.tokenizer.eos_token:
            raise ValueError("tokenizer: expected a token that ends a turn, got none in its template and no eos_token")
        return self.tokenizer.eos_token

    @cached_property
    def special_texts(self) -> list[str]:
        """Spellings of the tokens that are no text."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens, IMAGE_TOKEN} - IGNORED_TOKENS)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special_texts, key=len, reverse=True))))

    def special_in(self, text: str) -> str | None:
        """The first special token's spelling in a text, which would be read as that token."""
        found = self._special.search(text)
        return found[0] if found else None

    def fingerprint(self) -> dict[str, str]:
        """Digests of what token ids depend on: the tokenizer, the template and the system turn."""
        probe = self.tokenizer("Is it a cat? It's 3.5 cats!\n").input_ids
        return {
            "tokenizer": digest_of([len(self.tokenizer), probe]),
            "chat_template": digest_of([self.template, self.system]),
        }

    def prompts(self, conversations: Sequence[Conversation]) -> list[str]:
        """What the model answers to, one image placeholder an image."""
        return self._render(conversations, asks=True)

    def rows(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[tuple[str, str]]:
        """(prompt, answer with the token that ends it) of every conversation and the answer that follows it."""
        prompts = self.prompts(conversations)
        wholes = self._render(
            [(*turns, (ASSISTANT, answer)) for turns, answer in zip(conversations, answers, strict=True)]
        )
        rows = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            answer = self._after(prompt, whole)
            if not answer.endswith(self.tail):
                raise ValueError(f"chat template: expected {self.tail!r} behind the answer, got {answer[-80:]!r}")
            rows.append((prompt, answer.removesuffix(self.tail) + self.end))
        return rows

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered texts; a beginning that the template wrote is not added again."""
        begin = self.tokenizer.bos_token
        ids: list[list[int]] = [[] for _ in texts]
        for adds in (True, False):
            mine = [i for i, text in enumerate(texts) if adds != bool(begin and text.startswith(begin))]
            if mine:
                found = self.tokenizer([texts[i] for i in mine], add_special_tokens=adds).input_ids
                for i, row in zip(mine, found, strict=True):
                    ids[i] = row
        return ids


def parts_of(text: str) -> list[dict[str, str]]:
    """A message's text and images, in their order."""
    first, *others = text.split(IMAGE_TOKEN)
    parts: list[dict[str, str]] = [{"type": "text", "text": first}] if first or not others else []
    for behind in others:
        parts.append({"type": "image"})
        parts += [{"type": "text", "text": behind}] if behind else []
    return parts
