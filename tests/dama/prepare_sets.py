"""Small data sets for the tests of `prepare`, and the command as a function of its words."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dama.prepare import command

RLAIFV = pa.schema(
    {
        "ds_name": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        **dict.fromkeys(("question", "chosen", "rejected", "origin_dataset", "origin_split"), pa.string()),
        "idx": pa.int64(),
        "image_path": pa.string(),
    }
)


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    """Another picture for every number."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def rlaifv_row(number: int, image: int | None = None, **fields: Any) -> dict[str, Any]:
    """A row of RLAIF-V; `image` is its picture's number, by default another one for every row."""
    row = {
        "ds_name": "RLAIF-V",
        "image": {"bytes": picture(number if image is None else image), "path": f"{number}.png"},
        "question": "What is it?",
        "chosen": f"Cat {number}.",
        "rejected": f"It is dog {number}.",
        "origin_dataset": "VQAv2",
        "origin_split": '{"model": "llava-1.5-7b", "labeler": "llava-1.6-34b", "type": "question_answering"}',
        "idx": number,
        "image_path": f"{number}.png",
    }
    return row | fields


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = RLAIFV, group: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(*words: object) -> None:
    """`python -m dama prepare`, errors as exceptions."""
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    command.run(parser.parse_args(list(map(str, words))))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def card(out: Path) -> dict[str, Any]:
    return json.loads((out / "data_card.json").read_text())
