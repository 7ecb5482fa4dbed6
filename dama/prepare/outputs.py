"""The prepared set's files: repeated rows left out, images held out, every row in one list, card and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from dama.console import digest_of_file, open_fresh, write_atomic, write_json, writing
from dama.pairs import PairsError, place_of
from dama.prepare.card import Tally, images_of, markdown
from dama.prepare.images import ImageStore
from dama.prepare.rows import REPEATED_ID, REPEATED_PAIR, Record, pair_key, written
from dama.stage import Stage

IMAGES, PAIRS, HELD_OUT, DROPPED, SUMS = "images", "pairs.jsonl", "held_out.jsonl", "dropped.jsonl", "SHA256SUMS"
CARD_JSON, CARD_PAGE = "data_card.json", "data_card.md"
OUTPUTS = (PAIRS, HELD_OUT, DROPPED, CARD_JSON, CARD_PAGE, SUMS)
SHOWN_ROWS = 10  # in the error where none is left


class Split(NamedTuple):
    """How many images are held out, a share below 1 or a number, and the seed of the choice."""

    hold_out: float
    seed: int

    def held_out(self, images: Sequence[str]) -> frozenset[str]:
        """The images that come first in an order shuffled by the seed.

        A picture's place in it depends on its bytes and the seed alone, never on where its rows stand.
        """
        count = round(self.hold_out * len(images)) if self.hold_out < 1 else int(self.hold_out)

        def place(name: str) -> bytes:
            return hashlib.sha256(f"{self.seed} {name}".encode()).digest()

        return frozenset(sorted(images, key=place)[:count])


def settled(path: Path) -> Iterator[Record]:
    """The stage's records, a pair or an id that came before as a row left out."""
    pairs: dict[str, str] = {}
    ids: dict[str, str] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if "reason" not in record:
                record = _unless_repeated(record, pairs, ids)
            yield record


def _unless_repeated(record: Record, pairs: dict[str, str], ids: dict[str, str]) -> Record:
    left_out = {"place": record["place"], "idx": record["idx"], "image": record["origin_image"]}
    key = pair_key(record)
    if key in pairs:
        return left_out | {"reason": REPEATED_PAIR, "detail": f"as in {pairs[key]}"}
    if record["idx"] in ids:
        detail = f"another pair has it, in {ids[record['idx']]}; --column id= gives ids from the content"
        return left_out | {"reason": REPEATED_ID, "detail": detail}
    pairs[key] = ids[record["idx"]] = record["place"]
    return record


class LinesFile:
    """A JSONL file written line by line that appears under its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.digest = hashlib.sha256()
        self._file: BinaryIO = open_fresh(self.partial)  # closed by finish

    def write(self, record: Record) -> None:
        """Append one record as a line."""
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        self.digest.update(line)
        with writing(self.path, len(line)):
            self._file.write(line)

    def finish(self) -> str:
        """Give the file its name; returns the SHA-256 of its bytes."""
        with writing(self.path, self._file.tell()), self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self.partial.replace(self.path)
        return self.digest.hexdigest()


def write_outputs(stage: Stage, store: ImageStore, split: Split, facts: Record) -> Record:
    """Write all files from the stage's records; returns the manifest's summary. `facts` go to the head of the card.

    Raises PairsError, with the first reasons, where no pair is left to train on.
    """
    out = stage.folder
    images: dict[str, None] = {}  # in order of first use
    places: dict[str, None] = {}
    for record in settled(stage.records_path):
        if "reason" not in record:
            images |= dict.fromkeys(images_of(record))
            places[place_of(record["image"], record["idx"])] = None
    tally, sums = _write_lines(stage, split.held_out(list(places)))
    if not tally.pairs_of[False]:
        (out / PAIRS).unlink()
        remedy = f"correct the rows, or --image_folder, --column, --hold_out; all rows are in {out / DROPPED}"
        counts = f"{tally.rows} rows, {tally.left_out.total()} left out, {tally.pairs_of[True]} held out"
        lines = [f"  {line}" for line in _reasons(out, tally)]
        raise PairsError("\n".join([f"no pair is left to train on: {counts}", *lines, f"Remedy: {remedy}"]))
    store.remove_unused(frozenset(images))
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    lines += [f"{Path(name).stem}  {IMAGES}/{name}\n" for name in sorted(images)]
    write_atomic(out / SUMS, "".join(lines))
    checksum = hashlib.sha256("".join(lines).encode()).hexdigest()
    card = {"checksum": checksum, **facts, **tally.card(facts["settings"]["lengths"])}
    write_json(out / CARD_JSON, card)
    write_atomic(out / CARD_PAGE, markdown(card))
    return {"checksum": checksum, **card["counts"], "reasons": card["left_out"]}


def _write_lines(stage: Stage, held_out: frozenset[str]) -> tuple[Tally, dict[str, str]]:
    """pairs.jsonl, held_out.jsonl and dropped.jsonl; the card's figures and the files' SHA-256."""
    tally = Tally()
    files = {name: LinesFile(stage.folder / name) for name in (PAIRS, HELD_OUT, DROPPED)}
    for record in tqdm(settled(stage.records_path), "writing", total=stage.total, unit="row", leave=False):
        if "reason" in record:
            tally.add_left_out(record)
            files[DROPPED].write(record)
            continue
        held = place_of(record["image"], record["idx"]) in held_out
        tally.add_pair(record, held)
        files[HELD_OUT if held else PAIRS].write(written(record))
    return tally, {name: file.finish() for name, file in files.items()}


def _reasons(out: Path, tally: Tally) -> list[str]:
    counted = [f"{count} x {reason}" for reason, count in tally.left_out.most_common()]
    with (out / DROPPED).open(encoding="utf-8") as file:
        first = [json.loads(line) for line in islice(file, SHOWN_ROWS)]
    more = tally.left_out.total() - len(first)
    rest = [f"... and {more} more rows"] if more else []
    return [*counted, *(f"{record['place']}: {record['detail']}" for record in first), *rest]


def read_card(out: Path) -> Record:
    """Read the data card of an output folder."""
    return json.loads((out / CARD_JSON).read_text(encoding="utf-8"))


def check_outputs(out: Path) -> None:
    """Raise PairsError where files of a complete run are gone or changed; a picture's name is its own checksum."""
    remedy = "Remedy: --overwrite makes them anew"
    missing = [name for name in OUTPUTS if not (out / name).is_file()]
    if missing:
        raise PairsError(f"{out}: {', '.join(missing)} missing though the run was complete\n{remedy}")
    sums = [line.split("  ", 1) for line in (out / SUMS).read_text().splitlines() if f"  {IMAGES}/" not in line]
    changed = [name for digest, name in sums if digest_of_file(out / name) != digest[:16]]
    if changed:
        raise PairsError(f"{out}: {', '.join(changed)} changed since the run was complete\n{remedy}")
