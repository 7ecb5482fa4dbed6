"""MMStar (Chen et al. 2024): 1,500 multiple-choice questions that need the image, 250 for each of six capabilities.

    data = load(folder)                                     # or mode "blind": also without images, or "text_only"
    score(data, answers); format_table({name: score})

An answer counts where it gives one option's letter; whatever else is unparsed, counted, and not right. The original
takes any answer whose first character is the right letter, so that "Dogs ..." is D and "a cat" is A; `official_quirks`
gives its figure. Multi-modal gain is the total with images minus that without (S_v - S_wv); leakage is how much a
model without images is above its language model alone, max(0, S_wv - S_t).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dama.chat import after_thoughts
from dama.errors import error_list
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn
from eval.core.metrics import Metric
from eval.core.official import Fields, field_errors, raise_errors
from eval.core.scores import QUIRKS, Score, Table, TableColumn, score_items
from eval.core.sources import File, ImageSource
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of

DECODING: dict[str, Any] = {"max_new_tokens": 32, "num_beams": 1, "temperature": 0.0}
SUFFIX = "\nAnswer with the option's letter from the given choices directly"
CAPABILITIES = {
    "coarse_perception": "coarse perception",
    "fine_grained_perception": "fine-grained perception",
    "instance_reasoning": "instance reasoning",
    "logical_reasoning": "logical reasoning",
    "math": "math",
    "science_technology": "science & technology",
}
LETTERS = "ABCD"

_NAME_OF = {title: name for name, title in CAPABILITIES.items()}
_PACKAGE = "mmstar/mmstar.parquet"
_FIELDS: Fields = {"index": (int,), "question": (str,), "answer": (str,), "category": (str,), "l2_category": (str,)}
_BLIND = "-blind"  # ends the id of a question that is asked without its image


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, kw_only=True)
class MMStar(BenchmarkData):
    """A question's `kinds` are its capability and its axis, its `truth` a letter; without image, its id ends so."""

    mode: str

    @property
    def scored(self) -> tuple[Question, ...]:
        """The questions that the total is over: those with images, or all where there are none."""
        return tuple(q for q in self.questions if q.image or self.mode == "text_only")


def load(folder: str | Path, mode: str = "image") -> MMStar:
    """Read folder/mmstar/mmstar.parquet; images are in folder/mmstar/images.

    mode: "image", "blind" (every question with and without image), "text_only" (without). Raises ValueError, naming
    file and fields.
    """
    path = Path(folder) / _PACKAGE
    raise_errors(path, [] if path.is_file() else ["missing"])
    return from_rows(_read_rows(path, list(_FIELDS)), path, mode, Path(folder) / "mmstar/images")


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read columns of a Parquet file. Raises ValueError for another file, and for one without these columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected Parquet with {', '.join(columns)}, got another file ({error})") from error


def from_rows(rows: Sequence[dict[str, Any]], path: Path, mode: str = "image", images: Path = Path()) -> MMStar:
    """Return the benchmark of rows with the official fields; an index may be text or a table's 3.0.

    Raises ValueError that names `path` and every error.
    """
    rows = [row | {"index": _number(row.get("index"))} for row in rows]
    errors = [error for number, row in enumerate(rows) for error in _row_errors(number, row)]
    if not errors:
        times = Counter(row["index"] for row in rows)
        errors = [f"field 'index': {index} is used {count} times" for index, count in times.items() if count > 1]
    raise_errors(path, errors if rows else ["expected questions, got none"])
    shown = [_question(row, blind=False) for row in rows if mode != "text_only"]
    hidden = [_question(row, blind=True) for row in rows if mode != "image"]
    return MMStar((*shown, *hidden), "", images, mode=mode)


def _number(index: Any) -> Any:
    """Return an index as a number, as it is where it is none."""
    text = str(index).removesuffix(".0")
    return int(text) if text.isascii() and text.isdigit() else index


def id_of(row: Mapping[str, Any], data: MMStar | None = None) -> str | None:
    """Return the id of a row by its index (in lmms-eval's samples: question_id), None without one."""
    index = _number(row.get("index", row.get("question_id")))
    if not isinstance(index, int):
        return None
    return str(index) + _BLIND * (data is not None and data.mode == "text_only")


def _row_errors(number: int, row: Mapping[str, Any]) -> list[str]:
    if errors := field_errors(f"record {number}", row, _FIELDS):
        return errors
    allowed = {"answer": tuple(LETTERS), "category": tuple(_NAME_OF)}
    return [
        f"record {number}: field {name!r}: expected one of {', '.join(values)}, got {row[name]!r}"
        for name, values in allowed.items()
        if row[name] not in values
    ]


def _question(row: Mapping[str, Any], *, blind: bool) -> Question:
    kinds = (_NAME_OF[row["category"]], row["l2_category"])
    image = "" if blind else _image_name(row["index"])
    return Question(f"{row['index']}{_BLIND * blind}", image, row["question"] + SUFFIX, row["answer"], kinds)


def _image_name(index: int) -> str:
    return f"{index}.jpg"


# ------------------------------------------------------------------------------------------------------------ reading

_OPEN, _CLOSE = r"[\s*_\"'`(\[{]*", r"[*_\"'`)\]}]"
_ANSWER = r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice)"
_INTRODUCTION = rf"{_ANSWER}[*_]*(?:\s+(?:is|would\s+be|should\s+be))?[\s:*_]*(?:(?:option|choice)\s+)?"
# What may follow a letter that stands for its option: a bracket, a stop, a colon, a reason, or nothing.
_AFTER = (
    rf"(?:{_CLOSE}|\s*$|\.(?=\s|{_CLOSE}|$)|\s*[:;,]|\s*\n|\s+[-–—]\s|"
    r"\s+(?:because|since|as|which|so|based|is\s+(?:the\s+)?(?:correct|right|best|answer))\b)"
)
_LEADING = re.compile(rf"^{_OPEN}(?:{_INTRODUCTION}{_OPEN})?([A-D])(?={_AFTER})", re.IGNORECASE)
_STATED = re.compile(
    rf"\b(?:answer|option|choice)[*_]*(?:\s+(?:is|would\s+be|should\s+be)[\s:*_]*|\s*:[\s*_]*)"
    rf"(?:(?:option|choice)\s+)?{_OPEN}([A-D])(?={_AFTER})",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    rf"{_CLOSE}*\s*(?:,|/|&|;|\b(?:or|and)\b)?\s*(?:(?:option|choice)\s+)?{_OPEN}\b[A-D]\b(?={_CLOSE}|\s*[,;/&.]|\s*$|"
    r"\s+(?:or|and)\b)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}")
_OPTION = re.compile(r"(?:(?<=\s)|(?<=,))(?:([A-D]):|\(([A-D])\))\s*(.*?)(?=,?\s+(?:[A-D]:|\([A-D]\))|$)", re.DOTALL)


def options_of(question: str) -> dict[str, str]:
    """Return letter -> text of the options in a question: "Options: A: ..., B: ..." or "(A) ...", one per line."""
    return {first or second: text.strip() for first, second, text in _OPTION.findall(question.removesuffix(SUFFIX))}


def read_letter(text: str, question: str = "") -> str | None:
    r"""Return the option that an answer gives; None where it gives none, or several.

    Accepted are its letter by itself, in brackets, before a stop or colon, or as "the answer is ..."; also "B"
    followed by B's own text. A reasoning model's thoughts are left out; its answer may be in tags or in \boxed{}.
    """
    text = after_thoughts(text).strip()
    if boxed := _BOXED.findall(text):
        text = " and ".join(dict.fromkeys(boxed))  # several are no answer
    found = {match[1].upper() for match in _STATED.finditer(text) if not _ANOTHER.match(text, match.end())}
    several = any(_ANOTHER.match(text, match.end()) for match in _STATED.finditer(text))
    if leading := _LEADING.match(text):
        found.add(leading[1].upper())
        several = several or bool(_ANOTHER.match(text, leading.end()))
    elif not found and (letter := _with_its_text(text, question)):
        found.add(letter)
    return found.pop() if len(found) == 1 and not several else None


def _with_its_text(text: str, question: str) -> str | None:
    """Return the letter of "B The cat" where The cat is option B."""
    letter, _, rest = text.partition(" ")
    own = options_of(question).get(letter, "")
    return letter if own and _plain(own) == _plain(rest) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()


def is_right_officially(text: str, letter: str) -> bool:
    """Decide as the original: the lower-cased answer begins with the letter, alone or after one of three openings."""
    openings = ("", "(", "option ", "the answer is ")
    return text.strip().lower().startswith(tuple(opening + letter.lower() for opening in openings))


# -------------------------------------------------------------------------------------------------------------- score

METRICS = (
    Metric("total", "total %", decimals=2),
    *(Metric(name, f"{title} %", decimals=2) for name, title in CAPABILITIES.items()),
    Metric("blind_total", "total without images %", None, 2),
    Metric("text_only_total", "language model alone %", None, 2),
    Metric(
        "multimodal_gain",
        "multi-modal gain (points)",
        decimals=2,
        inputs=("total", "blind_total"),
        formula=lambda shown, hidden: shown - hidden,
    ),
    Metric(
        "leakage",
        "leakage (points)",
        "lower",
        2,
        inputs=("blind_total", "text_only_total"),
        formula=lambda hidden, alone: np.maximum(0.0, hidden - alone),
    ),
    Metric("unparsed_share", "unparsed %", "lower"),
)
_LABELS = {"image": "mmstar", "blind": "mmstar", "text_only": "mmstar-text-only"}


def score(
    data: MMStar,
    answers: Iterable[Answer],
    *,
    official_quirks: bool = False,
    text_only: Mapping[str, Record] | None = None,
) -> Score:
    """Compute, in percent, the share of right answers of all and of each capability; gain and leakage where known.

    text_only: id -> record of the language model's own results, made in the mode of this name. Raises ValueError where
    they are of another mode or are not about all questions.
    """
    given = {question.id: answer for question, answer in data.answered(answers)}
    _check_text_only(data, text_only)
    items = []
    for question in data.scored:
        if question.id in given:
            own = question.id.removesuffix(_BLIND)
            hidden = given.get(own + _BLIND) if question.image else None
            alone = None if text_only is None else text_only[own]
            items.append(_record(question, given[question.id], hidden, alone, official_quirks))
    counts = {"unparsed": 0 if official_quirks else sum(item["said"] is None for item in items)}
    if data.mode == "blind":
        counts["missing without images"] = sum("blind_total" not in item["parts"] for item in items)
    scored = [Question(q.id.removesuffix(_BLIND), q.image, q.prompt, q.truth, q.kinds) for q in data.scored]
    return score_items(_LABELS[data.mode] + QUIRKS * official_quirks, METRICS, items, scored, counts=counts)


def _record(
    question: Question, answer: Answer, hidden: Answer | None, alone: Record | None, official_quirks: bool
) -> Record:
    said, right = _read(question, answer, official_quirks)
    parts: Parts = {"total": [100.0 * right, 1.0], "unparsed_share": [100.0 * (said is None), 1.0]}
    parts[question.kinds[0]] = parts["total"]
    extras: dict[str, Any] = {}
    if hidden is not None:
        blind_said, blind_right = _read(question, hidden, official_quirks)
        parts["blind_total"] = [100.0 * blind_right, 1.0]
        extras = {"text_without_image": hidden.text, "said_without_image": blind_said}
    if alone is not None:
        parts["text_only_total"] = alone["parts"]["total"]
    wrong = None if said is None and not official_quirks else not right
    own = question.id.removesuffix(_BLIND)
    return record_of(
        question, answer.text, wrong=wrong, parts=parts, id=own, kinds=list(question.kinds), said=said, **extras
    )


def _read(question: Question, answer: Answer, official_quirks: bool) -> tuple[str | None, bool]:
    """Return the letter that the answer gives, and whether the answer counts as right."""
    said = read_letter(answer.text, question.prompt)
    return said, is_right_officially(answer.text, question.truth) if official_quirks else said == question.truth


def _check_text_only(data: MMStar, records: Mapping[str, Record] | None) -> None:
    if records is None:
        return
    errors = [f"question {id_}: with an image" for id_, record in records.items() if record["image"]]
    asked = {question.id.removesuffix(_BLIND): question for question in data.scored}
    errors += [f"question {id_}: no answer" for id_ in asked if "total" not in records.get(id_, {"parts": {}})["parts"]]
    errors += [
        f"question {id_}: another wording"
        for id_, question in asked.items()
        if id_ in records and records[id_]["prompt"].split() != question.prompt.split()
    ]
    if errors:
        remedy = "give results.json of the language model alone, made by --mode text_only on the same questions"
        raise ValueError(error_list("--text_only", errors, remedy))


format_table = Table(
    (
        TableColumn("total", "total", 2, interval=True),
        *(TableColumn(name, title.split(" &")[0], 2) for name, title in CAPABILITIES.items()),
        TableColumn("blind_total", "blind", 2),
        TableColumn("multimodal_gain", "gain", 2),
        TableColumn("leakage", "leakage", 2),
    ),
    note="unparsed, not right",
)


# ---------------------------------------------------------------------------------------------------------- benchmark


def _is_package(path: Path) -> None:
    _read_rows(path, [*_FIELDS, "image"])


_DATA = File(_PACKAGE, "https://huggingface.co/datasets/Lin-Chen/MMStar/resolve/main/mmstar.parquet", check=_is_package)


def _image_urls(data: Path) -> dict[str, str]:
    return {_image_name(row["index"]): "" for row in _read_rows(data / _PACKAGE, ["index"])}


def _take_images(package: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content); the image column has bytes, or a struct with bytes."""
    for row in _read_rows(package, ["index", "image"]):
        if (name := _image_name(row["index"])) in names:
            yield name, row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]


BENCHMARK = Benchmark(
    name="mmstar",
    title="MMStar",
    wrong="gives another option than the right one",
    files=(_DATA,),
    images=ImageSource("mmstar/images", _image_urls, f"taken out of {_PACKAGE}, {_DATA.source}", _DATA, _take_images),
    load=load,
    parts=(
        Part(DECODING, "answers", lambda question: question.image != ""),
        Part(DECODING, "answers_blind", lambda question: question.image == ""),
    ),
    score=score,
    metrics=METRICS,
    columns=(SummaryColumn("total", "MMStar", kind="ability"),),
    modes=(
        Mode("image", "with images"),
        Mode("blind", "with images, and then without: multi-modal gain"),
        Mode("text_only", "without images, for a language model"),
    ),
    stratum=lambda question: question.kinds[0] + _BLIND * (not question.image),
    table=format_table,
    published_file=Path(__file__).with_name("mmstar_published.json"),
    from_rows=from_rows,
    id_of=id_of,
    takes_text_only=True,
)
