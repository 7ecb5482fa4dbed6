"""The command's flags and its steps: find the rows, plan them, keep or leave out each one, split, write the card."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dama.console import digest_of, digest_of_file, log
from dama.prepare.contamination import evaluation_images
from dama.prepare.images import ImageStore
from dama.prepare.outputs import IMAGES, OUTPUTS, Split, check_outputs, read_card, write_outputs
from dama.prepare.rows import CountTokens, Record, Rules, add_lengths, folded, generator_of, record_of
from dama.prepare.sources import (
    ALL_SPLITS,
    BATCH_ROWS,
    SPLITS,
    TARGETS,
    LeftAside,
    SourceFile,
    count_rows,
    find_files,
    parse_columns,
    read_chunks,
    read_fields,
)
from dama.remote_code import remote_code_refused
from dama.stage import MANIFEST, Stage, open_stage

FLAGS = {
    "files": "SRC", "settings.columns": "--column", "settings.generators": "--generator", "settings.": "--",
    "tokenizer": "--tokenizer",
}  # fmt: skip
NAME = "prepare"
DESCRIPTION = f"""\
From a preference data set as people have it to one that is checked, counted and ready to train on.

SRC are files, folders or globs of Parquet, JSON, JSON lines or CSV, or hf://owner/name[@revision][/files]. Layouts that
are known by their fields:
    RLAIF-V        question, chosen, rejected, image (a path, or the image itself), origin_split
    RLHF-V         text (JSON of question, chosen and rejected), image
    TRL            prompt, chosen, rejected, images; texts or lists of messages
    ms-swift       messages (or query, response), rejected_response or rejected_messages, images
    LLaMA-Factory  conversations, chosen and rejected (a message each), images
    PDS-DPO        conversations, rejected_conversations
    first errors   answer, first_error (its first wrong sentence, as it stands there), correction; gives pairs with a
                   context: what comes before that sentence is read and not trained on (SENTINEL)
For any other table name its columns with --column NAME=COLUMN, NAME one of
    {", ".join(TARGETS)}.

A row is left out, counted and listed when it cannot be read, when its texts make no preference, when its picture is
missing, truncated or a decompression bomb, when the picture is one of Object HalBench's or POPE's, when --generator
names another model, and when the same pair or the same id came before.

Writes OUT/pairs.jsonl      --data of the other commands, --data_path of training
       OUT/held_out.jsonl   the pairs of --hold_out's images
       OUT/images/          --image_folder; named by SHA-256 of their bytes, each there once
       OUT/dropped.jsonl    every row left out: place, id, reason, what was wrong
       OUT/data_card.md     and .json: counts, lengths, picture sizes, sources
       OUT/SHA256SUMS       of all of these; `sha256sum -c SHA256SUMS` checks them
       OUT/prepare.jsonl    and manifest.json: what became of each row, from which an interrupted run continues
"""
EXAMPLES = """\
examples:
  python -m dama prepare hf://openbmb/RLAIF-V-Dataset --generator llava-1.5-7b --out data/rlaifv_7b
  python -m dama prepare rlaifv/*.parquet --hold_out 0.01 --tokenizer liuhaotian/llava-v1.5-7b --out data/rlaifv
  python -m dama prepare mine.csv --column question=prompt_text --column image=file --image_folder photos --out mine
"""
CHUNK_ROWS = 256  # what a kill can cost


class PrepareError(ValueError):
    """Faults of the command's flags or of the whole input, all in one message."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the command."""
    parser.add_argument("src", nargs="+", metavar="SRC", help="file, folder, glob, or hf://owner/name[@revision]")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the prepared set, made when absent")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out was made from other inputs")
    _add_row_flags(parser.add_argument_group("rows"))
    _add_card_flags(parser.add_argument_group("split and card"))
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="threads that check and write images. Default: CPU cores, at most 8 (%(default)s)",
    )


def _add_row_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="the column that holds what NAME means; may be given several times. `id=` takes no id from the file: "
        "each pair then gets a digest of its content",
    )
    group.add_argument(
        "--generator",
        action="append",
        default=[],
        metavar="MODEL",
        help="keep pairs whose answers this model wrote, by the name in origin_split; case, dashes, underscores and "
        "spaces do not matter; may be given several times. Default: all",
    )
    group.add_argument(
        "--split",
        choices=(*SPLITS, ALL_SPLITS),
        help="files to read, where the names in a folder, a glob or a hub set tell splits apart as in "
        "test-00000.parquet; the data card lists the others. Default: train, and files that are given by themselves",
    )
    group.add_argument("--keep_contaminated", action="store_true", help="keep rows that show an evaluation image")
    group.add_argument(
        "--image_folder",
        metavar="DIR",
        help="where image paths start, for images that are not inside the rows. Default: each file's own folder",
    )


def _add_card_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hold_out",
        type=float,
        default=0.0,
        metavar="N",
        help="images whose pairs are held out: below 1 their share, else their number. Default: none",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of that choice. Default: %(default)s")
    group.add_argument(
        "--tokenizer", metavar="NAME|DIR", help="counts lengths in its tokens. Default: lengths are counted in words"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that comes with --tokenizer; it may do anything"
    )


# ------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Input:
    """A file of rows, counted and fingerprinted before the work starts, and where its image paths start."""

    file: SourceFile
    image_folder: Path
    rows: int
    digest: str

    @property
    def facts(self) -> Record:
        """Name, rows, size in bytes and digest of the file."""
        return {
            "name": self.file.name,
            "rows": self.rows,
            "bytes": self.file.path.stat().st_size,
            "digest": self.digest,
        }

    @property
    def chunks(self) -> list[int]:
        """Rows of each chunk: CHUNK_ROWS, and the rest."""
        return [min(CHUNK_ROWS, self.rows - start) for start in range(0, self.rows, CHUNK_ROWS)]


@dataclass(frozen=True)
class Lengths:
    """How texts are counted: `unit` is what the card calls it, `digest` what the counts depend on."""

    count: CountTokens
    unit: str
    digest: str


def run(args: argparse.Namespace) -> None:
    """Check everything that can be seen at once, then goes through the rows and says what came out."""
    columns = checked_flags(args)
    out = Path(args.out)
    left_aside: LeftAside = {}
    files = find_inputs(args.src, out, args.split, left_aside)
    sizes = count_rows(files, columns)
    lengths = load_lengths(args.tokenizer, args.trust_remote_code)
    benchmarks = evaluation_images()
    generators = matched_generators(args.generator, files, columns)
    rules = Rules(generators, benchmarks, args.keep_contaminated)
    inputs = with_digests(files, sizes, args.image_folder)
    facts: Record = {
        "files": [source.facts for source in inputs],
        "settings": settings_of(args, columns, generators, lengths),
    }
    if left_aside:
        facts["left_aside"] = left_aside
    evaluation = digest_of({name: sorted(ids) for name, ids in benchmarks.items()})
    fingerprint = {**facts, "tokenizer": lengths.digest, "evaluation_images": evaluation}
    chunks = [size for source in inputs for size in source.chunks]
    with open_stage(out, NAME, fingerprint, chunks, overwrite=args.overwrite, flags=FLAGS) as stage:
        if stage.complete:
            check_outputs(out)
        else:
            for name in OUTPUTS:
                (out / name).unlink(missing_ok=True)
            store = ImageStore(out / IMAGES)
            append_rows(stage, inputs, columns, rules, store, lengths.count, args.workers)
            stage.finish(write_outputs(stage, store, Split(args.hold_out, args.seed), facts))
    log_card(out)


def settings_of(
    args: argparse.Namespace, columns: dict[str, str], generators: Collection[str], lengths: Lengths
) -> Record:
    """Settings that the prepared set depends on, as the data card lists them."""
    settings: Record = {
        "columns": columns,
        "generators": sorted(generators),
        "image_folder": args.image_folder,
        "keep_contaminated": args.keep_contaminated,
        "hold_out": args.hold_out,
        "seed": args.seed,
        "lengths": lengths.unit,
    }
    return settings if args.split is None else settings | {"split": args.split}


def checked_flags(args: argparse.Namespace) -> dict[str, str]:
    """--column as a mapping. Raises PrepareError with all errors that need no look at the rows."""
    errors, columns = [], {}
    try:
        columns = parse_columns(args.column)
    except ValueError as error:
        errors.append(str(error))
    if not (0 <= args.hold_out < 1 or (args.hold_out >= 1 and args.hold_out.is_integer())):
        errors.append(f"--hold_out {args.hold_out}: expected a share of the images below 1, or a number of them")
    if args.workers < 1:
        errors.append(f"--workers {args.workers}: expected 1 or more threads")
    if args.image_folder is not None and not Path(args.image_folder).is_dir():
        errors.append(f"--image_folder {args.image_folder}: no such folder")
    errors += _out_errors(Path(args.out), args.overwrite)
    if errors:
        raise PrepareError("\n".join(errors))
    return columns


def _out_errors(out: Path, overwrite: bool) -> list[str]:
    """A folder with files of somebody else is not written to."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [f"--out {out}: {existing} is not a folder that can be written to"]
    if (out / f"{NAME}.jsonl").exists() and (out / MANIFEST).exists():
        return []
    foreign = [name for name in OUTPUTS if (out / name).exists() and not overwrite]
    images = out / IMAGES
    if images.exists() and (not images.is_dir() or any(images.iterdir())):
        foreign.append(f"{IMAGES}/")
    if not foreign:
        return []
    return [f"--out {out}: holds {', '.join(foreign)}, not made by this command\nRemedy: give another folder"]


def find_inputs(
    sources: Sequence[str], out: Path, split: str | None = None, left_aside: LeftAside | None = None
) -> list[SourceFile]:
    """All files of rows but those that this command wrote before, where --out lies inside a source's folder."""
    aside: LeftAside = {}
    found = find_files(sources, split, aside)
    if left_aside is not None:
        inside = {name for name in aside if any((Path(source) / name).resolve().is_relative_to(out.resolve())
                                                for source in sources)}  # fmt: skip
        left_aside |= {name: why for name, why in aside.items() if name not in inside}
    files = [file for file in found if not file.path.resolve().is_relative_to(out.resolve())]
    if not files:
        raise PrepareError(f"{', '.join(sources)}: all tables in it are in --out {out}\nRemedy: give another --out")
    return files


def load_lengths(tokenizer: str | None, trust_remote_code: bool = False) -> Lengths:
    """Count the tokenizer's tokens, or words where none is given."""
    if tokenizer is None:
        return Lengths(lambda texts: [len(text.split()) for text in texts], "words (no --tokenizer was given)", "")
    from transformers import AutoTokenizer

    trust = "give a tokenizer that needs none, or --trust_remote_code once you have read its code"
    with remote_code_refused(f"--tokenizer {tokenizer}", trust):
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            remedy = "give a folder with tokenizer.json or tokenizer.model, or a hub name"
            raise PrepareError(f"--tokenizer {tokenizer}: {str(error).strip()}\nRemedy: {remedy}") from error

    def count(texts: Sequence[str]) -> list[int]:
        ids = loaded(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []
        return [len(tokens) for tokens in ids]

    return Lengths(count, f"tokens of {tokenizer}", digest_of(loaded.backend_tokenizer.to_str()))


def matched_generators(wanted: Sequence[str], files: Sequence[SourceFile], columns: dict[str, str]) -> frozenset[str]:
    """The folded names, after a look at all rows' generators. Raises PrepareError, listing those, for an absent one."""
    if not wanted:
        return frozenset()
    rows = (row for file in files for row in read_fields(file, columns, ("generator", "origin_split")))
    found = Counter(generator_of(row) for row in rows).most_common()
    there = {folded(name) for name, _ in found}
    absent = [name for name in wanted if folded(name) not in there]
    if absent:
        heading = f"--generator: no row of {', '.join(absent)}; generators of the rows are"
        listed = [f"{count:>9}  {name}" for name, count in found]
        remedy = "give one of these; case, dashes, underscores and spaces do not matter"
        raise PrepareError("\n".join([heading, *listed, f"Remedy: {remedy}"]))
    names = frozenset(map(folded, wanted))
    log(f"{NAME}: generators of all rows, with * those that are kept")
    for name, count in found:
        log(f"{'*' if folded(name) in names else ' '}{count:>9}  {name}")
    return names


def with_digests(files: Sequence[SourceFile], sizes: Sequence[int], image_folder: str | None) -> list[Input]:
    """Attach rows, digest and image folder to each file."""
    digests = (digest_of_file(file.path) for file in files)
    bar = tqdm(digests, "reading checksums of the files", total=len(files), unit="file", leave=False)
    return [
        Input(file, Path(image_folder or file.path.parent), rows, digest)
        for file, rows, digest in zip(files, sizes, bar, strict=True)
    ]


def append_rows(
    stage: Stage,
    inputs: Sequence[Input],
    columns: dict[str, str],
    rules: Rules,
    store: ImageStore,
    count: CountTokens,
    workers: int,
) -> None:
    """Append every chunk that the stage lacks, in the order of the plan; images are checked by `workers` threads."""
    rows_before = 0
    bar = tqdm(total=stage.total, initial=stage.records_done, desc=NAME, unit="row", smoothing=0.05)
    with bar, ThreadPoolExecutor(workers) as pool:
        for source in inputs:
            start = min(max(0, stage.records_done - rows_before), source.rows)  # where a chunk starts, or the file ends
            rows_before += source.rows
            check = partial(record_of, rules=rules, image_folder=source.image_folder, store=store)
            for chunk in read_chunks(source.file, columns, start, source.chunks[-(-start // CHUNK_ROWS) :]):
                records: list[Record] = []
                while batch := list(islice(chunk, BATCH_ROWS)):
                    records += pool.map(check, *zip(*batch))
                add_lengths(records, count)
                stage.append(records)
                bar.update(len(records))


def log_card(out: Path) -> None:
    """Log the counts of the data card and the output folder."""
    card = read_card(out)
    counts, images = card["counts"], card["images"]
    log(f"rows {counts['rows']}: pairs {counts['pairs']}, held out {counts['held_out']}, left out {counts['left_out']}")
    for reason, count in card["left_out"].items():
        log(f"{count:>9}  {reason}")
    if counts["evaluation_images_kept"]:
        log(f"WARNING: {counts['evaluation_images_kept']} pairs show evaluation images (--keep_contaminated)")
    log(f"images {images['distinct']}, {images['pairs_per_image']} pairs each, {images['bytes'] / 1e6:.1f} MB")
    log(f"written to {out}: data_card.md, dropped.jsonl lists every row left out")
    log(f"checksum {card['checksum']}")
