"""What the steps share: prompts with their questions, the folders of what each step made, a checkpoint's identity."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dama.console import digest_of, digest_of_file
from dama.errors import error_list
from dama.pairs import read_rows
from dama.stage import MANIFEST, Record, StageError, read_stage
from dama.texts import IMAGE_TOKEN

IMAGES, RANK_IMAGES, RESPOND, RANK_RESPONSES = STEPS = ("images", "rank-images", "respond", "rank-responses")
CONTEXT = "context"  # a step that runs where it is named
_SAFE_ID = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
_REMEDY = "correct these lines; a line is a text, or a record with prompt, question and an optional id"


class SynthError(ValueError):
    """Faults of the command's flags or inputs, all in one message."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A image to be made, and the question that will be asked about it. The id names files."""

    id: str
    prompt: str
    question: str


def read_prompts(files: Sequence[str | Path], questions: Sequence[str | Path] = ()) -> list[Prompt]:
    """Prompts of all files, in order: lines of text, or JSON records with prompt, question and perhaps id.

    `questions` are files of lines, one to each file of prompts and with as many lines; a leading <image> is taken off.
    Without an id, line n of art.txt is art-n. Raises SynthError with all errors.
    """
    if questions and len(questions) != len(files):
        raise SynthError(f"--questions: expected a file for each of --prompts ({len(files)}), got {len(questions)}")
    prompts: list[Prompt] = []
    errors: list[str] = []
    for number, file in enumerate(map(Path, files)):
        if not file.is_file():
            errors.append(f"--prompts {file}: no such file")
            continue
        rows = list(_rows(file))
        asked = list(_rows(Path(questions[number]))) if questions else [{}] * len(rows)
        if len(asked) != len(rows):
            errors.append(f"{questions[number]}: {len(asked)} questions, {file} has {len(rows)} prompts")
        for line, (row, question) in enumerate(zip(rows, asked), start=1):
            try:
                prompts.append(_prompt(f"{file.stem}-{line}", row, question))
            except ValueError as error:
                errors.append(f"{file}, {line}: {error}")
    twice = [id_ for id_, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    errors += [f"id {id_} is used more than once" for id_ in twice]
    if errors or not prompts:
        raise SynthError(error_list("prompts", errors or ["none in the files"], _REMEDY))
    return prompts


def _rows(file: Path) -> Iterator[Any]:
    """Records of .json and .jsonl, lines with something in them of any other file."""
    if not file.is_file():
        raise SynthError(f"--questions {file}: no such file")
    if file.suffix in (".json", ".jsonl"):
        yield from (row for _, row in read_rows(file))
    else:
        yield from (line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def _prompt(default_id: str, row: Any, asked: Any) -> Prompt:
    if isinstance(row, ValueError):
        raise row
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"expected a text or a record, got {type(row).__name__}")
    row = row | ({"question": asked} if isinstance(asked, str) else {})
    id_ = str(row.get("id", default_id))
    if not _SAFE_ID.fullmatch(id_):
        raise ValueError(f"id {id_!r}: expected letters, digits, '_', '-' and '.', since it names files")
    for name in ("prompt", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"no {name}" + ("; give --questions" if name == "question" else ""))
    question = row["question"].strip().removeprefix(IMAGE_TOKEN).strip()
    if IMAGE_TOKEN in question:
        raise ValueError(f"question: {IMAGE_TOKEN} inside the text would be read as one more image")
    return Prompt(id_, row["prompt"].strip(), question)


# ------------------------------------------------------------------------------------------------- the steps' folders


def step_folder(out: str | Path, step: str) -> Path:
    """Return the folder of a step's stage."""
    return Path(out) / "stages" / step


def read_step(out: str | Path, step: str) -> tuple[Record, list[Record]]:
    """(manifest, records) of a step that must be complete. Raises StageError, naming the command that completes it."""
    folder = step_folder(out, step)
    manifest = folder / MANIFEST
    if not manifest.is_file() or not json.loads(manifest.read_text(encoding="utf-8"))["complete"]:
        state = "unfinished" if manifest.is_file() else "not there"
        remedy = f"run `python -m dama synth {step} --out {out}` with its flags first"
        raise StageError(f"synth: the step {step} in {out} is {state}\nRemedy: {remedy}")
    return read_stage(folder, step)


def chunks_of(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Split items into lists of `size`; the last may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def by_prompt(records: Iterable[Record]) -> dict[str, list[Record]]:
    """A step's records of several to a prompt, by the prompt's id, in the order of the prompts."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["id"], []).append(record)
    return groups


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Digest all prompts, in order."""
    return digest_of([[prompt.id, prompt.prompt, prompt.question] for prompt in prompts])


def checkpoint_identity(name: str) -> Record:
    """A hub name, or a folder with a digest of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return {"model": name}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"model": folder.name, "files": digest_of([[path.name, digest_of_file(path)] for path in files])}


def numbers(scores: Iterable[float | None]) -> str:
    """Scores as the page and the lists of what was left out show them."""
    return ", ".join("none" if score is None else f"{score:.4g}" for score in scores)
