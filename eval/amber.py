"""AMBER (Wang et al. 2023): what descriptions invent, and yes/no questions on existence, attributes and relations.

    amber = load(folder)                                       # 1004 images to describe, 14,216 questions
    score(amber, answers); format_table({name: score})

CHAIR, Cover, Hal and Cog are those of the authors' code, which all published results come from; beside them stand Cog
as their paper defines it and Cover without the code's shadowing of truth words. Different from the original on purpose:
nouns are compared in lower case, and of an answer to a question the leading yes or no counts. `official_quirks` does
both as the original, and rounds where it does.

Similar words count as equal. That takes spaCy's en_core_web_lg once: `python -m eval.amber FOLDER` writes
FOLDER/amber/similar_words.json, and without it only equal words are equal, which the protocol says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dama.console import digest_of, log, report_error, write_json
from eval.core.benchmark import Benchmark, Part, SummaryColumn, TradeOff
from eval.core.metrics import Metric, derived
from eval.core.nouns import FALLBACK, UNLOADABLE, Tagger, nltk_tagger, rule_tagger
from eval.core.official import field_errors, raise_errors, read_json, read_records
from eval.core.scores import QUIRKS, Score, Table, TableColumn, score_items
from eval.core.sources import GITHUB_RAW, File, ImageSource, archive_with, files_of
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of
from eval.yes_no import read_leading as read_answer
from llava.eval.eval_pope import Reply, count

PartName = Literal["generative", "discriminative"]

PROTOCOL = "amber"
EXACT = "exact-match"  # labels metrics computed without the table of similar words
DECODING: dict[PartName, dict[str, Any]] = {
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
RATIOS = ("accuracy", "precision", "recall", "f1")
_PREFIXES = ("", *(f"{name}_" for name in dict.fromkeys(name for names in DIMENSIONS.values() for name in names)))

_QUERY = {"id": (int,), "image": (str,), "query": (str,)}
_ANNOTATION = {"id": (int,), "type": (str,), "truth": (str, list)}


# ------------------------------------------------------------------------------------------------------ benchmark


class Objects(NamedTuple):
    """The objects annotated for an image: what is in it, and what a model is likely to invent there."""

    truth: tuple[str, ...]
    hallu: tuple[str, ...]


@dataclass(frozen=True)
class SimilarWords:
    """Which words count as equal: a word to itself, and `pairs` of words, by the vectors of a spaCy `model`."""

    model: str
    pairs: frozenset[frozenset[str]]

    def __call__(self, one: str, other: str) -> bool:
        """Whether the two words count as equal; symmetric."""
        return one == other or frozenset((one, other)) in self.pairs


@dataclass(frozen=True, kw_only=True)
class Amber(BenchmarkData):
    """Questions and annotations. A question's `kinds` are its part and its dimensions, its `truth` yes or no.

    objects: id of a generative question -> its annotation. associations: word -> words that stand for it as well.
    safe_words: words that are never hallucinated. similar: None without a table of similar words.
    """

    objects: Mapping[str, Objects]
    associations: Mapping[str, tuple[str, ...]]
    safe_words: frozenset[str]
    similar: SimilarWords | None

    @property
    def vocabulary(self) -> frozenset[str]:
        """The words that count among a description's nouns."""
        return frozenset(vocabulary_of(self.associations))

    def part(self, part: PartName) -> list[Question]:
        """Return the questions of one part."""
        return [question for question in self.questions if question.kinds[0] == part]


def vocabulary_of(associations: Mapping[str, Iterable[str]]) -> list[str]:
    """Return, sorted, every word that has associations or is one."""
    return sorted(set(associations).union(*associations.values()))


def load(folder: str | Path, mode: str = "") -> Amber:
    """Read annotations.json, query/query_PART.json, relation.json and safe_words.txt of folder/amber.

    A part without its file of queries is left out; similar_words.json is optional. There is one mode.
    Raises ValueError, naming file and fields.
    """
    del mode
    source = Path(folder) / "amber"
    rows = read_records(source / "annotations.json", _ANNOTATION)
    annotations = {row["id"]: row for row in rows}
    files: dict[PartName, Path] = {part: source / f"query/query_{part}.json" for part in DECODING}
    present = {part: file for part, file in files.items() if file.is_file()}
    raise_errors(source, [] if present else [f"query/{file.name}: missing" for file in files.values()])
    questions = [question for part, file in present.items() for question in _read_part(part, file, annotations)]
    describe = "generative" in present
    associations = _read_associations(source / "relation.json") if describe else {}
    return Amber(
        tuple(questions),
        "",
        source / "images",
        objects={q.id: _objects(annotations[int(q.id)]) for q in questions if q.kinds[0] == "generative"},
        associations=associations,
        safe_words=frozenset(_read_words(source / "safe_words.txt")) if describe else frozenset(),
        similar=_read_similar(source / SIMILAR_WORDS, vocabulary_of(associations)),
    )


def _read_part(part: PartName, file: Path, annotations: Mapping[int, Mapping[str, Any]]) -> list[Question]:
    rows = read_records(file, _QUERY)
    errors = []
    for i, row in enumerate(rows):
        annotation = annotations.get(row["id"], {})
        if part == "generative":
            errors += field_errors(f"annotation {row['id']}", annotation, {"truth": (list,), "hallu": (list,)})
        elif annotation.get("type") not in DIMENSIONS or annotation["truth"] not in ("yes", "no"):
            errors.append(f"record {i}: expected a yes/no annotation with id {row['id']}, got {dict(annotation)}")
    ids = [row["id"] for row in rows]
    errors += [f"{len(ids) - len(set(ids))} ids are used twice"] * (len(ids) > len(set(ids)))
    raise_errors(file, errors)
    return [_question(part, row, annotations[row["id"]]) for row in rows]


def _question(part: PartName, row: Mapping[str, Any], annotation: Mapping[str, Any]) -> Question:
    if part == "generative":
        return Question(str(row["id"]), row["image"], row["query"], ", ".join(annotation["truth"]), (part,))
    kinds = (part, *DIMENSIONS[annotation["type"]])
    return Question(str(row["id"]), row["image"], row["query"], annotation["truth"], kinds)


def _objects(annotation: Mapping[str, Any]) -> Objects:
    return Objects(tuple(annotation["truth"]), tuple(annotation["hallu"]))


def _read_associations(path: Path) -> dict[str, tuple[str, ...]]:
    rows = read_json(path)
    raise_errors(path, [] if isinstance(rows, dict) else [f"expected an object, got {type(rows).__name__}"])
    raise_errors(path, [error for word in rows for error in field_errors("associations", rows, {word: (list,)})])
    return {word: tuple(others) for word, others in rows.items()}


def _read_words(path: Path) -> list[str]:
    raise_errors(path, [] if path.is_file() else ["missing"])
    return path.read_text(encoding="utf-8").split()


# -------------------------------------------------------------------------------------------------- similar words


def write_similar_words(folder: str | Path, model: str = OFFICIAL_MODEL) -> Path:
    """Write folder/amber/similar_words.json: which of the vocabulary's words are similar by a spaCy model's vectors.

    Similar: cosine above 0.8. Raises ValueError where the model cannot be loaded or has no vectors.
    """
    source = Path(folder) / "amber"
    words = vocabulary_of(_read_associations(source / "relation.json"))
    pairs, version = _similar_pairs(words, model)
    table = {"model": Path(model).name, "version": version, "above": SIMILAR_ABOVE, "words": words, "similar": pairs}
    write_json(source / SIMILAR_WORDS, table | {"digest": digest_of(table)})
    return source / SIMILAR_WORDS


def _similar_pairs(words: Sequence[str], model: str) -> tuple[list[list[str]], str]:
    """Return pairs of different words, each pair once, and the version of the model."""
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
    """Read the table, None without one. ValueError for a table that was changed, or made for other words."""
    if not vocabulary or not path.is_file():
        return None
    table = read_json(path)
    remedy = "delete it and write it anew with `python -m eval.amber`"
    if digest_of({name: value for name, value in table.items() if name != "digest"}) != table.get("digest"):
        raise ValueError(f"{path}: expected content of the digest that it names, got another\nRemedy: {remedy}")
    if table["words"] != list(vocabulary):
        raise ValueError(f"{path}: made for {len(table['words'])} words, not for relation.json's\nRemedy: {remedy}")
    return SimilarWords(table["model"], frozenset(map(frozenset, table["similar"])))


# -------------------------------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class Description:
    """How the authors' code credits the nouns of one description.

    hallucinated: one flag per noun. covered, imagined: how many truth words and likely inventions are credited. named:
    how many truth words the nouns stand for. likely: how many nouns stand for a likely invention.
    """

    hallucinated: tuple[bool, ...]
    covered: int
    imagined: int
    named: int
    likely: int

    def parts(self, objects: Objects, words: int) -> Parts:
        """Return metric -> [numerator, denominator], rates in percent."""
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
    """Credit the nouns of one description, one after the other.

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

_RATIO_TITLES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1"}
METRICS = (
    Metric(
        "amber_score", "AMBER score", inputs=("chair", "f1"), formula=lambda chair, f1: (100 - chair + f1) / 2
    ),
    Metric("chair", "CHAIR %", "lower"),
    Metric("cover", "Cover %"),
    Metric("hal", "Hal %", "lower"),
    Metric("cog", "Cog %", "lower"),
    Metric("cog_paper", "Cog (paper) %", "lower"),
    Metric("cover_unshadowed", "Cover (unshadowed) %"),
    Metric("mean_words", "mean words", None),
    *(
        Metric(f"{prefix}{ratio}", f"{prefix.replace('_', ' ')}{_RATIO_TITLES[ratio]}")
        for prefix in _PREFIXES
        for ratio in RATIOS
    ),
)  # fmt: skip


def score(
    amber: Amber, answers: Iterable[Answer], *, tagger: Tagger | None = None, official_quirks: bool = False
) -> Score:
    """Compute the metrics of descriptions and of questions, and amber_score = (100 - CHAIR + F1) / 2; in percent.

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
    asked = [question for question in amber.questions if question.kinds[0] in parts]
    result = score_items(label + QUIRKS * official_quirks, METRICS, items, asked)
    return replace(result, metrics=_rounded_as_original(result.metrics)) if official_quirks else result


def _fallback(amber: Amber) -> Tagger:
    log(f"AMBER: nltk's tagger and WordNet cannot be loaded, so rules find the nouns; metrics labeled {FALLBACK}")
    return rule_tagger(frozenset(word.lower() for word in amber.vocabulary))


Noun = tuple[str, int, int]
"""A word of the vocabulary, and its place in the text: [start, end)."""


def _noun_finder(tagger: Tagger, vocabulary: Collection[str], official_quirks: bool) -> Callable[[str], list[Noun]]:
    """Return a function: text -> its nouns in the vocabulary, with repeats; only the original is case-sensitive."""

    def form(word: str) -> str:
        return word if official_quirks else word.lower()

    known = {form(word): word for word in vocabulary}

    def nouns(text: str) -> list[Noun]:
        words = [word for word in tagger.words(text) if word.noun and form(word.lemma) in known]
        return [(known[form(word.lemma)], word.start, word.end) for word in words]

    return nouns


def _described(question: Question, answer: Answer, amber: Amber, find: Callable[[str], list[Noun]]) -> Record:
    objects, nouns = amber.objects[question.id], find(answer.text)
    description = describe([noun for noun, _, _ in nouns], objects, amber)
    found = list(zip(nouns, description.hallucinated))
    return record_of(
        question,
        answer.text,
        truth=list(objects.truth),
        wrong=any(description.hallucinated),
        spans=[[start, end] for (_, start, end), wrong in found if wrong],
        parts=description.parts(objects, len(answer.text.split())),
        part="generative",
        nouns=[{"noun": n, "start": start, "end": end, "correct": not wrong} for (n, start, end), wrong in found],
    )


def official_reading(text: str) -> Reply | None:
    """Read as the original: exactly "Yes" or "No"."""
    return {"Yes": "yes", "No": "no"}.get(text)  # type: ignore[return-value]


def _replied(question: Question, answer: Answer, reply: Reply | None) -> Record:
    counted = count([(reply, question.truth)], positive="no").parts()
    dimensions = question.kinds[1:]
    parts = {
        prefix + name: [100.0 * counted[name][0], float(counted[name][1])]
        for prefix in ("", *(f"{dimension}_" for dimension in dimensions))
        for name in RATIOS
    }
    wrong = None if reply is None else reply != question.truth
    extras = {"part": "discriminative", "dimensions": list(dimensions), "said": reply}
    return record_of(question, answer.text, wrong=wrong, parts=parts, **extras)


def _rounded_as_original(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Round to one decimal as the original does, with F1 computed from rounded precision and recall."""
    values = {name: None if value is None else round(value, 1) for name, value in metrics.items()}
    for prefix in _PREFIXES:
        precision, recall = values[f"{prefix}precision"], values[f"{prefix}recall"]
        if precision is not None and recall is not None:
            slack = 0.001 if prefix == "existence_" else 0.0001
            values[f"{prefix}f1"] = round(2 * precision * recall / (precision + recall + slack), 1)
    return values | derived(METRICS, values)


format_table = Table(
    tuple(
        TableColumn(metric, title)
        for metric, title in {
            "chair": "CHAIR",
            "cover": "Cover",
            "hal": "Hal",
            "cog": "Cog",
            "cog_paper": "Cog (paper)",
            "mean_words": "words",
            "accuracy": "acc",
            "precision": "P",
            "recall": "R",
            "f1": "F1",
            "existence_f1": "existence",
            "attribute_f1": "attribute",
            "relation_f1": "relation",
            "amber_score": "score",
        }.items()
    ),
    note="unparsed, right in no metric, which lowers accuracy and recall",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_PACKAGE = File(
    "amber/AMBER.zip",
    by_hand="by hand, from the Google Drive that the README of github.com/junyangwang0410/AMBER links to",
    check=archive_with(),
)
_FILES = {
    "annotations.json": (1813301, "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797"),
    "relation.json": (12699, "c4c1491e9bbc3209abc1888c12a1bf8413bdbab8a0d8be04b990a2e7680cf23e"),
    "safe_words.txt": (57, "f92cf1123f4578a2630832fac3e6ac4de36212ea55859d3bed4fd233723f4043"),
    "query/query_generative.json": (106220, "b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087"),
    "query/query_discriminative.json": (1738529, "1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8"),
}


def _image_urls(data: Path) -> dict[str, str]:
    return {row["image"]: "" for row in read_json(data / "amber/query/query_generative.json")}


def _is_of(part: PartName, question: Question) -> bool:
    return question.kinds[0] == part


BENCHMARK = Benchmark(
    name="amber",
    title="AMBER",
    wrong="invents an object, or answers a question falsely",
    files=files_of(
        "amber", f"{GITHUB_RAW}/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data", _FILES
    ),
    images=ImageSource("amber/images", _image_urls, f"taken out of {_PACKAGE.path}, {_PACKAGE.source}", _PACKAGE),
    load=load,
    parts=tuple(Part(decoding, name, partial(_is_of, name)) for name, decoding in DECODING.items()),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("chair", "AMBER CHAIR", rim=20),
        SummaryColumn("cover", "Cover"),
        SummaryColumn("hal", "Hal"),
        SummaryColumn("cog", "Cog", rim=None),
        SummaryColumn("mean_words", "AMBER words", rim=None),
        SummaryColumn("f1", "AMBER F1"),
    ),
    stratum=lambda question: question.kinds[0],
    trade_off=TradeOff("cover", ("chair", "hal", "cog")),
    table=format_table,
    published_file=Path(__file__).with_name("amber_published.json"),
)


# -------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Write similar words; return the exit code, 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m eval.amber", description=write_similar_words.__doc__)
    parser.add_argument("folder", help="the folder that has amber/relation.json")
    parser.add_argument("--model", default=OFFICIAL_MODEL, help="name or folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        path = write_similar_words(args.folder, args.model)
    except Exception as error:
        report_error(error, "amber")
        return 2
    log(f"similar words: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
