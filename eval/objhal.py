"""Object HalBench in rule mode: which COCO objects does a caption name, and which of them are not in the picture?

The protocol `objhal-rules` is the official scorer's path without a judge (RLHF-V / RLAIF-V, after CHAIR, Rohrbach et
al. 2018): the words of the caption itself are matched, and EVERY OCCURRENCE counts. The official path with a judge
counts each surface string once per response, so mention-level figures of the two are not comparable. Different from the
official code on purpose: upper case never hides an object ("iPhone"), synonyms of three words match whole, words are
split at any white space, and a metric with nothing to divide by is None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.core.statistics import Interval, paired_difference, ratio_interval
from eval.core.types import Answer

PROTOCOL = "objhal-rules"

# A word keeps its hyphens ("dog-like" names no dog); "man's" gives man and s.
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

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

_IRREGULAR = {"mice": "mouse", "geese": "goose", "oxen": "ox", "people": "person"}
# Plural ending -> singular endings to try, in this order; "-es" goes only where it is needed: "skies" are no ski.
_ENDINGS = (
    ("children", ("child",)),
    ("men", ("man",)),
    ("ies", ("y",)),
    ("ves", ("f", "fe")),
    *((f"{sibilant}es", (sibilant,)) for sibilant in ("s", "x", "z", "ch", "sh", "o")),
    ("s", ("",)),
)


@dataclass(frozen=True)
class Mention:
    """One object named in a text: the vocabulary's word for it, its COCO node, and text[start:end] as written."""

    surface: str
    node: str
    start: int
    end: int


@dataclass(frozen=True)
class ObjectVocabulary:
    """node_of: word or phrase -> node. phrases: words of a phrase -> the word it stands for, in node_of or not."""

    node_of: Mapping[str, str]
    phrases: Mapping[tuple[str, ...], str]
    words: frozenset[str]
    longest: int

    @classmethod
    def from_mapping(cls, synonyms: Mapping[str, Iterable[str]]) -> ObjectVocabulary:
        """node -> its synonyms (the node itself need not be repeated). Raises ValueError for a word of two nodes."""
        node_of: dict[str, str] = {}
        for node, others in synonyms.items():
            for word in (node, *others):
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
        return cls(node_of, phrases, words, max(len(phrase) for phrase in phrases))

    @classmethod
    def from_synonym_lines(cls, lines: Iterable[str]) -> ObjectVocabulary:
        """The official file's format: one line "node, synonym, synonym, ..." per node; blank lines are skipped."""
        rows = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        return cls.from_mapping({row[0]: tuple(row[1:]) for row in rows if row})

    @property
    def nodes(self) -> frozenset[str]:
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
        matches = list(_WORD.finditer(text))
        words = [singularise(match.group().lower(), self.words) for match in matches]
        # joined[i]: only white space lies between word i - 1 and word i, so a comma ends a phrase.
        joined = [i > 0 and text[matches[i - 1].end() : match.start()].isspace() for i, match in enumerate(matches)]
        i = 0
        while i < len(words):
            length = self._phrase_length(words, joined, i)
            surface = self.phrases[tuple(words[i : i + length])] if length > 1 else words[i]
            yield surface, matches[i].start(), matches[i + length - 1].end()
            i += length

    def _phrase_length(self, words: Sequence[str], joined: Sequence[bool], i: int) -> int:
        for length in range(min(self.longest, len(words) - i), 1, -1):
            if tuple(words[i : i + length]) in self.phrases and all(joined[i + 1 : i + length]):
                return length
        return 1


def singularise(word: str, known: Collection[str]) -> str:
    """The singular of a lower-case word if it is among the known words, else the word unchanged.

    Because only a known singular is accepted, the rules may be generous: "stoves" tries stof and stofe before stove.
    A known word stays as it is (skis, scissors, bus, children).
    """
    if word in known:
        return word
    return next((singular for singular in _singulars(word) if singular in known), word)


def _singulars(word: str) -> Iterator[str]:
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    for ending, replacements in _ENDINGS:
        if word.endswith(ending) and not word.endswith("ss"):
            yield from (word.removesuffix(ending) + replacement for replacement in replacements)


@dataclass(frozen=True)
class ObjHalItem:
    """One caption, the objects it names, and the nodes that are in its picture."""

    answer: Answer
    mentions: tuple[Mention, ...]
    truth: frozenset[str]

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        return tuple(mention for mention in self.mentions if mention.node not in self.truth)

    @property
    def found(self) -> frozenset[str]:
        return self.truth & {mention.node for mention in self.mentions}

    @property
    def words(self) -> int:
        return len(self.answer.text.replace("Assistant:", "").split())

    @property
    def repeated(self) -> int:
        """Objects named more than once by the same word: "a dog and a dog" is one, "a man and a woman" is none."""
        return sum(count > 1 for count in Counter(mention.surface for mention in self.mentions).values())

    def spans(self) -> list[tuple[int, int, Literal["hallucinated", "correct"]]]:
        """(start, end, kind) per mention, character offsets into the answer's text, for marking them in place."""
        return [(m.start, m.end, "correct" if m.node in self.truth else "hallucinated") for m in self.mentions]

    def record(self) -> dict[str, Any]:
        return {
            "question_id": self.answer.id,
            "image_id": self.answer.image_id,
            "prompt": self.answer.prompt,
            "text": self.answer.text,
            "mentions": [
                {"surface": m.surface, "node": m.node, "start": m.start, "end": m.end, "correct": m.node in self.truth}
                for m in self.mentions
            ],
            "missed": sorted(self.truth - self.found),
            "words": self.words,
            "repeated_objects": self.repeated,
        }


# Each metric is sum(first) / sum(second) over the items; rates in percent, words and objects per response.
METRICS: dict[str, Callable[[ObjHalItem], tuple[float, float]]] = {
    "response_level": lambda item: (100.0 * bool(item.hallucinated), bool(item.mentions)),  # CHAIRs_refine
    "chairs": lambda item: (100.0 * bool(item.hallucinated), 1),
    "mention_level": lambda item: (100.0 * len(item.hallucinated), len(item.mentions)),  # CHAIRi
    "object_recall": lambda item: (100.0 * len(item.found), len(item.truth)),
    "mean_words": lambda item: (item.words, 1),
    "repeated_objects": lambda item: (item.repeated, 1),
}


@dataclass(frozen=True)
class ObjHalScore:
    """metrics: the names of METRICS -> value with its 95 % bootstrap interval over pictures; None where undefined."""

    items: tuple[ObjHalItem, ...]
    metrics: Mapping[str, Interval]
    protocol: str = PROTOCOL

    def counts(self) -> dict[str, int]:
        return {
            "answers": len(self.items),
            "answers_without_object": sum(not item.mentions for item in self.items),
            "mentions": sum(len(item.mentions) for item in self.items),
            "hallucinated_mentions": sum(len(item.hallucinated) for item in self.items),
            "objects_in_pictures": sum(len(item.truth) for item in self.items),
        }

    def metrics_record(self) -> dict[str, dict[str, float | None]]:
        return {name: interval._asdict() for name, interval in self.metrics.items()}


def score_captions(
    captions: Iterable[Answer], ground_truth: Mapping[str, Collection[str]], vocabulary: ObjectVocabulary
) -> ObjHalScore:
    """Scores captions against image_id -> nodes in that picture (possibly none).

    Raises ValueError for a caption whose picture has no ground truth, and for a node that the vocabulary lacks.
    """
    items = tuple(_item(answer, ground_truth, vocabulary) for answer in captions)
    groups = [item.answer.image_id for item in items]
    metrics = {name: ratio_interval(*_sums(items, name), groups) for name in METRICS}
    return ObjHalScore(items, metrics)


def _item(answer: Answer, ground_truth: Mapping[str, Collection[str]], vocabulary: ObjectVocabulary) -> ObjHalItem:
    if answer.image_id not in ground_truth:
        raise ValueError(
            f"answer {answer.id!r}: image_id {answer.image_id!r} is not among the {len(ground_truth)} pictures with "
            "ground truth; score the answers with the ground truth of their own pictures (ids are text)"
        )
    truth = frozenset(ground_truth[answer.image_id])
    if unknown := truth - vocabulary.nodes:
        raise ValueError(
            f"ground truth of picture {answer.image_id!r}: {sorted(unknown)} are no nodes of the vocabulary, so no "
            "caption can name them; use the vocabulary that the ground truth was made with"
        )
    return ObjHalItem(answer, tuple(vocabulary.mentions(answer.text)), truth)


def _sums(items: Sequence[ObjHalItem], metric: str) -> tuple[list[float], list[float]]:
    pairs = [METRICS[metric](item) for item in items]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def difference(first: ObjHalScore, second: ObjHalScore) -> dict[str, Interval]:
    """first - second per metric, with a paired bootstrap interval. ValueError unless both answer the same questions."""
    ours, theirs = ({item.answer.id: item for item in score.items} for score in (first, second))
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"paired difference: {len(ours.keys() ^ theirs.keys())} question ids are in one of the two scores only "
            f"(of {len(ours)} and {len(theirs)}); score both models on the same questions"
        )
    items, others = list(ours.values()), [theirs[key] for key in ours]
    groups = [item.answer.image_id for item in items]
    return {name: paired_difference(_sums(items, name), _sums(others, name), groups) for name in METRICS}


_COLUMNS = {
    "response_level": ("response-level %", 1),
    "mention_level": ("mention-level %", 1),
    "object_recall": ("object recall %", 1),
    "mean_words": ("mean words", 1),
    "repeated_objects": ("repeated objects", 2),
}


def format_table(rows: Mapping[str, ObjHalScore]) -> str:
    """One aligned line per model under a heading, each figure as "value [low, high]" with its 95 % interval, or n/a."""
    lines = [["", *(title for title, _ in _COLUMNS.values())]]
    for name, score in rows.items():
        lines.append([name, *(_cell(score.metrics[key], decimals) for key, (_, decimals) in _COLUMNS.items())])
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def _cell(interval: Interval, decimals: int) -> str:
    if interval.value is None:
        return "n/a"
    return f"{interval.value:.{decimals}f} [{interval.low:.{decimals}f}, {interval.high:.{decimals}f}]"
