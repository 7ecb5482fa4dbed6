"""What the stages share: records appended to a JSONL file chunk by chunk, and a manifest with the inputs' fingerprint.

Complete for the same inputs: skipped. Interrupted: continued. Made from other inputs: refused, the difference named.
Shards of a stage write folders of their own, and the last to finish merges them into the bytes of an unsharded run.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType, TracebackType
from typing import IO, Any, BinaryIO, NamedTuple

from tqdm import tqdm

from dama.console import atomic_file, digest_of, digest_of_file, log, regular_file, write_json, writing

MANIFEST = "manifest.json"
SHARDS = "shards"  # the folder, inside a stage's, that holds those of its shards
Record = dict[str, Any]
Flags = Mapping[str, str]  # the beginning of a field of a fingerprint -> the flag that sets it
Summarize = Callable[[Any, list[Record]], Record]
"""(all records, what each shard handed to `conclude`) -> the summary in the manifest.

The records are a `RecordFile`: they have a length and can be iterated over more than once.
"""
Place = Callable[[Record], int]
"""A record -> where it belongs in the finished file, for stages whose chunks follow another order than their input."""


class Attachment(NamedTuple):
    """A binary file beside a stage's records, with a fixed number of bytes for each record, in their order."""

    name: str
    size_of: Callable[[Record], int]  # bytes that belong to a record


NO_FLAGS: Flags = MappingProxyType({})
IN_MEMORY = 1 << 26  # bytes of a file whose records are kept in memory for a second pass


class StageError(ValueError):
    """A stage's folder cannot be used: other inputs, unfinished, damaged, or in use."""


class Shard(NamedTuple):
    """Which part of a stage's chunks a process works on: block `index`, counted from 0, of `count`."""

    index: int  # type: ignore[assignment]  # tuple's methods of these names are not needed here
    count: int  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "3/16", the fourth of sixteen. Raises ValueError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"shard {text!r}: expected i/n with 0 <= i < n, as in 0/4, 1/4, 2/4 and 3/4")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_launcher(cls) -> Shard:
        """The process's rank under torchrun, DeepSpeed's launcher or srun; the only one without a launcher."""
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and size in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[size]))
        return WHOLE

    def block(self, chunks: int) -> range:
        """Numbers of the shard's chunks: contiguous, and as many as any other shard's, or one more or less."""
        return range(self.index * chunks // self.count, (self.index + 1) * chunks // self.count)

    def folder(self, root: Path) -> Path:
        """Where the shard writes; the stage's own folder where there is no other shard."""
        return root if self.count == 1 else root / SHARDS / f"{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)


class RecordFile(Collection[Record]):
    """The records of a JSONL file. A large file is read again for each pass instead of being held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[Record] | None = list(self._read()) if path.stat().st_size <= IN_MEMORY else None
        self._length = sum(1 for _ in self._lines()) if self._kept is None else len(self._kept)

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            yield from file

    def _read(self) -> Iterator[Record]:
        return map(json.loads, self._lines())

    def __iter__(self) -> Iterator[Record]:
        return self._read() if self._kept is None else iter(self._kept)

    def __len__(self) -> int:
        return self._length

    def __contains__(self, record: object) -> bool:
        return any(record == each for each in self)


class Stage:
    """One writer's hold on a stage or a shard of it: append one chunk of records after the other, then finish.

    Chunks are planned from the whole input, so an interrupted one starts again and a resumed run writes the same bytes
    as an undisturbed one. Exactly one process opens a shard. Use it in a `with` block:

        with open_stage(out, "name", fingerprint, [len(chunk) for chunk in chunks], shard=shard) as stage:
            for number in stage.to_do:
                stage.append(records_of(chunks[number]))
            manifest = stage.conclude(summarize, {"skipped": skipped})
    """

    def __init__(
        self,
        root: Path,
        name: str,
        fingerprint: Record,
        plan: Sequence[int],
        shard: Shard = WHOLE,
        flags: Flags = NO_FLAGS,
        attachment: Attachment | None = None,
    ) -> None:
        self.root, self.name, self.fingerprint, self.flags = root, name, fingerprint, flags
        self.attachment = attachment
        self.plan = list(plan)  # records in each chunk of the whole stage
        self.shard, self.folder, self.block = shard, shard.folder(root), shard.block(len(plan))
        self.chunk_sizes = [plan[number] for number in self.block]
        self.complete = False
        self.chunks_done = 0
        self._file: BinaryIO | None = None
        self._attached: BinaryIO | None = None
        self._started = time.monotonic()
        self._records_before = 0

    @property
    def to_do(self) -> range:
        """Numbers, in the whole stage, of the chunks that are still to be appended here."""
        return self.block[self.chunks_done :]

    @property
    def total(self) -> int:
        """Records of this stage or shard."""
        return sum(self.chunk_sizes)

    @property
    def records_done(self) -> int:
        """Number of records in the finished chunks."""
        return sum(self.chunk_sizes[: self.chunks_done])

    @property
    def records_path(self) -> Path:
        """Path of the stage's records."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def attachment_path(self) -> Path:
        """Path of the binary file beside the records. Only for a stage that has one."""
        assert self.attachment is not None
        return self.folder / self.attachment.name

    def append(self, records: Sequence[Record], attached: bytes = b"") -> None:
        """Write the next chunk, one line a record, and return when it is on the disk.

        Args:
            attached: what belongs to these records in the binary file beside them; it is on the disk first.
        """
        if self._file is None:
            raise StageError(f"{self.name}: nothing can be appended to a stage that is complete or closed")
        if self.chunks_done == len(self.chunk_sizes):
            raise StageError(f"{self.name}: all {len(self.chunk_sizes)} planned chunks are written already")
        expected = self.chunk_sizes[self.chunks_done]
        if len(records) != expected:
            got = f"chunk {self.chunks_done} has {len(records)} records"
            raise StageError(f"{self.name}: {got}, planned were {expected}")
        content = "".join(self._line(record) for record in records).encode("utf-8")
        size = sum(map(self.attachment.size_of, records)) if self.attachment else 0
        if len(attached) != size:
            raise StageError(f"{self.name}: expected {size} attached bytes for chunk {self.chunks_done}, "
                             f"got {len(attached)}")  # fmt: skip
        if self._attached is not None:
            _write_through(self._attached, self.attachment_path, attached)
        _write_through(self._file, self.records_path, content)
        self.chunks_done += 1

    def _line(self, record: Record) -> str:
        """The record as a line of JSON. Raises StageError naming the record and its fields that are NaN or infinite."""
        try:
            return _json_text(record) + "\n"
        except ValueError as error:
            fields = ", ".join(name for name, value in record.items() if not _is_finite(value))
            names = (f"{key} {record[key]}" for key in ("id", "question_id", "place") if key in record)
            which = next(names, "a record")
            problem = f"expected finite numbers, got NaN or an infinite number in {fields}"
            remedy = "check the model's weights and precision; what is written stays, and the same command continues"
            raise StageError(f"{self.name}: {which}: {problem}\nRemedy: {remedy}") from error

    def fill(self, work: Callable[[int], Sequence[Record]], unit: str) -> None:
        """Append what `work` makes of each chunk that is still to do; the progress bar counts records in `unit`s."""
        silent = self.complete
        with tqdm(total=self.total, initial=self.records_done, desc=self.name, unit=unit, disable=silent) as bar:
            for number in self.to_do:
                records = work(number)
                self.append(records)
                bar.update(len(records))

    def records(self) -> list[Record]:
        """All records written so far, read back from the file."""
        with self.records_path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def finish(self, summary: Record, places: Sequence[int] = ()) -> Record:
        """Marks the stage complete and returns its manifest; everything that depends on time is under "time".

        places: of a shard's records, where they belong in the merged file; kept in its manifest for the merge.
        """
        if self._file is None:
            raise StageError(f"{self.name}: a stage that is complete or closed cannot be finished")
        if self.chunks_done != len(self.chunk_sizes):
            done = f"{self.chunks_done} of {len(self.chunk_sizes)} chunks"
            raise StageError(f"{self.name}: finished after {done}; append the others first")
        manifest = _manifest(self, complete=True) | {
            "digest": digest_of_file(self.records_path),
            **self._attached_digest(),
            "summary": summary,
            "time": {
                "seconds": round(time.monotonic() - self._started, 3),
                "records": self.total - self._records_before,  # written by this run, the others by interrupted ones
                "finished": _now(),
            },
        }
        write_json(self.folder / MANIFEST, manifest | ({"places": list(places)} if places else {}))
        self.close()
        self.complete = True
        return manifest

    def _attached_digest(self) -> Record:
        if self.attachment is None:
            return {}
        return {"attached": {self.attachment.name: digest_of_file(self.attachment_path)}}

    def conclude(self, summarize: Summarize, facts: Record, place: Place | None = None) -> Record | None:
        """Finish the stage; the last shard to finish merges all.

        Returns the manifest of the whole stage, or None while other shards are missing. `facts` is what the summary
        needs besides the records. With `place` the finished file is in that order; a stage that is complete already
        stays as it is.
        """
        if self.shard.count == 1:
            return _read_manifest(self.folder) if self.complete else self._finish_whole(summarize, facts, place)
        if not self.complete:
            self.finish(facts, [place(record) for record in RecordFile(self.records_path)] if place else ())
        return self._merge_if_last(summarize, place)

    def _finish_whole(self, summarize: Summarize, facts: Record, place: Place | None) -> Record:
        """Finish a stage that is not in shards, its records in their final order.

        A kill after the file is replaced and before the manifest is written leaves all planned records in that order,
        which a resumed run finds complete and orders once more.
        """
        if place is not None and self.chunks_done == len(self.chunk_sizes):
            places = [place(record) for record in RecordFile(self.records_path)]
            if places != sorted(places):
                write_joined(self.records_path, [self.records_path], places)
        return self.finish(summarize(RecordFile(self.records_path), [facts]))

    def _merge_if_last(self, summarize: Summarize, place: Place | None) -> Record | None:
        parts = [Shard(index, self.shard.count).folder(self.root) for index in range(self.shard.count)]
        missing = [part for part in parts if not self._is_finished_sibling(part)]
        if not missing:
            return _merge(self.root, parts, self.name, summarize, place)
        remedy = f"the last to finish merges them, or `python -m dama merge {self.root}` afterwards"
        log(f"{self.name}: shard {self.shard} is done, {len(missing)} others are not yet; {remedy}")
        return None

    def _is_finished_sibling(self, part: Path) -> bool:
        """Whether that folder holds a complete shard of these inputs; it may be left over from others."""
        manifest = _read_manifest(part)
        mine = (True, self.name, self.fingerprint, digest_of(self.plan))
        return manifest is not None and tuple(manifest[key] for key in ("complete", *_SAME_IN_SHARDS)) == mine

    def close(self) -> None:
        """Give the folder free for another process; what is written stays and can be continued."""
        for file in (self._file, self._attached):
            if file is not None:
                file.close()
        self._file = self._attached = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _hold(self) -> None:
        """Open the records for appending and locks them, so that a second process is told instead of let in."""
        # Without a buffer, which on a full disk would fail once more when the file is closed.
        file = open(self.records_path, "ab", buffering=0, opener=regular_file)  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            remedy = "wait for it, end it, or give another --out"
            raise StageError(f"{self.name}: another process writes {self.records_path}\nRemedy: {remedy}") from error
        self._file = file
        if self.attachment is not None:
            self._attached = open(self.attachment_path, "ab", buffering=0, opener=regular_file)  # noqa: SIM115

    def _truncate(self, size: int, attached: int = 0) -> None:
        assert self._file is not None
        self._file.truncate(size)
        if self._attached is not None:
            self._attached.truncate(attached)

    def _recover(self) -> None:
        """Keep the whole chunks that are readable; a torn line and its unfinished chunk are cut off and done again."""
        ends = _line_ends(self.records_path)
        if len(ends) > self.total:
            raise _damaged(self.records_path, f"{len(ends)} records, planned were {self.total}")
        boundaries = [0, *accumulate(self.chunk_sizes)]
        attached_ends = self._attached_ends(len(ends))
        attached_size = self.attachment_path.stat().st_size if self.attachment else 0
        self.chunks_done = max(
            index
            for index, count in enumerate(boundaries)
            if count <= len(ends) and attached_ends[count] <= attached_size
        )
        kept = boundaries[self.chunks_done]
        self._records_before = kept
        size, kept_bytes = self.records_path.stat().st_size, ends[kept - 1] if kept else 0
        self._truncate(kept_bytes, attached_ends[kept])
        if size:
            cut = f", {size - kept_bytes} bytes of an interrupted chunk cut off" if size > kept_bytes else ""
            log(f"{self.name}: continues at record {kept} of {self.total} in {self.folder}{cut}")

    def _attached_ends(self, count: int) -> list[int]:
        """Byte offsets in the attachment before the first record and after each of `count` records."""
        if self.attachment is None:
            return [0] * (count + 1)
        with self.records_path.open("rb") as file:
            sizes = [self.attachment.size_of(json.loads(line)) for line, _ in zip(file, range(count))]
        return [0, *accumulate(sizes)]


def _write_through(file: BinaryIO, path: Path, content: bytes) -> None:
    """Append to an unbuffered file and return when it is on the disk."""
    with writing(path, len(content)):
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def open_stage(
    folder: str | Path,
    name: str,
    fingerprint: Record,
    chunk_sizes: Sequence[int],
    *,
    shard: Shard = WHOLE,
    overwrite: bool = False,
    flags: Flags = NO_FLAGS,
    attachment: Attachment | None = None,
) -> Stage:
    """Open folder/name.jsonl and folder/manifest.json for these inputs, one stage to a folder.

    `fingerprint` holds whatever the records depend on, as JSON values; `chunk_sizes` the records of each planned chunk
    of the whole input (one chunk is what a kill can cost). A `shard` of several writes to folder/shards instead.
    Afterwards `stage.complete` says that nothing is left to do; otherwise append the chunks `stage.to_do`. Raises
    StageError where the folder holds another stage, other inputs (every differing field named) or damaged records;
    `overwrite` starts anew instead. `flags` names the fields in errors, see `differences`. `attachment`: a binary file
    that is written beside the records.
    """
    root, fingerprint = Path(folder), json.loads(json.dumps(fingerprint))
    stage = Stage(root, name, fingerprint, chunk_sizes, flags=flags, attachment=attachment)
    if shard.count > 1 and (overwrite or not _skip_complete(stage)):
        stage = Stage(root, name, fingerprint, chunk_sizes, shard, flags, attachment)
    if stage.complete or (not overwrite and _skip_complete(stage)):
        return stage
    stage.folder.mkdir(parents=True, exist_ok=True)
    old = None if overwrite else _read_manifest(stage.folder)
    if old is not None:
        _refuse_other_plan(stage, old)
    elif not overwrite and stage.records_path.exists() and stage.records_path.stat().st_size:
        raise _damaged(stage.records_path, f"records without a {MANIFEST}, so their inputs are unknown")
    stage._hold()
    if old is None:
        # Records first: with the new manifest beside old records, a kill between the two would continue them.
        stage._truncate(0)
        write_json(stage.folder / MANIFEST, _manifest(stage, complete=False))
    stage._recover()
    return stage


def _skip_complete(stage: Stage) -> bool:
    """Whether the stage's folder holds it complete: then it says so and is marked. Raises for another's folder."""
    old = _read_manifest(stage.folder)
    if old is None:
        return False
    _refuse_other_inputs(stage, old)
    if not old["complete"]:
        return False
    _check_records(stage.records_path, old)
    log_complete(stage.name, stage.folder, old)
    stage.complete, stage.chunks_done = True, len(stage.chunk_sizes)
    return True


def files_of_stage(folder: Path, name: str) -> list[Path]:
    """All files of a complete stage: its manifest, its records, and what is attached to them."""
    attached = json.loads((folder / MANIFEST).read_bytes()).get("attached", {})
    return [folder / file for file in (MANIFEST, f"{name}.jsonl", *attached)]


def log_complete(name: str, folder: Path, manifest: Record) -> None:
    """Log that a stage is left as it is."""
    seconds = manifest["time"]["seconds"]
    log(f"{name}: complete in {folder} ({manifest['records']} records, made in {seconds:.1f} s), skipped")


def read_stage(folder: str | Path, name: str) -> tuple[Record, list[Record]]:
    """(manifest, records) of a complete stage. Raises StageError where it is absent, unfinished or damaged."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        remedy = f"run `python -m dama {name} --out {folder}` first"
        if (folder / SHARDS).is_dir():
            remedy = f"finish its shards, then `python -m dama merge {folder}`"
        raise StageError(f"{name}: no {MANIFEST} in {folder}\nRemedy: {remedy}")
    if manifest["stage"] != name:
        remedy = f"give the folder of the stage {name}"
        raise StageError(f"{folder} holds the stage {manifest['stage']}, expected {name}\nRemedy: {remedy}")
    if not manifest["complete"]:
        remedy = f"run `python -m dama {name}` with the same flags again, it continues"
        raise StageError(f"{name}: the stage in {folder} was interrupted\nRemedy: {remedy}")
    path = folder / f"{name}.jsonl"
    _check_records(path, manifest)
    with path.open(encoding="utf-8") as file:
        return manifest, [json.loads(line) for line in file]


# ---------------------------------------------------------------------------------------------------------- shards

_SAME_IN_SHARDS = ("stage", "fingerprint", "plan")


def shards_in(folder: str | Path) -> list[Path]:
    """The folders of a stage's shards, by name."""
    return sorted(path for path in (Path(folder) / SHARDS).glob("*-of-*") if path.is_dir())


def stage_of(folder: str | Path) -> str:
    """The name of the stage that a folder holds, whole or in shards. Raises StageError where there is none."""
    for place in (Path(folder), *shards_in(folder)):
        manifest = _read_manifest(place)
        if manifest is not None:
            return manifest["stage"]
    remedy = "give the folder that was a stage's --out"
    raise StageError(f"{folder}: neither {MANIFEST} nor {SHARDS} of a stage in it\nRemedy: {remedy}")


def merge_shards(folder: str | Path, name: str, summarize: Summarize) -> Record:
    """Join all shards in folder/shards to folder/name.jsonl and its manifest, the bytes of an unsharded run.

    Returns the manifest. Raises StageError naming every shard that is unfinished, of other inputs, missing or there
    twice.
    """
    parts = shards_in(folder)
    if not parts:
        raise StageError(f"{name}: no {SHARDS} in {folder}\nRemedy: run the stage with --shard 0/n to n-1/n first")
    return _merge(Path(folder), parts, name, summarize)


def _merge(root: Path, parts: Sequence[Path], name: str, summarize: Summarize, place: Place | None = None) -> Record:
    read = [(_read_manifest(part), part) for part in parts]
    errors = [f"  {part.name}: unfinished" for manifest, part in read if manifest is None or not manifest["complete"]]
    done = [(manifest, part) for manifest, part in read if manifest is not None and manifest["complete"]]
    foreign = [part for manifest, part in done if "chunks" not in manifest or manifest["stage"] != name]
    errors += [f"  {part.name}: not a shard of the stage {name}" for part in foreign]
    done = sorted((pair for pair in done if pair[1] not in foreign), key=lambda pair: pair[0]["chunks"])
    errors += [*_foreign_inputs(done), *_gaps_and_overlaps(done)]
    if errors:
        remedy = f"run the shards that are missing; remove from {root / SHARDS} what belongs to another run"
        raise StageError("\n".join([f"{name}: the shards in {root} do not fit together", *errors, f"Remedy: {remedy}"]))
    for manifest, part in done:
        _check_records(part / f"{name}.jsonl", manifest)
    return _write_merged(root, done, name, summarize, place)


def _foreign_inputs(done: Sequence[tuple[Record, Path]]) -> Iterator[str]:
    """Shards that were made from other inputs, or planned in other chunks, than the first of them."""
    for manifest, part in done[1:]:
        first, reference = done[0]
        changed = differences(first["fingerprint"], manifest["fingerprint"])
        if not changed and manifest["plan"] != first["plan"]:
            changed = ["other chunks"]
        yield from (f"  {part.name}: other inputs than {reference.name} ({line})" for line in changed)


def _gaps_and_overlaps(done: Sequence[tuple[Record, Path]]) -> Iterator[str]:
    """Chunks that are in none or in two of the shards, which come in the order of their chunks."""
    position = 0
    for manifest, part in done:
        start, end, _ = manifest["chunks"]
        if start > position:
            yield f"  gap: chunks {position} to {start - 1} are in no finished shard"
        elif start < min(position, end):
            yield f"  {part.name}: overlaps another, chunks {start} to {min(position, end) - 1} are there twice"
        position = max(position, end)
    if done and position < (total := done[0][0]["chunks"][2]):
        yield f"  gap: chunks {position} to {total - 1} are in no finished shard"


def _write_merged(
    root: Path, done: Sequence[tuple[Record, Path]], name: str, summarize: Summarize, place: Place | None
) -> Record:
    manifests = [manifest for manifest, _ in done]
    merged = {key: manifests[0][key] for key in ("stage", "complete", "records", "plan", "fingerprint")}
    merged["records"] = sum(manifest["records"] for manifest in manifests)
    old = _read_manifest(root)
    if old is None or old["fingerprint"] != merged["fingerprint"]:
        # Two shards that finish together both merge and write the same; a kill in between leaves what can be continued.
        write_json(root / MANIFEST, merged | {"complete": False})
    path, sources = root / f"{name}.jsonl", [part / f"{name}.jsonl" for _, part in done]
    places: Sequence[int] | None = None
    if place is not None:
        places = [place(record) for source in sources for record in RecordFile(source)]
    elif all("places" in manifest for manifest in manifests if manifest["records"]):
        places = [index for manifest in manifests for index in manifest.get("places", ())]
    write_joined(path, sources, places)
    seconds = max(manifest["time"]["seconds"] for manifest in manifests)  # they may have run beside each other
    attached = {file: _joined_attachment(root, file, [part for _, part in done]) for file in _attached_names(manifests)}
    merged |= {
        "digest": digest_of_file(path),
        **({"attached": attached} if attached else {}),
        "summary": summarize(RecordFile(path), [manifest["summary"] for manifest in manifests]),
        "time": {"seconds": seconds, "records": merged["records"], "finished": _now(), "shards": len(done)},
    }
    write_json(root / MANIFEST, merged)
    log(f"{name}: {len(done)} shards with {merged['records']} records merged in {root}")
    return merged


def _attached_names(manifests: Sequence[Record]) -> list[str]:
    """Files that belong to the records of all shards."""
    if any("places" in manifest for manifest in manifests if "attached" in manifest):
        raise ValueError("stage: expected an attachment or places of records, got both")
    return sorted({file for manifest in manifests for file in manifest.get("attached", {})})


def _joined_attachment(root: Path, file: str, parts: Sequence[Path]) -> str:
    """Join a binary file of all shards; return its digest."""
    sources = [part / file for part in parts]
    with atomic_file(root / file, sum(source.stat().st_size for source in sources)) as output:
        _copy_all(sources, output)
    return digest_of_file(root / file)


def write_joined(path: Path, sources: Sequence[Path], places: Sequence[int] | None = None) -> None:
    """Write the lines of JSONL files, one file after the other or all in the order of `places`, to one file.

    A line ends with a newline and with nothing else. No file is read into memory.

    Args:
        path: replaced at the end; it may be one of the sources. places: of every line, in the order of the sources.

    Raises:
        ValueError: there are more or fewer places than lines.
    """
    size = sum(source.stat().st_size for source in sources)
    with atomic_file(path, size) as output:
        if places is None:
            _copy_all(sources, output)
            return
        with TemporaryFile(dir=path.parent) as joined:
            _copy_all(sources, joined)
            joined.seek(0)
            lengths = [len(line) for line in joined]
            lines = zip(places, accumulate(lengths, initial=0), lengths, strict=False)
            if len(lengths) != len(places):
                raise ValueError(f"{path}: {len(lengths)} records, expected one for each of {len(places)} places")
            for _, start, length in sorted(lines, key=itemgetter(0)):
                output.write(os.pread(joined.fileno(), length, start))


def _copy_all(sources: Sequence[Path], output: IO[bytes]) -> None:
    for source in sources:
        with source.open("rb") as file:
            shutil.copyfileobj(file, output)


def differences(old: Any, new: Any, flags: Flags = NO_FLAGS, field: str = "") -> list[str]:
    """`flag: old -> new` for every leaf in which two JSON values differ; a value that is not recorded is the default.

    Args:
        old: earlier value.
        new: present value.
        field: name of the compared field; empty for the whole record.
        flags: the beginning of a field, such as "decoding." -> what to call it; other fields go by their own names.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [(f"{field}.{key}" if field else key, old.get(key), new.get(key)) for key in keys]
        return [line for name, was, now in parts for line in differences(was, now, flags, name)]
    if old == new:
        return []
    start = max((begin for begin in flags if field.startswith(begin)), key=len, default="")
    was, now = ("default" if value is None else json.dumps(value) for value in (old, new))
    return [f"{flags.get(start, start)}{field.removeprefix(start)}: {was} -> {now}"]


# -------------------------------------------------------------------------------------------------------- manifests


def _manifest(stage: Stage, complete: bool) -> Record:
    manifest = {
        "stage": stage.name,
        "complete": complete,
        "records": stage.total,
        "plan": digest_of(stage.plan),
        "fingerprint": stage.fingerprint,
    }
    if stage.shard.count > 1:
        manifest["chunks"] = [stage.block.start, stage.block.stop, len(stage.plan)]
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_manifest(folder: Path) -> Record | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits, too many brackets
        raise _damaged(path, f"not JSON ({error})") from error
    if not isinstance(manifest, dict) or not {"stage", "complete", "records", "plan", "fingerprint"} <= set(manifest):
        raise _damaged(path, "not the manifest of a stage")
    return manifest


def _damaged(path: Path, what: str) -> StageError:
    return StageError(f"{path}: {what}\nRemedy: give another --out, or --overwrite to make it anew")


def _refuse_other_inputs(stage: Stage, old: Record) -> None:
    remedy = "Remedy: give another --out, or --overwrite to replace it"
    if old["stage"] != stage.name:
        raise StageError(f"{stage.folder} holds the stage {old['stage']}, this is {stage.name}\n{remedy}")
    lines = differences(old["fingerprint"], stage.fingerprint, stage.flags)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise StageError(f"{stage.name}: {stage.folder} was made from other inputs (there -> here)\n{listed}\n{remedy}")


def _refuse_other_plan(stage: Stage, old: Record) -> None:
    if (old["plan"], old["records"]) != (digest_of(stage.plan), stage.total):
        was, now = f"{old['records']} records", f"{stage.total} records in {len(stage.chunk_sizes)} chunks"
        remedy = "give the settings of the interrupted run, another --out, or --overwrite"
        begun = f"{stage.name}: {stage.folder} was begun with other chunks"
        raise StageError(f"{begun} ({was}; now {now})\nRemedy: {remedy}")


def _check_records(path: Path, manifest: Record) -> None:
    if not path.is_file():
        raise _damaged(path, "missing, although the manifest says that the stage is complete")
    digests = {path.name: manifest["digest"]} | manifest.get("attached", {})
    for name, digest in digests.items():
        if not path.with_name(name).is_file() or digest_of_file(path.with_name(name)) != digest:
            raise _damaged(path.with_name(name), f"changed since the stage was finished (digest is not {digest})")


def _line_ends(path: Path) -> list[int]:
    """Byte offsets after each line, up to the first line that is torn or not JSON."""
    ends, end = [], 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_json(line):
                break
            end += len(line)
            ends.append(end)
    return ends


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _is_finite(value: Any) -> bool:
    try:
        _json_text(value)
    except ValueError:
        return False
    return True


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return False
    return True
