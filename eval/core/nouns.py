"""Which words of a text are nouns, and their singulars: by spaCy's tagger, by nltk's, or by rules without any data.

The published scorers need data that is not in the packages (en_core_web_trf; nltk's tagger and WordNet). Where it
cannot be loaded `rule_tagger` takes over, and results made with it are labelled FALLBACK.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple
from zipfile import BadZipFile

from dama.console import log

FALLBACK = "fallback-tagger"

# A word keeps its hyphens ("dog-like" names no dog); "man's" gives man and s.
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

_SPACY_NOUNS = ("NN", "NNS", "NNP", "NNPS")


class Word(NamedTuple):
    """text[start:end] is the word as written."""

    lemma: str
    noun: bool
    start: int
    end: int


@dataclass(frozen=True)
class Tagger:
    """`words`: text -> its words in order. `name`: of the tagger."""

    name: str
    words: Callable[[str], list[Word]]


# -------------------------------------------------------------------------------------------- taggers with their data

# Raised by packages or data that are missing, damaged, or of another version: a component's factory that is not
# installed is a ValueError (E002), weights that do not fit are a RuntimeError.
UNLOADABLE = (ImportError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, BadZipFile)
_SETS_TAGS = ("tagger", "attribute_ruler")


def spacy_tagger(model: str = "en_core_web_trf") -> Tagger | None:
    """A spaCy pipeline, given by name or folder; None where it cannot be loaded and run, or tags no words."""
    try:
        import spacy

        pipeline = spacy.load(model, exclude=["parser", "ner"])
        pipeline("a dog")  # some components fail only when they run
    except UNLOADABLE as error:
        _log_reason(f"spaCy's {model}", error)
        return None
    if not any(name in pipeline.pipe_names for name in _SETS_TAGS):
        log(f"nouns: spaCy's {model} has no tagger; its components are {', '.join(pipeline.pipe_names) or 'none'}")
        return None

    @cache  # what is extracted repeats from answer to answer
    def words(text: str) -> list[Word]:
        return [Word(t.lemma_, t.tag_ in _SPACY_NOUNS, t.idx, t.idx + len(t)) for t in pipeline(text)]

    return Tagger(model, words)


def nltk_tagger(*, lower: bool = True) -> Tagger | None:
    """Load nltk's tokenizer, tagger and WordNet lemmatizer; None where nltk or its data is not installed.

    lower: words are lemmatized in lower case. As they stand, "Dogs" at the head of a sentence stays "Dogs".
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer

        lemma = WordNetLemmatizer().lemmatize
        nltk.pos_tag(nltk.word_tokenize(lemma("dogs")))
    except UNLOADABLE as error:
        _log_reason("nltk or its data", error)
        return None

    def words(text: str) -> list[Word]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        spans = _spans(text, [word for word, _ in tagged])
        return [Word(lemma(w.lower() if lower else w), tag.startswith("NN"), *s) for (w, tag), s in zip(tagged, spans)]

    return Tagger("nltk", words)


def _log_reason(what: str, error: Exception) -> None:
    lines = (line.strip() for line in f"{type(error).__name__}: {error}".splitlines())
    reason = " ".join(line for line in lines if line.strip("*"))  # nltk frames its messages with asterisks
    log(f"nouns: {what} cannot be loaded: {reason[:200]}")


def _spans(text: str, tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where the tokens stand; nltk rewrites quotation marks, which stand nowhere and get an empty span."""
    end = 0
    for token in tokens:
        start = text.find(token, end)
        if start >= 0:
            end = start + len(token)
        yield (start, end) if start >= 0 else (end, end)


# -------------------------------------------------------------------------------------------------- singulars by rule

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


def singularize(word: str, known: Collection[str]) -> str:
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


# ---------------------------------------------------------------------------------------------------- nouns by rule


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ARTICLES = _set("a an the its his her their my your our each every another one")
_SUBJECTS = _set("i you he she it we they who which that there")
_MODALS = _set("can could may might must shall should will would")
_FUNCTION_WORDS = (
    _ARTICLES
    | _SUBJECTS
    | _MODALS
    | _set(
        "this these those some any no is are was were be been being am has have had having do does did me him us them "
        "himself herself itself themselves and or but nor so yet as if than while when where what how why because "
        "although though since until whether both either neither not also too very more most less least much many few "
        "several all various other such same only just even still already again here then now of in on at by for with "
        "from to into onto over under above below behind beside between among amid against along across around "
        "through near off out up down inside outside within without toward towards during before after about per like "
        "upon next together away beneath underneath alongside atop beyond throughout via opposite "
        "multiple two three four five six seven eight nine ten"
    )
)
_ADJECTIVES = _set(
    "red blue green yellow orange purple pink white black gray grey brown beige golden silver tan dark bright light "
    "big small large little tiny huge long short tall high low old young new modern vintage hot cold warm wet dry "
    "clean dirty empty full open wooden metallic plastic soft hard round square flat thick thin heavy fresh raw ripe "
    "good nice beautiful pretty cute fluffy furry cozy sunny cloudy snowy sandy rocky grassy leafy rusty shiny dusty "
    "muddy busy happy left right front rear upper lower main single double adult male female individual "
    "stainless smaller larger bigger older younger taller elderly standard separate average top bottom first second "
    "third last"
)
_NO_NOUNS = _FUNCTION_WORDS | _ADJECTIVES
_ADJECTIVE_ENDINGS = ("ful", "ous", "ive", "able", "ible", "ial", "onal", "less", "ly")
_NOT_BY_ENDING = _set(
    "family butterfly belly jelly bully olive hive table vegetable bible cable stable locomotive "
    "bed sled shed weed seed reed seaweed bedspread moped steed king ring wing string spring thing building ceiling "
    "clothing railing painting drawing earring sibling evening morning lightning pudding dumpling duckling icing "
    "flooring lighting awning sling wedding topping stuffing siding crossing marking frosting swing"
)
_ALSO_VERBS = _set(
    "watch drink leave lock monitor note pack paddle painting drawing plug ring sign signal ski skate sound support "
    "switch track train water brush book park stage range fish surf line file"
)
_BEFORE_A_CAN = (
    _ARTICLES | _ADJECTIVES | _set("soda tin beer trash garbage paint spray watering aluminum metal cola food")
)
_NEARNESS = _set("next close adjacent due similar")  # what makes "to" a preposition: "next to water"


def rule_tagger(known: Collection[str]) -> Tagger:
    """Return a tagger that finds nouns by closed classes, endings and neighbors; lemmas are known singulars."""
    return Tagger(FALLBACK, partial(_tag, known=known))


def _tag(text: str, known: Collection[str]) -> list[Word]:
    matches = list(WORD.finditer(text))
    words = [match.group().lower() for match in matches]
    # "" stands for a neighbour beyond a comma or another break.
    joined = [text[a.end() : b.start()].isspace() for a, b in zip(matches, matches[1:])]
    before = ["", *(word if near else "" for word, near in zip(words, joined))]
    after = [*(word if near else "" for word, near in zip(words[1:], joined)), ""]
    found = []
    for i, match in enumerate(matches):
        lemma = singularize(words[i], known)
        noun = _is_noun(words[i], before[max(i - 1, 0)], before[i], after[i], lemma in known)
        found.append(Word(lemma, noun, match.start(), match.end()))
    return found


def _is_noun(word: str, two_before: str, before: str, after: str, known: bool) -> bool:
    if word == "can":
        return before in _BEFORE_A_CAN
    if word in _ADJECTIVES:  # an orange, but: an orange cup
        return known and not (_may_be_noun(after) or after in _ADJECTIVES)
    if word.removesuffix("s") in _ALSO_VERBS:
        to = before == "to" and two_before not in _NEARNESS
        return not (to or before in _MODALS | _SUBJECTS or after in _ARTICLES)
    return _may_be_noun(word)


def _may_be_noun(word: str) -> bool:
    if len(word) < 2 or word.isdigit() or word in _NO_NOUNS:
        return False
    return word in _NOT_BY_ENDING or not word.endswith((*_ADJECTIVE_ENDINGS, "ing", "ed"))
