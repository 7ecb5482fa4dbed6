"""Answers that somebody has already, in the formats that people have them in, joined to a benchmark's questions.

LLaVA's and RLHF-V's answers.jsonl, lmms-eval's samples (*_samples_TASK.jsonl), VLMEvalKit's predictions (.xlsx, .tsv),
and the JSON files that the benchmarks' own scorers read: a list of objects, or an object of id -> answer.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dama.completion import well_formed
from dama.errors import error_list
from eval.core.benchmark import Benchmark
from eval.core.official import read_json
from eval.core.types import Answer, BenchmarkData, Question
from eval.xlsx import read_xlsx

Row = dict[str, Any]

# Where an answer may stand, first come first served: "answer" and "text" are questions' or truths' names, too.
TEXTS = ("prediction", "model_prediction", "model_answer", "response", "caption", "text", "answer")
IDS = ("question_id", "id", "index", "org_idx", "image_id")
PROMPTS = ("prompt", "question", "query", "input")

_SAMPLE = "filtered_resps"  # only lmms-eval's samples have it
_LONGEST_FIELD = 1 << 28  # characters of a field of a .tsv, which may hold an image
_REMEDY = "give the answers to this benchmark's questions, with an id or the question's own words in each"


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of answers; each row has its answer as "prediction". Raises ValueError that names file and row."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of answers, got none\nRemedy: give a .jsonl, .json, .xlsx or .tsv")
    rows = _read(path)
    errors = [f"row {number}: expected an object, got {type(row).__name__}" for number, row in enumerate(rows)
              if not isinstance(row, dict)]  # fmt: skip
    if errors or not rows:
        raise ValueError(error_list(str(path), errors or ["expected answers, got none"], _REMEDY))
    flat = [_from_sample(row) if _SAMPLE in row else row for row in rows]
    texts = [_text_of(row) for row in flat]
    errors = [
        f"row {number}: expected an answer as {' or '.join(TEXTS)}, got {sorted(row)}"
        for number, (row, text) in enumerate(zip(flat, texts))
        if text is None
    ]
    if errors:
        raise ValueError(error_list(str(path), errors, _REMEDY))
    return [row | {"prediction": text} for row, text in zip(flat, texts)]


def _read(path: Path) -> list[Any]:
    if path.suffix == ".xlsx":
        return [_with_text(row) for row in read_xlsx(path)]
    if path.suffix in (".tsv", ".csv"):
        csv.field_size_limit(_LONGEST_FIELD)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    content = read_json(path)
    if isinstance(content, dict):
        return [{"question_id": id_, "prediction": text} for id_, text in content.items()]
    return content


def _with_text(row: Row) -> Row:
    """Fill in the answer that an empty cell is."""
    return row if any(name in row for name in TEXTS[:-2]) else row | {"prediction": ""}


def _from_sample(row: Row) -> Row:
    """Return a sample of lmms-eval as a row: what its task knew of the question, its prompt, and its answer.

    Samples of 0.7 have no document; the fields that a task hands on to its metrics serve instead.
    """
    fields: Row = {}
    for value in row.values():
        fields |= value if isinstance(value, dict) else {}
    text = row[_SAMPLE]
    while isinstance(text, list) and len(text) == 1:
        text = text[0]
    known = {name: row[name] for name in ("doc_id", "target", "input") if name in row}
    return fields | known | {"prediction": text}


def _text_of(row: Mapping[str, Any]) -> str | None:
    """Return the answer, "" for one that is null; numbers, such as a letterless option, as text."""
    name = next((name for name in TEXTS if name in row), None)
    if name is None or isinstance(row[name], (list, dict)):
        return None
    return "" if row[name] is None else well_formed(str(row[name]))


# ------------------------------------------------------------------------------------------------------------ joining


def answers_of(rows: Sequence[Row], benchmark: Benchmark, data: BenchmarkData, path: str | Path) -> list[Answer]:
    """Join the rows to the questions: by id; samples of lmms-eval also by position; else by a wording used once.

    Whichever it is, a row that states a question must state this one. Raises ValueError that names every row without
    question, and questions with several rows.
    """
    questions = {question.id: question for question in data.questions}
    wordings = Counter(wording for question in data.questions for wording in _wordings(question))
    unique = {wording: q for q in data.questions for wording in _wordings(q) if wordings[wording] == 1}
    found = [_question_of(row, benchmark, data, questions, unique) for row in rows]
    errors = [
        f"row {number}: no question has its id or wording: {_shown(row)}"
        for number, (row, question) in enumerate(zip(rows, found))
        if question is None
    ]
    times = Counter(question.id for question in found if question is not None)
    errors += [f"question {id_!r}: {count} rows answer it" for id_, count in times.items() if count > 1]
    if errors:
        raise ValueError(error_list(str(path), errors, _REMEDY))
    return [
        Answer(q.id, q.image_id, q.prompt, row["prediction"], str(row.get("model_id") or ""), _missing(row))
        for row, q in zip(rows, found)
        if q is not None
    ]


def _missing(row: Mapping[str, Any]) -> str:
    return str(row.get("missing") or "")


def _question_of(
    row: Mapping[str, Any],
    benchmark: Benchmark,
    data: BenchmarkData,
    questions: Mapping[str, Question],
    unique: Mapping[str, Question],
) -> Question | None:
    stated = None if benchmark.id_of is None else benchmark.id_of(row, data)
    candidates = [] if stated is None else [stated]
    candidates += [_id(row[name]) for name in IDS if row.get(name) is not None]
    named = [questions[id_] for id_ in candidates if id_ in questions]
    position = row.get("doc_id")
    if isinstance(position, int) and 0 <= position < len(data.questions):
        named.append(data.questions[position])
    wordings = [str(row[name]) for name in PROMPTS if row.get(name)]
    if not wordings:
        return named[0] if named and candidates and named[0].id in candidates else None
    fitting = (question for question in named if _is_about(wordings, question))
    return next(fitting, None) or next((unique[_plain(w)] for w in wordings if _plain(w) in unique), None)


def _id(value: Any) -> str:
    """Return an id as text; a table's 3.0 is 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_about(wordings: Sequence[str], question: Question) -> bool:
    """Whether a wording is the question's, with or without what a harness puts before and after it."""
    whole, *_ = own = _wordings(question)
    return any(_plain(wording) in whole or any(part in _plain(wording) for part in own) for wording in wordings)


def _wordings(question: Question) -> list[str]:
    """Return the prompt, and the prompt without its last line, which says in which form to answer."""
    return [_plain(text) for text in (question.prompt, question.prompt.rpartition("\n")[0]) if text]


def _plain(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split())


def _shown(row: Mapping[str, Any]) -> str:
    shown = {name: row[name] for name in (*IDS, *PROMPTS) if row.get(name) is not None}
    return json.dumps(shown, ensure_ascii=False, default=str)[:120]
