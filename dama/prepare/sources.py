"""Where rows come from: files, folders and hub data sets of Parquet, JSON, JSON lines or CSV, read as a stream."""

from __future__ import annotations

import csv
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from dama.console import log
from dama.errors import error_list
from dama.pairs import PairsError, read_rows
from dama.styles import FIELDS, NamedRow

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema
    from pyarrow.parquet import ParquetFile

HUB = re.compile(r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<inside>.+))?")
KINDS = ((".parquet",), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"))
"""Endings of the files that are read; of a folder only the first kind that it holds."""
ENDINGS = tuple(ending for kind in KINDS for ending in kind)
TARGETS = {
    "question": "question",
    "chosen": "chosen",
    "rejected": "rejected",
    "image": "image",
    "id": "idx",
    "dataset": "origin_dataset",
    "generator": "generator",
    "kind": "kind",
    "context": "context",
    "answer": "answer",
    "first_error": "first_error",
    "correction": "correction",
}
"""What --column can name -> the field that it becomes."""
SAME_MEANING = {"question": ("prompt",), "image": ("image_path", "images"), "idx": ("id",)}
"""Fields that a column given for the first must not compete with."""
ANSWER_LAYOUTS = (
    {"chosen", "rejected"},
    {"conversations", "rejected_conversations"},
    {"messages", "rejected_response"},
    {"conversations", "rejected_response"},
    {"messages", "rejected_messages"},
    {"response", "rejected_response"},
    {"text"},
    {"answer", "first_error", "correction"},
)
"""Columns of which one set must be there; dama.styles says whose they are."""
QUESTION_FIELDS = {"question", "prompt", "query", "conversations", "messages", "text"}
BATCH_ROWS = 32  # rows of Parquet decoded at a time: a few MB of images, and bounded where answers are of 10 MB

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words in a file's or folder's name that stand for it, as on the hub."""
ALL_SPLITS = "all"
_SET = re.compile("(?<=.)(?:split|set|data|file)s?$")  # as in "testset.parquet"

Row = dict[str, Any]
LeftAside = dict[str, str]
"""File that is not read -> why."""


class SourceError(ValueError):
    """Faults of the files given, all in one message."""


class SourceFile(NamedTuple):
    """A file of rows: where it lies, and its name in messages and records.

    The name starts at the folder that holds all local files, so that what is written does not depend on where it lies.
    """

    path: Path
    name: str


# ----------------------------------------------------------------------------------------------------------- finding


def find_files(
    sources: Sequence[str], split: str | None = None, left_aside: LeftAside | None = None
) -> list[SourceFile]:
    """Find the files of rows that folders, globs, files and hf://owner/name[@revision][/glob] lead to.

    Local sources come first, as given, then the hub's; the files of each in order of name.

    Of a folder, a glob, several files or a hub set whose names tell splits apart only `split` is read, by default
    train; a file that is named by itself is read whatever its split, unless `split` is given. Files that are not read
    are added to `left_aside`. Raises SourceError naming every source that leads to no file.
    """
    aside: LeftAside = {} if left_aside is None else left_aside
    local: list[Path] = []
    remote: list[SourceFile] = []
    errors = []
    for source in sources:
        try:
            if source.startswith("hf:"):
                remote += _hub_files(source, split, aside)
            else:
                local += _local_files(source, split, aside)
        except SourceError as error:
            errors.append(str(error))
    if errors:
        raise SourceError("\n".join(errors))
    local = _of_one_split(local, sources, split, aside)
    found = {file.path.resolve(): file for file in [*_named(local), *remote]}
    return list(found.values())


def _of_one_split(paths: list[Path], sources: Sequence[str], split: str | None, aside: LeftAside) -> list[Path]:
    """Without files of other splits, where single files are named and some are of train: a shell expands globs so."""
    single = [Path(source) for source in sources if not source.startswith("hf:") and Path(source).is_file()]
    base = os.path.commonpath([path.absolute().parent for path in single]) if single else ""
    named = {path.absolute().relative_to(base).as_posix(): path for path in single}
    if split is not None or not {"train"} < {split_of(name) for name in named} - {None}:
        return paths
    kept = _of_split(named, split, base, aside)
    return [path for path in paths if path not in single or path in kept]


def _named(paths: Sequence[Path]) -> list[SourceFile]:
    if not paths:
        return []
    base = os.path.commonpath([path.absolute().parent for path in paths])
    names = [path.absolute().relative_to(base).as_posix() for path in paths]
    # Bytes of a name that are not UTF-8 are escaped, so that it can be written.
    return [SourceFile(path, os.fsencode(name).decode("utf-8", "backslashreplace")) for path, name in zip(paths, names)]


def split_of(name: str) -> str | None:
    """The split that a path names in its file or, from the innermost out, in a folder: data/train-00000.parquet."""
    for part in reversed(PurePosixPath(name).with_suffix("").parts):
        for word in re.findall("[a-z]+", part.lower()):
            word = _SET.sub("", word)
            found = next((split for split, words in SPLITS.items() if word in words), None)
            if found is not None:
                return found
    return None


def _of_split(named: Mapping[str, Any], split: str | None, source: str, aside: LeftAside) -> list[Any]:
    """The values whose names are of the split; one without a split in its name counts as train."""
    splits = {name: split_of(name) for name in named}
    wanted = split or "train"
    if split == ALL_SPLITS or (split is None and not any(splits.values())):
        return list(named.values())
    kept = [name for name, of_file in splits.items() if (of_file or "train") == wanted]
    if not kept:
        there = ", ".join(sorted({of_file or "train" for of_file in splits.values()}))
        remedy = f"--split with one of these, or --split {ALL_SPLITS}"
        raise SourceError(f"{source}: no file of the split {wanted}, only of {there}\nRemedy: {remedy}")
    others = {name: f"split {splits[name] or 'train'}" for name in named if name not in kept}
    aside |= others
    if others:
        log(f"{source}: {len(kept)} files of the split {wanted} are read, left aside: {', '.join(others)} (--split)")
    return [named[name] for name in kept]


def _local_files(source: str, split: str | None, aside: LeftAside) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        named = {file.relative_to(path).as_posix(): file for file in _first_kind(inside, source)}
        return _of_split(named, split, source, aside)
    paths = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    if not paths:
        raise SourceError(f"{source}: no such file or folder\nRemedy: give Parquet, JSON, JSON lines, CSV, or hf://...")
    wrong = [str(file) for file in paths if not _is_table(file)]
    if wrong:
        raise SourceError(error_list(source, wrong, f"expected files that end in {', '.join(ENDINGS)}"))
    if path.is_file() and split is None:
        return paths
    base = os.path.commonpath([file.absolute().parent for file in paths])
    return _of_split({file.absolute().relative_to(base).as_posix(): file for file in paths}, split, source, aside)


def _hidden(path: Path) -> bool:
    """The hub's own notes lie in hidden folders beside what it downloaded."""
    return any(part.startswith(".") for part in path.parts)


def _first_kind(files: Sequence[Path], source: str) -> list[Path]:
    for endings in KINDS:
        chosen = [file for file in files if file.suffix.lower() in endings]
        if chosen:
            aside = [file.name for file in files if file.suffix.lower() in ENDINGS and file not in chosen]
            if aside:
                log(f"{source}: its {len(chosen)} {chosen[0].suffix} files are read, left aside: {', '.join(aside)}")
            return chosen
    raise SourceError(f"{source}: none of its {len(files)} files is a table\nRemedy: expected {', '.join(ENDINGS)}")


def _hub_files(source: str, split: str | None, aside: LeftAside) -> list[SourceFile]:
    """Download a hub data set's tables at one revision; names carry the commit, so that the data card can."""
    match = HUB.fullmatch(source)
    if match is None:
        raise SourceError(f"{source}: expected hf://owner/name, hf://owner/name@revision, or either with /files")
    from huggingface_hub import snapshot_download

    name, revision = match["name"], match["revision"]
    wanted = [[match["inside"]]] if match["inside"] else [[f"*{ending}" for ending in kind] for kind in KINDS]
    for patterns in wanted:
        try:
            root = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
        except (OSError, ValueError) as error:  # every error of the hub's client is one of these
            remedy = "check name and revision; `hf auth login` where it is gated; or download it and give the folder"
            raise SourceError(f"{source}: {str(error).strip()}\nRemedy: {remedy}") from error
        inside = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if _is_table(file)}
        files = {
            place: SourceFile(file, f"hf://{name}@{root.name}/{place}")
            for place, file in inside.items()
            if any(fnmatch(place, pattern) for pattern in patterns)
        }
        if files and split is None and list(files) == [match["inside"]]:
            return list(files.values())  # named by itself
        if files:
            return _of_split(files, split, source, aside)
    expected = f"no table matches {' or '.join(pattern for patterns in wanted for pattern in patterns)}"
    raise SourceError(f"{source}: {expected}\nRemedy: give a pattern as in hf://owner/name/data/*.parquet")


def _is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS


# ----------------------------------------------------------------------------------------------------------- columns


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """question=prompt_text, ... as field -> column. Raises ValueError naming every one that cannot be."""
    columns, errors = {}, []
    for text in texts:
        target, equals, column = text.partition("=")
        if target not in TARGETS or not equals or (not column and target != "id"):
            errors.append(f"--column {text}: expected NAME=COLUMN, NAME one of {', '.join(TARGETS)}")
        columns[TARGETS.get(target, "")] = column
    if errors:
        raise ValueError("\n".join(errors))
    return columns


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with --column applied; anything but a record stays as it is. Raises ValueError for an absent column."""
    if not columns or not isinstance(row, dict):
        return row
    found = sorted(str(name) for name, value in row.items() if value is not None)
    missing = [column for column in columns.values() if column and column not in row]
    if missing:
        raise ValueError(f"no field {', '.join(missing)} (--column); it has {', '.join(sorted(map(str, row)))}")
    replaced = {name for field in columns for name in (field, *SAME_MEANING.get(field, ()))}
    kept = {name: value for name, value in row.items() if name not in replaced}
    given = {field: column for field, column in columns.items() if column}
    return NamedRow(kept | {field: row[column] for field, column in given.items()}, given, found)


# ---------------------------------------------------------------------------------------------------------- counting


def count_rows(files: Sequence[SourceFile], columns: Mapping[str, str]) -> list[int]:
    """Rows of each file. Raises SourceError naming every file that cannot be read or lacks a column."""
    counts, errors = [], []
    for file in files:
        try:
            counts.append(_count(file, columns))
        except (SourceError, PairsError, OSError) as error:
            errors.append(str(error))
    if not errors and not any(counts):
        errors = [f"{file.name}: no rows in it" for file in files]
    if errors:
        raise SourceError("\n".join(errors))
    return counts


def _count(file: SourceFile, columns: Mapping[str, str]) -> int:
    if file.path.suffix.lower() == ".parquet":
        with _open_parquet(file) as parquet:
            _check_schema(file, parquet.schema_arrow, columns)
            return parquet.metadata.num_rows
    return sum(1 for _ in _rows_of_text(file))


def _open_parquet(file: SourceFile) -> ParquetFile:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Read page by page: with pre_buffer a whole row group, images and all, would be in memory.
        return ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (ArrowException, OSError) as error:
        remedy = "the file is truncated or not Parquet; fetch it again"
        raise SourceError(f"{file.name}: {str(error).splitlines()[0]}\nRemedy: {remedy}") from error


def _check_schema(file: SourceFile, schema: Schema, columns: Mapping[str, str]) -> None:
    names = set(schema.names)
    errors = [f"no column {column!r} (--column)" for column in columns.values() if column and column not in names]
    have = names | set(columns)
    if not any(layout <= have for layout in ANSWER_LAYOUTS):
        errors += [f"no column {name!r}" for name in ("chosen", "rejected") if name not in have]
    if not have & QUESTION_FIELDS and not _holds_messages(schema, "chosen"):
        errors.append("no column 'question' or 'prompt'")
    if not have & {"image", "images", "image_path"}:
        errors.append("no column 'image', 'images' or 'image_path'")
    if errors:
        remedy = f"it has {', '.join(schema.names)}; name others as in --column question=COLUMN"
        raise SourceError(error_list(file.name, errors, remedy))


def _holds_messages(schema: Schema, column: str) -> bool:
    from pyarrow.types import is_large_list, is_list

    return column in schema.names and any(test(schema.field(column).type) for test in (is_list, is_large_list))


# ----------------------------------------------------------------------------------------------------------- reading


def read_chunks(file: SourceFile, columns: Mapping[str, str], start: int, sizes: Iterable[int]) -> Iterator[Any]:
    """The rows from number `start` (from 0) as one iterator of (place, row) for each of `sizes`, to be used in turn.

    A row that cannot be read comes as the ValueError that says why.
    """
    rows = _rows_of(file, columns, start)
    for size in sizes:
        yield islice(rows, size)


def read_fields(file: SourceFile, columns: Mapping[str, str], fields: Sequence[str]) -> Iterator[Row]:
    """Only these fields of every row that can be read: cheap in Parquet, where the others are not touched."""
    for _, row in _rows_of(file, columns, 0, fields):
        if isinstance(row, dict):
            yield {name: row.get(name) for name in fields}


def _rows_of(
    file: SourceFile, columns: Mapping[str, str], start: int, fields: Sequence[str] = FIELDS
) -> Iterator[tuple[str, Any]]:
    if file.path.suffix.lower() == ".parquet":
        rows = _rows_of_parquet(file, [*fields, *columns.values()], start)
    else:
        rows = islice(_rows_of_text(file), start, None)
    for place, row in rows:
        try:
            row = renamed(row, columns)
        except ValueError as error:
            row = error
        yield f"{file.name} {place}", row


def _rows_of_text(file: SourceFile) -> Iterator[tuple[str, Any]]:
    return _rows_of_csv(file.path) if file.path.suffix.lower() in KINDS[-1] else read_rows(file.path)


def _rows_of_csv(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes that are not UTF-8 pass as lone surrogates, so that only their own row is refused.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(reader, [])
        number = 0
        while (cells := _next_cells(reader)) is not None:
            if cells:
                number += 1
                yield f"row {number}", _row_of_cells(header, cells)


def _next_cells(reader: Iterator[list[str]]) -> list[str] | csv.Error | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        return error


def _row_of_cells(header: Sequence[str], cells: list[str] | csv.Error) -> Row | ValueError:
    if isinstance(cells, csv.Error):
        return ValueError("not CSV (a cell too long, or a stray quote, line end or zero byte)")
    if len(cells) != len(header):
        return ValueError(f"expected {len(header)} cells as in the first line, got {len(cells)}")
    if any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
        return ValueError("bytes that are not UTF-8")
    return {name: cell or None for name, cell in zip(header, cells)}


def _rows_of_parquet(file: SourceFile, wanted: Sequence[str], start: int) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException

    with _open_parquet(file) as parquet:
        groups, number = _groups_from(parquet, start)
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, groups, columns, use_threads=False):
                for row in _rows_of_batch(batch):
                    number += 1
                    if number > start:
                        yield f"row {number}", row
        except (ArrowException, OSError) as error:
            remedy = "the file is damaged; fetch it again"
            raise SourceError(f"{file.name}: damaged after row {number} ({error})\nRemedy: {remedy}") from error


def _groups_from(parquet: ParquetFile, start: int) -> tuple[list[int], int]:
    """The row groups from the one that holds row `start` on, and how many rows lie before them."""
    before = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if before + rows > start:
            return list(range(group, parquet.num_row_groups)), before
        before += rows
    return [], before


def _rows_of_batch(batch: RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_row_of_record(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row_of_record(record: RecordBatch) -> Row | ValueError:
    try:
        return record.to_pylist()[0]
    except UnicodeDecodeError as error:
        return ValueError(f"text that is not UTF-8 (byte {error.start})")
