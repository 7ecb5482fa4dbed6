"""What the stages share: records appended to a JSONL file chunk by chunk, and a manifest with the inputs' fingerprint.

Complete for the same inputs: skipped. Interrupted: continued. Made from other inputs: refused, the difference named.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dama.console import digest_of, digest_of_file, say, write_json

MANIFEST = "manifest.json"
Record = dict[str, Any]


class StageError(ValueError):
    """A stage's folder cannot be used: other inputs, unfinished, damaged, or in use."""


class Stage:
    """One writer's hold on a stage: append one chunk of records after the other, then finish.

    Chunks are planned from the whole input, so an interrupted one starts again and a resumed run writes the same bytes
    as an undisturbed one. In a distributed run exactly one process opens the stage. Use it in a `with` block.
    """

    def __init__(
        self, folder: Path, name: str, fingerprint: Record, chunk_sizes: Sequence[int], complete: bool
    ) -> None:
        self.folder, self.name, self.fingerprint = folder, name, fingerprint
        self.chunk_sizes = list(chunk_sizes)  # records in each chunk
        self.complete = complete
        self.chunks_done = len(self.chunk_sizes) if complete else 0
        self._file: BinaryIO | None = None
        self._started = time.monotonic()
        self._records_before = 0

    @property
    def total(self) -> int:
        """Records of the whole stage."""
        return sum(self.chunk_sizes)

    @property
    def records_done(self) -> int:
        return sum(self.chunk_sizes[: self.chunks_done])

    @property
    def records_path(self) -> Path:
        return self.folder / f"{self.name}.jsonl"

    def append(self, records: Sequence[Record]) -> None:
        """Writes the next chunk, one line a record, and returns when it is on the disk."""
        if self._file is None:
            raise StageError(f"{self.name}: nothing can be appended to a stage that is complete or closed")
        if self.chunks_done == len(self.chunk_sizes):
            raise StageError(f"{self.name}: all {len(self.chunk_sizes)} planned chunks are written already")
        expected = self.chunk_sizes[self.chunks_done]
        if len(records) != expected:
            got = f"chunk {self.chunks_done} has {len(records)} records"
            raise StageError(f"{self.name}: {got}, planned were {expected}")
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write("".join(lines).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.chunks_done += 1

    def records(self) -> list[Record]:
        """All records written so far, read back from the file."""
        with open(self.records_path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def finish(self, summary: Record) -> Record:
        """Marks the stage complete and returns its manifest; everything that depends on time is under "time"."""
        if self._file is None:
            raise StageError(f"{self.name}: a stage that is complete or closed cannot be finished")
        if self.chunks_done != len(self.chunk_sizes):
            done = f"{self.chunks_done} of {len(self.chunk_sizes)} chunks"
            raise StageError(f"{self.name}: finished after {done}; append the others first")
        manifest = _manifest(self, complete=True) | {
            "digest": digest_of_file(self.records_path),
            "summary": summary,
            "time": {
                "seconds": round(time.monotonic() - self._started, 3),
                "records": self.total - self._records_before,  # written by this run, the others by interrupted ones
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        write_json(self.folder / MANIFEST, manifest)
        self.close()
        self.complete = True
        return manifest

    def close(self) -> None:
        """Gives the folder free for another process; what is written stays and can be continued."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _hold(self) -> None:
        """Opens the records for appending and locks them, so that a second process is told instead of let in."""
        file = open(self.records_path, "ab")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            remedy = "wait for it, end it, or give another --out"
            raise StageError(f"{self.name}: another process writes {self.records_path}\nRemedy: {remedy}") from error
        self._file = file

    def _recover(self) -> None:
        """Keeps the whole chunks that are readable; a torn line and its unfinished chunk are cut off and done again."""
        assert self._file is not None
        ends = _line_ends(self.records_path)
        if len(ends) > self.total:
            raise _damaged(self.records_path, f"{len(ends)} records, planned were {self.total}")
        boundaries = [0, *accumulate(self.chunk_sizes)]
        self.chunks_done = max(index for index, count in enumerate(boundaries) if count <= len(ends))
        kept = boundaries[self.chunks_done]
        self._records_before = kept
        size, kept_bytes = self.records_path.stat().st_size, ends[kept - 1] if kept else 0
        self._file.truncate(kept_bytes)
        if size:
            cut = f", {size - kept_bytes} bytes of an interrupted chunk cut off" if size > kept_bytes else ""
            say(f"{self.name}: continues at record {kept} of {self.total} in {self.folder}{cut}")


def open_stage(
    folder: str | Path, name: str, fingerprint: Record, chunk_sizes: Sequence[int], *, overwrite: bool = False
) -> Stage:
    """Opens folder/name.jsonl and folder/manifest.json for these inputs, one stage to a folder.

    `fingerprint` holds whatever the records depend on, as JSON values; `chunk_sizes` the records of each planned chunk
    (one chunk is what a kill can cost). Afterwards `stage.complete` says that nothing is left to do; otherwise go on at
    chunk `stage.chunks_done`. Raises StageError where the folder holds another stage, other inputs (every differing
    field named) or damaged records; `overwrite` starts anew instead.
    """
    folder, fingerprint = Path(folder), json.loads(json.dumps(fingerprint))
    stage = Stage(folder, name, fingerprint, chunk_sizes, complete=False)
    folder.mkdir(parents=True, exist_ok=True)
    old = None if overwrite else _read_manifest(folder)
    if old is not None:
        _refuse_other_inputs(folder, name, fingerprint, old)
        if old["complete"]:
            _check_records(stage.records_path, old)
            seconds = old["time"]["seconds"]
            say(f"{name}: complete in {folder} ({old['records']} records, made in {seconds:.1f} s), skipped")
            return Stage(folder, name, fingerprint, chunk_sizes, complete=True)
        _refuse_other_plan(folder, stage, old)
    elif not overwrite and stage.records_path.exists() and stage.records_path.stat().st_size:
        raise _damaged(stage.records_path, f"records without a {MANIFEST}, so their inputs are unknown")
    stage._hold()
    if old is None:
        # Records first: with the new manifest beside old records, a kill between the two would continue them.
        os.truncate(stage.records_path, 0)
        write_json(folder / MANIFEST, _manifest(stage, complete=False))
    stage._recover()
    return stage


def read_stage(folder: str | Path, name: str) -> tuple[Record, list[Record]]:
    """(manifest, records) of a complete stage. Raises StageError where it is absent, unfinished or damaged."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise StageError(f"{name}: no {MANIFEST} in {folder}\nRemedy: run `python -m dama {name} --out {folder}` first")
    if manifest["stage"] != name:
        remedy = f"give the folder of the stage {name}"
        raise StageError(f"{folder} holds the stage {manifest['stage']}, expected {name}\nRemedy: {remedy}")
    if not manifest["complete"]:
        remedy = f"run `python -m dama {name}` with the same flags again, it continues"
        raise StageError(f"{name}: the stage in {folder} was interrupted\nRemedy: {remedy}")
    path = folder / f"{name}.jsonl"
    _check_records(path, manifest)
    with open(path, encoding="utf-8") as file:
        return manifest, [json.loads(line) for line in file]


def differences(old: Any, new: Any, field: str = "") -> list[str]:
    """`field: old -> new` for every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [(f"{field}.{key}" if field else key, old.get(key), new.get(key)) for key in keys]
        return [line for name, was, now in parts for line in differences(was, now, name)]
    return [] if old == new else [f"{field}: {json.dumps(old)} -> {json.dumps(new)}"]


def _manifest(stage: Stage, complete: bool) -> Record:
    return {
        "stage": stage.name,
        "complete": complete,
        "records": stage.total,
        "plan": digest_of(stage.chunk_sizes),
        "fingerprint": stage.fingerprint,
    }


def _read_manifest(folder: Path) -> Record | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"not JSON ({error})") from error
    if not isinstance(manifest, dict) or not {"stage", "complete", "records", "plan", "fingerprint"} <= set(manifest):
        raise _damaged(path, "not the manifest of a stage")
    return manifest


def _damaged(path: Path, what: str) -> StageError:
    return StageError(f"{path}: {what}\nRemedy: give another --out, or --overwrite to make it anew")


def _refuse_other_inputs(folder: Path, name: str, fingerprint: Record, old: Record) -> None:
    remedy = "Remedy: give another --out, or --overwrite to replace it"
    if old["stage"] != name:
        raise StageError(f"{folder} holds the stage {old['stage']}, this is {name}\n{remedy}")
    lines = differences(old["fingerprint"], fingerprint)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise StageError(f"{name}: {folder} was made from other inputs (there -> here)\n{listed}\n{remedy}")


def _refuse_other_plan(folder: Path, stage: Stage, old: Record) -> None:
    if (old["plan"], old["records"]) != (digest_of(stage.chunk_sizes), stage.total):
        was, now = f"{old['records']} records", f"{stage.total} records in {len(stage.chunk_sizes)} chunks"
        remedy = "give the settings of the interrupted run, another --out, or --overwrite"
        raise StageError(f"{stage.name}: {folder} was begun with other chunks ({was}; now {now})\nRemedy: {remedy}")


def _check_records(path: Path, manifest: Record) -> None:
    if not path.is_file():
        raise _damaged(path, "missing, although the manifest says that the stage is complete")
    if digest_of_file(path) != manifest["digest"]:
        raise _damaged(path, f"changed since the stage was finished (digest is not {manifest['digest']})")


def _line_ends(path: Path) -> list[int]:
    """Byte offsets after each line, up to the first line that is torn or not JSON."""
    ends, end = [], 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_json(line):
                break
            end += len(line)
            ends.append(end)
    return ends


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are both one
        return False
    return True
