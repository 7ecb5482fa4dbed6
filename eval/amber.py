"""AMBER (Wang et al. 2023): what descriptions invent, and yes/no questions on existence, attributes and relations.

    amber = load(folder)                                       # 1004 pictures to describe, 14,216 questions
    requests(amber, "generative"), DECODING["generative"]      # for llava.eval.generate; likewise "discriminative"
    score(amber, answers); format_table({name: score})

CHAIR, Cover, Hal and Cog are those of the authors' code, which all published figures come from; beside them stand Cog
as their paper defines it and Cover without the code's shadowing of truth words. Different from the original on purpose:
nouns are compared in lower case, and of an answer to a question the leading yes or no counts. `official_quirks` does
both as the original, and rounds where it does.

Similar words count as equal. That takes spaCy's en_core_web_lg once: `python -m eval.amber FOLDER` writes
FOLDER/amber/similar_words.json, and without it only equal words are equal, which the protocol says.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dama.console import digest_of, report_error, say, write_json
from eval.core.judge import QUIRKS, Parts
from eval.core.nouns import FALLBACK, UNLOADABLE, Tagger, nltk_tagger, rule_tagger
from eval.core.official import field_faults, read_json, read_records, refuse_faults
from eval.core.scores import Score, format_scores, ratios, record, score_of
from eval.core.types import Answer, Benchmark, Question
from llava.eval.eval_pope import Reply, count, is_undecided

if TYPE_CHECKING:
    from llava.generation.request import Request

Part = Literal["generative", "discriminative"]

PROTOCOL = "amber"
EXACT = "exact-match"  # labels figures made without the table of similar words
DECODING: dict[Part, dict[str, Any]] = {  # of llava.eval.generate
    "generative": {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0},
    "discriminative": {"max_new_tokens": 16, "num_beams": 1, "temperature": 0.0},
}
OFFICIAL_MODEL = "en_core_web_lg"  # whose vectors say which words are similar; another one is named in the protocol
SIMILAR_ABOVE = 0.8
SIMILAR_WORDS = "similar_words.json"

# Type of a question in the annotations -> the dimensions that it belongs to.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
GENERATIVE = ("chair", "cover", "hal", "cog", "cog_paper", "cover_unshadowed", "mean_words")
RATIOS = ("accuracy", "precision", "recall", "f1")
_PREFIXES = ("", *(f"{name}_" for name in dict.fromkeys(name for names in DIMENSIONS.values() for name in names)))
DISCRIMINATIVE = tuple(prefix + name for prefix in _PREFIXES for name in RATIOS)

_QUERY = {"id": (int,), "image": (str,), "query": (str,)}
_ANNOTATION = {"id": (int,), "type": (str,), "truth": (str, list)}


# ------------------------------------------------------------------------------------------------------ benchmark


class Objects(NamedTuple):
    """The objects annotated for a picture: what is in it, and what a model is likely to invent there."""

    truth: tuple[str, ...]
    hallu: tuple[str, ...]


@dataclass(frozen=True)
class SimilarWords:
    """Which words count as equal: a word to itself, and `pairs` of words, by the vectors of a spaCy `model`."""

    model: str
    pairs: frozenset[frozenset[str]]

    def __call__(self, one: str, other: str) -> bool:
        return one == other or frozenset((one, other)) in self.pairs


@dataclass(frozen=True, kw_only=True)
class Amber(Benchmark):
    """A question's `kinds` are its part and its dimensions, its `truth` yes or no; no judge is asked.

    objects: id of a generative question -> what is annotated. associations: word -> words that stand for it as well.
    safe_words: are never hallucinated. similar: None where there is no table of similar words.
    """

    objects: Mapping[str, Objects]
    associations: Mapping[str, tuple[str, ...]]
    safe_words: frozenset[str]
    similar: SimilarWords | None

    @property
    def vocabulary(self) -> frozenset[str]:
        """The words of which a description's nouns are judged."""
        return frozenset(vocabulary_of(self.associations))

    def part(self, part: Part) -> list[Question]:
        return [question for question in self.questions if question.kinds[0] == part]


def vocabulary_of(associations: Mapping[str, Iterable[str]]) -> list[str]:
    """Sorted: every word that has associations or is one."""
    return sorted(set(associations).union(*associations.values()))


def load(folder: str | Path) -> Amber:
    """annotations.json, query/query_PART.json, relation.json, safe_words.txt of folder/amber; pictures in its images/.

    A part without its file of queries is left out. similar_words.json is read where it is. Raises ValueError, naming
    file and fields.
    """
    home = Path(folder) / "amber"
    rows = read_records(home / "annotations.json", _ANNOTATION)
    annotations = {row["id"]: row for row in rows}
    files: dict[Part, Path] = {part: home / f"query/query_{part}.json" for part in DECODING}
    present = {part: file for part, file in files.items() if file.is_file()}
    refuse_faults(home, [] if present else [f"query/{file.name}: missing" for file in files.values()])
    questions = [question for part, file in present.items() for question in _read_part(part, file, annotations)]
    describe = "generative" in present
    associations = _read_associations(home / "relation.json") if describe else {}
    return Amber(
        tuple(questions),
        "",
        home / "images",
        objects={q.id: _objects(annotations[int(q.id)]) for q in questions if q.kinds[0] == "generative"},
        associations=associations,
        safe_words=frozenset(_read_words(home / "safe_words.txt")) if describe else frozenset(),
        similar=_read_similar(home / SIMILAR_WORDS, vocabulary_of(associations)),
    )


def _read_part(part: Part, file: Path, annotations: Mapping[int, Mapping[str, Any]]) -> list[Question]:
    rows = read_records(file, _QUERY)
    faults = []
    for i, row in enumerate(rows):
        annotation = annotations.get(row["id"], {})
        if part == "generative":
            faults += field_faults(f"annotation {row['id']}", annotation, {"truth": (list,), "hallu": (list,)})
        elif annotation.get("type") not in DIMENSIONS or annotation["truth"] not in ("yes", "no"):
            faults.append(f"record {i}: expected a yes/no annotation with id {row['id']}, got {dict(annotation)}")
    ids = [row["id"] for row in rows]
    faults += [f"{len(ids) - len(set(ids))} ids are used twice"] * (len(ids) > len(set(ids)))
    refuse_faults(file, faults)
    return [_question(part, row, annotations[row["id"]]) for row in rows]


def _question(part: Part, row: Mapping[str, Any], annotation: Mapping[str, Any]) -> Question:
    if part == "generative":
        return Question(str(row["id"]), row["image"], row["query"], ", ".join(annotation["truth"]), (part,))
    kinds = (part, *DIMENSIONS[annotation["type"]])
    return Question(str(row["id"]), row["image"], row["query"], annotation["truth"], kinds)


def _objects(annotation: Mapping[str, Any]) -> Objects:
    return Objects(tuple(annotation["truth"]), tuple(annotation["hallu"]))


def _read_associations(path: Path) -> dict[str, tuple[str, ...]]:
    rows = read_json(path)
    refuse_faults(path, [] if isinstance(rows, dict) else [f"expected an object, got {type(rows).__name__}"])
    refuse_faults(path, [fault for word in rows for fault in field_faults("associations", rows, {word: (list,)})])
    return {word: tuple(others) for word, others in rows.items()}


def _read_words(path: Path) -> list[str]:
    refuse_faults(path, [] if path.is_file() else ["missing"])
    return path.read_text(encoding="utf-8").split()


# -------------------------------------------------------------------------------------------------- similar words


def write_similar_words(folder: str | Path, model: str = OFFICIAL_MODEL) -> Path:
    """Writes folder/amber/similar_words.json: which of the vocabulary's words are similar by a spaCy model's vectors.

    Similar: cosine above 0.8. Raises ValueError where the model cannot be loaded or has no vectors.
    """
    home = Path(folder) / "amber"
    words = vocabulary_of(_read_associations(home / "relation.json"))
    pairs, version = _similar_pairs(words, model)
    table = {"model": Path(model).name, "version": version, "above": SIMILAR_ABOVE, "words": words, "similar": pairs}
    write_json(home / SIMILAR_WORDS, table | {"digest": digest_of(table)})
    return home / SIMILAR_WORDS


def _similar_pairs(words: Sequence[str], model: str) -> tuple[list[list[str]], str]:
    """Pairs of different words, each pair once; and the version of the model."""
    import numpy as np

    try:
        import spacy

        pipeline = spacy.load(model)
        vectors = np.array([pipeline(word).vector for word in words])  # [W, D]
    except UNLOADABLE as error:
        remedy = f"pip install spacy, then python -m spacy download {model}"
        raise ValueError(f"similar words: spaCy's {model} cannot be loaded ({error})\nRemedy: {remedy}") from error
    if not vectors.any():
        raise ValueError(
            f"similar words: {model} has no word vectors\nRemedy: use {OFFICIAL_MODEL}, the scorer's model"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    above = np.triu(directions @ directions.T > SIMILAR_ABOVE, k=1)
    return [[words[i], words[j]] for i, j in np.argwhere(above)], str(pipeline.meta["version"])


def _read_similar(path: Path, vocabulary: Sequence[str]) -> SimilarWords | None:
    """None where there is no table. ValueError for a table that was changed, or made for other words."""
    if not vocabulary or not path.is_file():
        return None
    table = read_json(path)
    remedy = "delete it and write it anew with `python -m eval.amber`"
    if digest_of({name: value for name, value in table.items() if name != "digest"}) != table.get("digest"):
        raise ValueError(f"{path}: its content has not the digest that it names\nRemedy: {remedy}")
    if table["words"] != list(vocabulary):
        raise ValueError(f"{path}: made for {len(table['words'])} words, not for relation.json's\nRemedy: {remedy}")
    return SimilarWords(table["model"], frozenset(map(frozenset, table["similar"])))


# -------------------------------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class Description:
    """What the nouns of one description come to, as the authors' code credits them.

    hallucinated: one flag a noun. covered, imagined: how many truth words and likely inventions are credited. named:
    how many truth words the nouns stand for. likely: how many nouns stand for a likely invention.
    """

    hallucinated: tuple[bool, ...]
    covered: int
    imagined: int
    named: int
    likely: int

    def parts(self, objects: Objects, words: int) -> Parts:
        """Metric -> [numerator, denominator], rates in percent."""
        wrong, nouns = sum(self.hallucinated), len(self.hallucinated)
        return {
            "chair": [100.0 * wrong, nouns],
            "cover": [100.0 * self.covered, len(objects.truth)],
            "hal": [100.0 * (wrong > 0), 1],
            "cog": [100.0 * self.imagined, len(objects.hallu)],
            "cog_paper": [100.0 * self.likely, nouns],  # |R' & H| / |R'|
            "cover_unshadowed": [100.0 * self.named, len(objects.truth)],
            "mean_words": [words, 1],
        }


def describe(nouns: Sequence[str], objects: Objects, amber: Amber) -> Description:
    """Credits the nouns of one description, one after the other.

    A safe word is never hallucinated and earns nothing. A noun that equals a truth word, or a word associated with one,
    covers it. Otherwise it credits the likely inventions that it equals and that it is similar to, and covers the truth
    word that it is similar to; where there is none of these it is hallucinated. Of several such entries the first is
    meant, associations before the words themselves, so that a truth word's association shadows a later truth word.
    """
    truth, hallu = (_entries(words, amber.associations) for words in objects)
    similar = amber.similar or eq
    hallucinated: list[bool] = []
    covered, imagined = set[int | None](), set[int | None]()
    for noun in nouns:
        if noun in amber.safe_words:
            hallucinated.append(False)
            continue
        owner = _first(truth, noun, eq)
        if owner is None:
            imagined |= {_first(hallu, noun, eq), _first(hallu, noun, similar)}
            owner = _first(truth, noun, similar)
        covered.add(owner)
        hallucinated.append(owner is None)
    named = {owner for word, owner in truth if any(similar(noun, word) for noun in nouns)}
    inventions = {word for word, _ in hallu}
    likely = sum(noun in inventions for noun in nouns)
    return Description(tuple(hallucinated), len(covered - {None}), len(imagined - {None}), len(named), likely)


def _entries(words: Sequence[str], associations: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(word, position of the annotated word that a hit credits): all associations in order, then the words."""
    associated = [(other, i) for i, word in enumerate(words) for other in associations.get(word, ())]
    return associated + [(word, i) for i, word in enumerate(words)]


def _first(entries: Iterable[tuple[str, int]], noun: str, equal: Callable[[str, str], bool]) -> int | None:
    return next((owner for word, owner in entries if equal(noun, word)), None)


# -------------------------------------------------------------------------------------------------------- scoring


def requests(amber: Amber, part: Part) -> list[Request]:
    """What the model is asked in this part: the raw query."""
    return replace(amber, questions=tuple(amber.part(part))).requests()


def score(
    amber: Amber, answers: Iterable[Answer], *, tagger: Tagger | None = None, official_quirks: bool = False
) -> Score:
    """GENERATIVE, DISCRIMINATIVE and amber_score = (100 - CHAIR + F1) / 2, in percent but for mean_words.

    The positive class is "no". A part without any answer is undefined, and its questions are not missing. tagger: finds
    the nouns of descriptions; nltk's where it can be loaded, else rules, and then the protocol says so.
    """
    answered = amber.answered(answers)
    parts = {question.kinds[0] for question, _ in answered}
    label, items = PROTOCOL, []
    if "generative" in parts:
        tagger = tagger or nltk_tagger(lower=not official_quirks) or _fallback(amber)
        model = EXACT if amber.similar is None else amber.similar.model
        label += f"-{model}" * (model != OFFICIAL_MODEL) + f"-{FALLBACK}" * (tagger.name == FALLBACK)
        nouns = _noun_finder(tagger, amber.vocabulary, official_quirks)
        items += [_described(*pair, amber, nouns) for pair in answered if pair[0].kinds[0] == "generative"]
    read = official_reading if official_quirks else read_answer
    items += [_replied(*pair, read(pair[1].text)) for pair in answered if pair[0].kinds[0] == "discriminative"]
    figures = (_official_figures if official_quirks else ratios)(items, (*GENERATIVE, *DISCRIMINATIVE))
    chair, f1 = figures["chair"], figures["f1"]
    figures["amber_score"] = None if chair is None or f1 is None else (100 - chair + f1) / 2
    asked = [question for question in amber.questions if question.kinds[0] in parts]
    return score_of(label + QUIRKS * official_quirks, figures, items, asked)


def _fallback(amber: Amber) -> Tagger:
    say(f"AMBER: nltk's tagger and WordNet cannot be loaded, so rules find the nouns; figures labelled {FALLBACK}")
    return rule_tagger(frozenset(word.lower() for word in amber.vocabulary))


Noun = tuple[str, int, int]
"""A word of the vocabulary, and where the text has it: [start, end)."""


def _noun_finder(tagger: Tagger, vocabulary: Collection[str], official_quirks: bool) -> Callable[[str], list[Noun]]:
    """text -> the nouns in it that are in the vocabulary, with repeats; case does not count but as the original."""

    def form(word: str) -> str:
        return word if official_quirks else word.lower()

    known = {form(word): word for word in vocabulary}

    def nouns(text: str) -> list[Noun]:
        words = [word for word in tagger.words(text) if word.noun and form(word.lemma) in known]
        return [(known[form(word.lemma)], word.start, word.end) for word in words]

    return nouns


def _described(question: Question, answer: Answer, amber: Amber, find: Callable[[str], list[Noun]]) -> dict[str, Any]:
    objects, nouns = amber.objects[question.id], find(answer.text)
    description = describe([noun for noun, _, _ in nouns], objects, amber)
    found = list(zip(nouns, description.hallucinated))
    return record(
        question,
        answer,
        truth=list(objects.truth),
        wrong=any(description.hallucinated),
        spans=[[start, end] for (_, start, end), wrong in found if wrong],
        parts=description.parts(objects, len(answer.text.split())),
        part="generative",
        nouns=[{"noun": n, "start": start, "end": end, "correct": not wrong} for (n, start, end), wrong in found],
    )


def read_answer(text: str) -> Reply | None:
    """The yes or no that the answer begins with, in any case; None where it begins otherwise, also with "No idea"."""
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    if found is None or is_undecided(text.strip().split(".")[0].lower()):
        return None
    return "yes" if found[1].lower() == "yes" else "no"


def official_reading(text: str) -> Reply | None:
    """As the original: exactly "Yes" or "No"."""
    return {"Yes": "yes", "No": "no"}.get(text)  # type: ignore[return-value]


def _replied(question: Question, answer: Answer, said: Reply | None) -> dict[str, Any]:
    counted = count([(said, question.truth)], positive="no").parts()
    dimensions = question.kinds[1:]
    parts = {
        prefix + name: [100.0 * counted[name][0], float(counted[name][1])]
        for prefix in ("", *(f"{dimension}_" for dimension in dimensions))
        for name in RATIOS
    }
    wrong = None if said is None else said != question.truth
    return record(
        question, answer, wrong=wrong, parts=parts, part="discriminative", dimensions=list(dimensions), said=said
    )


def _official_figures(items: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """Rounded to one decimal as the original does, F1 made of precision and recall that are rounded already."""
    figures = {name: None if value is None else round(value, 1) for name, value in ratios(items, names).items()}
    for prefix in _PREFIXES:
        precision, recall = figures[f"{prefix}precision"], figures[f"{prefix}recall"]
        if precision is not None and recall is not None:
            slack = 0.001 if prefix == "existence_" else 0.0001
            figures[f"{prefix}f1"] = round(2 * precision * recall / (precision + recall + slack), 1)
    return figures


def format_table(rows: Mapping[str, Score]) -> str:
    """One line per model: the description's figures, those of the questions, F1 by dimension, the AMBER score."""
    described = {"chair": "CHAIR", "cover": "Cover", "hal": "Hal", "cog": "Cog", "cog_paper": "Cog (paper)"}
    replied = {"accuracy": "acc", "precision": "P", "recall": "R", "f1": "F1"}
    dimensions = {f"{name}_f1": name for name in ("existence", "attribute", "relation")}
    titles = described | {"mean_words": "words"} | replied | dimensions | {"amber_score": "score"}
    return format_scores(rows, {name: (title, 1) for name, title in titles.items()})


# -------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.amber", description=write_similar_words.__doc__)
    parser.add_argument("folder", help="the folder that has amber/relation.json")
    parser.add_argument("--model", default=OFFICIAL_MODEL, help="name or folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        path = write_similar_words(args.folder, args.model)
    except Exception as error:
        report_error(error, "amber")
        return 2
    say(f"similar words: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
