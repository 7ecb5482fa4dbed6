"""The COCO objects that words name: CHAIR's synonym list (Rohrbach et al. 2018) and its rules for phrases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.core.nouns import WORD, Word, singularize

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
# Two-word rules of CHAIR beside the vocabulary's own phrases. Values outside the vocabulary are named on purpose:
# a "home plate" is no plate, a "train track" no train.
_PHRASES = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
    "home plate": "home plate",
    "train track": "train track",
}


@dataclass(frozen=True)
class Mention:
    """One object named in a text: the vocabulary's word for it, its COCO node, and text[start:end] as written.

    start = end = 0 where the judge names an object in words that the text does not use.
    """

    surface: str
    node: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class ObjectVocabulary:
    """node_of: word or phrase -> node, in lower case; `spelled`: the same as the list has them ("iPhone").

    phrases: words of a phrase -> the word it stands for, in node_of or not.
    """

    node_of: Mapping[str, str]
    phrases: Mapping[tuple[str, ...], str]
    words: frozenset[str]
    longest: int
    spelled: frozenset[str]

    @classmethod
    def from_mapping(cls, synonyms: Mapping[str, Iterable[str]]) -> ObjectVocabulary:
        """Build from node -> synonyms, the node itself not repeated. Raises ValueError for a word of two nodes."""
        node_of: dict[str, str] = {}
        spelled = set()
        for node, others in synonyms.items():
            for word in (node, *others):
                spelled.add(" ".join(word.split()))
                surface = " ".join(word.lower().split())
                if node_of.setdefault(surface, node) != node:
                    raise ValueError(
                        f"object vocabulary: {surface!r} belongs to {node_of[surface]!r} and to {node!r}, "
                        "expected one node per word; remove it from one of them"
                    )
        own = {surface: surface for surface in node_of if " " in surface}
        rules = {phrase: word for phrase, word in _PHRASES.items() if word in node_of or phrase not in own}
        phrases = {tuple(phrase.split()): word for phrase, word in {**own, **rules}.items()}
        words = frozenset(word for phrase in (*node_of, *_PHRASES) for word in phrase.split())
        return cls(node_of, phrases, words, max(len(phrase) for phrase in phrases), frozenset(spelled))

    @classmethod
    def from_synonym_lines(cls, lines: Iterable[str]) -> ObjectVocabulary:
        """The official file's format: one line "node, synonym, synonym, ..." per node; blank lines are skipped."""
        rows = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        return cls.from_mapping({row[0]: tuple(row[1:]) for row in rows if row})

    @property
    def nodes(self) -> frozenset[str]:
        """All object categories, without their synonyms."""
        return frozenset(self.node_of.values())

    def mentions(self, text: str) -> list[Mention]:
        """The objects that `text` names, in order, every occurrence."""
        found = [
            Mention(surface, self.node_of[surface], start, end)
            for surface, start, end in self._surfaces(text)
            if surface in self.node_of
        ]
        # The seat of a toilet is not a chair.
        if any(mention.surface == "toilet" for mention in found):
            found = [mention for mention in found if mention.surface != "seat"]
        return found

    def _surfaces(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Singular words from left to right, with the longest phrase that begins at a word in its place."""
        matches = list(WORD.finditer(text))
        words = [singularize(match.group().lower(), self.words) for match in matches]
        # joined[i]: only white space lies between word i - 1 and word i, so a comma ends a phrase.
        joined = [i > 0 and text[matches[i - 1].end() : match.start()].isspace() for i, match in enumerate(matches)]
        i = 0
        while i < len(words):
            length = self._phrase_length(words, joined, i)
            surface = self.phrases[tuple(words[i : i + length])] if length > 1 else words[i]
            yield surface, matches[i].start(), matches[i + length - 1].end()
            i += length

    def surfaces_of(self, words: Sequence[Word], *, official_quirks: bool = False) -> list[str]:
        """What the words of an extracted string name, in the vocabulary or not: phrases, and whole runs of nouns.

        A run is one compound, so that "beach chair" names no chair. official_quirks: the nouns beside a phrase are
        lost, and upper case is kept, so that "Traffic Light" names nothing.
        """
        lemmas = [word.lemma if official_quirks else word.lemma.lower() for word in words]
        joined = [i > 0 and word.start - words[i - 1].end <= 1 for i, word in enumerate(words)]
        phrases: list[str] = []
        runs: list[list[str]] = [[]]
        i = 0
        while i < len(words):
            length = self._phrase_length(lemmas, joined, i)
            if length > 1:
                phrases.append(self.phrases[tuple(lemmas[i : i + length])])
            if length > 1 or not words[i].noun or not joined[i]:
                runs.append([])
            if length == 1 and words[i].noun:
                runs[-1].append(lemmas[i])
            i += length
        return phrases if official_quirks and phrases else phrases + [" ".join(run) for run in runs if run]

    def _phrase_length(self, words: Sequence[str], joined: Sequence[bool], i: int) -> int:
        for length in range(min(self.longest, len(words) - i), 1, -1):
            if tuple(words[i : i + length]) in self.phrases and all(joined[i + 1 : i + length]):
                return length
        return 1


def ground_truth_from_coco(
    instances: Mapping[str, Any], captions: Mapping[str, Any], images: Iterable[int], vocabulary: ObjectVocabulary
) -> dict[int, list[str]]:
    """Return COCO id -> sorted nodes: the categories of its instances, and what its reference captions name.

    instances, captions: the contents of COCO's instances_*.json and captions_*.json.
    """
    found: dict[int, set[str]] = {image: set() for image in images}
    categories = {row["id"]: vocabulary.node_of[row["name"]] for row in instances["categories"]}
    for row in instances["annotations"]:
        if row["image_id"] in found:
            found[row["image_id"]].add(categories[row["category_id"]])
    for row in captions["annotations"]:
        if row["image_id"] in found:
            found[row["image_id"]] |= {mention.node for mention in vocabulary.mentions(row["caption"])}
    return {image: sorted(nodes) for image, nodes in found.items()}
