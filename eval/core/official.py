"""Read the benchmarks' official files: every error names file and field; prompts come out of scripts that never run."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dama.errors import error_list

REMEDY = "download the official files with `python -m eval.download`, or give their folder as DAMA_BENCH_DATA"

Fields = Mapping[str, tuple[type, ...]]
"""Field name -> the types that its value may have."""


def official_prompt(candidates: Iterable[Path], sha256: str, recorded: str | None = None) -> str:
    """Return the text with this digest: the content of the first file that exists, or a string in it if it is a script.

    A script is parsed and never run. White space around the text does not count. recorded: digest of another text
    that is accepted, which downloads.json lists. ValueError where neither is found.
    """
    paths = list(candidates)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"official prompt: expected {' or '.join(map(str, paths))}, got neither\nRemedy: {REMEDY}")
    texts = _strings(path) if path.suffix == ".py" else [path.read_text(encoding="utf-8")]
    for text in texts:
        for form in (text, text.strip()):
            if digest_of_text(form) in (sha256, recorded):
                return form
    got = f"none among its {len(texts)} strings" if path.suffix == ".py" else digest_of_text(texts[0])
    raise ValueError(f"official prompt in {path}: expected a text of SHA-256 {sha256}, got {got}\nRemedy: {REMEDY}")


def digest_of_text(text: str) -> str:
    """Return SHA-256 in hexadecimal, as `sha256sum` prints it for a file with this text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _strings(script: Path) -> list[str]:
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def read_json(path: Path) -> Any:
    """Read the content of a JSON file, or the list of a JSONL file's lines. ValueError names the file, and the line."""
    if not path.is_file():
        raise ValueError(f"{path}: missing\nRemedy: {REMEDY}")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return _parse(text, str(path))
    # Not splitlines: an official text may hold a line separator of Unicode's.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_parse(line, f"{path}, line {number}") for number, line in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, too many brackets
        raise ValueError(f"{where}: not JSON ({error})\nRemedy: {REMEDY}") from error


def read_records(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """Read a list of objects with at least these fields. ValueError names the file and every wrong field."""
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of records, got {str(rows)[:60]}\nRemedy: {REMEDY}")
    raise_errors(path, [error for i, row in enumerate(rows) for error in field_errors(f"record {i}", row, fields)])
    return rows


def field_errors(where: str, row: Any, fields: Fields) -> list[str]:
    """Return one line for each field that is missing or of another type."""
    if not isinstance(row, dict):
        return [f"{where}: expected an object, got {type(row).__name__}"]
    errors = []
    for name, types in fields.items():
        if not isinstance(row.get(name), types):
            expected = " or ".join(kind.__name__ for kind in types)
            got = type(row[name]).__name__ if name in row else "no such field"
            errors.append(f"{where}: field {name!r}: expected {expected}, got {got}")
    return errors


def raise_errors(path: Path, errors: Sequence[str]) -> None:
    """Raise ValueError for all errors, if there are any."""
    if errors:
        raise ValueError(error_list(str(path), errors, REMEDY))
