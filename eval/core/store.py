"""Files of an evaluation: answers.jsonl is read, results.json written, with all that a figure depends on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dama.console import write_atomic
from eval.core.types import Answer


@dataclass(frozen=True)
class Provenance:
    """What a figure depends on. `counts`: the answers and everything left out; `judge`: its name,
    version, prompt_digest and temperature; None where rules decide."""

    benchmark: str
    protocol: str
    checkpoint: str
    fingerprint: str
    decoding: Mapping[str, Any]
    counts: Mapping[str, int]
    judge: Mapping[str, Any] | None = None


def read_answers(path: str | Path) -> list[Answer]:
    """Reads answers.jsonl with LLaVA's and RLHF-V's field names.

    Fields: question_id, prompt (or question), text (or answer); if present image_id and model_id; others are not used.
    Raises ValueError, with the line number, for a line that is no JSON object, lacks a field or repeats a question_id.
    """
    answers: dict[str, Answer] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            answer = _parse_answer(line, f"{path}, line {number}")
            if answer.id in answers:
                raise ValueError(
                    f"{path}, line {number}: question_id {answer.id!r} occurs a second time, each may occur once; "
                    "delete one of the two lines"
                )
            answers[answer.id] = answer
    return list(answers.values())


def _parse_answer(line: str, where: str) -> Answer:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected one JSON object, got {line[:60]!r} ({error.msg}); "
            "if the run that wrote it was killed, resume it or delete the line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected one JSON object, got {type(row).__name__}; write one object per line")
    return Answer(
        id=str(_field(row, where, "question_id")),
        image_id=_optional(row, "image_id"),
        prompt=str(_field(row, where, "prompt", "question")),
        text=str(_field(row, where, "text", "answer")),
        model_id=_optional(row, "model_id"),
    )


def _optional(row: Mapping[str, Any], name: str) -> str:
    return "" if row.get(name) is None else str(row[name])


def _field(row: Mapping[str, Any], where: str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected the field {' or '.join(names)}, got {sorted(row)}; add it")


def write_results(
    path: str | Path, metrics: Mapping[str, Any], provenance: Provenance, items: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Writes results.json: provenance, metrics, a record per answer. Undefined is null; NaN raises ValueError."""
    content = {"provenance": asdict(provenance), "metrics": dict(metrics), "items": list(items)}
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
