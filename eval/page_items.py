"""A page's items, stored compactly: arrays instead of objects, every text once, all of it compressed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dama.report import cut_at_spans
from eval.core.types import Record

OUTCOMES: dict[bool | None, str] = {True: "wrong", False: "right", None: "unparsed"}
MISSING = ("missing", "No answer")  # the state of an item that some result has no answer to, and its name
MARKS = (None, "hallucinated", "correct")
_TAGS = ("kinds", "part", "split", "dimensions")  # fields of a record that say which class of items it belongs to


class AnswerView(NamedTuple):
    """One model's answer: its outcome, its text in pieces with their marks, the scorer's findings, the verdicts."""

    outcome: str
    pieces: list[tuple[str, str | None]]
    facts: list[str]
    verdicts: list[str]


class ItemView(NamedTuple):
    """What the page shows of an item. image_number: of the page's images, -1 for none."""

    id: str
    image: str
    image_number: int
    prompt: str
    truth: list[str]
    context: str
    tags: list[str]
    state: str
    answers: list[AnswerView]


def item_view(records: Sequence[Record], numbers: Mapping[str, int]) -> ItemView:
    """Return what the page shows of an item. records: of one run or of two. numbers: image -> its number."""
    first = records[0]
    return ItemView(
        id=first["id"],
        image=first["image"],
        image_number=numbers.get(first["image"], -1),
        prompt=first["prompt"],
        truth=first["truth"] if isinstance(first["truth"], list) else [first["truth"]],
        context=first.get("context", ""),
        tags=tags_of(first),
        state=state_of(records),
        answers=[_answer_view(record) for record in records],
    )


def _answer_view(record: Record) -> AnswerView:
    verdicts = [text or "(no reply)" for text in record.get("verdicts", ())]
    return AnswerView(_outcome(record), marked(record), list(_facts(record)), verdicts)


def state_of(records: Sequence[Record]) -> str:
    """Return what the item can be filtered by: unparsed, missing, or the outcomes of its answers."""
    outcomes = [_outcome(record) for record in records]
    return next((state for state in ("unparsed", MISSING[0]) if state in outcomes), " ".join(outcomes))


def _outcome(record: Record) -> str:
    return MISSING[0] if record.get("missing") else OUTCOMES[record["wrong"]]


def tags_of(record: Record) -> list[str]:
    """Return the classes that an item belongs to: a kind of question, a split, a dimension."""
    values = [record.get(name, []) for name in _TAGS]
    return list(dict.fromkeys(tag for value in values for tag in ([value] if isinstance(value, str) else value)))


def marked(record: Record) -> list[tuple[str, str | None]]:
    """Cut the answer into pieces: hallucinated, correct, or None. Of overlapping marks the first counts, wrong first.

    Pieces rather than offsets, because a browser counts some characters twice.
    """
    named = [*record.get("mentions", ()), *record.get("nouns", ())]
    spans = [(start, end, "hallucinated") for start, end in record["spans"]]
    spans += [(mark["start"], mark["end"], "correct") for mark in named if mark["correct"]]
    selected: list[Any] = []
    for start, end, kind in spans:
        if start < end and all(end <= other[0] or start >= other[1] for other in selected):
            selected.append((start, end, kind))
    return cut_at_spans(record["text"], selected)


def _facts(record: Record) -> Iterable[str]:
    """Describe what the scorer found in an answer."""
    if record.get("missing"):
        yield f"no answer: {record['missing']}"
    if record["spans"]:
        yield f"{len(record['spans'])} hallucinated"
    if record.get("missed"):
        yield f"not named: {', '.join(record['missed'])}"
    if record.get("said"):
        yield f"read as {record['said']}"
    if values := [_value(value) for value in record.get("values", ())]:
        yield f"judged {', '.join(values)}"


def _value(value: Any) -> str:
    """Format a rating, a grade, or the reference's score and the answer's."""
    if isinstance(value, list):
        reference, answer = value
        return f"{answer:g} (reference {reference:g})"
    return "unreadable" if value is None else f"{value:g}"


# ---------------------------------------------------------------------------------------------------------- packing


@dataclass
class _Texts:
    """Every different text once; elsewhere a text is its number."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def all(self, texts: Iterable[str]) -> list[int]:
        return [self.number(text) for text in texts]


def packed(items: Iterable[ItemView]) -> str:
    """Pack items for the page's script: JSON, compressed by zlib, in base64.

    The JSON is {"texts": [...], "items": [...]}; an item is an array in the order of ItemView's fields, an answer one
    in the order of AnswerView's; a text is its number in `texts`, and a piece is followed by its mark's number.
    """
    texts = _Texts()
    rows = [
        [
            texts.number(item.id),
            texts.number(item.image),
            item.image_number,
            texts.number(item.prompt),
            texts.all(item.truth),
            texts.number(item.context),
            texts.all(item.tags),
            texts.number(item.state),
            [_packed_answer(answer, texts) for answer in item.answers],
        ]
        for item in items
    ]
    content = json.dumps({"texts": list(texts.numbers), "items": rows}, separators=(",", ":"), ensure_ascii=False)
    return base64.b64encode(zlib.compress(content.encode(), 9)).decode()


def _packed_answer(answer: AnswerView, texts: _Texts) -> list[Any]:
    pieces = [number for text, mark in answer.pieces for number in (texts.number(text), MARKS.index(mark))]
    return [texts.number(answer.outcome), pieces, texts.all(answer.facts), texts.all(answer.verdicts)]


def unpacked(text: str) -> list[ItemView]:
    """Return the items of a packed text, as the page's script does."""
    content = json.loads(zlib.decompress(base64.b64decode(text)))
    texts = content["texts"]

    def all_of(numbers: Iterable[int]) -> list[str]:
        return [texts[number] for number in numbers]

    def answer_of(row: Sequence[Any]) -> AnswerView:
        outcome, pieces, facts, verdicts = row
        marks = [MARKS[number] for number in pieces[1::2]]
        return AnswerView(texts[outcome], list(zip(all_of(pieces[::2]), marks)), all_of(facts), all_of(verdicts))

    return [
        ItemView(
            texts[id_],
            texts[image],
            number,
            texts[prompt],
            all_of(truth),
            texts[context],
            all_of(tags),
            texts[state],
            [answer_of(row) for row in answers],
        )
        for id_, image, number, prompt, truth, context, tags, state, answers in content["items"]
    ]
