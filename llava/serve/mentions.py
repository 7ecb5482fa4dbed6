"""Objects that a text names, by a vocabulary of words and their synonyms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mention:
    """An object that a text names: characters [start, end)."""

    start: int
    end: int
    name: str


class ObjectVocabulary:
    """Words for objects. Each line "name, synonym, synonym ..."; plurals in -s, -es and -ies need not be listed."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.name_of: dict[str, str] = {}
        for line in lines:
            words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
            for word in words:
                for form in (word, word + "s", word + "es", *([word[:-1] + "ies"] if word.endswith("y") else [])):
                    self.name_of.setdefault(form, words[0])
        if not self.name_of:
            raise ValueError("vocabulary: expected lines of object names, got none")
        longest_first = sorted(self.name_of, key=len, reverse=True)
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def mentions(self, text: str) -> list[Mention]:
        """Every object that `text` names, from left to right, by its longest phrase ("dining table", not "table")."""
        return [Mention(m.start(), m.end(), self.name_of[m.group().lower()]) for m in self._pattern.finditer(text)]

    def names(self, listed: str) -> frozenset[str]:
        """The objects of a comma-separated list; a word that the vocabulary lacks stands for itself."""
        words = [" ".join(word.lower().split()) for word in listed.split(",") if word.strip()]
        return frozenset(self.name_of.get(word, word) for word in words)


def read_vocabulary(path: str | Path) -> ObjectVocabulary:
    """Read a vocabulary file, see `ObjectVocabulary`."""
    with Path(path).open(encoding="utf-8") as file:
        return ObjectVocabulary(file)
