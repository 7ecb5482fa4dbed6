"""Rows a second and peak memory of `python -m dama prepare` on Parquet of RLAIF-V's schema, its images inside.

The rows are generated: every image is another crop of a photograph, 1.7 pairs show each one as in RLAIF-V, and a few
rows in a thousand are bad in ways that the data card has to count. Reading the rows and doing nothing is the bound.

    python scripts/bench/prepare.py --photos FOLDER
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from dama.console import end_on_interrupt, log
from dama.prepare.contamination import evaluation_images

ROOT = Path(__file__).parents[2]
SCHEMA = pa.schema(
    {
        "ds_name": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        **dict.fromkeys(("question", "chosen", "rejected", "origin_dataset", "origin_split"), pa.string()),
        "idx": pa.int64(),
        "image_path": pa.string(),
    }
)
GENERATORS = ("llava-1.5-7b", "llava-1.6-34b", "omnilmm-12b", "minicpm-v")
WORDS = (
    "a the of in on with two three several red wooden small large person table street chair window sign dog bicycle "
    "stands sits holds shows appears near behind left right background foreground image scene light bright"
)
PAIRS_PER_IMAGE = 1.7
GROUP_ROWS = 1000
BAD = {100: "unusable image", 200: "evaluation image", 300: "repeated pair"}
"""Of 500 rows in turn, the number of the one that prepare has to leave out, and why."""


def main() -> None:
    """Write the Parquet files, time reading alone and `dama prepare`, and print rows per second and peak memory."""
    args = parse_arguments()
    photos = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photos:
        sys.exit(f"--photos {args.photos}: no .jpg or .png in it")
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_prepare_") as scratch:
        source, out = Path(scratch) / "parquet", Path(scratch) / "out"
        bad = write_shards(source, photos, args)
        size = sum(path.stat().st_size for path in source.iterdir())
        log(f"{args.rows} rows in {args.shards} Parquet files, {size / 1e9:.2f} GB")
        start = time.perf_counter()
        rows = sum(batch.num_rows for batch in batches(source))
        seconds = time.perf_counter() - start
        log(f"reading alone:  {rows / seconds:>8.0f} rows/s ({seconds:.1f} s)")
        prepare_seconds, cpu_seconds, peak = run_prepare(source, out, args.workers)
        megabytes, times = size / 1e6 / prepare_seconds, prepare_seconds / seconds
        log(f"prepare:        {rows / prepare_seconds:>8.0f} rows/s ({prepare_seconds:.1f} s, {megabytes:.0f} MB/s)")
        log(f"                {times:>8.1f} x the time of reading alone, --workers {args.workers}")
        log(f"processor time: {cpu_seconds:>8.1f} s, {rows / cpu_seconds:.0f} rows for a second of one core")
        log(f"peak memory:    {peak / 1e6:>8.0f} MB, resident, of the process and its children")
        left_out = json.loads((out / "data_card.json").read_text())["left_out"]
        log(f"left out:       {left_out}, as planted: {left_out == bad}")


def parse_arguments() -> argparse.Namespace:
    """Flags of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="photographs to cut crops from")
    parser.add_argument("--rows", type=int, default=83_132, metavar="N", help="default: RLAIF-V's %(default)s")
    parser.add_argument("--shards", type=int, default=13, metavar="N", help="Parquet files. Default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of prepare. Default: %(default)s")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where about 10 GB are free. Default: the system's")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------- the rows


def write_shards(folder: Path, photos: list[Path], args: argparse.Namespace) -> Counter[str]:
    """Writes the files; returns how many rows of them are bad in each way."""
    folder.mkdir()
    edges = [args.rows * shard // args.shards for shard in range(args.shards + 1)]
    with ProcessPoolExecutor(2) as pool:
        counts = pool.map(partial(write_shard, folder, photos), edges[:-1], edges[1:])
        return sum(tqdm(counts, "generating", total=args.shards, unit="file"), Counter())


def write_shard(folder: Path, photos: list[Path], first: int, last: int) -> Counter[str]:
    """Rows `first` to `last`; the same numbers make the same rows."""
    rng = random.Random(first)
    opened = [Image.open(path).convert("RGB") for path in photos]
    pictures = [crop(rng, opened) for _ in range(max(1, int((last - first) / PAIRS_PER_IMAGE)))]
    bad: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(folder / f"{first:06d}.parquet", SCHEMA) as writer:
        for number in range(first, last):
            row = good_row(rng, number, pictures[(number - first) % len(pictures)])
            error = BAD.get(number % 500)
            if error is not None and rows:
                row = spoiled(row, rows[-1], error, rng)
                bad[error] += 1
            rows.append(row)
            if len(rows) == GROUP_ROWS or number == last - 1:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
    return bad


def crop(rng: random.Random, photos: list[Image.Image]) -> bytes:
    """A JPEG of 60 to 100 % of a photograph's width and height."""
    photo = rng.choice(photos)
    width, height = (int(side * rng.uniform(0.6, 1)) for side in photo.size)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    file = io.BytesIO()
    photo.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def good_row(rng: random.Random, number: int, picture: bytes) -> dict[str, Any]:
    """A row as RLAIF-V's Parquet files have it, with an image of its own."""
    return {
        "ds_name": "RLAIF-V",
        "image": {"bytes": picture, "path": f"{number}.jpg"},
        "question": f"{sentence(rng, 8)[:-1]}?",
        "chosen": " ".join(sentence(rng, 14) for _ in range(5)),
        "rejected": " ".join(sentence(rng, 14) for _ in range(rng.randint(3, 6))),
        "origin_dataset": "generated",
        "origin_split": json.dumps({"model": GENERATORS[number % len(GENERATORS)], "type": "detailed_description"}),
        "idx": number,
        "image_path": f"{number}.jpg",
    }


def spoiled(row: dict[str, Any], before: dict[str, Any], error: str, rng: random.Random) -> dict[str, Any]:
    """A row with the named error: a repeated pair, an evaluation image, or an image cut in half."""
    if error == "repeated pair":
        return before | {"idx": row["idx"]}
    if error == "evaluation image":
        return row | {"image_path": f"COCO_val2014_{rng.choice(sorted(evaluation_images()['POPE'])):012d}.jpg"}
    picture = row["image"]["bytes"]
    return row | {"image": {"bytes": picture[: len(picture) // 2], "path": None}}


def sentence(rng: random.Random, words: int) -> str:
    """Random words as a sentence."""
    return " ".join(rng.choices(WORDS.split(), k=words)).capitalize() + "."


# --------------------------------------------------------------------------------------------------------- measuring


def batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """Batches of 32 rows of all Parquet files, in the order of their names."""
    for path in sorted(folder.iterdir()):
        yield from pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20).iter_batches(32)


def run_prepare(source: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """Of a whole run as a child process: seconds, seconds of processor time, highest resident memory in bytes."""
    line = [sys.executable, "-m", "dama", "prepare", str(source), "--out", str(out)]
    start, used, peak = time.perf_counter(), processor_seconds(), 0
    with subprocess.Popen([*line, "--hold_out", "0.01", "--workers", str(workers)], cwd=ROOT) as child:
        while child.poll() is None:
            peak = max(peak, resident(child.pid))
            time.sleep(0.05)
    if child.returncode:
        sys.exit(f"prepare ended with status {child.returncode}")
    return time.perf_counter() - start, processor_seconds() - used, peak


def processor_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident(process: int) -> int:
    """Bytes of memory that the process and its children hold at this moment."""
    try:
        parent = psutil.Process(process)
        return sum(each.memory_info().rss for each in (parent, *parent.children(recursive=True)))
    except psutil.NoSuchProcess:  # it ended in between
        return 0


if __name__ == "__main__":
    end_on_interrupt()
    main()
