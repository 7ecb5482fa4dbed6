"""Files of an evaluation: answers.jsonl is read, results.json written, with all that a metric depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dama.completion import well_formed
from dama.console import write_atomic
from dama.errors import error_list
from eval.core.types import Answer


@dataclass(frozen=True)
class Provenance:
    """What a metric depends on.

    Args:
        counts: the answers and everything left out.
        judge: its name, version, prompt_digest and temperature; None where rules decide.
    """

    benchmark: str
    protocol: str
    checkpoint: str
    fingerprint: str
    decoding: Mapping[str, Any]
    counts: Mapping[str, int]
    judge: Mapping[str, Any] | None = None


def read_answers(path: str | Path) -> list[Answer]:
    """Read answers.jsonl with LLaVA's and RLHF-V's field names.

    Fields: question_id, prompt (or question), text (or answer); if present image_id, model_id and missing (why there
    is no answer); others are not used.
    Raises ValueError, with the line number, for a line that is no JSON object, misses a field or repeats an id.
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
    except (ValueError, RecursionError) as error:  # also a number of too many digits, too many brackets
        raise ValueError(
            f"{where}: expected one JSON object, got {line[:60]!r} ({getattr(error, 'msg', error)}); "
            "if the run that wrote it was killed, resume it or delete the line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected one JSON object, got {type(row).__name__}; write one object per line")
    return Answer(
        id=str(_field(row, where, "question_id")),
        image_id=_optional(row, "image_id"),
        prompt=well_formed(str(_field(row, where, "prompt", "question"))),
        text=well_formed(str(_field(row, where, "text", "answer"))),
        model_id=_optional(row, "model_id"),
        missing=_optional(row, "missing"),
    )


def _optional(row: Mapping[str, Any], name: str) -> str:
    return "" if row.get(name) is None else str(row[name])


def _field(row: Mapping[str, Any], where: str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected the field {' or '.join(names)}, got {sorted(row)}; add it")


def not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Yield where in a JSON value NaN and infinities are, as "metrics, mean_f1: nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: {value}"
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from not_finite(part, f"{place}, {name}" if place else str(name))
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            name = part.get("id", number) if isinstance(part, dict) else number
            yield from not_finite(part, f"{place}, {name}")


def write_results(
    path: str | Path,
    metrics: Mapping[str, Any],
    provenance: Provenance,
    items: Iterable[Mapping[str, Any]] = (),
    described: Mapping[str, Any] | None = None,
) -> None:
    """Write results.json: provenance, metrics, a record per answer. Undefined is null.

    described: the benchmark's description (eval.imported), where it is none of this repository's.
    Raises ValueError, naming their places, for numbers that JSON does not have: NaN and infinities.
    """
    content: dict[str, Any] = {} if described is None else {"benchmark": dict(described)}
    content |= {"provenance": asdict(provenance), "metrics": dict(metrics), "items": list(items)}
    if places := list(not_finite(content)):
        remedy = "the old file, if any, is as it was; report this, since an undefined metric must be null"
        raise ValueError(error_list(f"{path}: not JSON compliant", places, remedy))
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
